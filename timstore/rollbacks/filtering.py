"""The probe filter: let the other samples' gradients answer, by the model's own curvature on a probe.

    d = s x(1),      x' = -(A(t) + c) x + y(t),      x(0) = 0

over the run's length t from 0 to 1, where s is the square root of that length (one number per parameter), A = s H s
with the Gauss-Newton matrix H of the probe's mean loss, and y what the samples pushed. It is training's linear
response: steep directions, where later training has undone most of a sample's push already, are damped, flat ones pass.

Source: docs/design/curvature.md.
"""

import math
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, combinations, pairwise
from typing import Any

import numpy as np
import torch

from timstore.database.snapshot import Snapshot
from timstore.database.states import State
from timstore.format.segments import ByteCache
from timstore.rollbacks.curvature import GaussNewton
from timstore.rollbacks.krylov import Space, eigen, krylov, random_signs
from timstore.rollbacks.plan import Plan, longest
from timstore.rollbacks.probe import Outcome, Probe, Room
from timstore.rollbacks.timeline import Moment, Timeline, moment_key, up_to
from timstore.rollbacks.vectors import Vector, Workspace

# At how many waypoints a probe is asked: eight are no better (docs/design/curvature.md).
_WAYPOINTS = 3
# Positions that tell enough of a stretch's curvature: sharing out rows of text costs nothing, of digits it does
# (docs/design/curvature.md).
_ENOUGH = 150
# Where c is looked for, and by which factors nearer.
_DAMPINGS, _NEARER = (0.0, *(4.0**power for power in range(-5, 7))), (2.0, 2**0.5, 2**0.25)


@dataclass(frozen=True, eq=False, slots=True)
class Stretch:
    """A part of the run whose curvature is taken to be one.

    Attributes:
        share: of the run's length.
        parameters: at a waypoint in it; the model's own when None.
    """

    share: float
    parameters: Vector | None = None


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
    moments = snapshot.catalog.sql(
        f"SELECT DISTINCT epoch, step FROM states WHERE role = 'theta' AND rollback_id IS NULL AND {up_to(moment)}"
    ).fetchall()
    timeline = longest(timelines)
    covered = np.concatenate([[0.0], np.cumsum(timeline.lengths(""))])
    keys = [moment_key(*one) for one in moments]
    # After which share of the run's length each waypoint is.
    places = (covered[np.searchsorted(timeline.keys, keys, side="right")] / (covered[-1] or 1.0)).tolist()
    by_place = dict(zip(places, moments, strict=True))
    speaking: list[tuple[float, Vector | None]] = []
    for place in _best_spread(by_place):
        state = State.find(snapshot, cache, "theta", moment=by_place[place])
        if workspace.sizes.keys() <= state.places.keys():
            speaking.append((place, _vector(state, plan, workspace)))
    speaking.append((1.0, None))
    edges = pairwise(_edges([place for place, _ in speaking]))
    return [Stretch(end - begin, vector) for (_, vector), (begin, end) in zip(speaking, edges, strict=True)]


def _best_spread(places: Iterable[float]) -> tuple[float, ...]:
    """Return those, in order, that are nearest to the run's moments together with its end, by mean square."""

    # A place speaks for the moments from begin to end around it: the integral of (t - place)^2 over them is a third of
    # the sum of the cubes.
    def away(chosen: tuple[float, ...]) -> float:
        spoken = zip((*chosen, 1.0), pairwise(_edges((*chosen, 1.0))), strict=True)
        return sum((end - place) ** 3 + (place - begin) ** 3 for place, (begin, end) in spoken)

    inside = sorted(place for place in places if 0 < place < 1)
    return min(combinations(inside, min(len(inside), _WAYPOINTS)), key=away)


def _edges(places: Sequence[float]) -> list[float]:
    """Return where the stretches of a run begin and end whose moments are nearest to each of some places."""
    return [0.0, *((place + following) / 2 for place, following in pairwise(places)), 1.0]


def _vector(state: State, plan: Plan, workspace: Workspace) -> Vector:
    vector = workspace.new()
    for block in workspace.blocks():
        width = plan.parameters[block.parameter].matrix_shape[1]
        numbers = torch.from_numpy(state.read(block.parameter, width, block.start, block.stop))
        vector.write(block.parameter, block.start, numbers.to(workspace.device, workspace.dtype))
    return vector


@dataclass(frozen=True, slots=True)
class Way:
    """What came of one half's curvature and the other's divergence.

    Attributes:
        products: with the first half's curvature, of all stretches together.
        damping: c, in units of one over the run's length.
        expected, seen: divergence of the other half's answers by that curvature, and as it is.
        spectrum: (value, weight) pairs of M's eigenvalues by the first half.
        positions: for which the model answers, per row of the first half.
    """

    products: int
    damping: float
    expected: float
    seen: float
    spectrum: Sequence[tuple[float, float]]
    positions: float


@dataclass(frozen=True, eq=False, slots=True)
class Filtered:
    """What the filter returns.

    Attributes:
        moved: |first order - delta| / |delta|, how much curvature mattered.
        apart: how far the changes of either way are from delta, their mean, over its norm.
        ways: one for each half; a single one of a probe of one row.
    """

    delta: Vector
    moved: float
    apart: float
    ways: tuple[Way, ...]


def probe_filter(
    model: torch.nn.Module,
    increments: Sequence[Vector],
    lengths: Sequence[Mapping[str, float]],
    probe: Probe,
    workspace: Workspace,
    *,
    depth: int,
    path: Sequence[Stretch] = (Stretch(1.0),),
    preconditioner: Vector | None = None,
    decays: Mapping[str, float] | None = None,
    judge: Probe | None = None,
    keep_bytes: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Filtered:
    """Return the change that remains when the other samples have answered: the mean of both ways to halve the probe.

    Cost: `depth` products with each half of the probe for each bin and once more, and as many workspace vectors; up to
    nineteen forward passes of each half, or of the judge, and one before. The stretches share a half's rows, where
    those have positions enough; otherwise each of them asks about all.

    Args:
        increments: first-order change of each time bin, in order of time; they are used up.
        lengths: of each bin, parameter to its step length tau; a parameter that has none passes. The bins' shares of
            the whole are taken to be the same for all parameters.
        path: the run's stretches, in order of time; the last one's parameters are the model's.
        preconditioner: what multiplies tau element by element (Adam); 1 when None.
        decays: parameter to a weight decay that is not in the increments, and bends as curvature does.
        judge: rows to hold the change against, like the training's, instead of the other half: then all of the probe is
            one half.
        keep_bytes: for graphs of the probe's batches that are kept between products, which halves their time, and then
            for answers before the change.
        advance: called after every product.
    """
    # Training moves the parameters by -H (theta - optimum) over a length tau. A change d that the samples' leaving
    # makes is answered like any other: d' = -tau H d + push. With d = s x and s = sqrt(tau) that is x' = -s H s x +
    # push / s, whose matrix is symmetric. For Adam s differs from element to element: the step length times what Adam
    # multiplied a gradient by, so that the filter works in the coordinates in which Adam's steps are plain ones.
    pushes = _Pushes(increments, lengths, preconditioner, workspace)
    first, second = probe.parts(2) if judge is None else (probe, judge)
    one_way = judge is not None or first is second
    halves = [(first, second)] if one_way else [(first, second), (second, first)]
    deltas, ways = [], []
    with probe.undisturbed():
        for own, others in halves:
            space, positions = _space_of(
                model, own, pushes, path, decays or {}, depth=depth, room=Room(keep_bytes), advance=advance
            )
            changes = _Changes(pushes, path, space)
            delta, way = changes.least(Outcome(model, others, room=Room(keep_bytes)), positions)
            space.free()
            deltas.append(delta)
            ways.append(way)
    delta, apart = _mean(deltas)
    pushes.first_order.add(delta, -1.0)
    moved, norm = pushes.first_order.norm(), delta.norm()
    for vector in (*increments, pushes.first_order):
        vector.free()
    return Filtered(delta, moved / norm if norm else 0.0, apart / norm if norm else 0.0, tuple(ways))


class _Pushes:
    """What is to be answered.

    Attributes:
        each: of each bin, its first-order change over s; 0 where an element, or its parameter, has no length.
        first_order: the sum of the changes.
        shares: of each bin, of the run's length.
        passing: parameters without a length: nothing answers their change.
    """

    def __init__(
        self,
        increments: Sequence[Vector],
        lengths: Sequence[Mapping[str, float]],
        preconditioner: Vector | None,
        workspace: Workspace,
    ) -> None:
        self.each, self.first_order, self._preconditioner = increments, workspace.new(), preconditioner
        # In each time bin y is the bin's first-order change over s, evenly over the bin's share of the length.
        self._taus = {name: sum(taus[name] for taus in lengths) for name in workspace.sizes}
        self.passing = frozenset(name for name, tau in self._taus.items() if tau <= 0)
        sums = torch.tensor([sum(taus.values()) for taus in lengths], dtype=torch.float64, device="cpu")
        shares = sums / sums.sum() if sums.sum() else torch.full_like(sums, 1 / len(sums))
        self.shares: list[float] = shares.tolist()
        for increment in increments:
            self.first_order.add(increment)
            for name in workspace.sizes:
                size, numbers = self.scale(name), increment.read(name)
                size = size if isinstance(size, torch.Tensor) else torch.full_like(numbers, size)
                increment.write(name, 0, torch.where(size > 0, numbers / size, 0.0))

    def scale(self, name: str) -> Any:
        """Return s of a parameter: one number for all its elements, or one each."""
        if self._preconditioner is None:
            return self._taus[name] ** 0.5
        return (self._preconditioner.read(name) * self._taus[name]).sqrt()


def _space_of(
    model: torch.nn.Module,
    own: Probe,
    pushes: _Pushes,
    path: Sequence[Stretch],
    decays: Mapping[str, float],
    *,
    depth: int,
    room: Room,
    advance: Callable[[], None],
) -> tuple[Space, float]:
    """Return (the space of the pushes and a random vector, positions per row) by the curvature of `own`."""
    workspace = pushes.first_order.workspace

    def curvatures_of(parts: Sequence[Probe]) -> list[GaussNewton]:
        asked = zip(parts, path, strict=True)
        return [GaussNewton(model, [*workspace.sizes], part, instead=one.parameters, room=room) for part, one in asked]

    parts = own.parts(len(path))
    curvatures = curvatures_of(parts)
    if len(path) > 1 and sum(curvature.positions for curvature in curvatures) < _ENOUGH * len(path):
        parts = [own] * len(path)
        curvatures = curvatures_of(parts)
    positions = sum(curvature.positions for curvature in curvatures) / sum(part.sequences for part in parts)

    def products(vector: Vector) -> Iterator[dict[str, torch.Tensor]]:
        """Yield s H s of each stretch, with the decays that bend as curvature does."""
        scaled = {name: vector.read(name) * pushes.scale(name) for name in workspace.sizes}
        for curvature in curvatures:
            bent = curvature.product(scaled)
            for name, decay in decays.items():
                bent[name] = bent[name] + decay * scaled[name]
            yield {name: numbers * pushes.scale(name) for name, numbers in bent.items()}
        advance()

    starts = [workspace.new() for _ in pushes.each]
    for start, push in zip(starts, pushes.each, strict=True):
        start.add(push)
    shares = [stretch.share for stretch in path]
    return krylov([*starts, random_signs(workspace)], products, shares, workspace, depth), positions


class _Changes:
    """The change that is left, as a function of the damping c."""

    def __init__(self, pushes: _Pushes, path: Sequence[Stretch], space: Space) -> None:
        self._pushes, self._space = pushes, space
        self._legs = list(_legs(pushes.shares, [stretch.share for stretch in path]))
        self._curvatures = [eigen(matrix) for matrix in space.matrices]
        self._values, self._vectors = eigen(space.mean)
        *self._starts, self._signs = space.starts.T

    def least(self, outcome: Outcome, positions: float) -> tuple[Vector, Way]:
        """Return the change that has the least of what the right one has the least of, and how it was found."""
        # A is known in a small space, and from half of the probe. It misses what other rows have, what the run's
        # curvature had in other directions, and what it becomes far from the model. All of this is seen at once where
        # the change is tried on the other half: the mean divergence D of its answers before and after should be
        # x' A(1) x / 2. With x_0 the change without damping and M the mean of A over the run, nearly the one that knows
        # the rest as well has the least
        #     D(x) - x' A(1) x / 2  +  (x - x_0)' phi(M)^-1 (x - x_0) / 2
        # since phi(M) is what turned the pushes into x_0. The damping is the c, the same for all directions, whose x
        # has less of it than any other. (It is not the curvature that is missing along x: where few directions hold
        # most of that, it is large, and would take the change back in all the others.)
        delta = self._pushes.first_order.workspace.new()

        @cache
        def seen(damping: float) -> float:
            self._write(damping, delta)
            return outcome.divergence(delta)

        @cache
        def loss(damping: float) -> float:
            taken_back = self._vectors.T @ (self._left(damping) - self._left(0.0))
            answered = float((taken_back.square() / phi(self._values)).sum()) / 2
            total = seen(damping) - self._expected(damping) + answered
            return total if math.isfinite(total) else math.inf

        # There may be more than one valley: first a wide look, then nearer to the best.
        looked = list(_DAMPINGS)
        for factor in _NEARER:
            best = min(looked, key=loss)
            looked += [best / factor, best * factor]
        damping = min(looked, key=loss)
        self._write(damping, delta)
        # Signs z have z' f(M) z as the trace of f(M), in the mean.
        weights = (self._vectors.T @ self._signs).square().tolist()
        spectrum = list(zip(self._values.tolist(), weights, strict=True))
        products = len(self._space.basis)
        return delta, Way(products, damping, self._expected(damping), seen(damping), spectrum, positions)

    def _expected(self, damping: float) -> float:
        """Return x' A(1) x / 2."""
        left = self._left(damping)
        return float(left @ self._space.matrices[-1] @ left) / 2

    def _write(self, damping: float, result: Vector) -> None:
        weights = self._left(damping).tolist()
        for name in result.workspace.sizes:
            if name in self._pushes.passing:
                result.write(name, 0, self._pushes.first_order.read(name))
                continue
            total = torch.zeros_like(result.read(name))
            for vector, weight in zip(self._space.basis, weights, strict=True):
                total.add_(vector.read(name), alpha=weight)
            result.write(name, 0, total * self._pushes.scale(name))

    def _left(self, damping: float) -> torch.Tensor:
        """Return x in the space's basis, (k,)."""
        left = torch.zeros_like(self._signs)
        # A is taken to be constant in each stretch of the run, as it was at a waypoint there, and at the end as it is
        # at the model; y is constant in each bin. Over a length f in which neither changes, x' = -(A + c) x + y is
        # solved by
        #     x  becomes  exp(-(A + c) f) x + phi((A + c) f) f y,      phi(z) = (1 - exp(-z)) / z
        # and f y is the part of the bin's push. A function of a symmetric matrix is that of its eigenvalues.
        for number, stretch, length, part in self._legs:
            values, vectors = self._curvatures[stretch]
            bent = (values + damping) * length
            pushed = vectors.T @ self._starts[number] * part
            left = vectors @ (torch.exp(-bent) * (vectors.T @ left) + phi(bent) * pushed)
        return left


def _legs(bins: Sequence[float], stretches: Sequence[float]) -> Iterator[tuple[int, int, float, float]]:
    """Yield a run's legs in order of time, each in one bin and one stretch, from the shares of both.

    A leg is (number of the bin, number of the stretch, its share of the run, its share of the bin).
    """
    ends, begin = list(accumulate(stretches)), 0.0
    for number, share in enumerate(bins):
        edges = [begin, *(end for end in ends[:-1] if begin < end < begin + share), begin + share]
        for first, last in pairwise(edges):
            stretch = min(bisect(ends, (first + last) / 2), len(ends) - 1)
            yield number, stretch, last - first, (last - first) / share if share else 1.0
        begin += share


def _mean(vectors: Sequence[Vector]) -> tuple[Vector, float]:
    """Return the mean of one or two vectors, written into the first, and how far they are from it."""
    mean, apart = vectors[0], 0.0
    for other in vectors[1:]:
        mean.add(other)
        mean.scale(0.5)
        other.add(mean, -1.0)
        apart = other.norm()
        other.free()
    return mean, apart


def phi(values: torch.Tensor) -> torch.Tensor:
    """Return (1 - exp(-x)) / x of every element, x >= 0."""
    # exp(-x) is 1 - x + x^2 / 2 - ..., so that this is 1 - x / 2 near 0, where the fraction is 0 / 0.
    small = values < 1e-8
    return torch.where(small, 1 - values / 2, -torch.expm1(-values) / torch.where(small, 1.0, values))
