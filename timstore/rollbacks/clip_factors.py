"""How the gradient that a step consumed would have been without the samples that leave.

g is the accumulated gradient, h what leaves of it. Everything in the units of the records, a GradScaler's scale
included. Source: docs/design/rollback.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from timstore.errors import CoverageError
from timstore.rollbacks.timeline import Timeline, moment_of

# torch clips by max_norm / (norm + this), at most 1.
_EPSILON = 1e-6


@dataclass(frozen=True, eq=False, slots=True)
class Leaving:
    """What leaves the steps that are touched, in order of time; arrays of shape (T,).

    Attributes:
        keys: `moment_key` of each step.
        samples, tokens: how many leave, a sample as often as it came; tokens are NaN where unknown.
        records: how many records that is.
        dot: <g, h>, NaN where unknown.
        norm: |h|; of several records it is NaN until it was computed.
        largest: the sum of the records' norms, which |h| cannot be above.
    """

    keys: np.ndarray
    samples: np.ndarray
    tokens: np.ndarray
    records: np.ndarray
    dot: np.ndarray
    norm: np.ndarray
    largest: np.ndarray

    def at(self, keys: np.ndarray) -> "Leaving":
        """Return what leaves at each of these steps, zeros where nothing does."""
        places = np.searchsorted(keys, self.keys)
        there = (places < len(keys)) & (keys[np.minimum(places, len(keys) - 1)] == self.keys)
        columns = {name: np.zeros(len(keys)) for name in self.__dataclass_fields__}
        for name, column in columns.items():
            column[places[there]] = getattr(self, name)[there]
        return replace(self, **{**columns, "keys": keys})

    def in_rounds(self, timelines: Iterable[Timeline]) -> "Leaving":
        """Return what leaves whole rounds, at every step of each."""
        groups = list(timelines)
        keys, places = np.unique(np.concatenate([one.keys for one in groups]), return_index=True)
        first = np.searchsorted(keys, np.concatenate([one.rounds for one in groups])[places])
        if np.array_equal(keys[first], keys):
            return self
        own = self.at(keys)

        # The parameters of a round's optimizers make one gradient: inner products and squares add up over them, while
        # its samples are the same ones in each.
        def total(column: np.ndarray) -> np.ndarray:
            sums: np.ndarray = np.bincount(first, column, len(keys))[first]
            return sums

        def most(column: np.ndarray) -> np.ndarray:
            largest = np.zeros(len(keys))
            with np.errstate(invalid="ignore"):
                np.maximum.at(largest, first, column)
            return largest[first]

        return Leaving(
            keys=keys,
            samples=most(own.samples),
            tokens=most(own.tokens),
            records=total(own.records),
            dot=total(own.dot),
            norm=np.sqrt(total(own.norm**2)),
            largest=total(own.largest),
        )


@dataclass(frozen=True, eq=False, slots=True)
class StepChange:
    """How each step's consumed gradient changes; arrays of shape (T,).

    Attributes:
        on_removed, on_whole: a and b.
        emptied: steps of which every sample leaves; they are taken with a gradient of zero.
        unknown: steps whose factors would have changed by what was not recorded; they stay there.
        clipped: whether any step was clipped.
    """

    on_removed: np.ndarray
    on_whole: np.ndarray
    emptied: np.ndarray
    unknown: np.ndarray
    clipped: bool

    def without(self, unknown: np.ndarray, ratio: np.ndarray) -> "StepChange":
        """Leave the factors of some steps as they were, since g is not known there."""
        # With b = 0 the change is -c h, for which g is not needed.
        return replace(
            self,
            on_removed=np.where(unknown, ratio, self.on_removed),
            on_whole=np.where(unknown, 0.0, self.on_whole),
            unknown=self.unknown | unknown,
        )


def needs_dots(timeline: Timeline, leaving: Leaving, rounds: Leaving, denominator: str) -> np.ndarray:
    """Say, for each step of `leaving`, whether its clip factor may change by an unknown <g, h>; shape of its keys.

    Args:
        rounds: what leaves whole rounds.
    """
    places, clips = _clipped_places(timeline, leaving)
    bounds, _ = clip_bounds(timeline)
    left = rounds.at(timeline.keys)
    # |g - h| <= |g| + |h|: where even that is not clipped, the product decides nothing.
    largest = (timeline.grad_norm + left.largest) / timeline.amp_scale
    reachable = _shrunk(timeline, left) & ~(_mean_factor(timeline, left, denominator) * largest <= bounds)
    needed: np.ndarray = clips & np.isnan(leaving.dot) & reachable[places]
    return needed


def needs_norms(timeline: Timeline, leaving: Leaving) -> np.ndarray:
    """Say, for each step of `leaving`, whether |h| of its several records is needed; shape of its keys."""
    needed: np.ndarray = (leaving.records > 1) & _clipped_places(timeline, leaving)[1] & ~np.isnan(leaving.dot)
    return needed


def _clipped_places(timeline: Timeline, leaving: Leaving) -> tuple[np.ndarray, np.ndarray]:
    """Return where each step of `leaving` is in the timeline, and whether it is there and clipping may change it."""
    bounds, known = clip_bounds(timeline)
    places = np.minimum(np.searchsorted(timeline.keys, leaving.keys), len(timeline.keys) - 1)
    return places, (timeline.keys[places] == leaving.keys) & (known and bool(np.isfinite(bounds).any()))


def change_of(timeline: Timeline, leaving: Leaving, denominator: str) -> StepChange:
    """Return how the consumed gradients of a group change.

    Args:
        denominator: `kept`, or `renormalised`: the mean is taken over the samples (tokens) that stay.
    """
    # With c the factor between accumulated and consumed, the step consumed c g. Without the samples it would have
    # consumed a (g - h), so that what it consumed changes by
    #     a (g - h) - c g  =  -(a h - b g),      b = a - c
    # a holds the factor of a mean that is taken again over fewer samples, and the clip factor that the smaller gradient
    # would have had. That follows from its norm, which is known without the gradient:
    #     |g - h|^2  =  |g|^2 - 2 <g, h> + |h|^2
    left, ratio, scale = leaving.at(timeline.keys), timeline.ratio, timeline.amp_scale
    touched, shrunk = left.records > 0, _shrunk(timeline, left)
    again = _mean_factor(timeline, left, denominator)
    bounds, known = clip_bounds(timeline)
    clips = np.isfinite(bounds)
    with np.errstate(invalid="ignore"):
        # A GradScaler had multiplied all of it by `scale`, and is undone before clipping. A mean over fewer samples is
        # `again` times as large, and torch would have clipped that to the bound.
        largest = (timeline.grad_norm + left.largest) / scale
        square = timeline.grad_norm**2 - 2 * left.dot + left.norm**2
        norm = np.where(touched, np.sqrt(np.maximum(square, 0.0)), timeline.grad_norm) / scale
        # What can never be clipped needs no norm.
        norm = np.where(np.isnan(norm) & (again * largest <= bounds), 0.0, norm)
        factor = np.where(clips, np.minimum(1.0, bounds / (again * norm + _EPSILON)), ratio * scale)
    # Nor can it be calculated for several bounds, or a scale that nobody told. Then it stays.
    unknown = shrunk & (np.isnan(factor) | (not known))
    factor = np.where(unknown, ratio * scale, factor)
    on_removed = np.where(shrunk, factor * again / scale, ratio)
    # A factor that is the old one but for rounding is the old one: whole gradients need not be read for it.
    on_whole = np.where(np.abs(on_removed - ratio) > 1e-13 * np.abs(ratio), on_removed - ratio, 0.0)
    clipped = bool((ratio * scale < 1).any())
    return StepChange(np.where(on_whole == 0, ratio, on_removed), on_whole, touched & ~shrunk, unknown, clipped)


def clip_bounds(timeline: Timeline) -> tuple[np.ndarray, bool]:
    """Return (the norm that each step was clipped to, Inf without clipping; whether that can be told)."""
    factor = timeline.ratio * timeline.amp_scale
    measured = timeline.grad_norm > 0
    clipped = measured & (factor < 1 - 1e-6)
    if not clipped.any():
        # Some other factor than that of clipping is at work, or none.
        return np.full(len(factor), np.inf), bool(np.all(np.abs(factor - 1) <= 1e-6)) or not measured.any()
    # A clipped step has factor = bound / (|g| + epsilon), which tells its bound; the others are taken to have the same.
    own = factor * (timeline.grad_norm / timeline.amp_scale + _EPSILON)
    common = float(np.median(own[clipped]))
    agree = bool(np.all(np.abs(own[clipped] / common - 1) < 1e-3)) and not bool((factor > 1 + 1e-3).any())
    return np.where(clipped, own, common), agree


def _shrunk(timeline: Timeline, left: Leaving) -> np.ndarray:
    """Say of each step whether some of its samples leave, and others stay."""
    shrunk: np.ndarray = (left.records > 0) & ~(left.samples >= timeline.samples)
    return shrunk


def _mean_factor(timeline: Timeline, left: Leaving, denominator: str) -> np.ndarray:
    """Return what a mean is multiplied by when it is taken by this denominator, for each step."""
    shrunk = _shrunk(timeline, left)
    if denominator == "kept":
        return np.ones(len(shrunk))
    # A mean over N is a sum over N; without n of them it is the sum over N - n: N / (N - n) times as large.
    by_tokens = np.array([unit == "tokens" for unit in timeline.mean_over])
    whole = np.where(by_tokens, timeline.tokens, timeline.samples)
    gone = np.where(by_tokens, left.tokens, left.samples)
    missing = shrunk & (np.isnan(whole) | np.isnan(gone) | (whole <= 0))
    if missing.any():
        epoch, step = moment_of(timeline.keys[np.flatnonzero(missing)[0]])
        raise CoverageError(
            f"epoch {epoch}, step {step}: what the mean divided by was not recorded, so it cannot be taken over the "
            "samples that stay; pass sample_ids= (or tokens=) to append_step, or use denominator='kept'",
            kind="no-denominator",
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(shrunk & (gone < whole), whole / (whole - gone), 1.0)
