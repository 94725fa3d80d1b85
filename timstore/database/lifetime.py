"""The stores that are open in this process: what becomes of them in a forked child, and when the interpreter ends."""

import atexit
import ctypes
import os
import warnings
import weakref
from pathlib import Path
from typing import Any

from timstore import errors

# Every `Store` from its opening to its end.
watched: "weakref.WeakSet[Any]" = weakref.WeakSet()
# The handles that nobody but us holds, and where each lies, which a relative path says no more once the process moved.
_unattended: "weakref.WeakKeyDictionary[Any, str]" = weakref.WeakKeyDictionary()


def unattended(store: Any) -> None:
    """Say that no caller holds this `Store`, so that none can commit what it accepted, or mean it."""
    _unattended[store] = os.path.realpath(store.path)


def commit_unattended(path: Path) -> None:
    """Commit what such handles of this process accepted for the store at a path."""
    waiting = [store for store in open_stores() if store in _unattended]
    place = os.path.realpath(path) if waiting else None
    for store in waiting:
        if _unattended[store] != place:
            continue
        try:
            store.commit()
        except errors.StorageError as error:
            if error.kind not in errors.LOST:
                raise
            _close(store, "what it had not committed was lost")


def open_stores() -> list[Any]:
    """Return the `Store`s that are open in this process."""
    return [store for store in watched if not store._closed and store._pid == os.getpid()]


def give_up(path: Path) -> None:
    """Close the handles on the store at a path, which is about to be removed, without another commit."""
    place = os.path.realpath(path)
    for store in open_stores():
        if os.path.realpath(store.path) == place:
            store._release()


def attended_stores() -> list[Any]:
    """Return those of them that a caller holds."""
    return [store for store in open_stores() if store not in _unattended]


def _keep_inherited() -> None:
    """Hold the stores of the parent in a forked child: DuckDB crashes where a connection is freed after a fork."""
    for store in watched:
        # One reference that nothing gives back, the end of the interpreter included: it clears every module.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(store))


os.register_at_fork(after_in_child=_keep_inherited)


@atexit.register
def _close_all() -> None:
    """Commit what an interpreter that ends without `close()` still holds."""
    for store in open_stores():
        _close(store, "records were lost at exit")


def _close(store: Any, outcome: str) -> None:
    """Close a store, and warn of the outcome where that fails."""
    try:
        store.close()
    except errors.TimstoreError as error:
        warnings.warn(f"{store.path}: {outcome}: {error}", errors.TimstoreWarning, stacklevel=1)
