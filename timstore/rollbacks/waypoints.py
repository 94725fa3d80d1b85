"""Waypoints: parameters of the model on its way, asked for the curvature that training met there."""

from collections.abc import Mapping

import numpy as np
import torch

from timstore.format.cache import ByteCache
from timstore.rollbacks.filtering import Stretch
from timstore.rollbacks.plan import Plan, longest
from timstore.rollbacks.timeline import Moment, Timeline, moment_key, up_to
from timstore.rollbacks.vectors import Vector, Workspace
from timstore.snapshot import Snapshot
from timstore.states import State

# Where in the run's length a waypoint speaks for the most: the middles of three of four stretches, and the model itself
# speaks for the fourth. Eight stretches are no better, and the rows of a probe are shared among them.
_WANTED = (1 / 8, 3 / 8, 5 / 8)


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
    chosen = _chosen(dict(zip(_places(longest(timelines), kept), kept, strict=True)))
    found: list[tuple[float, Vector | None]] = []
    for place, at in chosen.items():
        state = State.find(snapshot, cache, "theta", moment=at)
        if workspace.sizes.keys() <= state.places.keys():
            found.append((place, _vector(state, plan, workspace)))
    found.append((1.0, None))
    places = np.array([place for place, _ in found])
    edges = np.concatenate([[0.0], (places[1:] + places[:-1]) / 2, [1.0]])
    return [Stretch(float(share), vector) for share, (_, vector) in zip(np.diff(edges), found, strict=True)]


def _places(timeline: Timeline, moments: list[Moment]) -> list[float]:
    """Return after which share of the run's length moments are."""
    covered = np.concatenate([[0.0], np.cumsum(timeline.lengths(""))])
    keys = [moment_key(*one) for one in moments]
    shares = covered[np.searchsorted(timeline.keys, keys, side="right")] / (covered[-1] or 1.0)
    return [float(one) for one in shares]


def _chosen(places: Mapping[float, Moment]) -> dict[float, Moment]:
    """Return those nearest to where they speak for the most, in order of time."""
    inside = [place for place in places if 0 < place < 1]
    nearest = {min(inside, key=lambda place: abs(place - wanted)) for wanted in _WANTED if inside}
    return {place: places[place] for place in sorted(nearest)}


def _vector(state: State, plan: Plan, workspace: Workspace) -> Vector:
    vector = workspace.new()
    for block in workspace.blocks():
        width = plan.parameters[block.parameter].matrix_shape[1]
        numbers = torch.from_numpy(state.read(block.parameter, width, block.start, block.stop))
        vector.write(block.parameter, block.start, numbers.to(workspace.device, workspace.dtype))
    return vector
