"""Errors, grouped by what a handler would do about them.

Every class is a `TimstoreError` and also its natural builtin, carries a stable kebab-case `kind`, and
keeps the things it names (path, step, sample, parameter, ...) in `fields`.
"""

from typing import Any


class TimstoreError(Exception):
    """Root of every error that timstore raises on purpose."""

    kind = "timstore"

    def __init__(self, message: str, *, kind: str | None = None, **fields: Any) -> None:
        super().__init__(message)
        if kind is not None:
            self.kind = kind
        self.fields = fields


class NotFoundError(TimstoreError, LookupError):
    """A store, record, sample or parameter that does not exist."""

    kind = "not-found"

    __str__ = Exception.__str__  # LookupError's KeyError cousins quote; messages here read as sentences


class AlreadyExistsError(TimstoreError, FileExistsError):
    """A store or an object that exists where a new one was asked for."""

    kind = "already-exists"


class ReadOnlyError(TimstoreError, PermissionError):
    """A write to a store that was opened to read, or that this process may not write."""

    kind = "read-only"


class InvalidInputError(TimstoreError, ValueError):
    """An argument that cannot be right: wrong shape, type, name or value."""

    kind = "invalid-input"


class ModelMismatchError(InvalidInputError):
    """A model that is not the one the store recorded."""

    kind = "model-mismatch"


class StateError(TimstoreError, RuntimeError):
    """A call at the wrong time: closed, forked, already recording, out of order, done before."""

    kind = "state"


class CoverageError(TimstoreError, LookupError):
    """Something was asked of the records that was never recorded."""

    kind = "coverage"

    __str__ = Exception.__str__


class FormatError(TimstoreError, ValueError):
    """Bytes on disk that this version cannot read."""

    kind = "format"


class CorruptionError(FormatError):
    """Bytes on disk that are not the bytes that were written."""

    kind = "corruption"


class StorageError(TimstoreError, OSError):
    """The file system refused: no space, no permission, an I/O error. Nothing became visible."""

    kind = "storage"


LOST = ("gone", "replaced")
"""Kinds of `StorageError` after which a handle has no store any more."""


class TimstoreWarning(UserWarning):
    """Something the user should know before trusting a result."""


def shown(value: Any, most: int = 80) -> str:
    """Return the beginning of what Python shows of a value, for a message: whatever the value is, this fails never."""
    try:
        return f"{value!r:.{most}}"
    except Exception:  # a number of thousands of digits, lists within lists, an object that cannot be shown
        return f"a {type(value).__name__}"
