"""The folder in which tables are made: nobody else may enter it, and it goes with the process that made it."""

import fcntl
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import duckdb

from timstore.errors import StorageError, TimstoreError

_PREFIX = "timstore-catalogue-"
# Locked for as long as its process needs the folder. The lock decides who lives, not a number of a process: those of
# another container that shares the temporary directory mean nothing here.
_LOCK = "lock"


@contextmanager
def in_temporary_space() -> Iterator[None]:
    """Turn what the system and DuckDB say while tables are made there into errors of ours that name the place.

    Raises:
        StorageError: there is no room, or no temporary directory that can be written.
    """
    try:
        yield
    except TimstoreError:
        raise
    except (OSError, duckdb.OperationalError) as error:
        where = tempfile.tempdir or "any temporary directory"
        raise StorageError(
            f"SQL's tables cannot be kept in {where}: {error}. Set the environment variable TMPDIR to a directory with "
            "room (14 bytes per gradient row), and start again; the store itself is as it was",
            kind="temporary-space",
            path=str(where),
        ) from error
    except RuntimeError as error:
        # What DuckDB makes of Ctrl-C.
        if str(error) != "Query interrupted":
            raise
        raise KeyboardInterrupt from error


@contextmanager
def private_folder() -> Iterator[Path]:
    """Make a folder of mode 0700 in the system's temporary directory, and remove it when the block ends.

    SIGTERM and SIGHUP remove it too, where they would end the process; what a kill leaves, `remove_leftovers` finds.
    """
    folder, lock = _made()
    try:
        with _removed_by_signals(folder):
            yield folder
    finally:
        _remove(folder)
        os.close(lock)


def remove_leftovers() -> None:
    """Remove the folders of this user whose processes are dead."""
    with suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for folder in [Path(entry.path) for entry in entries if entry.name.startswith(_PREFIX)]:
            _remove_dead(folder)


def _made() -> tuple[Path, int]:
    """Return a new folder and the descriptor of its locked file.

    Until it is locked, a process that looks for leftovers takes it for one; then another is made.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with suppress(FileNotFoundError):
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            if _lock(lock) and (folder / _LOCK).exists():
                return folder, lock
            os.close(lock)


def _lock(descriptor: int) -> bool:
    """Lock a file of our own, unless another process did."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network file systems have no locks: nobody can take a folder there for a leftover
    return True


def _remove(folder: Path) -> None:
    """Remove a folder that this process holds."""
    with suppress(OSError), _opened(folder, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        _remove_opened(folder, descriptor)


def _remove_dead(folder: Path) -> None:
    """Remove a folder if it is this user's, and no process holds it."""
    with suppress(OSError), _opened(folder, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        if os.fstat(descriptor).st_uid != os.geteuid():
            return
        if _LOCK not in os.listdir(descriptor):
            os.rmdir(folder)  # only an empty one: whoever made it died before it was locked, or makes another
            return
        with _opened(_LOCK, os.O_RDWR | os.O_NONBLOCK, dir_fd=descriptor) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_opened(folder, descriptor)


@contextmanager
def _opened(path: Path | str, flags: int, dir_fd: int | None = None) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_NOFOLLOW, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_opened(folder: Path, descriptor: int) -> None:
    """Remove what an opened folder holds, and it; the lock comes last, so that what a kill leaves is found again."""
    for name in os.listdir(descriptor):
        if name != _LOCK:
            try:
                os.unlink(name, dir_fd=descriptor)
            except (IsADirectoryError, PermissionError):
                shutil.rmtree(name, dir_fd=descriptor)
    os.unlink(_LOCK, dir_fd=descriptor)
    os.rmdir(folder)


@contextmanager
def _removed_by_signals(folder: Path) -> Iterator[None]:
    """Remove the folder before a signal ends this process as it would have without."""
    maker = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == maker:  # a child that another thread forked has this handler too
            _remove(folder)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in taken:
            signal.signal(number, end)
        yield
    finally:
        for number in taken:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)
