"""What kind of loss the model is trained on, by the gradient that comes back to its outputs.

Of a softmax cross entropy that is, at each position, (softmax - label) times a factor: seen once, it is known. The
functions that losses are made of cannot be seen from here, and labels need not be among what the model is given.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

# Off by more, relative to a position's gradient, it is another loss: of float32, and of halves.
_OFF, _OFF_HALF = 1e-3, 2e-2
# Where a model is this sure of a label, rounding is what is left of the gradient.
_SURE = 1e-3
_LIKELY = 0.9
_POSITIONS = 32
# What transformers' and TRL's models return in the place of outputs, and the sign of its weight in a loss.
_MADE_OF_LABELS = {"loss": 1, "log_probs": -1}


class LossKind:
    """Watches what the model returns, now and then.

    Attributes:
        known: `cross_entropy`, None where it is not known.
        reason: why it will not be known.
    """

    def __init__(self) -> None:
        self.known: str | None = None
        self.reason: str | None = None
        self._looking = True
        self._outputs: torch.Tensor | None = None
        self._number = 0

    def go_on(self, known: str | None, reason: str | None) -> None:
        """Begin with what an earlier recording saw."""
        self.known, self.reason = known, reason
        self.look_again()

    def look_again(self) -> None:
        """Look at the next backward pass; a loss that was another one once stays unknown."""
        self._looking = self.reason is None

    def watch(self, returned: Any, *, labelled: bool, aside: Callable[[], bool]) -> None:
        """Look at the gradient that comes back to what the model returned, if it is time to look.

        Args:
            labelled: the model was given a label for each token, as transformers' language models are.
            aside: says whether a backward pass of our own runs.
        """
        if not self._looking:
            return
        outputs = getattr(returned, "logits", returned)
        # It makes its loss of the labels without ever holding all outputs, as fused kernels do.
        made = {name: getattr(returned, name, None) for name in _MADE_OF_LABELS} if labelled else {}
        if isinstance(outputs, torch.Tensor) and outputs.ndim >= 2:
            if outputs.requires_grad:
                # Not held by the hook: a loss that the user keeps still holds the graph, and the graph our hooks.
                number, self._outputs = self._number + 1, outputs.detach()
                self._number = number
                arrived = lambda gradient: None if aside() else self._arrived(number, gradient)  # noqa: E731
                outputs.register_hook(arrived)  # type: ignore[no-untyped-call]
        elif any(isinstance(one, torch.Tensor) for one in made.values()):
            for name, one in made.items():
                if isinstance(one, torch.Tensor) and one.requires_grad:
                    one.register_hook(partial(self._weighed, _MADE_OF_LABELS[name]))  # type: ignore[no-untyped-call]
        else:
            self._settle(None, "the model returns no outputs (a tensor with a row for each sample, or its `logits`)")

    def _weighed(self, sign: int, gradient: torch.Tensor) -> None:
        """A gradient came to what the model made of labels: of their mean or sum it is one number wherever it is."""
        if not self._looking:
            return
        weights = sign * gradient[gradient != 0].detach()
        if len(weights):
            self._said(bool(weights.min() > 0 and weights.max() - weights.min() <= _OFF_HALF * weights.max()))

    def _arrived(self, number: int, gradient: torch.Tensor) -> None:
        outputs = self._outputs
        if outputs is None or number != self._number:
            return
        self._outputs = None
        with torch.no_grad():
            found = is_cross_entropy(outputs, gradient)
        if found is not None:
            self._said(found)

    def _said(self, is_cross: bool) -> None:
        other = "the gradient at the model's outputs is not that of a cross entropy of their softmax"
        self._settle("cross_entropy" if is_cross else None, None if is_cross else other)

    def _settle(self, known: str | None, reason: str | None) -> None:
        self._looking = False
        self.known, self.reason = known, reason


def is_cross_entropy(outputs: torch.Tensor, gradient: torch.Tensor) -> bool | None:
    """Say whether a gradient at outputs, (..., classes), is that of a softmax cross entropy with one label a position.

    Labels may be smoothed, and positions weighted. None where it cannot be told: every gradient is zero (or has
    overflowed), or the model is sure of every label.
    """
    classes = outputs.shape[-1]
    rows = gradient.reshape(-1, classes)
    sizes = rows.abs().amax(1)
    told = ((sizes > 0) & sizes.isfinite()).nonzero().flatten()
    if not len(told) or classes < 2:
        return False if len(told) else None
    chosen = told[torch.linspace(0, len(told) - 1, min(_POSITIONS, len(told)), device=told.device).round().long()]
    seen = rows[chosen].cpu().double()
    likely = outputs.reshape(-1, classes)[chosen].cpu().double().softmax(1)
    labelled = likely - F.one_hot(seen.argmin(1), classes)
    # Where a label is smoothed and the model is surer than that, it is not the one that is pulled up most.
    unsure = likely.amax(1) < _LIKELY
    if not unsure.any():
        unsure = labelled.norm(dim=1) > _SURE
    # Of two classes any loss of their difference has such a gradient, but no other has one factor for all.
    if int(unsure.sum()) < (2 if classes == 2 else 1):
        return None
    # A smoothed label pulls towards all classes alike. Of three, two factors would explain any gradient.
    pulls = [labelled, likely - 1 / classes] if classes > 3 else [labelled]
    seen, basis = seen[unsure], torch.stack(pulls, 2)[unsure]
    factors = torch.linalg.pinv(basis.mT @ basis) @ (basis.mT @ seen[..., None])
    off = (seen - (basis @ factors)[..., 0]).norm(dim=1) / seen.norm(dim=1)
    single = min(outputs.dtype.itemsize, gradient.dtype.itemsize) >= 4
    allowed = _OFF if single else _OFF_HALF
    first, others = factors[:, 0, 0], factors[:, 1:, 0]
    alike = classes > 2 or float(first.max() - first.min()) <= allowed * float(first.max())
    return alike and bool((off <= allowed).all() and (first > 0).all() and (others >= -allowed * first[:, None]).all())
