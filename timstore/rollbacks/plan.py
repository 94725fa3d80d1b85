"""From selected gradients to rows and weights: what a rollback by weighted sums reads, and how much of each."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from timstore.errors import CoverageError
from timstore.records import Parameter
from timstore.rollbacks.clip_factors import StepChange
from timstore.rollbacks.gradient_blocks import ENCODINGS, GradientRows, by_parameter, encodings_of
from timstore.rollbacks.selection import Selection
from timstore.rollbacks.step_changes import Sources
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
    rows: dict[str, GradientRows]
    lengths: list[dict[str, float]]
    divisions: dict[str, Division]
    error_bounds: dict[str, float]
    dense_bytes: int


def make_plan(
    selection: Selection,
    names: list[str],
    timelines: dict[int, Timeline],
    changes: dict[int, StepChange],
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
    # A step consumed c g, and would have consumed c g - (a h - b g) without the samples that leave (`clip_factors`).
    # The final parameters hold -w times whatever a step consumed (`unrolled_weights`), so that they change by
    #     sum over steps of  w (a h - b g)
    # h is a sum over the records that leave. Where b is not 0, g is the step's whole gradient if that was kept; else
    # the sum over all records, if every sample of the step was recorded.
    known, edges = selection.known, bin_edges(timelines, bins)
    plan = Plan({name: known[name] for name in names}, {}, [{} for _ in range(bins)], {}, {}, 0)
    tables, dense_bytes = {}, 0
    if sources is not None:
        given = {"removed": selection.rows, "rest": sources.rest, "whole": sources.whole}
        tables = {kind: by_parameter(rows) for kind, rows in given.items() if rows is not None}
    shared: dict[Any, tuple[list[float], Division | None, np.ndarray]] = {}
    for name, parameter in plan.parameters.items():
        timeline, change = timelines[parameter.group_id], changes[parameter.group_id]
        # Parameters of one group that were idle in the same steps have all this in common.
        pattern = parameter.group_id, timeline.pattern(name)
        if pattern not in shared:
            number, own = np.searchsorted(edges, timeline.keys, side="left"), timeline.lengths(name)
            lengths = [float(own[number == one].sum()) for one in range(bins)]
            weights = np.zeros(0) if sources is None else timeline.weights(name, of) * strength
            shared[pattern] = lengths, timeline.division(name), weights
        lengths, division, weights = shared[pattern]
        for taus, length in zip(plan.lengths, lengths, strict=True):
            taus[name] = length
        if division is not None:
            plan.divisions[name] = division
        if sources is not None:
            chosen = {kind: rows[name] for kind, rows in tables.items() if name in rows}
            dense_bytes += sum(int(np.sum(rows["dense_bytes"].to_numpy())) for rows in chosen.values())
            plan.rows[name], plan.error_bounds[name] = _weighed(
                chosen, timeline, change, weights, sources.whole_keys, edges
            )
    return replace(plan, dense_bytes=dense_bytes)


def _weighed(
    tables: dict[str, pa.Table],
    timeline: Timeline,
    change: StepChange,
    weights: np.ndarray,
    whole_keys: np.ndarray,
    edges: np.ndarray,
) -> tuple[GradientRows, float]:
    """Return (a parameter's rows, no less than the error of their sum).

    Args:
        weights: w of each step.
        whole_keys: steps whose whole gradient is read.
    """
    columns, bound = [], 0.0
    for kind, rows in tables.items():
        keys = rows["key"].to_numpy()
        step = np.searchsorted(timeline.keys, keys)
        ratio, on_removed, on_whole = timeline.ratio[step], change.on_removed[step], change.on_whole[step]
        if kind == "whole":
            # What lies there is what was consumed, c g, so that b g is b / c of it.
            factors = -on_whole / np.where(ratio == 0, 1.0, ratio)
            encoding = np.full(len(keys), ENCODINGS.index("whole"), np.int8)
            norms = np.nan_to_num(timeline.grad_norm[step] * ratio)
        else:
            # Where g is the sum of all records, -b falls on those that leave as well: a - b = c.
            leaving = np.where(np.isin(keys, whole_keys), on_removed, ratio)
            factors = -on_whole if kind == "rest" else leaving
            encoding, norms = encodings_of(rows), rows["norm"].to_numpy()
        weight = weights[step] * factors
        # |sum of w (stored - exact)| <= sum of |w| |exact| times the relative error that was measured on storing.
        bound += float(np.sum(np.abs(weight) * norms * rows["rel_error"].to_numpy()))
        number = np.searchsorted(edges, keys, side="left")
        columns.append((rows["commit"].to_numpy(), rows["owner"].to_numpy(), encoding, weight, number))
    joined = GradientRows(*(np.concatenate(column) for column in zip(*columns, strict=True)))
    return joined.take(np.lexsort((joined.owner, joined.commit))), bound


def check_steps(selection: Selection, timelines: dict[int, Timeline]) -> None:
    """Refuse gradients of steps whose scalars were never recorded."""
    rows = selection.rows
    names = rows["parameter"].unique().to_pylist()
    groups = pa.array([selection.known[name].group_id for name in names], pa.int64())
    of_row = groups.take(pa.compute.index_in(rows["parameter"], pa.array(names))).to_numpy(zero_copy_only=False)
    keys = rows["key"].to_numpy()
    for group in np.unique(of_row).tolist():
        recorded = timelines[group].keys if group in timelines else np.zeros(0, np.int64)
        absent = np.flatnonzero((of_row == group) & ~np.isin(keys, recorded))
        if len(absent):
            epoch, step = moment_of(keys[absent[0]])
            raise CoverageError(
                f"epoch {epoch}, step {step}, parameter {rows['parameter'][int(absent[0])]} (group {group}) has no "
                "learning rate: pass lr= to append, or append_step",
                kind="no-lr",
            )


def step_rows(selection: Selection, timelines: dict[int, Timeline]) -> dict[str, GradientRows]:
    """Return the leaving gradients of each parameter, weight 1, with the position of their step as bin."""
    return {
        name: GradientRows.of(
            rows, np.searchsorted(timelines[selection.known[name].group_id].keys, rows["key"].to_numpy())
        )
        for name, rows in by_parameter(selection.rows).items()
    }


def bin_edges(timelines: dict[int, Timeline], bins: int) -> np.ndarray:
    """Return the last moment of each bin but the last, so that every bin covers the same step length."""
    if not timelines or bins == 1:
        return np.zeros(0, np.int64)
    # The pushes of a bin are taken to come evenly over its length, so that bins of equal length err alike.
    timeline = longest(timelines)
    covered = np.cumsum(timeline.lengths(""))
    shares = covered[-1] * np.arange(1, bins) / bins
    edges: np.ndarray = timeline.keys[np.minimum(np.searchsorted(covered, shares), len(covered) - 1)]
    return edges


def longest(timelines: dict[int, Timeline]) -> Timeline:
    """Return the timeline that went farthest, which speaks for all where they have to be one."""
    return max(timelines.values(), key=lambda timeline: float(timeline.lengths("").sum()))
