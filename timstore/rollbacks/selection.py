"""Which gradients leave, which others say how the steps change, and what earlier rollbacks left of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from timstore.arguments import listed, sample_id, whole_number
from timstore.database.identity import Identity, taken_out
from timstore.database.snapshot import Snapshot
from timstore.errors import CorruptionError, CoverageError, InvalidInputError, StateError
from timstore.model.optimizer_names import SGD_FAMILY
from timstore.options import RollbackOptions
from timstore.records import Parameter
from timstore.rollbacks.clip_factors import Leaving
from timstore.rollbacks.timeline import moment_key, up_to

_RECORD = "attempt, epoch, step, rank, sample"
_KEY = f"epoch * {moment_key(1, 0)} + step"
_IN_KEYS = f"{_KEY} IN (SELECT unnest(?::BIGINT[]))"


@dataclass(frozen=True, slots=True)
class Condition:
    """An SQL condition on `records`, and its parameters."""

    sql: str
    params: tuple[Any, ...] = ()

    def __and__(self, other: "Condition") -> "Condition":
        return Condition(f"{self.sql} AND {other.sql}", (*self.params, *other.params))


@dataclass(frozen=True, eq=False, slots=True)
class Selection:
    """The gradients that leave.

    Attributes:
        leaves: says that a record was asked for and is in the model.
        samples, skipped: ids that leave; ids that were asked for and have no records.
        removed: the records that leave, each as [attempt, epoch, step, rank, sample].
        before: how many others were asked for that rollbacks took out of this model before, and of which samples.
        known: every parameter of the store.
        rows: one row per gradient part, of all parameters, in reading order; `key` is the step's `moment_key`.
        leaving: what that takes from each step.
    """

    snapshot: Snapshot
    identity: Identity
    leaves: Condition
    samples: tuple[int, ...]
    skipped: tuple[int, ...]
    removed: list[list[int]]
    before: tuple[int, tuple[int, ...]]
    known: dict[str, Parameter]
    rows: pa.Table
    leaving: Leaving

    @property
    def dense_bytes(self) -> int:
        """The size of the leaving gradients if they were dense."""
        return int(np.sum(self.rows["dense_bytes"].to_numpy()))

    def names(self, wanted: Iterable[str] | None) -> list[str]:
        """Return the parameters that change: those wanted, all when None."""
        names: list[str] = self.rows["parameter"].unique().to_pylist()
        unknown = sorted(set(wanted or ()) - self.known.keys())
        if unknown:
            raise InvalidInputError(f"no parameter {unknown[0]} was ever recorded", parameter=unknown[0])
        return [name for name in names if wanted is None or name in wanted]

    def whole_gradients(self, keys: np.ndarray | None = None) -> pa.Table:
        """Return one row per step, of these or of all, and parameter whose whole gradient the store keeps."""
        rows = self.snapshot.catalog.sql(
            f"SELECT {_KEY} AS key, parameter, commit, owner, rel_error, bytes AS dense_bytes FROM stored.states "
            "SEMI JOIN states USING (attempt, epoch, step, role, parameter) "
            f"WHERE role = 'gradient' AND {up_to(self.identity.moment)} ORDER BY commit, owner"
        ).to_arrow_table()
        if keys is not None:
            rows = rows.filter(pa.compute.is_in(rows["key"], pa.array(keys, pa.int64())))
        _check_once(rows, ["key", "parameter"])
        return rows

    def rest_of(self, keys: np.ndarray) -> tuple[pa.Table | None, np.ndarray]:
        """Return (the gradients that stay in those of the steps of which every sample was recorded, those steps)."""
        complete = self.snapshot.catalog.sql(
            f"SELECT key FROM (SELECT {_KEY} AS key, list_distinct(flatten(list(sample_ids))) AS ids FROM "
            f"(SELECT DISTINCT epoch, step, rank, sample_ids FROM steps WHERE {_IN_KEYS}) GROUP BY ALL) "
            f"JOIN (SELECT {_KEY} AS key, count(DISTINCT sample) AS held FROM records GROUP BY ALL) USING (key) "
            "WHERE len(ids) = held ORDER BY key",
            [keys.tolist()],
        ).fetchall()
        # A step is complete where as many samples were recorded as its batches of all processes held.
        steps = np.array([row[0] for row in complete], np.int64)
        if not len(steps):
            return None, steps
        staying = Condition(
            f"{_IN_KEYS} EXCEPT SELECT {_RECORD} FROM records WHERE {self.leaves.sql}",
            (steps.tolist(), *self.leaves.params),
        )
        return _gradients(self.snapshot, staying), steps


def select(snapshot: Snapshot, ids: Iterable[int] | None, options: RollbackOptions, identity: Identity) -> Selection:
    """Select the records that leave, and check that they suffice.

    Args:
        identity: the model's place in time, and what rollbacks took out of it: neither that nor what came later is in
            it. Without a place: at the end of the records.
    """
    # Asked for, in the run up to where the model is, and not taken out of it before.
    asked = _asked(ids, options, identity)
    drawn = tuple(row[0] for row in _fetch(snapshot, "SELECT DISTINCT sample", asked, "ORDER BY sample"))
    skipped = _check_coverage(snapshot, ids, options, drawn, identity)
    if not drawn:
        raise CoverageError("no recorded sample is selected: nothing to remove", kind="nothing-selected")
    out, params = taken_out(identity.removals)
    before = _fetch(
        snapshot,
        "SELECT sample, count(*)",
        asked & Condition(out, tuple(params)),
        "GROUP BY sample ORDER BY sample",
    )
    leaves = asked & Condition(f"NOT {out}", tuple(params))
    removed = [list(row) for row in _fetch(snapshot, f"SELECT {_RECORD}", leaves)]
    if not removed:
        raise StateError(
            f"{len(before)} of these samples were removed from this model before (the first is {before[0][0]}), and "
            "none of their records came into it since: removing them twice is a wrong update; force=True does so all "
            "the same",
            kind="removed-before",
            samples=[row[0] for row in before],
        )
    return Selection(
        snapshot,
        identity,
        leaves,
        samples=tuple(sorted({row[-1] for row in removed})),
        skipped=skipped,
        removed=removed,
        before=(sum(row[1] for row in before), tuple(row[0] for row in before)),
        known=snapshot.parameters(),
        rows=_gradients(snapshot, leaves),
        leaving=_leaving(snapshot, leaves),
    )


def asked_samples(ids: Iterable[int] | None, where: str | None) -> tuple[int, ...] | None:
    """Return the ids that were asked for, checked; None where `where` says which."""
    if (ids is None) == (where is None):
        both = "" if ids is None else ", and not both"
        raise InvalidInputError(f"say what to remove: ids, or where (an SQL condition on the records table){both}")
    if ids is None:
        return None
    checked = tuple(dict.fromkeys(whole_number(sample, "ids") for sample in listed(ids, "ids", "a list of integers")))
    if not checked:
        raise InvalidInputError("ids is empty: nothing to remove")
    return tuple(sample_id(sample, "a sample id") for sample in checked)


def _fetch(snapshot: Snapshot, select: str, condition: Condition, order: str = "") -> list[tuple[Any, ...]]:
    return list(snapshot.catalog.fetch(f"{select} FROM records WHERE {condition.sql} {order}", list(condition.params)))


def _asked(ids: Iterable[int] | None, options: RollbackOptions, identity: Identity) -> Condition:
    asked = Condition(up_to(identity.moment))
    if options.where is not None:
        asked &= Condition(f"({options.where})")
    for column, values in (("sample", ids), ("epoch", options.epochs)):
        if values is not None:
            asked &= Condition(f"{column} IN (SELECT unnest(?::BIGINT[]))", (list(values),))
    return asked


def _leaving(snapshot: Snapshot, leaves: Condition) -> Leaving:
    # A sample may come several times in a step: in several micro-batches, as the rows of a pair.
    steps = snapshot.catalog.sql(
        f"WITH leaving AS (SELECT * FROM records WHERE {leaves.sql}), "
        "batches AS (SELECT epoch, step, rank, any_value(sample_ids) AS ids FROM steps GROUP BY ALL), "
        "counted AS (SELECT epoch, step, sum(greatest(1, len(list_filter(ids, lambda one: one = sample)))) AS came "
        "FROM (SELECT DISTINCT epoch, step, rank, sample FROM leaving) LEFT JOIN batches USING (epoch, step, rank) "
        "GROUP BY ALL) "
        f"SELECT {_KEY} AS key, any_value(came)::DOUBLE AS samples, sum(tokens)::DOUBLE AS tokens, "
        "count(*)::DOUBLE AS records, sum(dot) AS dot, sqrt(sum(norm * norm)) AS norm, sum(norm) AS largest, "
        "count(dot) AS dots, count(tokens) AS counts FROM leaving JOIN counted USING (epoch, step) "
        "GROUP BY ALL ORDER BY key",
        list(leaves.params),
    ).to_arrow_table()
    column = {name: steps[name].to_numpy() for name in steps.column_names}
    records = column["records"]
    return Leaving(
        keys=column["key"].astype(np.int64),
        samples=column["samples"],
        tokens=np.where(column["counts"] == records, column["tokens"], np.nan),
        records=records,
        # <g, h> adds up over records; |h| does not.
        dot=np.where(column["dots"] == records, column["dot"], np.nan),
        norm=np.where(records == 1, column["norm"], np.nan),
        largest=column["largest"],
    )


def _gradients(snapshot: Snapshot, chosen: Condition) -> pa.Table:
    rows = snapshot.catalog.sql(
        f"SELECT g.commit, g.owner, {_KEY} AS key, g.sample, g.rank, g.parameter, g.part, g.encoding, g.norm, "
        "g.rel_error, g.dense_bytes FROM stored.gradients g "
        f"SEMI JOIN (SELECT {_RECORD} FROM records WHERE {chosen.sql}) c USING ({_RECORD}) ORDER BY g.commit, g.owner",
        list(chosen.params),
    ).to_arrow_table()
    _check_once(rows, ["key", "rank", "sample", "parameter", "part"])
    return rows


def _check_coverage(
    snapshot: Snapshot,
    ids: Iterable[int] | None,
    options: RollbackOptions,
    samples: tuple[int, ...],
    identity: Identity,
) -> tuple[int, ...]:
    """Return ids that were asked for and never recorded; refuse them, and gaps, unless told to skip."""
    asked = tuple(ids or ())
    absent = tuple(sorted(set(asked) - set(samples)))
    if options.missing == "skip":
        return absent
    catalog = snapshot.catalog
    if absent:
        batches = "SELECT DISTINCT unnest(sample_ids) AS sample FROM steps WHERE sample_ids IS NOT NULL"
        seen = {row[0] for row in catalog.sql(batches).fetchall()}
        never = [sample for sample in absent if sample not in seen]
        unrecorded = [sample for sample in absent if sample in seen]
        told = [f"never drawn: {_some(never)}"] * bool(never)
        told += [f"trained on without being recorded: {_some(unrecorded)}"] * bool(unrecorded)
        raise CoverageError(
            f"{len(absent)} of {len(asked)} samples have no records ({'; '.join(told)}); "
            "missing='skip' goes on without them",
            kind="never-recorded",
            samples=absent,
        )
    if samples:
        epochs = "true" if options.epochs is None else f"epoch IN ({', '.join(map(str, options.epochs)) or 'NULL'})"
        gaps = catalog.sql(
            "SELECT d.epoch, d.step, d.sample FROM (SELECT DISTINCT epoch, step, unnest(sample_ids) AS sample "
            f"FROM steps WHERE {up_to(identity.moment)} AND {epochs}) d ANTI JOIN records USING (epoch, step, sample) "
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
    for twice in counted.filter(pa.compute.greater(counted["count_all"], 1)).slice(0, 1).to_pylist():
        epoch, step = divmod(twice["key"], moment_key(1, 0))
        whose = f"sample {twice['sample']}, " if "sample" in twice else ""
        raise CorruptionError(
            f"epoch {epoch}, step {step}, {whose}parameter {twice['parameter']} was recorded {twice['count_all']} "
            "times in one attempt, by several writers: begin a new attempt from there",
            kind="recorded-twice",
            sample=twice.get("sample"),
        )


def _some(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:10]))
    return shown if len(ids) <= 10 else f"{shown} and {len(ids) - 10} more"


def warnings_of_earlier(selection: Selection) -> list[str]:
    """Return what the user should know of earlier rollbacks of the model, and of those that nobody can tell."""
    snapshot, identity, told = selection.snapshot, selection.identity, []
    count, samples = selection.before
    partial = [removal for removal in identity.removals if not removal.is_whole and set(removal.samples) & set(samples)]
    if partial:
        strength = min(removal.strength for removal in partial)
        how = [f"with strength {strength:g}"] * (strength < 1)
        how += ["of some parameters only"] * any(removal.parameters is not None for removal in partial)
        inexact = any(not removal.is_exact for removal in partial)
        how += ["in a store of an earlier version, which does not say which"] * inexact
        told.append(
            f"{count} records were left out since earlier rollbacks took them out of this model, but "
            f"{', '.join(how)}: undo those and remove all at once to be sure that nothing is left"
        )
    for restart in identity.restarts:
        back = sorted({sample for removal in restart.removals if not removal.states for sample in removal.samples})
        if back and _carries(snapshot, restart.attempt):
            told.append(
                f"training went on in attempt {restart.attempt} with an optimizer that kept its momentum from before "
                f"the rollback of {len(back)} samples (the first is {back[0]}): part of them came back into the model "
                "by it, and no record says how much; rollback(optimizer=...) corrects the optimizer as well"
            )
    for attempt in identity.hidden:
        start = snapshot.view.attempts[attempt]
        told.append(
            f"attempt {attempt} began at epoch {start.from_epoch}, step {start.from_step} with a model that had been "
            "trained further: what it was trained on from there is superseded, stays in the model, and is not removed"
        )
    possible = _possible(selection)
    if possible:
        told.append(
            f"whether earlier rollbacks took records of {len(possible)} of these samples (the first is {possible[0]}) "
            "out of this model cannot be told, since the store does not know the weights that it came from: if so, "
            "they were subtracted twice now"
        )
    return told


def _carries(snapshot: Snapshot, attempt: int) -> bool:
    """Say whether the first steps of an attempt, one of each group, used momentum or moments from before it."""
    parameters = snapshot.parameters().values()
    rows = snapshot.catalog.rows(
        "SELECT * FROM stored.steps WHERE attempt = ? "
        "QUALIFY rank() OVER (PARTITION BY group_id ORDER BY epoch, step) = 1",
        [attempt],
    ).to_pylist()
    return any(
        (row["momentum"] or row["optimizer"] not in SGD_FAMILY)
        and {parameter.name for parameter in parameters if parameter.group_id == row["group_id"]}
        - {*(row["idle"] or ()), *(row["fresh"] or ())}
        for row in rows
    )


def _possible(selection: Selection) -> list[int]:
    """Return the samples that leave and that rollbacks may have taken out before."""
    if not selection.identity.possible:
        return []
    out, params = taken_out(selection.identity.possible)
    samples = selection.snapshot.catalog.rows(
        f"SELECT DISTINCT sample FROM records WHERE {out} AND (attempt, epoch, step, rank, sample) IN "
        "(SELECT (r[1], r[2], r[3], r[4], r[5]) FROM (SELECT unnest(?::BIGINT[][]) AS r)) ORDER BY sample",
        [*params, selection.removed],
    )
    return list(samples["sample"].to_pylist())
