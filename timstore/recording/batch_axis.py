"""Where each sample is in the tensors that modules are given and return.

Axis(0)         (B, ..., d)    what almost every model keeps
Axis(1)         (T, B, d)      recurrent layers, `nn.Transformer`, attention inside
Folded          (B * T, d)     one sample's tokens after the other's
Folded          (T * B, d)     one token of every sample after the other
Whole           anything       when there is one sample only
Owners          (..., d)       several samples in a row ("packed"), told apart by an id for every token
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Parts = torch.Tensor | list[torch.Tensor]


class Layout(Protocol):
    """How a tensor falls apart into samples."""

    def fits(self, shape: Sequence[int], batch: int) -> bool:
        """Say whether a tensor of this shape can hold so many samples in this way."""
        ...

    def parts(self, tensor: torch.Tensor, batch: int) -> Parts:
        """Return a view per sample: (B, ...), or one (tokens, ...) each where they differ in length."""
        ...


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis is the batch."""

    number: int = 0

    def fits(self, shape: Sequence[int], batch: int) -> bool:
        return len(shape) > self.number and shape[self.number] == batch

    def parts(self, tensor: torch.Tensor, batch: int) -> torch.Tensor:
        return tensor.movedim(self.number, 0)


@dataclass(frozen=True, slots=True)
class Folded:
    """Axis 0 is batch and tokens in one: sample after sample, or `token_major`."""

    token_major: bool = False

    def fits(self, shape: Sequence[int], batch: int) -> bool:
        return len(shape) > 0 and shape[0] % batch == 0

    def parts(self, tensor: torch.Tensor, batch: int) -> torch.Tensor:
        rest = tensor.shape[1:]
        if self.token_major:
            return tensor.reshape(len(tensor) // batch, batch, *rest).movedim(1, 0)
        return tensor.reshape(batch, len(tensor) // batch, *rest)


@dataclass(frozen=True, slots=True)
class Whole:
    """All of it belongs to the only sample."""

    def fits(self, shape: Sequence[int], batch: int) -> bool:
        return batch == 1

    def parts(self, tensor: torch.Tensor, batch: int) -> torch.Tensor:
        return tensor[None]


@dataclass(frozen=True, slots=True, eq=False)
class Owners:
    """Every token has its sample: `tokens` holds the places of each sample's tokens, all leading axes taken as one.

    Attributes:
        rows, count: of the packed rows, and of all tokens in them.
    """

    tokens: tuple[torch.Tensor, ...]
    rows: int
    count: int

    def fits(self, shape: Sequence[int], batch: int) -> bool:
        return self._leading(shape) is not None

    def parts(self, tensor: torch.Tensor, batch: int) -> list[torch.Tensor]:
        axes = self._leading(tensor.shape)
        assert axes is not None
        flat = tensor.reshape(self.count, *tensor.shape[axes:])
        return [flat[places.to(flat.device)] for places in self.tokens]

    def of(self, shape: Sequence[int]) -> "Owners | None":
        """Return where the samples are in what a model returned, None where it has no number for each token.

        What predicts the next token may leave out the last one of each row.
        """
        if self.fits(shape, 0):
            return self
        length = self.count // self.rows
        if len(shape) < 2 or shape[0] != self.rows or shape[1] != length - 1:
            return None
        kept = (places[places % length != length - 1] for places in self.tokens)
        return Owners(tuple(places - places // length for places in kept), self.rows, self.count - self.rows)

    def _leading(self, shape: Sequence[int]) -> int | None:
        fitting = (axes for axes in range(1, len(shape) + 1) if math.prod(shape[:axes]) == self.count)
        # Tokens first, and rows after them, would be as many.
        return next((axes for axes in fitting if axes == 1 or shape[0] == self.rows), None)


CANDIDATES: tuple[Axis | Folded, ...] = (Axis(0), Axis(1), Folded(), Folded(token_major=True), Axis(2))
"""What may be proved, the most likely first."""


def only(tensor: torch.Tensor, layout: Layout, batch: int, rows: list[int]) -> torch.Tensor:
    """Return the tensor with everything zero that is not these rows' of the batch."""
    if isinstance(layout, Owners):
        flat = tensor.reshape(layout.count, -1)
        masked = torch.zeros_like(flat)
        places = torch.cat([layout.tokens[row] for row in rows]).to(flat.device)
        masked[places] = flat[places]
        return masked.reshape(tensor.shape)
    masked = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    into, parts = layout.parts(masked, batch), layout.parts(tensor, batch)
    for row in rows:
        into[row] = parts[row]
    return masked


def owners_of(ids: torch.Tensor) -> tuple[list[int], Owners]:
    """Return the samples that are packed into rows of tokens, and where their tokens are.

    Args:
        ids: (rows, T), the sample of every token; negative for tokens of none.
    """
    flat = ids.reshape(-1).cpu()
    samples = list(dict.fromkeys(one for one in flat.tolist() if one >= 0))
    return samples, Owners(tuple((flat == one).nonzero().flatten() for one in samples), len(ids), flat.numel())
