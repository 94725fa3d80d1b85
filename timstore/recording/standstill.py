"""Between two steps of its optimizer a parameter stands still: each step begins where the last one ended.

A rollback takes away what the optimizer did. What else changes a parameter (clamps, averages, decay by hand, weights
loaded on the way) it knows nothing of, and would leave in the model a part of what it claims to remove.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from timstore.errors import StateError
from timstore.recording.elements import Elements, Values, is_kept_together, kept_together, on_host

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
        self._held = {name: _Held(one) for name, one in parameters.items() if one.numel()}
        self.hold(whole=True)

    def hold(self, *, whole: bool) -> None:
        """Keep what the parameters are now; with `whole`, sums over all of their elements too."""
        together = self._together()
        for name, held in self._held.items():
            held.hold(together.get(name), whole)

    def look(self) -> None:
        """A forward pass begins: see how large the numbers are by now where a parameter was changed in place."""
        for held in self._held.values():
            held.look()

    def check(self, where: str) -> None:
        """Refuse parameters that are not what they were; what was changed and changed back is.

        Args:
            where: "before epoch 0, step 3".

        Raises:
            StateError: naming the first such parameter.
        """
        now = self._together()
        then = {name: self._held[name].values for name in now}
        if now and np.array_equal(on_host([*now.values()]), on_host([*then.values()])):
            now = then  # one comparison that the host waits for, instead of one per parameter
        for name, held in self._held.items():
            if held.changed(now.get(name)):
                raise _error(name, where)

    def _together(self) -> dict[str, Values]:
        found = {name: one.parameter.detach() for name, one in self._held.items() if is_kept_together(one.parameter)}
        return kept_together(found)


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


class _Held:
    """One parameter, as it was."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self._elements = None if is_kept_together(parameter) else Elements(parameter)
        self._often = False

    def hold(self, values: Values | None, whole: bool) -> None:
        numbers = self.parameter.detach()
        if values is None:
            assert self._elements is not None
            values = self._elements.chosen(numbers, extremes=True)
        self.values = values
        self._sums = _sums(numbers) if whole or self._often else None
        self._seen = 0.0
        self._held_version = self._version()

    def look(self) -> None:
        if self._version() != self._held_version:
            self._seen = max(self._seen, float(self.parameter.detach().abs().max()))

    def changed(self, values: Values | None) -> bool:
        """Say whether it is not what it was, given its elements as they are now where they are looked up together."""
        if values is None:
            assert self._elements is not None
            values = self._elements.of(self.parameter)
        self._often = self._often or self._version() != self._held_version
        apart = _apart(values, self.values)
        sums_apart = 0.0 if self._sums is None else _apart(_sums(self.parameter.detach()), self._sums)
        if not apart and not sums_apart:
            return False
        largest = max(self._seen, _largest(self.values))
        ulps, sum_ulps = _ULPS.get(self.parameter.dtype, (0.0, 0.0))
        return apart > ulps * largest or sums_apart > sum_ulps * largest

    def _version(self) -> tuple[int, int]:
        # A tensor assigned to `.data` brings memory of its own.
        return self.parameter._version, self.parameter.data_ptr()


def _sums(numbers: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of each block, (blocks,) float64."""
    weights = _WEIGHTS.to(numbers.device)
    pieces = torch.split(numbers.reshape(-1), _PIECE)
    padded = (nn.functional.pad(one, (0, -len(one) % _BLOCK)).view(-1, _BLOCK) for one in pieces)
    return torch.cat([one.double() @ weights for one in padded])


def _apart(now: Values, then: Values) -> float:
    """Return the largest difference."""
    if now is then:
        return 0.0
    if isinstance(now, np.ndarray):
        return 0.0 if np.array_equal(now, then) else float(np.abs(now - then).max())
    return 0.0 if torch.equal(now, then) else float((now.double() - then.double()).abs().max())  # type: ignore[arg-type, union-attr]


def _largest(values: Values) -> float:
    return float(np.abs(values).max()) if isinstance(values, np.ndarray) else float(values.abs().max())
