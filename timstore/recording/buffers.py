"""Host memory for what is captured, apart from the heap that training takes its own from.

Records stay until they are written, a few steps long, between activations that come and go within one. In one heap the
two would leave each other holes: it grows to a multiple, and pages are taken from the system and given back all along.
"""

import math
import mmap
import weakref
from collections.abc import Callable

import numpy as np
import torch

from timstore.records import BFLOAT16

_SLAB_BYTES = 16 * 1024 * 1024
_ALIGNED = 64


class Buffers:
    """Copies tensors into slabs, which are used again once nothing is left of what was copied there.

    From a CUDA device copies are made while training goes on, and are there once `wait` returns; others at once.
    """

    def __init__(self) -> None:
        self._pools: dict[torch.device, _Pool] = {}

    def copy(self, tensor: torch.Tensor, rows: torch.Tensor | None = None) -> np.ndarray:
        """Return a copy on the host, contiguous; nothing that happens later to the tensor can change it.

        Args:
            rows: which of axis 0 to take, as indices on the tensor's device; None for all.
        """
        tensor = tensor.detach()
        pool = self._pools.get(tensor.device)
        if pool is None:
            made = _CudaPool(tensor.device) if tensor.is_cuda else _Pool()
            pool = self._pools.setdefault(tensor.device, made)
        shape = tensor.shape if rows is None else (len(rows), *tensor.shape[1:])
        # numpy has no bfloat16.
        raw = tensor.dtype == torch.bfloat16
        tensor = tensor.view(torch.int16) if raw else tensor
        copied = pool.take(shape, torch.empty(0, dtype=tensor.dtype, device="cpu").numpy().dtype)
        pool.fill(torch.from_numpy(copied), tensor, rows)
        return copied.view(BFLOAT16) if raw else copied

    def wait(self) -> None:
        """Return when everything that was copied so far is there."""
        for pool in self._pools.values():
            pool.wait()


class _Pool:
    """The slabs for what is copied from one device."""

    def __init__(self) -> None:
        self.slabs: list[_Slab] = []
        self._current: np.ndarray | None = None
        self._end = 0

    def fill(self, into: torch.Tensor, tensor: torch.Tensor, rows: torch.Tensor | None) -> None:
        """Copy a tensor, or rows of it."""
        if rows is None or tensor.device != into.device:
            into.copy_(tensor if rows is None else tensor.index_select(0, rows))
        else:
            torch.index_select(tensor, 0, rows, out=into)

    def wait(self) -> None:
        """Return when everything is there."""

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return memory that nothing is in."""
        size = math.prod(shape) * dtype.itemsize
        # The latest slab, while it lasts: what was captured together is let go of together.
        if self._current is None or self._end + size > len(self._current):
            self._current, self._end = self._unused(size), 0
        piece = self._current[self._end : self._end + size]
        self._end = -(-(self._end + size) // _ALIGNED) * _ALIGNED
        return piece.view(dtype).reshape(shape)

    def _unused(self, size: int) -> np.ndarray:
        self._current = None
        slab = next((one for one in self.slabs if one.size >= size and one.unused), None)
        if slab is None:
            slab = self._new_slab(max(size, _SLAB_BYTES))
            self.slabs.append(slab)
        return slab.take()

    def _new_slab(self, size: int) -> "_Slab":
        """Return a slab of so many bytes, or more, of the system's own memory."""
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return _Slab(size, lambda: np.frombuffer(memory, np.uint8))


class _CudaPool(_Pool):
    """Page-locked slabs, filled on a stream beside the one that training computes on."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def fill(self, into: torch.Tensor, tensor: torch.Tensor, rows: torch.Tensor | None) -> None:
        # On the device first: training may change or free its own before that has left.
        whole = tensor.clone(memory_format=torch.contiguous_format) if rows is None else tensor.index_select(0, rows)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            into.copy_(whole, non_blocking=True)
        whole.record_stream(self._stream)

    def wait(self) -> None:
        self._stream.synchronize()

    def _new_slab(self, size: int) -> "_Slab":
        size = 1 << (size - 1).bit_length()  # as much is taken in any case
        return _Slab(size, torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True).numpy)


class _Slab:
    """Memory, of which `view` makes a new array each time."""

    def __init__(self, size: int, view: Callable[[], np.ndarray]) -> None:
        self.size = size
        self._view = view
        self._taken: weakref.ref[np.ndarray] | None = None

    @property
    def unused(self) -> bool:
        return self._taken is None or self._taken() is None

    def take(self) -> np.ndarray:
        """Return the slab as bytes. Every view of them, and of these, holds on to this very array."""
        taken = self._view()
        self._taken = weakref.ref(taken)
        return taken
