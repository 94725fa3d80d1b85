"""What one writing handle knows of its attempt: parameters, moments recorded before, the last step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

import pyarrow as pa

from timstore.database.snapshot import Snapshot
from timstore.database.validation import parameter
from timstore.errors import InvalidInputError
from timstore.format.schemas import SCHEMAS
from timstore.records import Parameter, Step, StepGroup

# Moments kept in mind; earlier ones are looked up in the store.
_REMEMBERED = 1024

_GROUP_FIELDS = [field.name for field in fields(StepGroup)]

Moment = tuple[int, int]


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

    def new_parameters(self, given: Iterable[Any]) -> list[Parameter]:
        """Return those of some parameters that are not known as they are.

        Raises:
            InvalidInputError: one is known with another shape.
        """
        new: dict[str, Parameter] = {}
        for one in map(parameter, given):
            before = new.get(one.name) or self.parameters().get(one.name)
            if before is not None and before.shape != one.shape:
                raise InvalidInputError(
                    f"parameter {one.name} has shape {before.shape} in this store, not {one.shape}; "
                    "record another model into a store of its own",
                    parameter=one.name,
                )
            if before != one:
                new[one.name] = one
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


def table(kind: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return rows as the table of that kind.

    Raises:
        InvalidInputError: naming the column that cannot hold what it was given.
    """
    columns = []
    for column in SCHEMAS[kind]:
        try:
            columns.append(pa.array([row.get(column.name) for row in rows], column.type))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise InvalidInputError(f"{kind}: {column.name} holds {column.type}: {error}") from error
    return pa.Table.from_arrays(columns, schema=SCHEMAS[kind])


def check_rows(kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse rows that could not be written as that kind of table later.

    Raises:
        InvalidInputError: naming the column that cannot hold what it was given.
    """
    tests = _plain_tests(kind)
    if all(row.get(name) is None or fits(row[name]) for row in rows for name, fits in tests):
        return
    # What is not of the very type is for Arrow to judge.
    table(kind, rows)


def row_bytes(row: Mapping[str, Any]) -> int:
    """Return about what a row takes in a table."""
    return sum(8 * len(value) if isinstance(value, list) else 8 for value in row.values())


@cache
def _plain_tests(kind: str) -> list[tuple[str, Callable[[Any], bool]]]:
    """Return each column with a test for values that it surely holds."""
    return [(column.name, _plain_test(column.type)) for column in SCHEMAS[kind]]


def _plain_test(arrow: pa.DataType) -> Callable[[Any], bool]:
    if pa.types.is_list(arrow):
        fits = _plain_test(arrow.value_type)
        return lambda value: type(value) is list and all(map(fits, value))
    if pa.types.is_integer(arrow):
        limit = 2 ** (arrow.bit_width - 1)
        return lambda value: type(value) is int and -limit <= value < limit
    if pa.types.is_string(arrow):
        return lambda value: type(value) is str and value.isascii()
    plain = float if pa.types.is_floating(arrow) else bool
    return lambda value: type(value) is plain


def same(one: Any, other: Any) -> bool:
    """Say whether two values of a row are one: NaN is what NaN is."""
    return bool(one == other or (one != one and other != other))


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return f"{ordered[0]} was" if len(ordered) == 1 else f"{ordered[0]} and {len(ordered) - 1} more parameters were"
