"""Parameter-shaped vectors: in memory up to a limit, in a private spill file beyond it."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import torch

from timstore.errors import StorageError

# Small enough that what the allocator keeps of freed blocks stays far below any memory_limit.
_LARGEST_BLOCK_BYTES = 1024 * 1024
# What is kept in memory of parameters that are written over, where the caller gave no limit.
KEPT_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Block:
    """Elements [start, stop) of one parameter, flat."""

    parameter: str
    start: int
    stop: int


class Workspace:
    """Makes vectors with one number per element of the chosen parameters.

    Args:
        sizes: parameter name to its number of elements.
        memory_limit_bytes: for all that is kept in memory.
        directory: where the spill file goes, the system's temporary directory when None.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        dtype: torch.dtype = torch.float32,
        memory_limit_bytes: int,
        device: torch.device | str = "cpu",
        directory: Path | None = None,
    ) -> None:
        self.sizes = dict(sizes)
        self.dtype = dtype
        self.device = torch.device(device)
        self.block_numel = max(1, min(_LARGEST_BLOCK_BYTES, memory_limit_bytes // 8) // dtype.itemsize)
        self.offsets: dict[str, int] = {}
        self.numel = 0
        for name, size in self.sizes.items():
            self.offsets[name], self.numel = self.numel, self.numel + size
        self.free_bytes = memory_limit_bytes
        self.spill = _SpillFile(directory)

    def new(self) -> "Vector":
        """Return a vector of zeros."""
        return Vector(self, Numbers(self, self.numel, self.dtype, self.device))

    def keep(self, blocks: Iterable[torch.Tensor], numel: int, dtype: torch.dtype, device: torch.device) -> "Numbers":
        """Return a copy of a tensor that is given flat, in blocks, bit for bit in its own precision."""
        copy, done = Numbers(self, numel, dtype, device), 0
        for block in blocks:
            copy.write(done, block)
            done += len(block)
        return copy

    def blocks(self) -> Iterator[Block]:
        """Yield the elements of a vector in order, a bounded number at a time."""
        for name, size in self.sizes.items():
            for start in range(0, size, self.block_numel):
                yield Block(name, start, min(size, start + self.block_numel))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.spill.close()


class _SpillFile:
    """Bytes beyond the limit, in a file without a name: nothing is left behind, whatever happens.

    Read and written in blocks, never mapped: mapped pages would count as memory.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._file: IO[bytes] | None = None
        self._end = 0
        self._released: dict[int, list[int]] = {}

    def reserve(self, size: int) -> int:
        """Return where so many bytes of zeros lie; they are written, so that a full disk is noticed now."""
        if self._released.get(size):
            place = self._released[size].pop()
        else:
            place, self._end = self._end, self._end + size
        zeros = memoryview(bytes(min(size, _LARGEST_BLOCK_BYTES)))
        for start in range(0, size, _LARGEST_BLOCK_BYTES):
            self.write(place + start, zeros[: size - start])
        return place

    def release(self, place: int, size: int) -> None:
        self._released.setdefault(size, []).append(place)

    def write(self, place: int, data: memoryview) -> None:
        try:
            if self._file is None:
                # Open as long as the workspace is, which closes it.
                self._file = tempfile.TemporaryFile(prefix="timstore-", dir=self._directory)  # noqa: SIM115
            done = 0
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], place + done)
        except OSError as error:
            where = self._directory or tempfile.gettempdir()
            raise StorageError(
                f"the deltas do not fit into memory_limit, and the spill file in {where} cannot be written "
                f"({error.strerror}): make room there, set TMPDIR to a larger disk, or raise memory_limit"
            ) from error

    def read(self, place: int, size: int) -> bytearray:
        assert self._file is not None
        data, done = bytearray(size), 0
        while done < size:
            try:
                count = os.preadv(self._file.fileno(), [memoryview(data)[done:]], place + done)
            except OSError as error:
                raise StorageError(f"the spill file cannot be read back: {error.strerror}") from error
            if count == 0:
                raise StorageError(f"the spill file ended {size - done} bytes early")
            done += count
        return data

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # nothing of it is needed any more
                self._file.close()


class Numbers:
    """A flat tensor in memory, or in the spill file where the workspace's limit is reached; zeros at first."""

    def __init__(self, workspace: Workspace, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self.numel, self.dtype, self.device = numel, dtype, device
        self._workspace = workspace
        # Once memory is used up numbers go to the file one after another; those that are there stay where they are.
        self._size_bytes = numel * dtype.itemsize
        self._tensor: torch.Tensor | None = None
        self._place: int | None = None
        if self._size_bytes <= workspace.free_bytes:
            workspace.free_bytes -= self._size_bytes
            self._tensor = torch.zeros(numel, dtype=dtype, device=device)
        else:
            self._place = workspace.spill.reserve(self._size_bytes)

    @property
    def spilled(self) -> bool:
        return self._place is not None

    def read(self, start: int, stop: int) -> torch.Tensor:
        if self._tensor is not None:
            return self._tensor[start:stop]
        if stop == start:
            return torch.zeros(0, dtype=self.dtype, device=self.device)
        itemsize = self.dtype.itemsize
        assert self._place is not None
        data = self._workspace.spill.read(self._place + start * itemsize, (stop - start) * itemsize)
        return torch.frombuffer(data, dtype=torch.uint8).view(self.dtype).to(self.device)

    def write(self, start: int, numbers: torch.Tensor) -> None:
        if self._tensor is not None:
            self._tensor[start : start + numbers.numel()] = numbers
            return
        assert self._place is not None
        data = numbers.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().data
        self._workspace.spill.write(self._place + start * self.dtype.itemsize, data)

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield all numbers in order, a bounded number at a time."""
        most = self._workspace.block_numel
        return (self.read(start, min(self.numel, start + most)) for start in range(0, self.numel, most))

    def free(self) -> None:
        """Give the space back to the workspace; the numbers must not be used afterwards."""
        if self._tensor is not None:
            self._tensor = None
            self._workspace.free_bytes += self._size_bytes
        elif self._place is not None:
            self._workspace.spill.release(self._place, self._size_bytes)
            self._place = None


class Vector:
    """One number per parameter element; made by `Workspace.new`."""

    def __init__(self, workspace: Workspace, numbers: Numbers) -> None:
        self.workspace = workspace
        self.numbers = numbers

    def read(self, parameter: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return elements [start, stop) of one parameter, 1-D; do not change them, `write` does."""
        offset = self.workspace.offsets[parameter]
        return self.numbers.read(offset + start, offset + (self.workspace.sizes[parameter] if stop is None else stop))

    # Every operation goes block by block: a vector in the spill file is never in memory as a whole.

    def at(self, block: Block) -> torch.Tensor:
        """Return the elements of a block."""
        return self.read(block.parameter, block.start, block.stop)

    def in_blocks(self, parameter: str) -> Iterator[torch.Tensor]:
        """Yield the elements of one parameter in order, a bounded number at a time."""
        size, most = self.workspace.sizes[parameter], self.workspace.block_numel
        return (self.read(parameter, start, min(size, start + most)) for start in range(0, size, most))

    def write(self, parameter: str, start: int, numbers: torch.Tensor) -> None:
        """Set elements from `start` on; numbers is 1-D."""
        self.numbers.write(self.workspace.offsets[parameter] + start, numbers)

    def dot(self, other: "Vector") -> float:
        """Return the inner product, accumulated in float64."""
        # Block after block and not in parallel, so that the rounding is the same on every machine.
        return sum(
            (float(torch.dot(self.at(block).double(), other.at(block).double())) for block in self.workspace.blocks()),
            0.0,
        )

    def norm(self) -> float:
        """Return the Euclidean norm."""
        return float(self.dot(self) ** 0.5)

    def add(self, other: "Vector", factor: float = 1.0) -> None:
        """Add a multiple of another vector, in place."""
        for block in self.workspace.blocks():
            self.write(block.parameter, block.start, torch.add(self.at(block), other.at(block), alpha=factor))

    def scale(self, factor: float) -> None:
        """Multiply by a number, in place."""
        for block in self.workspace.blocks():
            self.write(block.parameter, block.start, self.at(block) * factor)

    def free(self) -> None:
        """Give the space back to the workspace; the vector must not be used afterwards."""
        self.numbers.free()
