"""One safetensors file: which tensor lies where, checked before anything of it is believed, and read in blocks."""

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from timstore.errors import FormatError, InvalidInputError, StateError, StorageError
from timstore.os_errors import reporting

_BLOCK_BYTES = 256 * 1024
_LENGTH_BYTES = 8
# What the format's own library reads at most.
_MOST_HEADER_BYTES = 100_000_000
# The format's dtypes that torch has, some of them in newer versions alone. Tensors of others are only copied.
TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "C64": "complex64",
    "BOOL": "bool",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


@dataclass(frozen=True, eq=False, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        dtype: as the format spells it, such as BF16; it may be one that we do not know.
        start, stop: its bytes, counted from the beginning of the file.
    """

    file: "TensorFile"
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype as torch knows it; None where it does not."""
        return getattr(torch, TORCH_NAMES.get(self.dtype, ""), None)

    def blocks(self, size_bytes: int = _BLOCK_BYTES) -> Iterator[torch.Tensor]:
        """Yield its bytes in order, so many at a time."""
        for start in range(self.start, self.stop, size_bytes):
            yield self.file.read(start, min(self.stop, start + size_bytes))


class TensorFile:
    """An open safetensors file. It is read, and never mapped: mapped pages are memory.

    The file is 8 bytes, the length of the header (little-endian); the header, JSON that gives each tensor's dtype,
    shape and place in the data; the data, without holes. It may come from anywhere, so nothing is believed unchecked.

    Args:
        descriptor: of the file.
        header_bytes: that its header may take.

    Attributes:
        tensors: by name.
        metadata: what the writer noted, text by text.

    Raises:
        FormatError: it is no safetensors file, or not whole.
        InvalidInputError: its header is longer than memory allows.
    """

    def __init__(self, path: Path, descriptor: int, header_bytes: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._status = os.fstat(descriptor)
        size = self._status.st_size
        length = int.from_bytes(self._bytes(0, min(_LENGTH_BYTES, size)), "little")
        if not 2 <= length <= min(size - _LENGTH_BYTES, _MOST_HEADER_BYTES):
            raise self._broken(f"its header is said to have {length:,} bytes, and the file has {size:,}")
        if length > header_bytes:
            raise InvalidInputError(
                f"{path}: the header has {length:,} bytes, more than memory_limit leaves for it ({header_bytes:,}): "
                "raise memory_limit",
                kind="memory-limit",
                path=str(path),
            )
        begin = _LENGTH_BYTES + length
        try:
            header = json.loads(self._bytes(_LENGTH_BYTES, begin), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._broken(f"its header is not JSON as the format wants it ({error})") from error
        if not isinstance(header, dict):
            raise self._broken("its header is no JSON object")
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(isinstance(text, str) for text in self.metadata.values()):
            raise self._broken("its __metadata__ holds something else than text")
        self.tensors = {name: self._tensor(name, entry, begin) for name, entry in header.items()}
        self._check_covered(begin, size)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return bytes [start, stop) as uint8, on the host."""
        return read(self._descriptor, self.path, start, stop)

    def check_unchanged(self) -> None:
        """Refuse to go on when somebody wrote to the file, or replaced it.

        Raises:
            StateError: it is another one than it was.
        """
        with reporting("read", self.path):
            now = os.stat(self.path)
        marks = ("st_dev", "st_ino", "st_size", "st_mtime_ns")
        if any(getattr(now, mark) != getattr(self._status, mark) for mark in marks):
            raise StateError(f"{self.path} changed while it was rolled back: nothing was changed", path=str(self.path))

    def _bytes(self, start: int, stop: int) -> bytes:
        return self.read(start, stop).numpy().tobytes()

    def _tensor(self, name: str, entry: Any, begin: int) -> StoredTensor:
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, stop]}:
                numbers = [*shape, start, stop]
            case _:
                numbers = [None]
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise self._broken(f"tensor {name} is not described as dtype, shape and data_offsets", name)
        tensor = StoredTensor(self, name, dtype, tuple(shape), begin + start, begin + stop)
        known = tensor.torch_dtype
        if known is not None and math.prod(shape) * known.itemsize != stop - start:
            raise self._broken(
                f"tensor {name} of dtype {dtype} and shape {tensor.shape} cannot take {stop - start:,} bytes", name
            )
        return tensor

    def _check_covered(self, begin: int, size: int) -> None:
        """Hold every tensor to begin where another ends, and the last one to end with the file."""
        end = begin
        for tensor in sorted(self.tensors.values(), key=lambda tensor: (tensor.start, tensor.stop)):
            if tensor.start != end or not tensor.start <= tensor.stop <= size:
                raise self._broken(
                    f"tensor {tensor.name} lies at bytes {tensor.start:,} to {tensor.stop:,} of {size:,}, and the one "
                    f"before it ends at {end:,}",
                    tensor.name,
                )
            end = tensor.stop
        if end != size:
            raise self._broken(f"its tensors end at byte {end:,}, and the file has {size:,}")

    def _broken(self, why: str, tensor: str | None = None) -> FormatError:
        fields = {} if tensor is None else {"tensor": tensor}
        return FormatError(
            f"{self.path} is no whole safetensors file: {why}. Restore it from a copy, or save the model again",
            path=str(self.path),
            **fields,
        )


@contextmanager
def plain_file(path: Path) -> Iterator[int]:
    """Open a file to be read; yields its descriptor.

    Raises:
        NotFoundError, StorageError: it cannot be read.
        InvalidInputError: it is a device, a pipe or a folder.
    """
    with reporting("read", path):
        # Without O_NONBLOCK, opening a named pipe would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidInputError(f"{path} is no plain file", path=str(path))
        yield descriptor
    finally:
        os.close(descriptor)


def read(descriptor: int, path: Path, start: int, stop: int) -> torch.Tensor:
    """Return bytes [start, stop) of an open file as uint8, on the host.

    Raises:
        StorageError: it cannot be read, or has become shorter.
    """
    data = torch.empty(stop - start, dtype=torch.uint8, device="cpu")
    rest = data.numpy().data
    with reporting("read", path):
        while rest:
            done = os.preadv(descriptor, [rest], stop - len(rest))
            if done == 0:
                raise StorageError(f"{path} became shorter while it was read", path=str(path))
            rest = rest[done:]
    return data


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that is given twice: readers differ in which of the two they take."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name is given twice")
    return entries
