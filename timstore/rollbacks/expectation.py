"""How far from the retrained model a rollback is expected to end, and how far retraining ends from itself.

Both are KL(retrained || other), means over positions, and neither needs a retraining.

Source: docs/design/curvature.md, "The meter".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from timstore.rollbacks.filtering import Way, phi
from timstore.rollbacks.gradient_blocks import GradientRows, by_parameter
from timstore.rollbacks.report import Estimate, ExpectedKL
from timstore.rollbacks.selection import Selection
from timstore.rollbacks.timeline import Timeline, moment_key


def order_noise(ways: Sequence[Way], timeline: Timeline) -> float | None:
    """Return KL(one order || another) on data that stays; None where it is not known how many rows a step drew."""
    lengths = timeline.lengths("")
    if not lengths.sum() or not (timeline.samples > 0).all():
        return None
    # Two runs that draw the same rows in different orders end apart. In the filter's coordinates and along an
    # eigenvector of the probe's curvature A with value v, the gradient of a step at share r_t of the run before its end
    # leaves
    #     a_t  =  f_t phi(v f_t) exp(-v r_t),      f_t the step's own share of the run
    # of itself. A model whose answers are as likely as it says has position gradients with covariance A, so that the
    # mean of a batch of B rows with K positions each has v / (B K) along the eigenvector. An epoch draws every row
    # once: what all steps of it share does not depend on the order, and its mean falls out of a_t. Two runs of
    # independent orders are then 2 v / (B K) sum (a_t - mean a)^2 apart, in square, and KL is v / 2 times that:
    #     noise  =  sum over v of  v^2 / (B K) sum over epochs, and over their steps, of (a_t - mean a)^2
    # with no number in it that was fitted. The sum over eigenvalues is a trace, read off the space of a random vector.
    shares = lengths / lengths.sum()
    later = 1 - np.cumsum(shares)
    epochs = np.unique(timeline.keys // moment_key(1, 0), return_inverse=True)[1]
    steps = np.bincount(epochs)

    def variance(value: float) -> float:
        left = shares * phi(torch.from_numpy(value * shares)).numpy() * np.exp(-value * later)
        common = np.bincount(epochs, left) / steps
        return float(((left - common[epochs]) ** 2 / timeline.samples).sum())

    return fmean(
        sum(weight * value**2 * variance(value) for value, weight in way.spectrum) / way.positions for way in ways
    )


def first_use(selection: Selection, timelines: dict[int, Timeline]) -> dict[str, GradientRows]:
    """Return each leaving sample's gradient in the step that used it first, parameter by parameter.

    They are weighted so that their sum is the gradient of the samples' mean loss then.
    """
    # A step's loss is a mean over its batch of B, and a record is the sample's share of it, times a GradScaler's scale:
    # B / scale of it is the gradient of the sample's own loss, and one over the samples makes the mean.
    numbers = np.unique(selection.rows["sample"].to_numpy(), return_inverse=True)[1]
    keys = selection.rows["key"].to_numpy()
    first = np.full(numbers.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, numbers, keys)
    rows = {}
    for name, mine in by_parameter(selection.rows.filter(pa.array(keys == first[numbers]))).items():
        timeline = timelines[selection.known[name].group_id]
        at = np.searchsorted(timeline.keys, mine["key"].to_numpy())
        weights = timeline.samples[at] / timeline.amp_scale[at] / len(first)
        rows[name] = replace(GradientRows.of(mine, np.zeros(len(at), np.int64)), weight=weights)
    return rows


def faded(selection: Selection) -> float:
    """Return the norm of each sample's gradient at its last use over that at its first, the mean over samples."""
    rows = selection.rows
    squares = rows.select(["sample", "key"]).append_column("square", pc.power(rows["norm"], 2))
    sums = (
        squares.group_by(["sample", "key"])
        .aggregate([("square", "sum")])
        .sort_by([("sample", "ascending"), ("key", "ascending")])
    )
    norms, samples = np.sqrt(sums["square_sum"].to_numpy()), sums["sample"].to_numpy()
    starts = np.flatnonzero(np.diff(samples, prepend=samples[0] - 1))
    first, last = norms[starts], norms[np.append(starts[1:], len(norms)) - 1]
    return float(np.mean(last[first > 0] / first[first > 0])) if first.any() else 0.0


@dataclass(frozen=True, slots=True)
class _Fit:
    """A factor to multiply with, and what a standard deviation of the logarithms is as a factor."""

    factor: float
    spread: float

    def of(self, number: float) -> Estimate:
        value = self.factor * number
        return Estimate(value, value / self.spread, value * self.spread)


# On data that stays the rollback's distance goes with what the change makes of held-out rows' answers. On forgotten
# data it goes with how much the change raises these samples' loss, to first order, where they were first used, which is
# what training had made of them; and it is larger where their gradients have faded, for those were memorised. Constants
# and powers were fitted on the 39 trainings of scripts/bench_workloads.py that were not set aside for the judgement of
# these numbers (scripts/calibrate.py).
_FORGOTTEN, _STAYING = _Fit(0.028, 2.5), _Fit(9.6, 1.9)
_NOISE_FORGOTTEN, _NOISE_STAYING = _Fit(2.8, 2.5), _Fit(2.1, 2.4)
# Beyond what was seen, less or more says nothing.
_LEAST_FADED, _MOST_FADED = 0.1, 2.0


def expected_kl(rise: float, faded: float, seen: float, noise: float) -> ExpectedKL:
    """Return what to expect.

    Args:
        seen: divergence of held-out rows by the change.
        noise: of `order_noise`.
    """
    lasting = min(max(faded, _LEAST_FADED), _MOST_FADED)
    return ExpectedKL(
        forgotten=_FORGOTTEN.of(max(rise, 0.0) ** 1.43 / lasting**0.85),
        staying=_STAYING.of(seen**1.02 * noise**0.41),
        noise_forgotten=_NOISE_FORGOTTEN.of(noise / lasting**0.74),
        noise_staying=_NOISE_STAYING.of(noise),
        rise=rise,
        faded=faded,
    )
