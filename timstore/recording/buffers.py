"""Host memory for what is captured, apart from the heap that training takes its own from.

Records stay until they are written, a few steps long, between activations that come and go within one. In one heap the
two would leave each other holes: it grows to a multiple, and pages are taken from the system and given back all along.
"""

import math
import mmap
import weakref
from collections.abc import Callable, Sequence

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
        # numpy has no bfloat16.
        raw = tensor.dtype == torch.bfloat16
        copied = pool.copy(tensor.view(torch.int16) if raw else tensor, rows)
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

    def copy(self, tensor: torch.Tensor, rows: torch.Tensor | None) -> np.ndarray:
        """Return a copy of a tensor, or of rows of it."""
        shape = tensor.shape if rows is None else (len(rows), *tensor.shape[1:])
        size = math.prod(shape) * tensor.itemsize
        # The latest slab, while it lasts: what was captured together is let go of together.
        if self._current is None or self._end + size > len(self._current):
            self._let_go()
            self._current, self._end = self._unused(size), 0
        copied = self._current[self._end : self._end + size]
        self._fill(copied, tensor, rows, shape)
        self._end = -(-(self._end + size) // _ALIGNED) * _ALIGNED
        return copied.view(torch.empty(0, dtype=tensor.dtype, device="cpu").numpy().dtype).reshape(shape)

    def wait(self) -> None:
        """Return when everything is there."""

    def _fill(self, copied: np.ndarray, tensor: torch.Tensor, rows: torch.Tensor | None, shape: Sequence[int]) -> None:
        """Copy into these bytes."""
        into = torch.from_numpy(copied)
        if rows is not None and tensor.device != into.device:
            tensor, rows = tensor.index_select(0, rows), None
        _put(into, tensor, rows, shape)

    def _let_go(self) -> None:
        """Nothing more comes into the current slab."""
        self._current = None

    def _unused(self, size: int) -> np.ndarray:
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
    """Page-locked slabs, each filled from one of the device at once, on a stream beside those that training uses.

    Into the device's slab copies go in training's own order, so that it may change or free its tensors afterwards.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._there = torch.empty(0, dtype=torch.uint8, device=device)
        self._sent = 0
        self._writing: set[torch.cuda.Stream] = set()

    def wait(self) -> None:
        self._send()
        self._stream.synchronize()

    def _fill(self, copied: np.ndarray, tensor: torch.Tensor, rows: torch.Tensor | None, shape: Sequence[int]) -> None:
        if not self._end:
            assert self._current is not None
            self._there = torch.empty(len(self._current), dtype=torch.uint8, device=self._device)
        self._writing.add(torch.cuda.current_stream(self._device))
        _put(self._there[self._end : self._end + len(copied)], tensor, rows, shape)

    def _let_go(self) -> None:
        self._send()
        self._sent = 0
        super()._let_go()

    def _send(self) -> None:
        """Begin to copy to the host what is new in the device's slab."""
        if self._current is None or self._sent == self._end:
            return
        span = slice(self._sent, self._end)
        for stream in self._writing:
            self._stream.wait_stream(stream)
        with torch.cuda.stream(self._stream):
            torch.from_numpy(self._current[span]).copy_(self._there[span], non_blocking=True)
        self._there.record_stream(self._stream)
        self._sent = self._end
        self._writing.clear()

    def _new_slab(self, size: int) -> "_Slab":
        size = 1 << (size - 1).bit_length()  # as much is taken in any case
        return _Slab(size, torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True).numpy)


def _put(into: torch.Tensor, tensor: torch.Tensor, rows: torch.Tensor | None, shape: Sequence[int]) -> None:
    """Copy a tensor, or rows of it, to where these bytes are."""
    place = into.view(tensor.dtype).view(shape)
    if rows is None:
        place.copy_(tensor)
    else:
        torch.index_select(tensor, 0, rows, out=place)


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
