"""How each kind of module yields one gradient per sample from its input and the gradient at its output.

    Linear               G_i = D_i' A_i                 kept as factors
    transformers' Conv1D the same, transposed           kept as factors
    Conv1d, 2d, 3d       the same, A_i its patches      kept as factors or dense, by size
    Embedding            rows of D_i, by token id       kept as rows
    MultiheadAttention   its projections, as Linears    `attention`
    batch, layer norm    scale and shift                `recomputed_modules`
    any other            the module again, alone        `recomputed_modules`

A kind is matched by the forward that really runs: a subclass with another forward is "any other".
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from timstore.errors import CoverageError
from timstore.recording.calls import Call, HostRows, rows_of, tokens, wide_dtype
from timstore.records import BFLOAT16, Factors, Gradient, Rows

# Parameter (by identity) and, per chosen sample, its part of the gradient.
Captured = list[tuple[nn.Parameter, list[Gradient]]]
Wanted = Callable[[Any], bool]


class Kind:
    """A kind of module.

    Attributes:
        needs_arguments: its call is made again, so all that it was given is kept until then.
        keeps_input: whether the input is kept beyond backward, as a factor.
        draws_elsewhere: it takes random numbers of Python's or numpy's generators; None before it has trained.
    """

    needs_arguments = False
    keeps_input = False
    draws_elsewhere: bool | None = None

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module

    def parameters(self) -> list[nn.Parameter]:
        """Return what it captures the gradients of."""
        return list(self.module.parameters(recurse=False))

    def capture(self, call: Call, gradient: torch.Tensor, wanted: Wanted) -> Captured:
        """Return the parts of the wanted parameters, from the gradient at the module's output."""
        raise AssertionError("a kind says how it is captured")


class LinearKind(Kind):
    """`torch.nn.Linear`."""

    keeps_input = True

    def capture(self, call: Call, gradient: torch.Tensor, wanted: Wanted) -> Captured:
        weight, bias = self.module.weight, self.module.bias
        outputs = call.host_rows(gradient)
        captured: Captured = []
        if isinstance(weight, nn.Parameter) and wanted(weight):
            inputs = call.input_rows(gradient.dtype)
            parts = zip(inputs, outputs, call.squares(outputs, gradient), strict=True)
            captured.append((weight, [self.factors(*part) for part in parts]))
        if isinstance(bias, nn.Parameter) and wanted(bias):
            captured.append((bias, sums(call, gradient, outputs, bias.dtype)))
        return captured

    def factors(self, inputs: np.ndarray, outputs: np.ndarray, square: Any) -> Gradient:
        """Return one sample's gradient of the weight, and its squared norm where that is known."""
        return Factors(inputs, outputs, square)


class TransposedLinearKind(LinearKind):
    """transformers' `Conv1D`, whose weight is (d_in, d_out): its gradient is A' D."""

    def factors(self, inputs: np.ndarray, outputs: np.ndarray, square: Any) -> Gradient:
        return Factors(outputs, inputs, square)


class EmbeddingKind(Kind):
    """`torch.nn.Embedding`."""

    def __init__(self, name: str, module: nn.Embedding) -> None:
        super().__init__(name, module)
        check_embedding(name, module)

    def capture(self, call: Call, gradient: torch.Tensor, wanted: Wanted) -> Captured:
        weight = self.module.weight
        if not wanted(weight):
            return []
        assert isinstance(weight, nn.Parameter)
        found: list[Gradient] = []
        for ids, part in zip(call.samples(call.held()), call.samples(gradient), strict=True):
            found.append(looked_up(call, ids.reshape(-1), rows_of(part), weight, self.module.padding_idx))
        return [(weight, found)]


def check_embedding(name: str, module: nn.Module) -> None:
    """Refuse a table that does not only look up.

    Raises:
        CoverageError: naming the module and the option.
    """
    for option in ("scale_grad_by_freq", "sparse"):
        if getattr(module, option):
            raise CoverageError(f"module {name}: an Embedding with {option}=True cannot be recorded; turn it off")
    if module.max_norm is not None:
        raise CoverageError(f"module {name}: an Embedding with max_norm changes its weight by itself; turn it off")


def looked_up(call: Call, ids: torch.Tensor, grads: torch.Tensor, weight: torch.Tensor, padding: Any) -> Rows:
    """Return the gradient of a table from that of every look-up, (T, d)."""
    if padding is not None:
        ids, grads = ids[ids != padding], grads[ids != padding]
    indices, inverse = torch.unique(ids, return_inverse=True)
    values = torch.zeros(len(indices), grads.shape[1], dtype=grads.dtype, device=grads.device)
    values.index_add_(0, inverse, grads)
    return Rows(call.buffers.copy(indices), call.buffers.copy(values), tuple(weight.shape))


class ConvKind(Kind):
    """`torch.nn.Conv1d`, `Conv2d`, `Conv3d`: a Linear over patches, where those are fewer numbers than the weight."""

    def capture(self, call: Call, gradient: torch.Tensor, wanted: Wanted) -> Captured:
        module: Any = self.module
        weight, bias = module.weight, module.bias
        captured: Captured = []
        grads = call.samples(gradient)
        if wanted(weight):
            images = call.samples(call.held())
            wide = weight[0].numel() + len(weight)
            parts: list[Gradient] = []
            for given, grad in zip(map(self._images, images), map(self._images, grads), strict=True):
                places = grad.numel() // len(weight)
                if module.groups == 1 and places * wide < weight.numel():
                    patches = _patches(module, given).to(grad.dtype)
                    factors = call.buffers.copy(patches), call.buffers.copy(grad.movedim(1, -1).reshape(places, -1))
                    parts.append(Factors(*factors))
                else:
                    parts.append(call.buffers.copy(_weight_gradient(module, given, grad)))
            captured.append((weight, parts))
        if isinstance(bias, nn.Parameter) and wanted(bias):
            summed = [
                grad.transpose(0, 1).flatten(1).sum(1, dtype=wide_dtype(grad.dtype)).to(bias.dtype)
                for grad in map(self._images, grads)
            ]
            captured.append((bias, [call.buffers.copy(one) for one in summed]))
        return captured

    def _images(self, part: torch.Tensor) -> torch.Tensor:
        """Return (images, channels, ...) of a sample: all that is before them is its rows and tokens."""
        return part.reshape(-1, *part.shape[-len(self.module.kernel_size) - 1 :])  # type: ignore[arg-type]


def _padded(module: Any, images: torch.Tensor) -> torch.Tensor:
    """Return one sample's images with the padding that the module gives them."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return nn.functional.pad(images, module._reversed_padding_repeated_twice, mode=mode)


def _patches(module: Any, images: torch.Tensor) -> torch.Tensor:
    """Return (places, channels x kernel): what the kernel is multiplied with at each place of the output."""
    patches = _padded(module, images)
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        patches = patches.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    count = len(module.kernel_size)
    # (images, channels, *places, *kernel) to (images, *places, channels, *kernel)
    moved = patches.movedim(1, count + 1)
    return moved.reshape(int(np.prod(moved.shape[: count + 1])), -1)


def _weight_gradient(module: Any, images: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return one sample's gradient of the weight, dense."""
    count = len(module.kernel_size)
    of_weight = torch.ops.aten.convolution_backward(
        gradient,
        _padded(module, images).to(gradient.dtype),
        module.weight.detach().to(gradient.dtype),
        None,
        module.stride,
        [0] * count,
        module.dilation,
        False,
        [0] * count,
        module.groups,
        [False, True, False],
    )[1]
    assert isinstance(of_weight, torch.Tensor)
    return of_weight


def sums(call: Call, gradient: torch.Tensor, outputs: HostRows, dtype: torch.dtype) -> list[Gradient]:
    """Return each chosen sample's gradient of a bias, from its token rows on the host."""
    if isinstance(outputs, np.ndarray) and outputs.dtype != BFLOAT16 and gradient.device.type == "cpu":
        whole = torch.from_numpy(outputs)
        return list(call.buffers.copy(whole.sum(1, dtype=wide_dtype(whole.dtype)).to(dtype)))
    parts = call.samples(gradient)
    if isinstance(parts, torch.Tensor):
        return list(call.buffers.copy(tokens(parts).sum(1, dtype=wide_dtype(parts.dtype)).to(dtype)))
    return [call.buffers.copy(rows_of(one).sum(0, dtype=wide_dtype(one.dtype)).to(dtype)) for one in parts]
