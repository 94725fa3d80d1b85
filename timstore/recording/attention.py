"""`torch.nn.MultiheadAttention`: its projections are made by functions, where no module's hook comes by."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from timstore.recording.batch_axis import Axis, Folded, Layout
from timstore.recording.calls import Call
from timstore.recording.modules import Captured, LinearKind, Wanted, sums
from timstore.records import Factors, Gradient

# Told of a projection: its kind, input, output, and where the batch is.
See = Callable[[LinearKind, torch.Tensor, torch.Tensor, Layout], None]


class Projections:
    """Sees the projections of one MultiheadAttention, between `begin` and `end` of its forward pass.

    torch calls `linear` of its own `functional` for them, with the whole weights or rows of them, on (L, N, E) and
    (L * N, E): N samples of length L. That name is another's for the time of the call.
    """

    def __init__(self, name: str, module: nn.MultiheadAttention, see: See) -> None:
        self._name = name
        self._module = module
        self._see = see
        self._linear: Any = None

    def parameters(self) -> list[nn.Parameter]:
        """Return what may be seen: the biases of keys and values have no projection."""
        module: Any = self._module
        found = [module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        found += [module.in_proj_bias, module.out_proj.weight, module.out_proj.bias]
        return [one for one in found if isinstance(one, nn.Parameter)]

    def begin(self) -> None:
        """Take the place of torch's `linear`."""
        if self._linear is None:
            self._linear = nn.functional.linear
            nn.functional.linear = self._seen  # type: ignore[assignment]

    def end(self) -> None:
        """Give it back."""
        if self._linear is not None:
            nn.functional.linear, self._linear = self._linear, None

    def _seen(self, given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        output: torch.Tensor = self._linear(given, weight, bias)
        whole = {id(one) for one in self.parameters()}
        of_weight, of_bias = (_source(one, whole) for one in (weight, bias))
        if of_weight is not None or of_bias is not None:
            layout: Layout = Axis(1) if given.ndim == 3 else Folded(token_major=True)
            self._see(_ProjectionKind(self._name, self._module, of_weight, of_bias), given, output, layout)
        return output


class _ProjectionKind(LinearKind):
    """A Linear by rows of a weight, (parameter, first row) each."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        weight: tuple[nn.Parameter, int] | None,
        bias: tuple[nn.Parameter, int] | None,
    ) -> None:
        super().__init__(name, module)
        self._weight, self._bias = weight, bias

    def parameters(self) -> list[nn.Parameter]:
        return [pair[0] for pair in (self._weight, self._bias) if pair is not None]

    def capture(self, call: Call, gradient: torch.Tensor, wanted: Wanted) -> Captured:
        outputs = call.host_rows(gradient)
        captured: Captured = []
        if self._weight is not None and wanted(self._weight[0]):
            weight, first = self._weight
            inputs = call.input_rows(gradient.dtype)
            squares = call.squares(outputs, gradient)
            parts: list[Gradient] = [
                Factors(given, _widened(call, rows, first, len(weight)), square)
                for given, rows, square in zip(inputs, outputs, squares, strict=True)
            ]
            captured.append((weight, parts))
        if self._bias is not None and wanted(self._bias[0]):
            bias, first = self._bias
            summed = sums(call, gradient, outputs, bias.dtype)
            captured.append((bias, [_widened(call, one[None], first, len(bias))[0] for one in summed]))  # type: ignore[index]
        return captured


def _source(piece: torch.Tensor | None, whole: set[int]) -> tuple[nn.Parameter, int] | None:
    """Return the parameter that a weight is, or is rows of, and the first of them."""
    if piece is None:
        return None
    if id(piece) in whole:
        return piece, 0  # type: ignore[return-value]
    base = piece._base
    if base is None or id(base) not in whole:
        return None
    return base, piece.storage_offset() // max(1, base.stride(0))  # type: ignore[return-value]


def _widened(call: Call, rows: np.ndarray, first: int, width: int) -> np.ndarray:
    """Return rows with zeros for the outputs that are not among them."""
    if rows.shape[1] == width:
        return rows
    call.buffers.wait()
    wide = np.zeros((len(rows), width), rows.dtype)
    wide[:, first : first + rows.shape[1]] = rows
    return wide
