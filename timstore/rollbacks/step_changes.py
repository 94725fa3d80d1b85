"""What the samples that leave change in every step: norms where they are needed, and what g is made of."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch

from timstore.records import Parameter
from timstore.rollbacks.clip_factors import StepChange, change_of, needs_dots, needs_norms
from timstore.rollbacks.gradient_blocks import GradientRows, Piece, by_parameter, pieces_of
from timstore.rollbacks.selection import Selection
from timstore.rollbacks.streaming_sum import Readers, sums_by_bin
from timstore.rollbacks.timeline import Timeline


@dataclass(frozen=True, eq=False, slots=True)
class Sources:
    """What the changed steps' whole gradients are made of.

    Attributes:
        whole: rows of whole gradients that the store keeps.
        whole_keys: the steps that those are of.
        rest: rows of the gradients that stay, in other steps, of which every sample was recorded.
    """

    whole: pa.Table | None
    whole_keys: np.ndarray
    rest: pa.Table | None


def changes_of(
    selection: Selection, timelines: dict[int, Timeline], readers: Readers, denominator: str, dtype: torch.dtype
) -> dict[int, StepChange]:
    """Return how the consumed gradients of each group change.

    Cost: where steps were clipped, one more pass over their records: those that leave, if several do; all of them, if
    <g, h> was not recorded and every sample was.
    """
    # First <g, h> where it may decide about clipping and nobody recorded it, |h| coming with it; then |h| alone where
    # several records of a step leave. One norm over several optimizers is over all that leaves them.
    leaving = selection.leaving
    rounds = leaving.in_rounds(timelines.values())
    wanted = np.zeros(len(leaving.keys), bool)
    for timeline in timelines.values():
        wanted |= needs_dots(timeline, leaving, rounds, denominator)
    if wanted.any():
        rest, keys = selection.rest_of(leaving.keys[wanted])
        if rest is not None:
            dot, norm, places = leaving.dot.copy(), leaving.norm.copy(), np.searchsorted(leaving.keys, keys)
            dot[places], norm[places] = _inner_products(selection, rest, keys, readers, dtype)
            leaving = replace(leaving, dot=dot, norm=norm)
    needed = np.zeros(len(leaving.keys), bool)
    for timeline in timelines.values():
        needed |= needs_norms(timeline, leaving) & np.isnan(leaving.norm)
    if needed.any():
        norm = leaving.norm.copy()
        norm[needed] = _inner_products(selection, None, leaving.keys[needed], readers, dtype)[1]
        leaving = replace(leaving, norm=norm)
    leaving = leaving.in_rounds(timelines.values())
    return {group: change_of(timeline, leaving, denominator) for group, timeline in timelines.items()}


def sources_of(
    selection: Selection, timelines: dict[int, Timeline], changes: dict[int, StepChange]
) -> tuple[dict[int, StepChange], Sources]:
    """Return the changes that are possible, and what the changed steps' whole gradients are made of.

    Where a step's gradient is not known its factors stay as they were; `StepChange.unknown` says so.
    """
    # b g is needed where b is not 0, of whatever there is: whole gradients are read before all records of a step are.
    changed = {group: change.on_whole != 0 for group, change in changes.items()}
    keys = np.unique(np.concatenate([timelines[group].keys[steps] for group, steps in changed.items()]))
    whole, rest = None, None
    whole_keys, rest_keys = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if len(keys):
        whole = selection.whole_gradients(keys)
        whole_keys = complete_steps(whole["key"].to_numpy(), selection.known, timelines)
        whole = whole.filter(pa.compute.is_in(whole["key"], pa.array(whole_keys)))
        rest, rest_keys = selection.rest_of(np.setdiff1d(keys, whole_keys))
    there = np.concatenate([whole_keys, rest_keys])
    possible = {
        group: change.without(changed[group] & ~np.isin(timelines[group].keys, there), timelines[group].ratio)
        for group, change in changes.items()
    }
    return possible, Sources(whole, whole_keys, rest)


def complete_steps(keys: np.ndarray, known: dict[str, Parameter], timelines: dict[int, Timeline]) -> np.ndarray:
    """Return those steps of `keys` (one entry per step and parameter) that have every parameter that was active."""
    # A step is complete where as many parameters have an entry as were not idle in it.
    steps, counts = np.unique(keys, return_counts=True)
    wanted = np.zeros(len(steps), np.int64)
    for group, timeline in timelines.items():
        names = {name for name, parameter in known.items() if parameter.group_id == group}
        places = np.searchsorted(steps, timeline.keys)
        for place, key, idle in zip(places.tolist(), timeline.keys.tolist(), timeline.idle, strict=True):
            if place < len(steps) and steps[place] == key:
                wanted[place] += len(names - idle)
    complete: np.ndarray = steps[counts == wanted]
    return complete


def _inner_products(
    selection: Selection, rest: pa.Table | None, keys: np.ndarray, readers: Readers, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Return (<g, h>, |h|) in each of these steps, over all parameters.

    Args:
        rest: the gradients that stay; None where only |h| is wanted.
    """
    staying = {} if rest is None else by_parameter(rest)
    dots, squares = np.zeros(len(keys)), np.zeros(len(keys))

    def sums(rows: pa.Table | None, piece: Piece) -> Iterator[tuple[int, torch.Tensor]]:
        if rows is None:
            return iter(())
        by_step = GradientRows.of(rows, np.searchsorted(keys, rows["key"].to_numpy()))
        return sums_by_bin(by_step, piece, readers, dtype, torch.device("cpu"))

    mine = selection.rows.filter(pa.compute.is_in(selection.rows["key"], pa.array(keys)))
    for name, rows in by_parameter(mine).items():
        # Two sums, and what they are multiplied as, are alive at a time.
        for piece in pieces_of(selection.known[name], readers.memory.sums_bytes // 3, dtype.itemsize):
            others = sums(staying.get(name), piece)
            number, other = next(others, (len(keys), None))
            for step, gone in sums(rows, piece):
                while number < step:
                    number, other = next(others, (len(keys), None))
                wide = gone.double()
                squares[step] += float(wide.square().sum())
                if number == step and other is not None:
                    dots[step] += float((wide * other).sum())
    # g = (g - h) + h, so that <g, h> = <g - h, h> + |h|^2.
    return dots + squares, np.sqrt(squares)
