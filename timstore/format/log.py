"""The commit protocol: data first, then one exclusively created record that makes it visible."""

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime

from isal.isal_zlib import crc32

from timstore.errors import (
    CorruptionError,
    InvalidInputError,
    NotFoundError,
    ReadOnlyError,
    StateError,
    StorageError,
)
from timstore.format import layout
from timstore.format.commits import Attempt, Commit, Moment, ObjectInfo, Scope, parse_attempt, parse_record
from timstore.format.objects import Objects
from timstore.format.place import Place, replaced
from timstore.format.settings import Settings

_log = logging.getLogger(__name__)

Build = Callable[[], Iterator[tuple[str, bytes, str, int, int]]]

_MOST_FENCES = 3


class Overtaken(Exception):
    """What a commit was to hold is not what it may hold, since another writer was first: it is to be built again."""


class LogWriter:
    """One writer's log. Not to be shared with a forked child, nor used by two threads at once.

    Raises:
        ReadOnlyError: the store asks of its writers what this version cannot do.
    """

    def __init__(self, objects: Objects, settings: Settings) -> None:
        if not settings.writable:
            raise ReadOnlyError(
                f"writing to this store takes {', '.join(settings.unknown_writer_features)}, which this timstore "
                "cannot do. Open it with mode='r', or install a newer one",
                features=settings.unknown_writer_features,
            )
        self._objects = objects
        self._settings = settings
        self._process = os.getpid()
        self._closed = False
        self._unsettled: str | None = None
        self._at = ""
        self._newest: Commit | None = None
        self._writer = ""
        self._place = Place(objects, settings)
        self._is_copy = False  # whether what lies there is another copy, of which is unknown yet what it holds
        self._place.check()
        self._start()

    @property
    def writer(self) -> str:
        """The id under which the next commit goes; it changes when a fence is met."""
        return self._writer

    def commit(
        self,
        attempt: int,
        rank: int,
        steps: tuple[Moment, Moment] | None,
        records: int,
        build: Build,
        *,
        ranks: tuple[int, ...] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Commit:
        """Write one commit and return it: from then on every reader sees it, and it survives what the durability says.

        On an error nothing is visible and what was written is deleted: keep the rows and call again. The
        one exception is kind `outcome-unknown`, after which this writer refuses to go on.

        Args:
            attempt, rank, records: as the commit's record shall say.
            steps: first and last (epoch, step) covered.
            build: returns the commit's objects, each (path below the commit's folder, bytes, kind, logical
                bytes, rows). Called again when everything must be written under another name; its objects are
                consumed one at a time and never held.
            ranks: all processes whose rows it holds, None when unknown.
            check: called while no other writer of the store makes a record, right before this one does; what it
                raises leaves nothing visible.

        Raises:
            StorageError: the disk refused; kind `outcome-unknown` when the record may or may not last.
            ReadOnlyError: this process may not write here.
            CorruptionError: something else lies where this writer's record belongs.
            StateError: closed, forked, or after an unknown outcome.
        """
        self._require_usable()
        if self._closed:
            raise StateError("this writer is closed; open the store again to write")
        for _ in range(_MOST_FENCES):
            folder = layout.data_prefix(self._writer, self._seq, secrets.token_hex(layout.NONCE_BYTES))
            try:
                self._require_same(attempt)
                infos = self._put(folder, build)
                with self._objects.alone(layout.LOG):
                    self._require_same(attempt)
                    check()
                    commit = self._publish(
                        kind="commit",
                        attempt=attempt,
                        rank=rank,
                        steps=steps,
                        records=records,
                        objects=infos,
                        ranks=ranks,
                    )
            except Exception:  # after an interrupt nothing is deleted: the record may be there
                if self._unsettled is None:
                    drop(self._objects, folder)
                raise
            if commit is not None:
                size = sum(info.bytes for info in infos)
                _log.debug("committed %d records, %d bytes, as %s/%d", records, size, self._writer, commit.seq)
                return commit
            _log.info("writer %s was fenced by maintenance, and goes on as another", self._writer)
            drop(self._objects, folder)
            self._start()
        raise StateError(f"maintenance fenced this writer {_MOST_FENCES} times during one commit; try again later")

    def close(self) -> None:
        """End this writer's log with a close record, unless it has no commits. Closing twice does nothing.

        Raises:
            StorageError, ReadOnlyError: the record could not be written; the commits are not affected.
            StateError: forked, or after an unknown outcome.
        """
        self._require_usable()
        if not self._closed and self._newest is not None:
            last = self._newest
            self._require_same(last.attempt)
            self._publish(kind="close", attempt=last.attempt, rank=last.rank, steps=None, records=0, objects=[])
        self._closed = True

    def _start(self) -> None:
        self._writer = secrets.token_hex(layout.WRITER_BYTES)
        self._newest = None

    @property
    def _seq(self) -> int:
        return self._newest.seq + 1 if self._newest else 0

    def _require_usable(self) -> None:
        if os.getpid() != self._process:
            raise StateError("this writer belongs to the parent process; open the store again in the child")
        if self._unsettled is not None:
            raise StateError(
                f"whether {self._unsettled} was committed for good is unknown since an earlier error. "
                "Open the store again: it shows what is there",
                path=self._unsettled,
            )

    def _require_same(self, attempt: int) -> None:
        """Refuse a store in which this writer's records have no place: one of another id, or an earlier copy."""
        self._is_copy |= not self._place.check()
        if not self._is_copy:
            return
        last = self._newest
        needed = [layout.attempt_path(attempt), *([layout.record_path(last.writer, last.seq)] if last else [])]
        for path in needed:
            if not self._objects.exists(path):
                raise replaced(f"an earlier copy was put in its place, without {path}")
        if last is not None and layout.unseal(self._objects.read(needed[-1]), needed[-1])[1] != last.digest:
            raise replaced(f"a copy was put in its place whose {needed[-1]} is another one")
        self._is_copy = False

    def _put(self, folder: str, build: Build) -> list[ObjectInfo]:
        infos = []
        for name, data, kind, logical_bytes, rows in build():
            path = folder + name
            if layout.parse_data_path(path) is None:
                raise InvalidInputError(f"{name!r} cannot name an object of a commit", path=name)
            infos.append(ObjectInfo(path, len(data), crc32(data), kind, logical_bytes, rows))
            self._objects.put(path, data)
        self._objects.sync([info.path for info in infos])
        return infos

    def _publish(
        self,
        *,
        kind: str,
        attempt: int,
        rank: int,
        steps: tuple[Moment, Moment] | None,
        records: int,
        objects: list[ObjectInfo],
        ranks: tuple[int, ...] | None = None,
    ) -> Commit | None:
        """Create this writer's next record and return it, or None when a fence is in its place."""
        path = layout.record_path(self._writer, self._seq)
        # A clock set back must not turn the order of a writer's commits around.
        self._at = max(self._at, now())
        fields = {
            **layout.header(self._settings.reader_features, self._settings.writer_features),
            "store": self._settings.store_id,
            "writer": self._writer,
            "seq": self._seq,
            "previous": self._newest.digest if self._newest else None,
            "kind": kind,
            "at": self._at,
            "attempt": attempt,
            "rank": rank,
            "steps": steps,
            "records": records,
            **({} if ranks is None else {"ranks": ranks}),
            "objects": [{name: getattr(info, name) for name in ObjectInfo.__slots__} for info in objects],
        }
        data, _ = layout.seal(fields)
        record = self._parse(data, path)  # before anyone else can: a record that readers refuse must not appear
        self._unsettled = path  # and so it stays when an interrupt leaves here
        try:
            found = create_settled(self._objects, path, data)
        except Exception as error:
            if getattr(error, "kind", None) != "outcome-unknown":
                self._unsettled = None
            raise
        if found == data:
            self._newest = record
        self._unsettled = None
        if found == data:
            return record
        if self._parse(found, path).kind == "fence":
            return None
        raise CorruptionError(f"{path} holds a record that this writer did not write", path=path)

    def _parse(self, data: bytes, path: str) -> Commit:
        fields, digest = layout.unseal(data, path)
        return parse_record(fields, digest, path, self._settings, self._newest)


def claim_attempt(
    objects: Objects,
    from_epoch: int,
    from_step: int,
    scope: Scope,
    ranks: int,
    first: bool = False,
    digest_before: str | None = None,
) -> Attempt:
    """Begin an attempt, durable and visible at return; of several callers at once each gets its own number.

    Args:
        from_epoch, from_step: rows of earlier attempts from here on are superseded.
        scope: the sample ids that are recorded, "all", or None when unknown.
        ranks: how many processes train together.
        first: make attempt 0, or return it as it is when it exists.
        digest_before: of all parameters before its first step; None when unknown.

    Raises:
        StorageError, ReadOnlyError: nothing became visible, unless its kind is `outcome-unknown`.
    """
    while True:
        numbers = [
            number for path in objects.list(layout.RUNS) if (number := layout.parse_attempt_path(path)) is not None
        ]
        number = 0 if first else max(numbers, default=-1) + 1
        path = layout.attempt_path(number)
        fields = {
            **layout.header(),
            "attempt": number,
            "from": {"epoch": from_epoch, "step": from_step},
            "scope": scope,
            "ranks": ranks,
            "digest_before": digest_before,
            "at": now(),
            "claim": secrets.token_hex(8),  # tells our file from that of a caller who asks for the same
        }
        data, _ = layout.seal(fields)
        attempt = parse_attempt(data, path)
        found = create_settled(objects, path, data)
        if found == data:
            return attempt
        if first:
            return parse_attempt(found, path)


def create_settled(objects: Objects, path: str, data: bytes) -> bytes:
    """Create an object and return what its name then holds: `data`, or what another made first.

    An error of `create` does not say what happened (the reply may be lost, not the request): only the name does.

    Raises:
        StorageError: kind `outcome-unknown` when not even the name says it.
        Exception: the error of `create`, when nothing became visible.
    """
    try:
        objects.create(path, data)
        return data
    except Exception as error:
        found = _look(objects, path, error)
        if found is None:
            raise
        if found == data:
            _settle(objects, path, error)
        return found


def _look(objects: Objects, path: str, error: Exception) -> bytes | None:
    try:
        return objects.read(path, most=layout.RECORD_BYTES)
    except NotFoundError:
        return None
    except Exception as unreadable:
        raise _unknown(path, f"{error}; reading it back failed too: {unreadable}") from error


def _settle(objects: Objects, path: str, error: Exception) -> None:
    """Make our visible object last; a failed fsync is never repeated, a second one may lie."""
    if getattr(error, "kind", None) == "not-durable":
        raise _unknown(path, f"it is visible, but {error}") from error
    try:
        objects.sync([path])
    except Exception as unsynced:
        raise _unknown(path, f"it is visible, but {unsynced}") from error


def _unknown(path: str, why: str) -> StorageError:
    return StorageError(f"whether {path} is committed for good is unknown: {why}", kind="outcome-unknown", path=path)


def drop(objects: Objects, folder: str) -> None:
    """Delete a folder that no record names; what cannot be deleted stays, and no reader sees it."""
    with suppress(Exception):
        objects.delete_prefix(folder)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
