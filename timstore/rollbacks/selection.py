"""Which gradients leave, and which others say how the steps change without them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from timstore.database.identity import Identity, taken_out
from timstore.database.snapshot import Snapshot
from timstore.errors import CorruptionError, CoverageError, InvalidInputError, StateError
from timstore.records import Parameter
from timstore.rollbacks.clip_factors import Leaving
from timstore.rollbacks.request import Request
from timstore.rollbacks.timeline import Moment, moment_key, up_to

_RECORD = "attempt, epoch, step, rank, sample"
_KEY = f"epoch * {moment_key(1, 0)} + step"
_IN_KEYS = f"{_KEY} IN (SELECT unnest(?::BIGINT[]))"


@dataclass(frozen=True, eq=False, slots=True)
class Selection:
    """The gradients that leave.

    Attributes:
        samples, skipped: ids that leave; ids that were asked for and have no records.
        records: how many of them leave.
        removed: which they are, each as [attempt, epoch, step, rank, sample].
        before: how many others were asked for that rollbacks took out of this model before, and of which samples.
        known: every parameter of the store.
        rows: one row per gradient part, of all parameters, in reading order; `key` is the step's `moment_key`.
        leaving: what that takes from each step.
    """

    samples: tuple[int, ...]
    skipped: tuple[int, ...]
    records: int
    removed: list[list[int]]
    before: tuple[int, tuple[int, ...]]
    known: dict[str, Parameter]
    rows: pa.Table
    leaving: Leaving

    @property
    def dense_bytes(self) -> int:
        """The size of the leaving gradients if they were dense."""
        return int(np.sum(self.rows["dense_bytes"].to_numpy()))

    def names(self, wanted: frozenset[str] | None) -> list[str]:
        """Return the parameters that change: those wanted, all when None.

        Raises:
            InvalidInputError: a wanted one was never recorded.
        """
        names: list[str] = self.rows["parameter"].unique().to_pylist()
        if wanted is None:
            return names
        unknown = sorted(wanted - self.known.keys())
        if unknown:
            raise InvalidInputError(f"no parameter {unknown[0]} was ever recorded", parameter=unknown[0])
        return [name for name in names if name in wanted]


def select(snapshot: Snapshot, request: Request, identity: Identity) -> Selection:
    """Select the records that leave, and check that they suffice.

    Args:
        identity: the model's place in time, and what rollbacks took out of it: neither that nor what came later is in
            it. Without a place: at the end of the records.

    Raises:
        CoverageError: samples or steps that were never recorded.
        CorruptionError: the same gradient was recorded by two writers.
        InvalidInputError: `where` is no condition on `records`, or nothing is selected.
        StateError: rollbacks took all of it out before.
    """
    asked, params = _asked(request, identity.moment)
    found = snapshot.catalog.fetch(f"SELECT DISTINCT sample FROM records WHERE {asked} ORDER BY sample", params)
    skipped = _check_coverage(snapshot, request, tuple(row[0] for row in found), identity.moment)
    if not found:
        raise CoverageError("no recorded sample is selected: nothing to remove", kind="nothing-selected")
    before = _out_before(snapshot, request, identity)
    condition, params = _condition(request, identity)
    removed = [list(row) for row in snapshot.catalog.fetch(f"SELECT {_RECORD} FROM records WHERE {condition}", params)]
    samples = tuple(sorted({row[-1] for row in removed}))
    if not samples:
        raise StateError(
            f"{len(before[1])} of these samples were removed from this model before (the first is {before[1][0]}), and "
            "none of their records came into it since: removing them twice is a wrong update; force=True does so all "
            "the same",
            kind="removed-before",
            samples=list(before[1]),
        )
    # A sample may come several times in a step: in several micro-batches, as the rows of a pair.
    steps = snapshot.catalog.sql(
        f"WITH leaving AS (SELECT * FROM records WHERE {condition}), "
        "batches AS (SELECT epoch, step, rank, any_value(sample_ids) AS ids FROM steps GROUP BY ALL), "
        "counted AS (SELECT epoch, step, sum(greatest(1, len(list_filter(ids, lambda one: one = sample)))) AS came "
        "FROM (SELECT DISTINCT epoch, step, rank, sample FROM leaving) LEFT JOIN batches USING (epoch, step, rank) "
        "GROUP BY ALL) "
        f"SELECT {_KEY} AS key, any_value(came)::DOUBLE AS samples, sum(tokens)::DOUBLE AS tokens, "
        "count(*)::DOUBLE AS records, sum(dot) AS dot, sqrt(sum(norm * norm)) AS norm, sum(norm) AS largest, "
        "count(dot) AS dots, count(tokens) AS counts FROM leaving JOIN counted USING (epoch, step) "
        "GROUP BY ALL ORDER BY key",
        params,
    ).to_arrow_table()
    column = {name: steps[name].to_numpy() for name in steps.column_names}
    records = column["records"]
    leaving = Leaving(
        keys=column["key"].astype(np.int64),
        samples=column["samples"],
        tokens=np.where(column["counts"] == records, column["tokens"], np.nan),
        records=records,
        dot=np.where(column["dots"] == records, column["dot"], np.nan),
        norm=np.where(records == 1, column["norm"], np.nan),
        largest=column["largest"],
    )
    chosen = f"SELECT {_RECORD} FROM records WHERE {condition}"
    rows = _gradients(snapshot, chosen, params)
    return Selection(samples, skipped, len(removed), removed, before, snapshot.parameters(), rows, leaving)


def whole_gradients(snapshot: Snapshot, moment: Moment | None, keys: np.ndarray | None = None) -> pa.Table:
    """Return one row per step and parameter whose whole gradient was kept.

    Args:
        keys: only of these steps.
    """
    rows = snapshot.catalog.sql(
        f"SELECT {_KEY} AS key, parameter, commit, owner, rel_error, bytes AS dense_bytes FROM stored.states "
        f"SEMI JOIN states USING (attempt, epoch, step, role, parameter) WHERE role = 'gradient' AND {up_to(moment)} "
        "ORDER BY commit, owner"
    ).to_arrow_table()
    if keys is not None:
        rows = rows.filter(pa.compute.is_in(rows["key"], pa.array(keys, pa.int64())))
    _check_once(rows, ["key", "parameter"])
    return rows


def rest_of(
    snapshot: Snapshot, request: Request, identity: Identity, keys: np.ndarray
) -> tuple[pa.Table | None, np.ndarray]:
    """Return (the gradients that stay in those of the steps of which every sample was recorded, those steps)."""
    complete = snapshot.catalog.sql(
        f"SELECT key FROM (SELECT {_KEY} AS key, list_distinct(flatten(list(sample_ids))) AS ids FROM "
        f"(SELECT DISTINCT epoch, step, rank, sample_ids FROM steps WHERE {_IN_KEYS}) GROUP BY ALL) "
        f"JOIN (SELECT {_KEY} AS key, count(DISTINCT sample) AS held FROM records GROUP BY ALL) USING (key) "
        "WHERE len(ids) = held ORDER BY key",
        [keys.tolist()],
    ).fetchall()
    held = np.array([row[0] for row in complete], np.int64)
    if not len(held):
        return None, held
    condition, params = _condition(request, identity)
    staying = f"SELECT {_RECORD} FROM records WHERE {_IN_KEYS} EXCEPT SELECT {_RECORD} FROM records WHERE {condition}"
    return _gradients(snapshot, staying, [held.tolist(), *params]), held


def _gradients(snapshot: Snapshot, chosen: str, params: list[Any]) -> pa.Table:
    rows = snapshot.catalog.sql(
        f"SELECT g.commit, g.owner, {_KEY} AS key, g.sample, g.rank, g.parameter, g.part, g.encoding, g.norm, "
        f"g.rel_error, g.dense_bytes FROM stored.gradients g SEMI JOIN ({chosen}) c USING ({_RECORD}) "
        "ORDER BY g.commit, g.owner",
        params,
    ).to_arrow_table()
    _check_once(rows, ["key", "rank", "sample", "parameter", "part"])
    return rows


def _condition(request: Request, identity: Identity) -> tuple[str, list[Any]]:
    """Return the SQL condition, and its parameters, that a record was asked for and is in the model."""
    asked, params = _asked(request, identity.moment)
    out, more = taken_out(identity.removals)
    return f"{asked} AND NOT {out}", [*params, *more]


def _out_before(snapshot: Snapshot, request: Request, identity: Identity) -> tuple[int, tuple[int, ...]]:
    """Return how many of the records that were asked for are out of the model, and of which samples."""
    if not identity.removals:
        return 0, ()
    asked, params = _asked(request, identity.moment)
    out, more = taken_out(identity.removals)
    found = snapshot.catalog.fetch(
        f"SELECT sample, count(*) FROM records WHERE {asked} AND {out} GROUP BY sample ORDER BY sample",
        [*params, *more],
    )
    return sum(row[1] for row in found), tuple(row[0] for row in found)


def _asked(request: Request, moment: Moment | None) -> tuple[str, list[Any]]:
    conditions, params = [up_to(moment)], []
    if request.where is not None:
        conditions.append(f"({request.where})")
    if request.ids is not None:
        conditions.append("sample IN (SELECT unnest(?::BIGINT[]))")
        params.append(list(request.ids))
    if request.epochs is not None:
        conditions.append("epoch IN (SELECT unnest(?::BIGINT[]))")
        params.append(list(request.epochs))
    return " AND ".join(conditions), params


def _check_coverage(
    snapshot: Snapshot, request: Request, samples: tuple[int, ...], moment: Moment | None
) -> tuple[int, ...]:
    """Return ids that were asked for and never recorded; refuse them, and gaps, unless told to skip."""
    absent = tuple(sorted(set(request.ids or ()) - set(samples)))
    if absent and request.missing == "error":
        seen = {
            row[0]
            for row in snapshot.catalog.sql(
                "SELECT DISTINCT unnest(sample_ids) AS sample FROM steps WHERE sample_ids IS NOT NULL"
            ).fetchall()
        }
        never = [one for one in absent if one not in seen]
        unrecorded = [one for one in absent if one in seen]
        told = [f"never drawn: {_some(never)}"] * bool(never)
        told += [f"trained on without being recorded: {_some(unrecorded)}"] * bool(unrecorded)
        raise CoverageError(
            f"{len(absent)} of {len(request.ids or ())} samples have no records ({'; '.join(told)}); "
            "missing='skip' goes on without them",
            kind="never-recorded",
            samples=absent,
        )
    if request.missing == "error" and samples:
        epochs = "true" if request.epochs is None else f"epoch IN ({', '.join(map(str, request.epochs)) or 'NULL'})"
        drawn_at = (
            f"SELECT DISTINCT epoch, step, unnest(sample_ids) AS sample FROM steps WHERE {up_to(moment)} AND {epochs}"
        )
        gaps = snapshot.catalog.sql(
            f"SELECT d.epoch, d.step, d.sample FROM ({drawn_at}) d ANTI JOIN records USING (epoch, step, sample) "
            "WHERE d.sample IN (SELECT unnest(?::BIGINT[])) ORDER BY ALL LIMIT 1",
            [list(samples)],
        ).fetchall()
        if gaps:
            epoch, step, sample = gaps[0]
            raise CoverageError(
                f"sample {sample} was trained on in epoch {epoch}, step {step} without being recorded: removing the "
                "rest would leave that part in the model; missing='skip' does so",
                kind="not-recorded",
                sample=sample,
            )
    return absent


def _check_once(rows: pa.Table, columns: list[str]) -> None:
    """Two writers of one attempt could record the same gradient; adding it twice would be a wrong update."""
    counted = rows.group_by(columns).aggregate([([], "count_all")])
    twice = counted.filter(pa.compute.greater(counted["count_all"], 1)).to_pylist()
    if twice:
        one = twice[0]
        epoch, step = divmod(one["key"], moment_key(1, 0))
        whose = f"sample {one['sample']}, " if "sample" in one else ""
        raise CorruptionError(
            f"epoch {epoch}, step {step}, {whose}parameter {one['parameter']} was recorded {one['count_all']} times in "
            "one attempt, by several writers: begin a new attempt from there",
            kind="recorded-twice",
            sample=one.get("sample"),
        )


def _some(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:10]))
    return shown if len(ids) <= 10 else f"{shown} and {len(ids) - 10} more"
