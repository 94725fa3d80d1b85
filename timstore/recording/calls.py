"""One call of a module in a forward pass: what it was given, and whose part of it is to be copied."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from timstore.errors import CoverageError
from timstore.model.eval_guard import RandomState
from timstore.recording.batch_axis import Layout, Parts
from timstore.recording.buffers import Buffers
from timstore.recording.chosen import Chosen
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
        place: what is proved of where the samples are is known by this name.
        chosen: the samples to capture.
        layout: where the samples are in input and output; None while that has to be proved.
        candidates: where they may be, the likeliest first; none of a table that is given one row of ids for all.
        shape: of the input.
        version: of the input when the module ran, which an in-place operation would raise.
        arguments: positional and keyword arguments, tensors detached; only kept where they are needed.
        autocast: what the module ran under.
        random: where torch's generators were when it ran; only kept where it is needed.
        buffers: where what is captured is copied to.
        released: the step is over.
        takes_argument: the input is an argument of the model, whose batch axis is declared.
    """

    name: str
    place: str
    chosen: Chosen
    layout: Layout | None
    candidates: tuple[Layout, ...]
    shape: torch.Size
    input: Input
    version: int
    output_shape: torch.Size
    arguments: Arguments | None
    autocast: "Autocast"
    random: RandomState | None
    buffers: Buffers
    released: bool = False
    takes_argument: bool = False

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
        assert self.layout is not None
        return self.chosen.parts(tensor.detach(), self.layout)

    def host_rows(self, tensor: torch.Tensor) -> HostRows:
        """Return a copy on the host of the captured samples' token rows."""
        assert self.layout is not None
        parts = self.layout.parts(tensor.detach(), self.chosen.batch)
        if isinstance(parts, list):
            return [self.buffers.copy(rows_of(parts[place])) for (place,) in self.chosen.rows]
        return self.chosen.joined(self.buffers.copy(tokens(parts), self.chosen.order(parts.device)))

    def computed_rows(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return (n, T, d), the captured samples' token rows where training computes; None where lengths differ."""
        parts = self.samples(tensor)
        return tokens(parts) if isinstance(parts, torch.Tensor) else None

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
            computed = self.computed_rows(held) if held.is_cuda else None
            # Only while the input is there; of longer ones no norm is taken by it.
            if computed is not None and computed.shape[1] < 2 * computed.shape[2]:
                self.input.gram = _gram(computed)
            self.input.tensor = None
        return self.input.arrays

    def squares(self, outputs: HostRows, gradient: torch.Tensor) -> Sequence[Any]:
        """Return the squared norm of each captured sample's product, from the Gram matrices of its factors.

        All samples at once, and where training computes: the writer's one thread would take longer, and on the host
        take its cores. None each, left to the writer, where the products themselves are cheaper, or lengths differ.
        What a CUDA device computes is in arrays of one number, there when all that is copied is.

        Args:
            outputs: the captured samples' rows of `gradient`, on the host.
        """
        given = self.input.rows
        if not isinstance(outputs, np.ndarray) or not isinstance(given, np.ndarray):
            return [None] * len(outputs)
        rows, length, d_out = outputs.shape
        d_in = given.shape[2]
        costs = length * (d_out if self.input.gram is not None else d_in + d_out)
        if gradient.device.type not in ("cpu", "cuda") or costs >= 2 * d_in * d_out:
            return [None] * rows
        computed = torch.from_numpy(widen(outputs)) if gradient.device.type == "cpu" else self.computed_rows(gradient)
        assert computed is not None
        with torch.no_grad():
            if self.input.gram is None:
                self.input.gram = _gram(torch.from_numpy(widen(given)))
            found = (self.input.gram * _gram(computed)).sum((1, 2), dtype=torch.float64)
        if not found.is_cuda:
            return found.tolist()
        copied = self.buffers.copy(found)
        return [copied[place, ...] for place in range(rows)]


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


def _gram(rows: torch.Tensor) -> torch.Tensor:
    wide = rows.to(wide_dtype(rows.dtype))
    with torch.autocast(rows.device.type, enabled=False):
        return torch.bmm(wide, wide.mT)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to add numbers up in: not half precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
