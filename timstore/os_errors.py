"""Paths that users give, and what the system says of the files there, as errors of ours."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timstore.errors import InvalidInputError, NotFoundError, ReadOnlyError, StorageError, TimstoreError, shown

_READS = ("read", "open")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def user_path(given: Any) -> Path:
    """Return a path as a user gave it.

    Raises:
        InvalidInputError: it can name nothing.
        NotFoundError: it counts from a working directory that is gone.
    """
    try:
        path = os.fspath(given)
    except TypeError:
        raise InvalidInputError(f"a path is text or a pathlib.Path, not {shown(given)}") from None
    if not isinstance(path, str) or not path:
        raise InvalidInputError(f"a path is text or a pathlib.Path, not {shown(given)}")
    if "://" in path:
        message = f"{shown(path)}: this version knows local files, and keeps stores in local directories"
        raise InvalidInputError(message, path=path)
    try:
        if b"\0" in os.fsencode(path):
            raise InvalidInputError(f"{shown(path)} holds a NUL character, which no path may", path=path)
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{shown(path)} cannot name a file: {error.reason}", path=path) from None
    with reporting("open", Path(path)):
        Path(path).absolute()
    return Path(path)


@contextmanager
def reporting(doing: str, path: Path) -> Iterator[None]:
    """Turn what the system says into errors of ours that name the path."""
    try:
        yield
    except TimstoreError:
        raise
    except OSError as error:
        raise _translated(error, doing, path) from error


def _translated(error: OSError, doing: str, path: Path) -> TimstoreError:
    fields: dict[str, Any] = {"path": str(path), "errno": error.errno}
    if error.errno == errno.ENOENT and not path.is_absolute() and not _has_working_directory():
        return NotFoundError(
            f"cannot {doing} {path}: the working directory of this process was removed. Give the whole path, or change "
            "to a directory that is there",
            **fields,
        )
    if error.errno == errno.ENOENT:
        return NotFoundError(f"cannot {doing} {path}: there is no such file or folder", **fields)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and doing not in _READS:
        return ReadOnlyError(
            f"cannot {doing} {path}: {error.strerror}. Nothing was changed; choose an output where you may write",
            **fields,
        )
    message = f"cannot {doing} {path}: {error.strerror or error}"
    if error.errno == errno.ENAMETOOLONG:
        return InvalidInputError(f"{message}. Choose a shorter one", **fields)
    if error.errno == errno.EACCES:
        message = f"{message}. Ask its owner for access"
    elif doing not in _READS:
        message = f"{message}. {'Make room, and try again' if error.errno in _FULL else 'Nothing was changed'}"
    ours = StorageError(message, **fields)
    ours.errno = error.errno
    return ours


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True
