"""One call of a module in a forward pass: what it was given, and whose part of it is to be copied."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from timstore.errors import CoverageError
from timstore.recording.buffers import Buffers
from timstore.recording.chosen import Chosen
from timstore.recording.layouts import Layout, Parts
from timstore.records import widen

# (n, T, d) of samples that are equally long, or one (T, d) each.
HostRows = np.ndarray | list[np.ndarray]
# Positional and by name.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(eq=False, slots=True, weakref_slot=True)
class Input:
    """A module's input while backward is on its way; layers that got the same tensor hold the same Input.

    Attributes:
        tensor: the input, detached; dropped once it is copied, or the step is over.
        rows: of the captured samples, (n, T, d) or one (T, d) each, on the host.
        arrays: each of them, (T, d); the store knows shared inputs by these very objects.
        gram: rows times their transpose, (n, T, T).
    """

    tensor: torch.Tensor | None
    rows: HostRows | None = None
    arrays: list[np.ndarray] | None = None
    gram: torch.Tensor | None = None

    def release(self) -> None:
        """Let go of everything."""
        self.tensor = self.rows = self.arrays = self.gram = None


@dataclass(eq=False, slots=True, weakref_slot=True)
class Call:
    """One call of a module in a forward pass.

    Attributes:
        name: of the module, and its kind, for messages.
        chosen: the samples to capture.
        layout: where the samples are in input and output.
        version: of the input when the module ran, which an in-place operation would raise.
        arguments: positional and keyword arguments, tensors detached; only kept where they are needed.
        autocast: what the module ran under.
        random: the state of torch's generator on the host when it ran; only kept where it is needed.
        buffers: where what is captured is copied to.
        released: the step is over.
    """

    name: str
    chosen: Chosen
    layout: Layout
    input: Input
    version: int
    output_shape: torch.Size
    arguments: Arguments | None
    autocast: "Autocast"
    random: torch.Tensor | None
    buffers: Buffers
    released: bool = False

    def release(self) -> None:
        """Let go of every tensor."""
        self.input.release()
        self.arguments = None
        self.released = True

    def held(self) -> torch.Tensor:
        """Return the input.

        Raises:
            CoverageError: it is not what it was any more. Autograd itself refuses that only where it saved this very
                tensor: not under autocast, whose layers save a copy in another dtype.
        """
        held = self.input.tensor
        assert held is not None
        if held._version != self.version:
            raise CoverageError(
                f"module {self.name}: its input was changed in place after it ran, so that its gradient cannot be "
                "told for one sample; use the operation that makes a new tensor",
                module=self.name.partition(" ")[0],
            )
        return held

    def samples(self, tensor: torch.Tensor) -> Parts:
        """Return the captured samples' parts of a tensor: (n, rows, ...), or one (rows, ...) each."""
        return self.chosen.parts(tensor.detach(), self.layout)

    def host_rows(self, tensor: torch.Tensor) -> HostRows:
        """Return a copy on the host of the captured samples' token rows."""
        parts = self.layout.parts(tensor.detach(), self.chosen.batch)
        if isinstance(parts, list):
            return [self.buffers.copy(rows_of(parts[place])) for (place,) in self.chosen.rows]
        return self.chosen.joined(self.buffers.copy(tokens(parts), self.chosen.order(parts.device)))

    def input_rows(self, dtype: torch.dtype) -> list[np.ndarray]:
        """Return the captured samples' input on the host, copied once for all layers that share it.

        Args:
            dtype: of the gradient at the output. Under autocast the layer itself cast its input to that.
        """
        if self.input.arrays is None:
            held = self.held()
            if self.autocast.enabled and held.is_floating_point() and held.dtype != dtype:
                held = held.to(dtype)
            self.input.rows = self.host_rows(held)
            self.input.arrays = list(self.input.rows)
            self.input.tensor = None
        return self.input.arrays

    def norms(self, outputs: HostRows, device: torch.device) -> list[float] | list[None]:
        """Return the norm of each captured sample's product, from the Gram matrices of its factors.

        All samples at once, and all cores: where training computes on the host, the writer's one thread would take
        them from it for longer. On an accelerator, and where the products themselves are cheaper, it is left to the
        writer.
        """
        given = self.input.rows
        if not isinstance(outputs, np.ndarray) or not isinstance(given, np.ndarray):
            return [None] * len(outputs)
        rows, length, d_out = outputs.shape
        d_in = given.shape[2]
        costs = length * (d_out if self.input.gram is not None else d_in + d_out)
        if device.type != "cpu" or costs >= 2 * d_in * d_out:
            return [None] * rows
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            if self.input.gram is None:
                self.input.gram = _gram(given)
            squares = (self.input.gram * _gram(outputs)).sum((1, 2), dtype=torch.float64).clamp_(min=0)
        return [square**0.5 if math.isfinite(square) else math.nan for square in squares.tolist()]


@dataclass(frozen=True, slots=True)
class Autocast:
    """Whether a module ran under autocast, and to what."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> "Autocast":
        kind = device.type
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def again(self) -> AbstractContextManager[Any]:
        """Return a context in which it is as it was; tensors are not cached, which would keep the graph."""
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


def with_each_tensor(arguments: Arguments, change: Callable[[torch.Tensor], torch.Tensor]) -> Arguments:
    """Return positional and keyword arguments with every tensor among them changed; those inside others stay."""

    def one(value: Any) -> Any:
        return change(value) if isinstance(value, torch.Tensor) else value

    args, kwargs = arguments
    return tuple(one(value) for value in args), {name: one(value) for name, value in kwargs.items()}


def tokens(parts: torch.Tensor) -> torch.Tensor:
    """Return (n, T, d): everything between batch and features is tokens."""
    return parts.reshape(len(parts), math.prod(parts.shape[1:-1]), parts.shape[-1])


def rows_of(part: torch.Tensor) -> torch.Tensor:
    """Return (T, d) of one sample's part."""
    return part.reshape(math.prod(part.shape[:-1]), part.shape[-1])


def _gram(rows: np.ndarray) -> torch.Tensor:
    wide = torch.from_numpy(widen(rows))
    return torch.bmm(wide, wide.mT)
