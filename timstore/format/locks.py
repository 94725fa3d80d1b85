"""One writer at a time, whatever process or thread it is in."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from timstore.errors import StorageError

# What is done under a lock takes milliseconds.
_SECONDS = 60
_PAUSE = 0.001


@contextmanager
def locked(folder: int, where: Path) -> Iterator[None]:
    """Hold the lock of an open folder, which ends with the process; on a file system without locks hold nothing.

    Raises:
        StorageError: kind `locked`: another holds it for a minute.
    """
    is_held = _take(folder, where)
    try:
        yield
    finally:
        if is_held:  # not by closing the folder: a child that was forked meanwhile holds it open
            fcntl.flock(folder, fcntl.LOCK_UN)


def _take(folder: int, where: Path) -> bool:
    until = time.monotonic() + _SECONDS
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                message = f"another process has held {where} for {_SECONDS} s: is it stopped? End it, and commit again"
                raise StorageError(message, kind="locked") from None
            time.sleep(_PAUSE)
        except OSError:
            return False
