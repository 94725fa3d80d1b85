"""What the system says of files that are a user's own, as errors of ours."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timstore.errors import NotFoundError, ReadOnlyError, StorageError, TimstoreError


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
    if error.errno == errno.ENOENT:
        return NotFoundError(f"cannot {doing} {path}: there is no such file or folder", **fields)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and doing != "read":
        return ReadOnlyError(
            f"cannot {doing} {path}: {error.strerror}. Nothing was changed; choose an output where you may write",
            **fields,
        )
    message = f"cannot {doing} {path}: {error.strerror or error}"
    if doing != "read":
        advice = "Make room, and try again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Nothing was changed"
        message = f"{message}. {advice}"
    ours = StorageError(message, **fields)
    ours.errno = error.errno
    return ours
