"""What the file system refuses, as errors of ours that name the path."""

import errno
from pathlib import Path
from typing import Any

from timstore.errors import (
    AlreadyExistsError,
    CorruptionError,
    NotFoundError,
    ReadOnlyError,
    StorageError,
    TimstoreError,
)


def not_plain(where: Path, path: str) -> CorruptionError:
    """Return the error of what is neither file nor folder."""
    return CorruptionError(
        f"{where} is, or lies behind, a symbolic link or something else that is neither file nor folder. timstore "
        "follows none: put the real file there",
        kind="not-a-file",
        path=path,
    )


def too_large(where: Path, path: str, size: int, most: int) -> CorruptionError:
    """Return the error of a file that has more bytes than can be right."""
    return CorruptionError(
        f"{where} has {size} bytes, and at most {most} can be right: something else was written to it. Restore this "
        "file from a copy",
        kind="too-large",
        path=path,
        bytes=size,
    )


def translated(error: OSError, doing: str, where: Path, path: str, size: int, kind: str | None) -> TimstoreError:
    """Return the error that says what could not be done.

    Args:
        doing: a verb: read, list, look for, write, create, delete, fsync, lock.
        path: relative to the store.
        size: of what was to be written.
        kind: of the error; by what the system says when None.
    """
    fields: dict[str, Any] = {"path": path, "errno": error.errno}
    reads = doing in ("read", "list", "look for")
    if kind is not None:
        message = f"cannot {doing} {where}: {error.strerror}. What was written there may not survive a power loss"
        return with_errno(StorageError(message, kind=kind, **fields), error)
    if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.EISDIR):
        return not_plain(where, path)
    if error.errno == errno.ENOENT and (reads or doing == "delete"):
        return NotFoundError(f"{where} does not exist", path=path)
    if error.errno == errno.EEXIST:
        return AlreadyExistsError(f"{where} exists already, and objects are written once", path=path)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not reads:
        message = f"cannot {doing} {where}: {error.strerror}. Open the store with mode='r', or where you may write"
        return with_errno(ReadOnlyError(message, **fields), error)
    message = f"cannot {doing} {where}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = f"no space left to {doing} {where} ({size} bytes); nothing became visible. Make room and try again"
    return with_errno(StorageError(message, **fields), error)


def with_errno(ours: StorageError | ReadOnlyError, error: OSError) -> TimstoreError:
    """Return the error with the system's number for it."""
    ours.errno = error.errno
    return ours
