"""How much of a push is left at the end of a run, as a function of curvature: the run's own answer, and phi's.

The other samples undo part of what the forgotten ones pushed, the more the steeper the direction and the earlier
the push. `true` follows the recorded schedule for one direction: momentum carries a push on before anything can
answer it. `closed` is what the filter's closed form makes of it. Both are 1 in a flat direction.
"""

from dataclasses import dataclass

import numpy as np
import torch

from timstore.optimizers import ADAM_FAMILY
from timstore.rollbacks.coefficients import adam_weights, weights
from timstore.rollbacks.curvature import phi
from timstore.rollbacks.timeline import Timeline


@dataclass(frozen=True, eq=False, slots=True)
class Response:
    """The answer of one run to pushes in some of its steps.

    Attributes:
        timeline: of the group that moved most.
        parameter: one of its parameters.
        steps: positions of the pushed steps; `shares`, which add to 1, how much of the whole push each one is.
        bins: the time bin of each; `count` is the number of bins, all of the same step length.
    """

    timeline: Timeline
    parameter: str
    steps: np.ndarray
    shares: np.ndarray
    bins: np.ndarray
    count: int

    def true(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return what is left of the push.

        Args:
            lengths: (n,) curvature times the run's whole step length (tau), not negative.
        """
        timeline = self.timeline
        active = timeline.active(self.parameter)
        tau = timeline.lengths(self.parameter)
        consumed = timeline.ratio * timeline.kept
        curvature = consumed[:, None] * (lengths.numpy() / tau.sum())[None, :]
        # No step of a training that held together goes beyond the floor of the valley.
        own = np.where(consumed > 0, tau / np.where(consumed > 0, consumed, 1.0), 0.0)
        curvature = np.minimum(curvature, 1 / np.maximum(own, 1e-300)[:, None])
        weigh = adam_weights if timeline.optimizer in ADAM_FAMILY else weights
        fresh = timeline.fresh_steps(self.parameter, active)
        bent = weigh(timeline.schedule, active, fresh, curvature=curvature)[self.steps]
        flat = weigh(timeline.schedule, active, fresh)[self.steps]
        left = np.divide(bent, flat[:, None], out=np.ones_like(bent), where=flat[:, None] != 0)
        return torch.from_numpy(self.shares @ left)

    def closed(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return what the filter leaves of the push, bin after bin."""
        each = lengths / self.count
        left = torch.zeros_like(lengths)
        for number in range(self.count):
            share = float(self.shares[self.bins == number].sum())
            left += share * torch.exp(-each * (self.count - 1 - number)) * phi(each)
        return left
