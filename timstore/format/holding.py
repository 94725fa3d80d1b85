"""A folder held against other processes of this machine."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from timstore.errors import StateError
from timstore.os_errors import reporting

# Some network file systems have no locks: two processes at one place then are as they were without.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def held(folder: Path, by_another: str) -> Iterator[None]:
    """Hold a folder against other processes of this machine, and other threads, while the block runs.

    Raises:
        StateError: another one holds it.
    """
    with reporting("read", folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(f"{by_another}: wait until it is done", kind="held") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        # Whoever held it may have moved it meanwhile.
        if not folder.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise StateError(f"{by_another}, or has just done so: look at what is there", kind="held")
        yield
    finally:
        os.close(descriptor)
