"""From ids or SQL to rows and weights: everything a rollback needs to know before it reads one gradient."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from timstore.errors import CorruptionError, CoverageError, InvalidInputError
from timstore.records import Parameter
from timstore.rollbacks.request import Request
from timstore.rollbacks.timeline import Division, Moment, Timeline, moment_key, read_timelines, up_to
from timstore.snapshot import Snapshot

ENCODINGS = ("factors", "dense", "rows")


@dataclass(frozen=True, eq=False, slots=True)
class ParameterRows:
    """The chosen gradients of one parameter, in reading order; arrays of one length.

    Attributes:
        encoding: index into `ENCODINGS`.
        weight: what the gradient is multiplied by to undo it; strength is in it.
        bin: time bin of its step.
    """

    commit: np.ndarray
    owner: np.ndarray
    encoding: np.ndarray
    weight: np.ndarray
    bin: np.ndarray


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """What to read, with which weights.

    Attributes:
        parameters: those that change, in the order of the model's.
        lengths: per time bin, parameter to the step length its curvature acted over (tau).
        divisions: of the parameters that Adam trained; their gradients are summed in its coordinates.
        error_bounds: per parameter, no more than this Frobenius distance of the sum is due to lossy storage.
        dense_bytes: size of the chosen gradients if they were dense.
    """

    samples: tuple[int, ...]
    skipped: tuple[int, ...]
    records: int
    parameters: dict[str, Parameter]
    rows: dict[str, ParameterRows]
    lengths: list[dict[str, float]]
    divisions: dict[str, Division]
    error_bounds: dict[str, float]
    dense_bytes: int


def make_plan(snapshot: Snapshot, request: Request, moment: Moment | None, bins: int) -> Plan:
    """Select the records, check that they suffice, and weigh them.

    Args:
        moment: the model's place in time; coefficients end there. None: at the end of the records.

    Raises:
        CoverageError: samples, steps or learning rates that were never recorded.
        CorruptionError: the same gradient was recorded by two writers.
        InvalidInputError: `where` is no condition on `records`, or nothing is selected.
    """
    condition, params = _condition(request, moment)
    keys = "attempt, epoch, step, rank, sample"
    chosen = f"(SELECT {keys} FROM records WHERE {condition})"
    found = snapshot.catalog.sql(f"SELECT DISTINCT sample FROM {chosen} ORDER BY sample", params).fetchall()
    samples = tuple(row[0] for row in found)
    skipped = _check_coverage(snapshot, request, samples, moment)
    if not samples:
        raise CoverageError("no recorded sample is selected: nothing to remove", kind="nothing-selected")
    rows = snapshot.catalog.sql(
        "SELECT g.commit, g.owner, g.epoch, g.step, g.sample, g.rank, g.parameter, g.part, g.encoding, g.norm, "
        f"g.rel_error, g.dense_bytes FROM stored.gradients g SEMI JOIN {chosen} c USING ({keys}) "
        "ORDER BY g.commit, g.owner",
        params,
    ).to_arrow_table()
    _check_once(rows)
    known = snapshot.parameters()
    names = rows["parameter"].unique().to_pylist()
    if request.parameters is not None:
        unknown = sorted(request.parameters - known.keys())
        if unknown:
            raise InvalidInputError(f"no parameter {unknown[0]} was ever recorded", parameter=unknown[0])
        names = [name for name in names if name in request.parameters]
    timelines = read_timelines(snapshot, moment, samples)
    edges = _bin_edges(timelines, bins)
    weigher = _Weigher(timelines, edges, request.strength)
    chosen_rows = {name: _select(rows, name, known[name], weigher) for name in names}
    divided = {
        name: timelines[known[name].group_id].division(name) for name in names if known[name].group_id in timelines
    }
    divisions = {name: division for name, division in divided.items() if division is not None}
    moments = {*zip(*(rows[name].to_pylist() for name in ("epoch", "step", "rank", "sample")), strict=True)}
    return Plan(
        samples=samples,
        skipped=skipped,
        records=len(moments),
        parameters={name: known[name] for name in names},
        rows={name: one for name, (one, _) in chosen_rows.items()},
        lengths=[weigher.lengths(known, names, number) for number in range(bins)],
        divisions=divisions,
        error_bounds={name: bound for name, (_, bound) in chosen_rows.items()},
        dense_bytes=int(np.sum(rows["dense_bytes"].to_numpy())),
    )


class _Weigher:
    """Weights and time bins of a parameter's steps, worked out once per group and pattern."""

    def __init__(self, timelines: dict[int, Timeline], edges: np.ndarray, strength: float) -> None:
        self._timelines = timelines
        self._edges = edges
        self._strength = strength
        self._weights: dict[Any, np.ndarray] = {}

    def weigh(self, parameter: Parameter, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (weights, bins) of the moments `keys` for one parameter."""
        timeline = self._timelines.get(parameter.group_id)
        held = np.zeros(0, np.int64) if timeline is None else timeline.keys
        absent = ~np.isin(keys, held)
        if absent.any() or timeline is None:
            epoch, step = divmod(int(keys[absent][0]), moment_key(1, 0))
            raise CoverageError(
                f"epoch {epoch}, step {step}, parameter {parameter.name} (group {parameter.group_id}) has no learning "
                "rate: pass lr= to append, or append_step",
                kind="no-lr",
            )
        positions = np.searchsorted(held, keys)
        pattern = (parameter.group_id, timeline.pattern(parameter.name))
        if pattern not in self._weights:
            self._weights[pattern] = timeline.weights(parameter.name) * self._strength
        return self._weights[pattern][positions], np.searchsorted(self._edges, keys, side="left")

    def lengths(self, known: dict[str, Parameter], names: list[str], number: int) -> dict[str, float]:
        """Return tau of each parameter in time bin `number`."""
        result, cache = {}, {}
        for name in names:
            group = known[name].group_id
            timeline = self._timelines[group]
            key = group, timeline.pattern(name)
            if key not in cache:
                inside = np.searchsorted(self._edges, timeline.keys, side="left") == number
                cache[key] = float(timeline.lengths(name)[inside].sum())
            result[name] = cache[key]
        return result


def _bin_edges(timelines: dict[int, Timeline], bins: int) -> np.ndarray:
    """Return the last moment of each bin but the last, so that every bin covers the same step length."""
    if not timelines or bins == 1:
        return np.zeros(0, np.int64)
    timeline = max(timelines.values(), key=lambda one: float(one.lengths("").sum()))
    covered = np.cumsum(timeline.lengths(""))
    shares = covered[-1] * np.arange(1, bins) / bins
    edges: np.ndarray = timeline.keys[np.minimum(np.searchsorted(covered, shares), len(covered) - 1)]
    return edges


def _select(rows: pa.Table, name: str, parameter: Parameter, weigher: _Weigher) -> tuple[ParameterRows, float]:
    mine = rows.filter(pa.compute.equal(rows["parameter"], name))
    columns = {one: mine[one].to_numpy() for one in ("commit", "owner", "epoch", "step", "norm", "rel_error")}
    weight, number = weigher.weigh(parameter, moment_key(columns["epoch"].astype(np.int64), columns["step"]))
    encoding = np.array([ENCODINGS.index(one) for one in mine["encoding"].to_pylist()], np.int8)
    bound = float(np.sum(np.abs(weight) * columns["norm"] * columns["rel_error"]))
    return ParameterRows(columns["commit"], columns["owner"], encoding, weight, number), bound


def _condition(request: Request, moment: Moment | None) -> tuple[str, list[Any]]:
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


def _check_once(rows: pa.Table) -> None:
    """Two writers of one attempt could record the same gradient; adding it twice would be a wrong update."""
    columns = ["epoch", "step", "rank", "sample", "parameter", "part"]
    counted = rows.group_by(columns).aggregate([([], "count_all")])
    twice = counted.filter(pa.compute.greater(counted["count_all"], 1)).to_pylist()
    if twice:
        one = twice[0]
        raise CorruptionError(
            f"epoch {one['epoch']}, step {one['step']}, sample {one['sample']}, parameter {one['parameter']} was "
            f"recorded {one['count_all']} times in one attempt, by several writers: begin a new attempt from there",
            kind="recorded-twice",
            sample=one["sample"],
        )


def _some(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:10]))
    return shown if len(ids) <= 10 else f"{shown} and {len(ids) - 10} more"
