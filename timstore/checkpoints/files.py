"""One open safetensors file, read a bounded number of bytes at a time, and never mapped: mapped pages are memory."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from timstore.checkpoints.header import LENGTH_BYTES, Header, StoredTensor, header_length, parse_header
from timstore.errors import InvalidInputError, StateError, StorageError
from timstore.os_errors import reporting

BLOCK_BYTES = 256 * 1024
# Without O_NONBLOCK, opening a named pipe would wait for ever.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


class PlainFile:
    """An open file, as it is at this moment.

    Raises:
        NotFoundError, StorageError: it cannot be read.
        InvalidInputError: it is a device, a pipe or a folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reporting("read", path):
            self.descriptor = os.open(path, _READ)
            self.status = os.fstat(self.descriptor)
        if not stat.S_ISREG(self.status.st_mode):
            self.close()
            raise InvalidInputError(f"{path} is no plain file", path=str(path))

    @property
    def size(self) -> int:
        """The number of its bytes."""
        return self.status.st_size

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return bytes [start, stop) as uint8, on the host.

        Raises:
            StorageError: it cannot be read, or has become shorter.
        """
        data = torch.empty(stop - start, dtype=torch.uint8, device="cpu")
        view, done = data.numpy().data, 0
        with reporting("read", self.path):
            while done < len(view):
                got = os.preadv(self.descriptor, [view[done:]], start + done)
                if got == 0:
                    raise StorageError(f"{self.path} became shorter while it was read", path=str(self.path))
                done += got
        return data

    def check_unchanged(self) -> None:
        """Refuse to go on when the file is another one than it was.

        Raises:
            StateError: somebody wrote to it, or replaced it.
        """
        with reporting("read", self.path):
            now = os.stat(self.path)
        if any(
            getattr(now, one) != getattr(self.status, one) for one in ("st_dev", "st_ino", "st_size", "st_mtime_ns")
        ):
            raise StateError(f"{self.path} changed while it was rolled back: nothing was changed", path=str(self.path))

    def close(self) -> None:
        """Close it."""
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorFile(PlainFile):
    """An open safetensors file.

    Args:
        header_bytes: that its header may take.

    Raises:
        FormatError: it is none, or not whole.
    """

    def __init__(self, path: Path, header_bytes: int) -> None:
        super().__init__(path)
        try:
            self.header = self._header(header_bytes)
        except BaseException:
            self.close()
            raise

    def _header(self, header_bytes: int) -> Header:
        first = self.read(0, min(LENGTH_BYTES, self.size)).numpy().tobytes()
        length = header_length(first, self.path, self.size, header_bytes)
        text = self.read(LENGTH_BYTES, LENGTH_BYTES + length).numpy().tobytes()
        return parse_header(text, self.path, self.size)

    def blocks(self, tensor: StoredTensor, size_bytes: int = BLOCK_BYTES) -> Iterator[torch.Tensor]:
        """Yield the bytes of one tensor in order, so many at a time."""
        for start in range(tensor.start, tensor.stop, size_bytes):
            yield self.read(start, min(tensor.stop, start + size_bytes))
