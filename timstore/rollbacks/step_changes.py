"""What the samples that leave change in every step: norms where they are needed, and what g is made of."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow.compute
import torch

from timstore.database.identity import Identity
from timstore.database.snapshot import Snapshot
from timstore.records import Parameter
from timstore.rollbacks.clip_factors import Change, change_of, needs_dots, needs_norms
from timstore.rollbacks.gradient_blocks import Piece, by_parameter, pieces_of, rows_of
from timstore.rollbacks.plan import Sources
from timstore.rollbacks.request import Request
from timstore.rollbacks.selection import Selection, rest_of, whole_gradients
from timstore.rollbacks.streaming_sum import Budget, Readers, sums_by_bin
from timstore.rollbacks.timeline import Timeline


def changes_of(
    snapshot: Snapshot,
    request: Request,
    identity: Identity,
    selection: Selection,
    timelines: dict[int, Timeline],
    readers: Readers,
    budget: Budget,
    dtype: torch.dtype,
) -> dict[int, Change]:
    """Return how the consumed gradients of each group change.

    Cost: where steps were clipped, one more pass over their records: those that leave, if several do; all of them, if
    <g, h> was not recorded and every sample was.
    """
    leaving = selection.leaving
    rounds = leaving.in_rounds(timelines.values())
    wanted = np.zeros(len(leaving.keys), bool)
    for timeline in timelines.values():
        wanted |= needs_dots(timeline, leaving, rounds, request.denominator)
    if wanted.any():
        rest, held = rest_of(snapshot, request, identity, leaving.keys[wanted])
        if rest is not None:
            dot, norm, places = leaving.dot.copy(), leaving.norm.copy(), np.searchsorted(leaving.keys, held)
            dot[places], norm[places] = _inner_products(selection, rest, held, readers, budget, dtype)
            leaving = replace(leaving, dot=dot, norm=norm)
    needed = np.zeros(len(leaving.keys), bool)
    for timeline in timelines.values():
        needed |= needs_norms(timeline, leaving) & np.isnan(leaving.norm)
    if needed.any():
        norms = leaving.norm.copy()
        norms[needed] = _inner_products(selection, None, leaving.keys[needed], readers, budget, dtype)[1]
        leaving = replace(leaving, norm=norms)
    leaving = leaving.in_rounds(timelines.values())
    return {group: change_of(timeline, leaving, request.denominator) for group, timeline in timelines.items()}


def sources_of(
    snapshot: Snapshot,
    request: Request,
    identity: Identity,
    known: dict[str, Parameter],
    timelines: dict[int, Timeline],
    changes: dict[int, Change],
) -> tuple[dict[int, Change], Sources]:
    """Return where the whole gradients of the changed steps come from, and the changes that this allows.

    Where a step's gradient is not known its factors stay as they were; `Change.unknown` says so.
    """
    keys = np.unique(np.concatenate([timelines[group].keys[one.on_whole != 0] for group, one in changes.items()]))
    kept, rest = None, None
    kept_keys, rest_keys = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if len(keys):
        kept = whole_gradients(snapshot, identity.moment, keys)
        kept_keys = complete_steps(kept["key"].to_numpy(), known, timelines)
        kept = kept.filter(pyarrow.compute.is_in(kept["key"], pyarrow.array(kept_keys)))
        rest, rest_keys = rest_of(snapshot, request, identity, np.setdiff1d(keys, kept_keys))
    held = np.concatenate([kept_keys, rest_keys])
    settled = {
        group: one.without(
            (one.on_whole != 0) & ~np.isin(timelines[group].keys, held),
            timelines[group].ratio,
        )
        for group, one in changes.items()
    }
    return settled, Sources(kept, rest, kept_keys, rest_keys)


def complete_steps(keys: np.ndarray, known: dict[str, Parameter], timelines: dict[int, Timeline]) -> np.ndarray:
    """Return those steps of `keys` (one entry per step and parameter) that have every parameter that was active."""
    found, counts = np.unique(keys, return_counts=True)
    wanted = np.zeros(len(found), np.int64)
    for group, timeline in timelines.items():
        names = {name for name, parameter in known.items() if parameter.group_id == group}
        at = np.searchsorted(found, timeline.keys)
        for position, key, idle in zip(at.tolist(), timeline.keys.tolist(), timeline.idle, strict=True):
            if position < len(found) and found[position] == key:
                wanted[position] += len(names - idle)
    complete: np.ndarray = found[counts == wanted]
    return complete


def _inner_products(
    selection: Selection,
    rest: pyarrow.Table | None,
    keys: np.ndarray,
    readers: Readers,
    budget: Budget,
    dtype: torch.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (<g, h>, |h|) in each of these steps, over all parameters; g is the sum of what leaves and what stays.

    Args:
        rest: the gradients that stay; None where only |h| is wanted.
    """
    staying = {} if rest is None else by_parameter(rest)
    dots, squares = np.zeros(len(keys)), np.zeros(len(keys))

    def sums(rows: pyarrow.Table | None, piece: Piece) -> Iterator[tuple[int, torch.Tensor]]:
        if rows is None:
            return iter(())
        parts = rows_of(rows, np.searchsorted(keys, rows["key"].to_numpy()))
        return sums_by_bin(parts, piece, readers, budget.unit_bytes, dtype, torch.device("cpu"))

    mine = selection.rows.filter(pyarrow.compute.is_in(selection.rows["key"], pyarrow.array(keys)))
    for name, rows in by_parameter(mine).items():
        # Two sums, and what they are multiplied as, are alive at a time.
        for piece in pieces_of(selection.known[name], budget.sums_bytes // 3, dtype.itemsize):
            others = sums(staying.get(name), piece)
            number, other = next(others, (len(keys), None))
            for at, gone in sums(rows, piece):
                while number < at:
                    number, other = next(others, (len(keys), None))
                wide = gone.double()
                squares[at] += float(wide.square().sum())
                if number == at and other is not None:
                    dots[at] += float((wide * other).sum())
    return dots + squares, np.sqrt(squares)
