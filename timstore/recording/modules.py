"""How each kind of module yields one gradient per sample from its input and the gradient at its output.

    Linear               G_i = D_i' A_i                 kept as factors
    transformers' Conv1D the same, transposed           kept as factors
    Embedding            rows of D_i, by token id       kept as rows
    any other leaf       a vector-Jacobian product of that module alone, one sample at a time

A kind is matched by the forward that really runs: a subclass with another forward is "any other leaf".
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from timstore.errors import CoverageError
from timstore.recording.buffers import Buffers
from timstore.records import Factors, Gradient, Rows, widen


@dataclass(eq=False, slots=True, weakref_slot=True)
class Input:
    """A module's input while backward is on its way; layers that got the same tensor hold the same Input.

    Attributes:
        tensor: the input, detached; dropped once it is copied, or the step is over.
        rows: of the chosen samples, (n, T, d) on the host.
        arrays: each of them, (T, d); the store knows shared inputs by these very objects.
        gram: rows times their transpose, (n, T, T).
    """

    tensor: torch.Tensor | None
    rows: np.ndarray | None = None
    arrays: list[np.ndarray] | None = None
    gram: torch.Tensor | None = None

    def release(self) -> None:
        """Let go of everything."""
        self.tensor = self.rows = self.arrays = self.gram = None


@dataclass(eq=False, slots=True, weakref_slot=True)
class Call:
    """One call of a module in a forward pass.

    Attributes:
        batch: number of rows of the whole batch.
        chosen: positions of the samples to capture, None for all.
        version: of the input when the module ran, which an in-place operation would raise.
        arguments: positional and keyword arguments, tensors detached; only kept where they are needed.
        buffers: where what is captured is copied to.
        released: the step is over.
    """

    batch: int
    chosen: torch.Tensor | None
    input: Input
    version: int
    output_shape: torch.Size
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None
    buffers: Buffers
    released: bool = False

    def release(self) -> None:
        """Let go of every tensor."""
        self.input.release()
        self.arguments = None
        self.released = True


# Parameter (by identity) and, per chosen sample, its part of the gradient.
Captured = list[tuple[nn.Parameter, list[Gradient]]]


class Kind:
    """A kind of module."""

    needs_arguments = False
    keeps_input = False

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module

    def capture(self, call: Call, gradient: torch.Tensor, wanted: Callable[[Any], bool]) -> Captured:
        """Return the parts of the wanted parameters, from the gradient at the module's output."""
        raise AssertionError("a kind says how it is captured")


class LinearKind(Kind):
    """`torch.nn.Linear`."""

    keeps_input = True

    def capture(self, call: Call, gradient: torch.Tensor, wanted: Callable[[Any], bool]) -> Captured:
        weight, bias = self.module.weight, self.module.bias
        outputs = _host_rows(gradient, call)
        captured: Captured = []
        if isinstance(weight, nn.Parameter) and wanted(weight):
            parts = zip(_input_rows(call), outputs, _norms(call.input, outputs, gradient.device), strict=True)
            captured.append((weight, [self._factors(*part) for part in parts]))
        if isinstance(bias, nn.Parameter) and wanted(bias):
            captured.append((bias, list(call.buffers.copy(_tokens(_chosen(gradient, call)).sum(1)))))
        return captured

    def _factors(self, inputs: np.ndarray, outputs: np.ndarray, norm: float | None) -> Gradient:
        return Factors(inputs, outputs, norm)


class TransposedLinearKind(LinearKind):
    """transformers' `Conv1D`, whose weight is (d_in, d_out): its gradient is A' D."""

    def _factors(self, inputs: np.ndarray, outputs: np.ndarray, norm: float | None) -> Gradient:
        return Factors(outputs, inputs, norm)


class EmbeddingKind(Kind):
    """`torch.nn.Embedding`."""

    def __init__(self, name: str, module: nn.Embedding) -> None:
        super().__init__(name, module)
        for option in ("scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                raise CoverageError(f"module {name}: an Embedding with {option}=True cannot be recorded; turn it off")
        if module.max_norm is not None:
            raise CoverageError(f"module {name}: an Embedding with max_norm changes its weight by itself; turn it off")

    def capture(self, call: Call, gradient: torch.Tensor, wanted: Callable[[Any], bool]) -> Captured:
        weight = self.module.weight
        if not wanted(weight):
            return []
        assert isinstance(weight, nn.Parameter)
        shape = tuple(weight.shape)
        ids = _chosen(_held(call), call)
        ids = ids.flatten(1) if ids.ndim > 1 else ids[:, None]
        outputs = _chosen(gradient, call).reshape(len(ids), -1, shape[1])
        parts: list[Gradient] = []
        for row, grads in zip(ids, outputs, strict=True):
            kept = row != self.module.padding_idx if self.module.padding_idx is not None else slice(None)
            indices, inverse = torch.unique(row[kept], return_inverse=True)
            values = torch.zeros(len(indices), shape[1], dtype=grads.dtype, device=grads.device)
            values.index_add_(0, inverse, grads[kept])
            parts.append(Rows(call.buffers.copy(indices), call.buffers.copy(values), shape))
        return [(weight, parts)]


class LeafKind(Kind):
    """Any other module without children: norms, convolutions, layers of one's own."""

    needs_arguments = True

    def capture(self, call: Call, gradient: torch.Tensor, wanted: Callable[[Any], bool]) -> Captured:
        assert call.arguments is not None
        if _held(call)._version != call.version:
            raise CoverageError(
                f"module {self.name} ({type(self.module).__name__}): its input was changed in place after it ran, so "
                "its gradient cannot be computed again for one sample; use the operation that makes a new tensor",
                module=self.name,
            )
        held = {name: one for name, one in self.module.named_parameters(recurse=False) if wanted(one)}
        parts: dict[str, list[Gradient]] = {name: [] for name in held}
        gradient = gradient.reshape(call.output_shape)
        positions = range(call.batch) if call.chosen is None else call.chosen.tolist()
        for position in positions:
            leaves = {f"module.{name}": one.detach().requires_grad_() for name, one in held.items()}
            args, kwargs = _row(call.arguments, position, call.batch)
            with torch.enable_grad():
                output = functional_call(_Unhooked(self.module), leaves, args, kwargs)
            grads = torch.autograd.grad(
                output,
                list(leaves.values()),
                gradient[position : position + 1],
                allow_unused=True,
                materialize_grads=True,
            )
            for name, grad in zip(held, grads, strict=True):
                # Copied: a gradient may be a view of the one that came in, which autograd goes on adding to.
                parts[name].append(call.buffers.copy(grad))
        return [(held[name], found) for name, found in parts.items()]


class _Unhooked(nn.Module):
    """Computes a module again without its hooks, ours and the user's: they have seen this pass already."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def kind_of(name: str, module: nn.Module) -> Kind:
    """Return how a module is captured.

    Raises:
        CoverageError: its gradient is not a sum over samples, or cannot be seen.
    """
    if "forward" in vars(module):
        return LeafKind(name, module)
    forward = type(module).forward
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return LinearKind(name, module)
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward:
        return EmbeddingKind(name, module)
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return TransposedLinearKind(name, module)
    return LeafKind(name, module)


def check_separable(name: str, module: nn.Module) -> None:
    """Refuse a module whose output for one sample depends on the others or on chance.

    Raises:
        CoverageError: naming the module and the way out.
    """
    if not module.training:
        return
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise CoverageError(
            f"module {name} ({type(module).__name__}) mixes the samples of a batch in training mode: no gradient of it "
            f"belongs to one sample; put it in eval mode ({name}.eval()), or use GroupNorm or LayerNorm",
            module=name,
        )
    if getattr(module, "dropout", 0) and isinstance(getattr(module, "dropout", 0), float):
        raise CoverageError(
            f"module {name} ({type(module).__name__}) has dropout inside, which cannot be repeated sample by sample; "
            "set its dropout to 0, or use a separate Dropout module",
            module=name,
        )


def _held(call: Call) -> torch.Tensor:
    assert call.input.tensor is not None
    return call.input.tensor


def _input_rows(call: Call) -> list[np.ndarray]:
    """Return the chosen samples' input on the host, copied once for all layers that share it."""
    if call.input.arrays is None:
        call.input.rows = _host_rows(_held(call), call)
        call.input.arrays = list(call.input.rows)
        call.input.tensor = None
    return call.input.arrays


def _norms(given: Input, outputs: np.ndarray, device: torch.device) -> list[float] | list[None]:
    """Return the norm of each chosen sample's product, from the Gram matrices of its factors.

    All samples at once, and all cores: where training computes on the host, the writer's one thread would take them
    from it for longer. On an accelerator, and where the products themselves are cheaper, it is left to the writer.
    """
    rows, tokens, d_out = outputs.shape
    assert given.rows is not None
    d_in = given.rows.shape[2]
    costs = tokens * (d_out if given.gram is not None else d_in + d_out)
    if device.type != "cpu" or costs >= 2 * d_in * d_out:
        return [None] * rows
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        if given.gram is None:
            given.gram = _gram(given.rows)
        squares = (given.gram * _gram(outputs)).sum((1, 2), dtype=torch.float64).clamp_(min=0)
    return [square**0.5 if math.isfinite(square) else math.nan for square in squares.tolist()]


def _gram(rows: np.ndarray) -> torch.Tensor:
    wide = torch.from_numpy(widen(rows))
    return torch.bmm(wide, wide.mT)


def _host_rows(tensor: torch.Tensor, call: Call) -> np.ndarray:
    """Return a copy of the chosen samples' rows on the host, (n, T, d)."""
    return call.buffers.copy(_tokens(_by_sample(tensor, call)), call.chosen)


def _chosen(tensor: torch.Tensor, call: Call) -> torch.Tensor:
    """Return the chosen samples' rows where they are."""
    tensor = _by_sample(tensor, call).detach()
    return tensor if call.chosen is None else tensor.index_select(0, call.chosen)


def _by_sample(tensor: torch.Tensor, call: Call) -> torch.Tensor:
    # The hook may sit on what the output is a view of: (B * T, d).
    return tensor if tensor.shape[:1] == (call.batch,) else tensor.reshape(call.batch, -1, tensor.shape[-1])


def _tokens(tensor: torch.Tensor) -> torch.Tensor:
    """Return (n, T, d): everything between batch and features is tokens."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1]) if tensor.numel() else tensor[:, None, :]


def _row(arguments: tuple[Sequence[Any], Mapping[str, Any]], position: int, batch: int) -> tuple[Any, dict[str, Any]]:
    def one(value: Any) -> Any:
        whole = isinstance(value, torch.Tensor) and value.shape[:1] == (batch,)
        return value[position : position + 1] if whole else value

    args, kwargs = arguments
    return tuple(one(value) for value in args), {name: one(value) for name, value in kwargs.items()}
