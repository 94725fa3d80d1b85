"""A new directory on its way: made beside its place, by one process at a time, and moved there when it is whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from timstore.errors import InvalidInputError
from timstore.format.local_files import folder_held
from timstore.os_errors import reporting, user_path


def place_of(path: str | os.PathLike[str]) -> Path:
    """Return where a new directory is to go, links followed.

    Raises:
        InvalidInputError: nothing can take the place of what is there.
    """
    found = Path(os.path.realpath(user_path(path)))
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
    with folder_held(found, f"another process is {doing} {path}"):
        yield found


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
