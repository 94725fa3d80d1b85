"""What the samples that leave change in every step: norms where they are needed, and what g is made of."""

from dataclasses import replace

import numpy as np
import pyarrow.compute
import torch

from timstore.records import Parameter
from timstore.rollbacks.consumed import Change, change_of, needs_norms
from timstore.rollbacks.engine import Budget, Readers, sums_by_bin
from timstore.rollbacks.loading import by_parameter, pieces_of, rows_of
from timstore.rollbacks.plan import Sources
from timstore.rollbacks.request import Request
from timstore.rollbacks.selection import Selection, rest_of, whole_gradients
from timstore.rollbacks.timeline import Moment, Timeline
from timstore.snapshot import Snapshot


def changes_of(
    selection: Selection,
    timelines: dict[int, Timeline],
    denominator: str,
    readers: Readers,
    budget: Budget,
    dtype: torch.dtype,
) -> dict[int, Change]:
    """Return how the consumed gradients of each group change.

    Cost: where steps were clipped and several of their samples leave, one more pass over those records.
    """
    leaving = selection.leaving
    needed = np.zeros(len(leaving.keys), bool)
    for timeline in timelines.values():
        needed |= needs_norms(timeline, leaving)
    if needed.any():
        norms = leaving.norm.copy()
        norms[needed] = _norms(selection, leaving.keys[needed], readers, budget, dtype)
        leaving = replace(leaving, norm=norms)
    return {group: change_of(timeline, leaving, denominator) for group, timeline in timelines.items()}


def sources_of(
    snapshot: Snapshot,
    request: Request,
    moment: Moment | None,
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
        kept = whole_gradients(snapshot, moment, keys)
        kept_keys = complete_steps(kept["key"].to_numpy(), known, timelines)
        kept = kept.filter(pyarrow.compute.is_in(kept["key"], pyarrow.array(kept_keys)))
        rest, rest_keys = rest_of(snapshot, request, moment, np.setdiff1d(keys, kept_keys))
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


def _norms(
    selection: Selection,
    keys: np.ndarray,
    readers: Readers,
    budget: Budget,
    dtype: torch.dtype,
) -> np.ndarray:
    """Return the norm, over all parameters, of the sum of the leaving gradients in each of these steps."""
    rows = selection.rows.filter(pyarrow.compute.is_in(selection.rows["key"], pyarrow.array(keys)))
    squares = np.zeros(len(keys))
    for name, mine in by_parameter(rows).items():
        parts = rows_of(mine, np.searchsorted(keys, mine["key"].to_numpy()))
        for piece in pieces_of(selection.known[name], budget.sums_bytes, dtype.itemsize):
            for number, total in sums_by_bin(parts, piece, readers, budget.unit_bytes, dtype, torch.device("cpu")):
                squares[number] += float(total.double().square().sum())
    return np.sqrt(squares)
