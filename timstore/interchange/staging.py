"""A new directory on its way: made beside its place, by one process at a time, and moved there when it is whole."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from timstore.errors import InvalidInputError, StateError
from timstore.reporting import reporting

# Some network file systems have no locks: two processes at one place then are as they were without.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def place_of(path: str | os.PathLike[str]) -> Path:
    """Return where a new directory is to go, links followed.

    Raises:
        InvalidInputError: nothing can take the place of what is there.
    """
    found = Path(os.path.realpath(path))
    if os.path.ismount(found):
        raise InvalidInputError(f"{found} is a mount point: choose a folder in it", path=str(found))
    return found


def beside(path: Path, doing: str) -> Path:
    """Return what the directory for a path is called on its way, hidden as nothing of a user's own."""
    return path.with_name(f".{path.name}.{doing}")


@contextmanager
def staged(path: Path, doing: str) -> Iterator[Path]:
    """Hold the directory beside a path while the block runs; what an interrupted one left is in it.

    Raises:
        StateError: another process holds it.
    """
    found = beside(path, doing)
    with reporting("make", found):
        found.mkdir(parents=True, exist_ok=True)
    with held(found, f"another process is {doing} {path}"):
        yield found


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


def emptied(folder: Path) -> None:
    """Remove everything in a folder, and not the folder: somebody may hold it."""
    with reporting("empty", folder):
        for one in folder.iterdir():
            if one.is_dir() and not one.is_symlink():
                shutil.rmtree(one)
            else:
                one.unlink()


def publish(folder: Path, path: Path) -> None:
    """Move a directory to its place, where an empty one may be."""
    with reporting("write", path):
        if path.exists():
            path.rmdir()
        folder.rename(path)
