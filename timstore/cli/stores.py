"""Opening a store that exists; no verb makes one by a mistyped path."""

from pathlib import Path

import timstore
from timstore.errors import InvalidInputError, NotFoundError


def reading(path: Path) -> timstore.Store:
    """Open a store to read.

    Raises:
        NotFoundError: there is none.
        InvalidInputError: the path is a file.
    """
    if path.exists() and not path.is_dir():
        raise InvalidInputError(f"{path} is a file, and a store is a folder: name the folder", path=str(path))
    try:
        return timstore.open(path, "r")
    except NotFoundError:
        why = "the directory has no timstore.json" if path.is_dir() else "the path does not exist"
        raise NotFoundError(f"there is no store at {path}: {why}", path=str(path)) from None


def writing(path: Path) -> timstore.Store:
    """Open a store to write to it.

    Raises:
        NotFoundError: there is none.
    """
    reading(path).close()
    return timstore.open(path)
