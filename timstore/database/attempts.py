"""Which attempt a handle writes into: the latest one, one of its own, or the one that its fellow processes write."""

import logging
import os
import re
from collections.abc import Iterable

from timstore.errors import InvalidInputError, StateError, shown
from timstore.format.local_files import Objects
from timstore.format.log import Attempt, Scope, claim_attempt

_log = logging.getLogger(__name__)
_DIGEST = re.compile("[0-9a-f]{64}")


class CurrentAttempt:
    """The attempt that a handle writes into.

    Args:
        latest: the last one that was there when the store was opened.
    """

    def __init__(self, objects: Objects, path: str | os.PathLike[str], latest: Attempt | None) -> None:
        self._objects = objects
        self._path = path
        self._attempt = latest

    @property
    def is_begun(self) -> bool:
        """Whether there is one."""
        return self._attempt is not None

    def get(self, scope: Scope = None, ranks: int = 1, digest_before: str | None = None) -> Attempt:
        """Return it; the first one is begun, with these, where there is none."""
        if self._attempt is None:
            self._attempt = self._claim(0, 0, scope, ranks, digest_before, first=True)
        return self._attempt

    def begin(
        self, from_epoch: int, from_step: int, scope: Scope, ranks: int, digest_before: str | None = None
    ) -> Attempt:
        """Begin a new one."""
        self._attempt = self._claim(from_epoch, from_step, scope, ranks, digest_before)
        _log.info("%s: attempt %d begins at (%d, %d)", self._path, self._attempt.attempt, from_epoch, from_step)
        return self._attempt

    def join(self, number: int, known: Iterable[Attempt]) -> None:
        """Go on in one that another process began.

        Raises:
            StateError: it is not among the known ones.
        """
        found = next((one for one in known if one.attempt == number), None)
        if found is None:
            raise StateError(f"{self._path} has no attempt {number}: the processes do not write into one store")
        self._attempt = found

    def claim(self, scope: Scope, ranks: int, digest_before: str | None = None) -> None:
        """Say which samples it records, and in how many processes; a first one is begun with this digest.

        Raises:
            StateError: it was begun with another scope.
        """
        attempt = self.get(scope, ranks, digest_before)
        if attempt.scope is not None and attempt.scope != scope:
            raise StateError(
                f"attempt {attempt.attempt} of {self._path} records {_scope_text(attempt.scope)}, not "
                f"{_scope_text(scope)}: keep the samples, or pass resume_from=(epoch, step) to begin a new attempt",
                kind="other-scope",
            )

    def _claim(
        self, from_epoch: int, from_step: int, scope: Scope, ranks: int, digest: str | None, first: bool = False
    ) -> Attempt:
        if digest is not None and not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
            raise InvalidInputError(f"digest_before is 64 hexadecimal digits, or None if unknown, not {shown(digest)}")
        return claim_attempt(self._objects, from_epoch, from_step, scope, ranks, first, digest)


def _scope_text(scope: Scope) -> str:
    return f"{len(scope)} chosen samples" if isinstance(scope, tuple) else "all samples"
