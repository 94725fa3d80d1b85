"""Host memory for what is captured, apart from the heap that training takes its own from.

Records stay until they are written, a few steps long, between activations that come and go within one. In one heap the
two would leave each other holes: it grows to a multiple, and pages are taken from the system and given back all along.
"""

import math
import mmap
import weakref

import numpy as np
import torch

from timstore.records import BFLOAT16

_SLAB_BYTES = 16 * 1024 * 1024
_ALIGNED = 64


class Buffers:
    """Copies tensors into slabs, which are used again once nothing is left of what was copied there."""

    def __init__(self) -> None:
        self._slabs: list[_Slab] = []
        self._current: np.ndarray | None = None
        self._end = 0

    def copy(self, tensor: torch.Tensor, rows: torch.Tensor | None = None) -> np.ndarray:
        """Return a copy on the host, contiguous; nothing that happens later can change it.

        Args:
            rows: which of axis 0 to take, as indices on the tensor's device; None for all.
        """
        tensor = tensor.detach()
        if tensor.device.type != "cpu" and rows is not None:
            tensor, rows = tensor.index_select(0, rows), None
        shape = tensor.shape if rows is None else (len(rows), *tensor.shape[1:])
        # numpy has no bfloat16.
        raw = tensor.dtype == torch.bfloat16
        tensor = tensor.view(torch.int16) if raw else tensor
        copied = self._empty(shape, torch.empty(0, dtype=tensor.dtype).numpy().dtype)
        into = torch.from_numpy(copied)
        if rows is None:
            into.copy_(tensor)
        else:
            torch.index_select(tensor, 0, rows, out=into)
        return copied.view(BFLOAT16) if raw else copied

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        # The latest slab, while it lasts: what was captured together is let go of together.
        if self._current is None or self._end + size > len(self._current):
            self._current, self._end = self._unused(size), 0
        piece = self._current[self._end : self._end + size]
        self._end = -(-(self._end + size) // _ALIGNED) * _ALIGNED
        return piece.view(dtype).reshape(shape)

    def _unused(self, size: int) -> np.ndarray:
        self._current = None
        slab = next((one for one in self._slabs if one.size >= size and one.unused), None)
        if slab is None:
            slab = _Slab(max(size, _SLAB_BYTES))
            self._slabs.append(slab)
        return slab.take()


class _Slab:
    """Memory of the system's own."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._taken: weakref.ref[np.ndarray] | None = None

    @property
    def unused(self) -> bool:
        return self._taken is None or self._taken() is None

    def take(self) -> np.ndarray:
        """Return the slab as bytes. Every view of them, and of these, holds on to this very array."""
        taken = np.frombuffer(self._memory, np.uint8)
        self._taken = weakref.ref(taken)
        return taken
