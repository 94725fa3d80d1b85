"""Waypoints: parameters of the model on its way, asked for the curvature that training met there."""

from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise

import numpy as np
import torch

from timstore.database.snapshot import Snapshot
from timstore.database.states import State
from timstore.format.segments import ByteCache
from timstore.rollbacks.filtering import Stretch
from timstore.rollbacks.plan import Plan, longest
from timstore.rollbacks.timeline import Moment, Timeline, moment_key, up_to
from timstore.rollbacks.vectors import Vector, Workspace

# At how many of them a probe is asked: eight are no better (docs/design/curvature.md).
_ASKED_AT = 3


def read_path(
    snapshot: Snapshot,
    cache: ByteCache,
    moment: Moment | None,
    plan: Plan,
    timelines: dict[int, Timeline],
    workspace: Workspace,
) -> list[Stretch]:
    """Return the stretches of a run up to a moment, each with the parameters of one of the waypoints that are kept.

    The vectors are the caller's. Without a waypoint the whole run is one stretch, for which the model speaks.
    """
    kept = snapshot.catalog.sql(
        f"SELECT DISTINCT epoch, step FROM states WHERE role = 'theta' AND rollback_id IS NULL AND {up_to(moment)}"
    ).fetchall()
    moments = dict(zip(_places(longest(timelines), kept), kept, strict=True))
    found: list[tuple[float, Vector | None]] = []
    for place in _chosen(moments):
        state = State.find(snapshot, cache, "theta", moment=moments[place])
        if workspace.sizes.keys() <= state.places.keys():
            found.append((place, _vector(state, plan, workspace)))
    found.append((1.0, None))
    edges = _edges([place for place, _ in found])
    return [Stretch(end - begin, vector) for (_, vector), (begin, end) in zip(found, pairwise(edges), strict=True)]


def _places(timeline: Timeline, moments: list[Moment]) -> list[float]:
    """Return after which share of the run's length moments are."""
    covered = np.concatenate([[0.0], np.cumsum(timeline.lengths(""))])
    keys = [moment_key(*one) for one in moments]
    shares = covered[np.searchsorted(timeline.keys, keys, side="right")] / (covered[-1] or 1.0)
    return [float(one) for one in shares]


def _chosen(places: Iterable[float]) -> tuple[float, ...]:
    """Return those, in order, that are nearest to the run's moments together with its end, by mean square."""

    def away(chosen: tuple[float, ...]) -> float:
        spoken = zip((*chosen, 1.0), pairwise(_edges((*chosen, 1.0))), strict=True)
        return sum((end - place) ** 3 + (place - begin) ** 3 for place, (begin, end) in spoken)

    inside = sorted(place for place in places if 0 < place < 1)
    return min(combinations(inside, min(len(inside), _ASKED_AT)), key=away)


def _edges(places: Sequence[float]) -> list[float]:
    """Return where the stretches of a run begin and end whose moments are nearest to each of some places."""
    return [0.0, *((one + other) / 2 for one, other in pairwise(places)), 1.0]


def _vector(state: State, plan: Plan, workspace: Workspace) -> Vector:
    vector = workspace.new()
    for block in workspace.blocks():
        width = plan.parameters[block.parameter].matrix_shape[1]
        numbers = torch.from_numpy(state.read(block.parameter, width, block.start, block.stop))
        vector.write(block.parameter, block.start, numbers.to(workspace.device, workspace.dtype))
    return vector
