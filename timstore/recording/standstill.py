"""Between two steps of its optimizer a parameter stands still: each step begins where the last one ended.

A rollback takes away what the optimizer did. What else changes a parameter (clamps, averages, decay by hand, weights
loaded on the way) it knows nothing of, and would leave in the model a part of what it claims to remove.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from timstore.errors import StateError
from timstore.recording.elements import Elements

# Sums are taken over blocks this long, so many elements at once, with weights so that an exchange of two shows.
_BLOCK, _PIECE = 1024, 1 << 22
_WEIGHTS = torch.linspace(0.5, 1.5, _BLOCK, dtype=torch.float64, device="cpu")

# What an element, and the sum of a block, may be off by, of the largest number: a few units in the last place, since
# what adds a perturbation and subtracts it again, as sharpness-aware optimizers do, leaves no less. In half precision
# that would be as large as a step. Rounding goes either way, so that it adds up as the root of the length.
_ULPS = {
    torch.float32: (4 * 2.0**-23, 8 * 2.0**-23 * _BLOCK**0.5),
    torch.float64: (4 * 2.0**-52, 8 * 2.0**-52 * _BLOCK),
}


class Standstill:
    """What one optimizer's parameters were when its last step ended, or recording began.

    At every step version counters and some elements are compared, the largest and smallest among them. Sums over all
    elements are kept where `hold` is told to, and after every step of parameters that were once changed in place
    between two steps: that may be harmless, as where weights are swapped for an evaluation, and it may come again.

    Args:
        parameters: the optimizer's, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._often: set[str] = set()
        self.hold(whole=True)

    def hold(self, *, whole: bool) -> None:
        """Keep what the parameters are now; with `whole`, sums over all of their elements too."""
        self._elements = Elements(self._parameters)
        summed = self._parameters if whole else self._often
        self._sums = {name: _sums(self._parameters[name]) for name in summed}
        self._versions = {name: _version(one) for name, one in self._parameters.items()}
        # How large numbers were on the way: what rounding leaves of a perturbation is relative to that.
        self._largest: dict[str, float] = {}

    def look(self) -> None:
        """A forward pass begins: see how large the numbers are by now where a parameter was changed in place."""
        for name, parameter in self._parameters.items():
            if _version(parameter) != self._versions[name]:
                now = float(parameter.detach().abs().max())
                self._largest[name] = max(now, self._largest.get(name, 0.0))

    def check(self, where: str) -> None:
        """Refuse parameters that are not what they were; what was changed and changed back is.

        Args:
            where: "before epoch 0, step 3".

        Raises:
            StateError: naming the first such parameter.
        """
        self._often.update(name for name, one in self._parameters.items() if _version(one) != self._versions[name])
        now = Elements(self._parameters, like=self._elements)
        moved = self._elements.names if not np.array_equal(now.numbers, self._elements.numbers) else ()
        for name in dict.fromkeys((*moved, *self._sums)):
            if self._is_changed(name, now):
                raise _error(name, where)

    def _is_changed(self, name: str, now: Elements) -> bool:
        then = self._elements.of(name)
        apart = float(np.abs(now.of(name) - then).max())
        sums_apart = 0.0
        if name in self._sums:
            sums = _sums(self._parameters[name])
            same = torch.equal(sums, self._sums[name])
            sums_apart = 0.0 if same else float((sums - self._sums[name]).abs().max())
        largest = max(self._largest.get(name, 0.0), float(np.abs(then).max()))
        ulps, sum_ulps = _ULPS.get(self._parameters[name].dtype, (0.0, 0.0))
        return apart > ulps * largest or sums_apart > sum_ulps * largest


def _version(parameter: nn.Parameter) -> tuple[int, int]:
    # A tensor assigned to `.data` brings memory of its own.
    return parameter._version, parameter.data_ptr()


def _sums(parameter: nn.Parameter) -> torch.Tensor:
    """Return the weighted sum of each block, (blocks,) float64."""
    weights = _WEIGHTS.to(parameter.device)
    pieces = torch.split(parameter.detach().reshape(-1), _PIECE)
    padded = (nn.functional.pad(one, (0, -len(one) % _BLOCK)).view(-1, _BLOCK) for one in pieces)
    return torch.cat([one.double() @ weights for one in padded])


def _error(name: str, where: str) -> StateError:
    return StateError(
        f"parameter {name} was changed {where} by something else than its optimizer (clamped, averaged, decayed by "
        "hand, rolled back, or loaded from a checkpoint): a rollback takes away what the optimizer did, and would "
        "leave a part of it in the model. Keep averages in a copy of the model, let the optimizer decay, and bound "
        "weights in the forward pass; or leave the `with` block before such a change, and go on with "
        "resume_from=(epoch, step + 1) after loading the checkpoint of a recorded step, with a new store after "
        "anything else",
        kind="changed-outside",
        parameter=name,
    )
