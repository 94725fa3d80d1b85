"""Parameter-shaped vectors: in memory up to a limit, in a private spill file beyond it."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

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

    The spill file is read and written in blocks and never mapped: mapped pages would count as memory. It is
    deleted from its directory as soon as it is open, so that nothing is left behind.

    Args:
        sizes: parameter name to its number of elements.
        memory_limit_bytes: for all vectors in memory together.
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
        self.numel = sum(self.sizes.values())
        self.vector_bytes = self.numel * dtype.itemsize
        self.block_numel = max(1, min(_LARGEST_BLOCK_BYTES, memory_limit_bytes // 8) // dtype.itemsize)
        self.offsets: dict[str, int] = {}
        offset = 0
        for name, size in self.sizes.items():
            self.offsets[name] = offset
            offset += size
        self._limit_bytes = memory_limit_bytes
        self._directory = directory
        self._used_bytes = 0
        self._file: int | None = None
        self._file_bytes = 0
        self._free: list[int] = []

    def new(self) -> "Vector":
        """Return a vector of zeros."""
        if self._used_bytes + self.vector_bytes <= self._limit_bytes:
            self._used_bytes += self.vector_bytes
            return Vector(self, torch.zeros(self.numel, dtype=self.dtype, device=self.device), None)
        return Vector(self, None, self._place())

    def blocks(self) -> Iterator[Block]:
        """Yield the elements of a vector in order, a bounded number at a time."""
        for name, size in self.sizes.items():
            for start in range(0, size, self.block_numel):
                yield Block(name, start, min(size, start + self.block_numel))

    def keep(self, blocks: Iterable[torch.Tensor], numel: int, dtype: torch.dtype) -> "Kept":
        """Return a copy of a tensor that is given flat, in blocks, bit for bit in its own precision."""
        size_bytes = numel * dtype.itemsize
        if self._used_bytes + size_bytes <= self._limit_bytes:
            self._used_bytes += size_bytes
            found = list(blocks)
            return Kept(self, torch.cat(found) if found else torch.empty(0, dtype=dtype), 0, numel, dtype)
        place, self._file_bytes = self._file_bytes, self._file_bytes + size_bytes
        done = 0
        for block in blocks:
            data = block.cpu().contiguous().view(torch.uint8).numpy().data
            self._write(place + done, data)
            done += len(data)
        return Kept(self, None, place, numel, dtype)

    def close(self) -> None:
        """Give the spill file's space back."""
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):  # nothing of it is needed any more
                os.close(file)

    def _place(self) -> int:
        if self._free:
            place = self._free.pop()
        else:
            place, self._file_bytes = self._file_bytes, self._file_bytes + self.vector_bytes
        zeros = memoryview(bytes(min(self.vector_bytes, _LARGEST_BLOCK_BYTES)))
        for start in range(0, self.vector_bytes, max(1, len(zeros))):
            self._write(place + start, zeros[: self.vector_bytes - start])
        return place

    def _write(self, place: int, data: bytes | memoryview) -> None:
        try:
            if self._file is None:
                self._file, name = tempfile.mkstemp(prefix="timstore-", suffix=".spill", dir=self._directory)
                os.unlink(name)
            done = 0
            while done < len(data):
                done += os.pwrite(self._file, memoryview(data)[done:], place + done)
        except OSError as error:
            where = self._directory or tempfile.gettempdir()
            raise StorageError(
                f"the deltas do not fit into memory_limit, and the spill file in {where} cannot be written "
                f"({error.strerror}): make room there, set TMPDIR to a larger disk, or raise memory_limit"
            ) from error

    def _read(self, place: int, size: int) -> bytearray:
        assert self._file is not None
        data = bytearray(size)
        done = 0
        while done < size:
            try:
                got = os.preadv(self._file, [memoryview(data)[done:]], place + done)
            except OSError as error:
                raise StorageError(f"the spill file cannot be read back: {error.strerror}") from error
            if got == 0:
                raise StorageError(f"the spill file ended {size - done} bytes early")
            done += got
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Vector:
    """One number per parameter element; made by `Workspace.new`."""

    def __init__(self, workspace: Workspace, numbers: torch.Tensor | None, place: int | None) -> None:
        self.workspace = workspace
        self._numbers = numbers
        self._place = place

    @property
    def spilled(self) -> bool:
        """Whether it lives in the spill file."""
        return self._place is not None

    def read(self, parameter: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return elements [start, stop) of one parameter, 1-D; do not change them, `write` does."""
        stop = self.workspace.sizes[parameter] if stop is None else stop
        first = self.workspace.offsets[parameter] + start
        if self._numbers is not None:
            return self._numbers[first : first + stop - start]
        itemsize = self.workspace.dtype.itemsize
        assert self._place is not None
        if stop == start:
            return torch.zeros(0, dtype=self.workspace.dtype, device=self.workspace.device)
        data = self.workspace._read(self._place + first * itemsize, (stop - start) * itemsize)
        return torch.frombuffer(data, dtype=self.workspace.dtype).to(self.workspace.device)

    def in_blocks(self, parameter: str) -> Iterator[torch.Tensor]:
        """Yield the elements of one parameter in order, a bounded number at a time."""
        size, most = self.workspace.sizes[parameter], self.workspace.block_numel
        return (self.read(parameter, start, min(size, start + most)) for start in range(0, size, most))

    def write(self, parameter: str, start: int, numbers: torch.Tensor) -> None:
        """Set elements from `start` on; numbers is 1-D."""
        first = self.workspace.offsets[parameter] + start
        if self._numbers is not None:
            self._numbers[first : first + numbers.numel()] = numbers
            return
        assert self._place is not None
        itemsize = self.workspace.dtype.itemsize
        data = numbers.to("cpu", self.workspace.dtype).contiguous().view(torch.uint8).numpy()
        self.workspace._write(self._place + first * itemsize, data.tobytes())

    def dot(self, other: "Vector") -> float:
        """Return the inner product, accumulated in float64."""
        total = 0.0
        for block in self.workspace.blocks():
            left = self.read(block.parameter, block.start, block.stop)
            right = left if other is self else other.read(block.parameter, block.start, block.stop)
            total += float(torch.dot(left.double(), right.double()))
        return total

    def norm(self) -> float:
        """Return the Euclidean norm."""
        return float(self.dot(self) ** 0.5)

    def add(self, other: "Vector", factor: float = 1.0) -> None:
        """Add a multiple of another vector, in place."""
        for block in self.workspace.blocks():
            mine = self.read(block.parameter, block.start, block.stop)
            theirs = other.read(block.parameter, block.start, block.stop)
            self.write(block.parameter, block.start, torch.add(mine, theirs, alpha=factor))

    def scale(self, factor: float) -> None:
        """Multiply by a number, in place."""
        for block in self.workspace.blocks():
            self.write(block.parameter, block.start, self.read(block.parameter, block.start, block.stop) * factor)

    def free(self) -> None:
        """Give the space back to the workspace; the vector must not be used afterwards."""
        if self._numbers is not None:
            self._numbers = None
            self.workspace._used_bytes -= self.workspace.vector_bytes
        elif self._place is not None:
            self.workspace._free.append(self._place)
            self._place = None


@dataclass(frozen=True, eq=False, slots=True)
class Kept:
    """A tensor as it was; made by `Workspace.keep`."""

    workspace: Workspace
    numbers: torch.Tensor | None
    place: int
    numel: int
    dtype: torch.dtype

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield its numbers in order, flat."""
        if self.numbers is not None:
            yield self.numbers
            return
        size = self.dtype.itemsize
        for start in range(0, self.numel, self.workspace.block_numel):
            stop = min(self.numel, start + self.workspace.block_numel)
            data = self.workspace._read(self.place + start * size, (stop - start) * size)
            yield torch.frombuffer(data, dtype=torch.uint8).view(self.dtype)
