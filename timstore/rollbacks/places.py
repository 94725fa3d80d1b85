"""Where one parameter of what is rolled back lives: here in a module, elsewhere in a file."""

from collections.abc import Iterator
from typing import Protocol

import torch


class Place(Protocol):
    """One parameter where it lives; its elements are counted flat."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision that it is kept in."""

    @property
    def device(self) -> torch.device:
        """Where its numbers are when they are read."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return elements [start, stop); do not change them, `write` does."""

    def blocks(self, numel: int) -> Iterator[torch.Tensor]:
        """Yield all elements in order, so many at a time; do not change them."""

    def write(self, blocks: Iterator[torch.Tensor]) -> None:
        """Take new values of all elements, in order; each block may be made of the old values of its elements."""
