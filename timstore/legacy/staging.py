"""A new directory on its way: made beside its place, by one process at a time, and moved there when it is whole."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from timstore.errors import InvalidInputError, StateError
from timstore.format.local_files import folder_held
from timstore.os_errors import reporting, user_path


def place_of(path: str | os.PathLike[str]) -> Path:
    """Return where a new directory is to go, links followed.

    Raises:
        InvalidInputError: nothing can take the place of what is there.
    """
    place = Path(os.path.realpath(user_path(path)))
    if os.path.ismount(place):
        raise InvalidInputError(f"{place} is a mount point: choose a folder in it", path=str(place))
    return place


def beside(path: Path, doing: str) -> Path:
    """Return what the directory for a path is called on its way, hidden as nothing of a user's own."""
    return path.with_name(f".{path.name}.{doing}")


@contextmanager
def staged(path: Path, doing: str, goes_on: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield a directory beside a path, which takes its place, where an empty one may be, when the block is through.

    Args:
        goes_on: whether the block can go on with what an interrupted one left in there. Without it nothing is left when
            the block fails; with it nothing after a `StateError` or `ValueError`, which would come again.

    Raises:
        StateError: another process holds it.
    """
    folder = beside(path, doing)
    with reporting("make", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with folder_held(folder, f"another process is {doing} {path}"):
        if goes_on is None or not goes_on(folder):
            _empty(folder)
        try:
            yield folder
            with reporting("write", path):
                if path.exists():
                    path.rmdir()
                folder.rename(path)
        except BaseException as error:
            if goes_on is None or isinstance(error, StateError | ValueError):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _empty(folder: Path) -> None:
    """Remove everything in a folder, and not the folder, which is held."""
    with reporting("empty", folder):
        for item in folder.iterdir():
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            else:
                item.unlink()
