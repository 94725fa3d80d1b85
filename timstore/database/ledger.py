"""The attempt that a handle writes into, and what it knows of it: parameters, moments recorded, the last step."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

from timstore.database.snapshot import Snapshot
from timstore.errors import InvalidInputError, StateError, shown
from timstore.format.local_files import Objects
from timstore.format.log import Attempt, Scope, claim_attempt
from timstore.records import Parameter, Step, StepGroup

_log = logging.getLogger(__name__)
_DIGEST = re.compile("[0-9a-f]{64}")

# Moments kept in mind; earlier ones are looked up in the store.
_REMEMBERED = 1024

_GROUP_FIELDS = [field.name for field in fields(StepGroup)]

Moment = tuple[int, int]


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
        attempt = next((attempt for attempt in known if attempt.attempt == number), None)
        if attempt is None:
            raise StateError(f"{self._path} has no attempt {number}: the processes do not write into one store")
        self._attempt = attempt

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


class Ledger:
    """Keeps the attempt free of duplicates without reading more of the store than the moments in question.

    Args:
        attempt: the attempt that is written.
        snapshot: returns what is committed; its tables are loaded only where there is anything.
        commit: commits what was accepted; now and then, so that a long run is not kept in memory.
    """

    def __init__(self, attempt: int, snapshot: Callable[[], Snapshot], commit: Callable[[], None]) -> None:
        self.attempt = attempt
        self._commit = commit
        self._snapshot = snapshot
        self._parameters: dict[str, Parameter] | None = None
        self._recorded: dict[tuple[int, int, int], dict[int, frozenset[str]]] = {}
        self._steps: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
        self._names: dict[frozenset[str], frozenset[str]] = {}
        self._committed: Moment | None = self._last_committed()
        self._last: Moment | None = self._committed

    @property
    def frontier(self) -> Moment | None:
        """The last live (epoch, step), committed or appended here."""
        return self._last

    def parameters(self) -> dict[str, Parameter]:
        """Return what is known of every parameter."""
        if self._parameters is None:
            rows = self._query("SELECT parameter, shape, dtype, group_id FROM parameters", [])
            self._parameters = {
                row["parameter"]: Parameter(row["parameter"], tuple(row["shape"]), row["dtype"], row["group_id"])
                for row in rows
            }
        return self._parameters

    def new_parameters(self, parameters: Iterable[Parameter]) -> list[Parameter]:
        """Return those of some parameters that are not known as they are.

        Raises:
            InvalidInputError: one is known with another shape.
        """
        new: dict[str, Parameter] = {}
        for parameter in parameters:
            before = new.get(parameter.name) or self.parameters().get(parameter.name)
            if before is not None and before.shape != parameter.shape:
                raise InvalidInputError(
                    f"parameter {parameter.name} has shape {before.shape} in this store, not {parameter.shape}; "
                    "record another model into a store of its own",
                    parameter=parameter.name,
                )
            if before != parameter:
                new[parameter.name] = parameter
        return list(new.values())

    def check_new(self, moment: Moment, rank: int, samples: Sequence[int], names: frozenset[str]) -> None:
        """Refuse gradients that this attempt holds already.

        Raises:
            InvalidInputError: naming the sample, the moment and the parameters.
        """
        recorded = self._at(moment, rank)
        seen: set[int] = set()
        for sample in samples:
            twice = names if sample in seen else names & recorded.get(sample, frozenset())
            if twice:
                raise InvalidInputError(
                    f"epoch {moment[0]}, step {moment[1]}, sample {sample}, rank {rank}: {_some(twice)} recorded "
                    f"before in attempt {self.attempt}; a resumed run begins a new attempt (begin_attempt), and a "
                    "sample that is in a step twice is appended once, with a list of parts",
                    kind="duplicate",
                    sample=sample,
                )
            seen.add(sample)

    def new_steps(self, step: Step) -> list[dict[str, Any]]:
        """Return the rows of `step` that are not known yet.

        Raises:
            InvalidInputError: if a group's row is known and says something else.
        """
        key = step.epoch, step.step, step.rank
        known = {row["group_id"]: row for row in self._steps_at(key)}
        new = []
        for row in step_rows(step, self.attempt):
            before = known.setdefault(row["group_id"], row)
            if before is row:
                new.append(row)
                continue
            for name in row:
                if not same(before[name], row[name]):
                    raise InvalidInputError(
                        f"epoch {step.epoch}, step {step.step}, group {row['group_id']}: recorded before with "
                        f"{name} {before[name]}, now {row[name]}",
                        kind="duplicate",
                    )
        return new

    def accept(
        self,
        moment: Moment,
        rank: int,
        *,
        samples: Sequence[int] = (),
        names: frozenset[str] = frozenset(),
        steps: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Remember what was accepted for writing."""
        if samples:
            recorded = self._at(moment, rank)
            for sample in samples:
                together = recorded.get(sample, frozenset()) | names
                # One set for all that are alike: a model has thousands of names.
                recorded[sample] = self._names.setdefault(together, together)
        if steps:
            self._steps_at((*moment, rank)).extend(steps)
        self._last = moment if self._last is None else max(self._last, moment)

    def know(self, parameters: Iterable[Parameter]) -> None:
        """Remember parameters that were accepted for writing."""
        self.parameters().update({parameter.name: parameter for parameter in parameters})

    def _make_room(self) -> None:
        """Forget what was accepted when it is much: it is committed, and looked up in the store from now on."""
        if max(len(self._recorded), len(self._steps)) < _REMEMBERED:
            return
        self._commit()
        self._committed = self._last
        # The moment that is at hand is likely to be asked for again, sample by sample.
        self._recorded = {key: known for key, known in self._recorded.items() if key[:2] == self._last}
        self._steps = {key: known for key, known in self._steps.items() if key[:2] == self._last}

    def _query(self, query: str, values: list[Any]) -> list[dict[str, Any]]:
        """Ask the committed tables."""
        snapshot = self._snapshot()
        return snapshot.catalog.rows(query, values).to_pylist() if snapshot.view.commits else []

    def _last_committed(self) -> Moment | None:
        rows = self._query(
            "SELECT epoch, step FROM (SELECT epoch, step FROM steps UNION ALL SELECT epoch, step FROM records) "
            "ORDER BY epoch DESC, step DESC LIMIT 1",
            [],
        )
        return (rows[0]["epoch"], rows[0]["step"]) if rows else None

    def _at(self, moment: Moment, rank: int) -> dict[int, frozenset[str]]:
        key = (*moment, rank)
        if key not in self._recorded:
            self._make_room()
            self._recorded[key] = {}
            # Training moves forward: only a moment that is not beyond everything committed has to be looked up.
            if self._committed is not None and moment <= self._committed:
                rows = self._query(
                    "SELECT sample, list(parameter) AS names FROM gradients WHERE attempt = ? AND epoch = ? "
                    "AND step = ? AND rank = ? GROUP BY sample",
                    [self.attempt, *key],
                )
                self._recorded[key] = {row["sample"]: frozenset(row["names"]) for row in rows}
        return self._recorded[key]

    def _steps_at(self, key: tuple[int, int, int]) -> list[dict[str, Any]]:
        if key not in self._steps:
            self._make_room()
            self._steps[key] = []
            if self._committed is not None and key[:2] <= self._committed:
                query = "SELECT * FROM steps WHERE attempt = ? AND epoch = ? AND step = ? AND rank = ?"
                self._steps[key] = self._query(query, [self.attempt, *key])
        return self._steps[key]


def step_rows(step: Step, attempt: int) -> list[dict[str, Any]]:
    """Return one `steps` row per optimizer group."""
    shared = {
        "attempt": attempt,
        "epoch": step.epoch,
        "step": step.step,
        "rank": step.rank,
        "consumed_ratio": step.consumed_ratio,
        "samples": None if step.sample_ids is None else len(step.sample_ids),
        "tokens": step.tokens,
        "grad_norm": step.grad_norm,
        "amp_scale": step.amp_scale,
        "clip_value": step.clip_value,
        "mean_over": step.mean_over,
        "micro_batches": step.micro_batches,
        "skipped": step.skipped,
        "sample_ids": None if step.sample_ids is None else list(step.sample_ids),
    }
    rows = [{**{name: getattr(group, name) for name in _GROUP_FIELDS}, **shared} for group in step.groups]
    # As lists they compare with rows that were read back.
    return [{name: list(value) if isinstance(value, tuple) else value for name, value in row.items()} for row in rows]


def parameter_rows(parameters: Iterable[Parameter], attempt: int) -> list[dict[str, Any]]:
    """Return one `parameters` row each."""
    return [
        {
            "attempt": attempt,
            "parameter": parameter.name,
            "shape": list(parameter.shape),
            "dtype": parameter.dtype,
            "numel": parameter.numel,
            "group_id": parameter.group_id,
        }
        for parameter in parameters
    ]


def same(one: Any, other: Any) -> bool:
    """Say whether two values of a row are one: NaN is what NaN is."""
    return bool(one == other or (one != one and other != other))


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return f"{ordered[0]} was" if len(ordered) == 1 else f"{ordered[0]} and {len(ordered) - 1} more parameters were"


def _scope_text(scope: Scope) -> str:
    return f"{len(scope)} chosen samples" if isinstance(scope, tuple) else "all samples"
