"""From selected gradients to rows and weights: what a rollback by weighted sums reads, and how much of each."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from timstore.errors import CoverageError
from timstore.records import Parameter
from timstore.rollbacks.clip_factors import Change
from timstore.rollbacks.gradient_blocks import ENCODINGS, ParameterRows, by_parameter, encodings_of, rows_of
from timstore.rollbacks.selection import Selection
from timstore.rollbacks.timeline import Division, Timeline, moment_of


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """What to read, with which weights.

    Attributes:
        parameters: those that change.
        lengths: per time bin, parameter to the step length its curvature acted over (tau).
        divisions: of the parameters that Adam trained; their gradients are summed in its coordinates.
        error_bounds: per parameter, no more than this Frobenius distance of the sum is due to lossy storage.
        dense_bytes: size of the chosen gradients if they were dense.
    """

    parameters: dict[str, Parameter]
    rows: dict[str, ParameterRows]
    lengths: list[dict[str, float]]
    divisions: dict[str, Division]
    error_bounds: dict[str, float]
    dense_bytes: int


@dataclass(frozen=True, eq=False, slots=True)
class Sources:
    """What the changed steps' whole gradients are made of.

    Attributes:
        kept: rows of whole gradients that were kept.
        rest: rows of the gradients that stay, in steps of which every sample was recorded.
        kept_keys, rest_keys: the steps that each of them is for.
    """

    kept: pa.Table | None
    rest: pa.Table | None
    kept_keys: np.ndarray
    rest_keys: np.ndarray


def make_plan(
    selection: Selection,
    names: list[str],
    timelines: dict[int, Timeline],
    changes: dict[int, Change],
    sources: Sources | None,
    bins: int,
    strength: float,
    of: str = "parameter",
) -> Plan:
    """Weigh every gradient that the change of the parameters is a sum of.

    Args:
        names: the parameters that change.
        changes: of each group's consumed gradients.
        sources: of whole gradients; None where the change is no sum, and no row is weighed.
        of: `parameter`, or `buffer`: the change of the optimizer's momentum instead.
    """
    known, edges = selection.known, bin_edges(timelines, bins)
    chosen = {}
    if sources is not None:
        weigher = _Weigher(selection, timelines, changes, sources, edges, strength, of)
        chosen = {name: weigher.rows_of(known[name]) for name in names}
    divided = {
        name: timelines[known[name].group_id].division(name) for name in names if known[name].group_id in timelines
    }
    return Plan(
        parameters={name: known[name] for name in names},
        rows={name: rows for name, (rows, _, _) in chosen.items()},
        lengths=[_lengths(known, names, timelines, edges, number) for number in range(bins)],
        divisions={name: division for name, division in divided.items() if division is not None},
        error_bounds={name: bound for name, (_, bound, _) in chosen.items()},
        dense_bytes=sum(size for _, _, size in chosen.values()),
    )


class _Weigher:
    """Weights and time bins of a parameter's steps, worked out once per group and pattern."""

    def __init__(
        self,
        selection: Selection,
        timelines: dict[int, Timeline],
        changes: dict[int, Change],
        sources: Sources,
        edges: np.ndarray,
        strength: float,
        of: str,
    ) -> None:
        self._timelines = timelines
        self._changes = changes
        self._sources = sources
        tables = {"removed": selection.rows, "rest": sources.rest, "kept": sources.kept}
        self._tables = {kind: by_parameter(one) for kind, one in tables.items() if one is not None}
        self._edges = edges
        self._strength = strength
        self._of = of
        self._weights: dict[Any, np.ndarray] = {}

    def rows_of(self, parameter: Parameter) -> tuple[ParameterRows, float, int]:
        """Return (rows, bound of their error, bytes if they were dense) of one parameter."""
        found, bound, size = [], 0.0, 0
        for kind, tables in self._tables.items():
            mine = tables.get(parameter.name)
            if mine is None:
                continue
            keys = mine["key"].to_numpy()
            weight = self._weights_at(parameter, keys) * self._factors(parameter, keys, kind)
            size += int(np.sum(mine["dense_bytes"].to_numpy()))
            if kind == "kept":
                encoding = np.full(len(keys), ENCODINGS.index("whole"), np.int8)
                norms = self._consumed_norms(parameter, keys)
            else:
                encoding = encodings_of(mine)
                norms = mine["norm"].to_numpy()
            bound += float(np.sum(np.abs(weight) * norms * mine["rel_error"].to_numpy()))
            number = np.searchsorted(self._edges, keys, side="left")
            found.append((mine["commit"].to_numpy(), mine["owner"].to_numpy(), encoding, weight, number))
        columns = [np.concatenate(one) for one in zip(*found, strict=True)]
        rows = ParameterRows(*columns)
        return rows.take(np.lexsort((rows.owner, rows.commit))), bound, size

    def _weights_at(self, parameter: Parameter, keys: np.ndarray) -> np.ndarray:
        """Return what each step's consumed gradient weighs."""
        timeline = self._timelines[parameter.group_id]
        pattern = (parameter.group_id, timeline.pattern(parameter.name))
        if pattern not in self._weights:
            self._weights[pattern] = timeline.weights(parameter.name, self._of) * self._strength
        return self._weights[pattern][np.searchsorted(timeline.keys, keys)]

    def _consumed_norms(self, parameter: Parameter, keys: np.ndarray) -> np.ndarray:
        """Return no less than the norm of each step's consumed gradient."""
        timeline = self._timelines[parameter.group_id]
        at = np.searchsorted(timeline.keys, keys)
        norms: np.ndarray = np.nan_to_num(timeline.grad_norm[at] * timeline.ratio[at])
        return norms

    def _factors(self, parameter: Parameter, keys: np.ndarray, kind: str) -> np.ndarray:
        """Return what turns a gradient into its part of `a h - b g`, the change of what was consumed."""
        timeline, change = self._timelines[parameter.group_id], self._changes[parameter.group_id]
        at = np.searchsorted(timeline.keys, keys)
        ratio, on_removed, on_whole = timeline.ratio[at], change.on_removed[at], change.on_whole[at]
        if kind == "kept":
            return -on_whole / np.where(ratio == 0, 1.0, ratio)
        if kind == "rest":
            return -on_whole
        # Where g is the sum of all records, b's part of it falls on h as well: a - b = c.
        return np.where(np.isin(keys, self._sources.kept_keys), on_removed, ratio)


def check_steps(selection: Selection, timelines: dict[int, Timeline]) -> None:
    """Refuse gradients of steps whose scalars were never recorded.

    Raises:
        CoverageError: naming the step and the parameter.
    """
    rows = selection.rows
    names = rows["parameter"].unique().to_pylist()
    groups = pa.array([selection.known[name].group_id for name in names], pa.int64())
    of_row = groups.take(pa.compute.index_in(rows["parameter"], pa.array(names))).to_numpy(zero_copy_only=False)
    keys = rows["key"].to_numpy()
    for group in np.unique(of_row).tolist():
        held = timelines[group].keys if group in timelines else np.zeros(0, np.int64)
        absent = np.flatnonzero((of_row == group) & ~np.isin(keys, held))
        if len(absent):
            epoch, step = moment_of(keys[absent[0]])
            raise CoverageError(
                f"epoch {epoch}, step {step}, parameter {rows['parameter'][int(absent[0])]} (group {group}) has no "
                "learning rate: pass lr= to append, or append_step",
                kind="no-lr",
            )


def step_rows(selection: Selection, timelines: dict[int, Timeline]) -> dict[str, ParameterRows]:
    """Return the leaving gradients of each parameter, weight 1, with the position of their step as bin."""
    found = {}
    for name, mine in by_parameter(selection.rows).items():
        keys = timelines[selection.known[name].group_id].keys
        found[name] = rows_of(mine, np.searchsorted(keys, mine["key"].to_numpy()))
    return found


def _lengths(
    known: dict[str, Parameter], names: list[str], timelines: dict[int, Timeline], edges: np.ndarray, number: int
) -> dict[str, float]:
    """Return tau of each parameter in time bin `number`."""
    result: dict[str, float] = {}
    cache: dict[Any, float] = {}
    for name in names:
        timeline = timelines[known[name].group_id]
        key = known[name].group_id, timeline.pattern(name)
        if key not in cache:
            inside = np.searchsorted(edges, timeline.keys, side="left") == number
            cache[key] = float(timeline.lengths(name)[inside].sum())
        result[name] = cache[key]
    return result


def bin_edges(timelines: dict[int, Timeline], bins: int) -> np.ndarray:
    """Return the last moment of each bin but the last, so that every bin covers the same step length."""
    if not timelines or bins == 1:
        return np.zeros(0, np.int64)
    timeline = longest(timelines)
    covered = np.cumsum(timeline.lengths(""))
    shares = covered[-1] * np.arange(1, bins) / bins
    edges: np.ndarray = timeline.keys[np.minimum(np.searchsorted(covered, shares), len(covered) - 1)]
    return edges


def longest(timelines: dict[int, Timeline]) -> Timeline:
    """Return the timeline that went farthest, which speaks for all where they have to be one."""
    return max(timelines.values(), key=lambda one: float(one.lengths("").sum()))
