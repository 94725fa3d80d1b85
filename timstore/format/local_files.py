"""Where objects lie: named, immutable byte strings, written once and never replaced; here, files of a local folder."""

import errno
import fcntl
import mmap
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import ParamSpec, Protocol, TypeAlias, TypeVar

from timstore.errors import (
    AlreadyExistsError,
    CorruptionError,
    InvalidInputError,
    NotFoundError,
    ReadOnlyError,
    StateError,
    StorageError,
    TimstoreError,
)
from timstore.format import paths
from timstore.os_errors import reporting

P = ParamSpec("P")
R = TypeVar("R")
Paths: TypeAlias = list[str]  # `list` inside the classes below is their method
Mark: TypeAlias = tuple[int, ...]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# Files that are worth writing past the page cache, and what their parts are a multiple of.
_DIRECT = getattr(os, "O_DIRECT", 0)  # where there is no such thing, the cache is used
_DIRECT_BYTES = 256 * 1024
_BLOCK_BYTES = 4096
_ALIGNED_BYTES = 1024 * 1024
# Without O_NONBLOCK, opening a named pipe that someone put into the store would wait for ever.
_READ = os.O_NOFOLLOW | os.O_NONBLOCK
# What is done under a lock takes milliseconds.
_SECONDS = 60
_PAUSE = 0.001
# Some network file systems have no locks: two processes at one place then are as they were without.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Objects(Protocol):
    """What a store needs of the place it lies in: everything that `timstore.format` reads and writes goes through it.

    Paths are those that `paths.is_object_path` accepts. An object that cannot be read or written for other reasons than
    those below is a `StorageError`, or a `ReadOnlyError` where this process may not write.
    """

    def put(self, path: str, data: bytes) -> None:
        """Write one new data object, or raise `AlreadyExistsError`; after another error part of it may be left.

        On disk, and found again after a power loss, only after `sync`.
        """

    def sync(self, objects: Iterable[str]) -> None:
        """Make the names of objects that were put survive a power loss; `StorageError`, kind `not-durable`, if not."""

    def create(self, path: str, data: bytes) -> None:
        """Create an object whole and durable, or raise `AlreadyExistsError`: of several callers one succeeds.

        After any other error nothing is visible, except with kind `not-durable`: then it is there, but a power loss may
        take it away.
        """

    def read(self, path: str, start: int = 0, size: int | None = None, *, most: int | None = None) -> bytes:
        """Return the whole object, or `size` bytes from `start` on (fewer where it ends), or raise `NotFoundError`.

        What is no plain object is a `CorruptionError`; so is, with kind `too-large` and the field `bytes`, one of more
        than `most` bytes, which is not read.
        """

    def mark(self, path: str) -> Mark:
        """Return what tells an object from any other that took its place, or raise `NotFoundError`; reads nothing."""

    def alone(self, prefix: str) -> AbstractContextManager[None]:
        """Keep every other process and thread that asks likewise out of a folder; where there are no locks, nobody.

        `StorageError`, kind `locked`, when another holds it for a minute.
        """

    def list(self, prefix: str) -> Paths:
        """Return the sorted paths of all objects below a folder; none when there is no such folder."""

    def folders(self, prefix: str) -> Paths:
        """Return the sorted paths of the folders right below a folder, without their slash."""

    def delete(self, path: str) -> None:
        """Delete one object, or raise `NotFoundError`."""

    def delete_prefix(self, prefix: str) -> None:
        """Delete a folder and all objects below it; nothing happens when there is none."""

    def synced(self) -> "Objects":
        """Return the same objects, every write of them durable: for what copies before it deletes."""


class LocalObjects:
    """Objects as files of mode 0600 in folders of mode 0700, on a POSIX file system with hard links.

    No symbolic link is followed below `root`, and names that begin with a dot are no objects. Every system call that
    changes the disk goes through `_call`, where fault tests take hold.

    Args:
        root: the store's folder; it is made, with its parents, when the first object is written.
        durable: fsync everything. Without it objects survive the death of the process but no power loss.
    """

    def __init__(self, root: str | Path, *, durable: bool) -> None:
        self.root = Path(root).absolute()
        self.durable = durable
        self._aligned: list[mmap.mmap] = []
        self._was_there = False

    def synced(self) -> "LocalObjects":
        objects = copy(self)
        objects.durable = True
        return objects

    def put(self, path: str, data: bytes) -> None:
        *folders, name = self._parts(path)
        with self._reporting("write", path, data), self._folder(folders, create=True) as folder:
            self._write_new(name, data, folder)

    def sync(self, objects: Iterable[str]) -> None:
        """Fsync every folder above the objects, deepest first, the root last."""
        if not self.durable:
            return
        above = {parts[:depth] for parts in map(self._parts, objects) for depth in range(len(parts))}
        for folders in sorted(above, key=lambda folders: (-len(folders), folders)):
            path = "/".join(folders)
            with self._reporting("fsync", path, kind="not-durable"), self._folder(folders) as folder:
                self._call(os.fsync, folder)

    def create(self, path: str, data: bytes) -> None:
        """Write a file under a temporary name, fsync it, and link it to its own, which only one caller can."""
        *folders, name = self._parts(path)
        temporary = f".{name}.{secrets.token_hex(4)}"
        with self._reporting("create", path, data), self._folder(folders, create=True) as folder:
            try:
                self._write_new(temporary, data, folder)
                self._link(temporary, name, folder)
            finally:
                with suppress(OSError):  # a temporary name that stays is ignored by every reader
                    self._call(os.unlink, temporary, dir_fd=folder)
        self.sync([path])

    def read(self, path: str, start: int = 0, size: int | None = None, *, most: int | None = None) -> bytes:
        *folders, name = self._parts(path)
        with self._reporting("read", path), self._folder(folders) as folder:

            def opener(name: str, flags: int) -> int:
                return os.open(name, flags | _READ, dir_fd=folder)

            with open(name, "rb", buffering=0, opener=opener) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise self._not_plain(path)
                if most is not None and status.st_size > most:
                    raise CorruptionError(
                        f"{self.root / path} has {status.st_size} bytes, and at most {most} can be right: something "
                        "else was written to it. Restore this file from a copy",
                        kind="too-large",
                        path=path,
                        bytes=status.st_size,
                    )
                file.seek(start)
                # `read` takes memory for all that it is asked for.
                return file.read(-1 if size is None else min(size, max(0, status.st_size - start)))

    def mark(self, path: str) -> Mark:
        """Return device, inode, size and the time of the last change of a file's entry, in one system call."""
        with self._reporting("look for", path):
            status = os.stat(self.root / path)
        return status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns

    @contextmanager
    def alone(self, prefix: str) -> Iterator[None]:
        """Hold the folder's lock, which goes with the process that holds it."""
        with ExitStack() as stack:
            with self._reporting("lock", prefix):
                folder = stack.enter_context(self._folder(self._parts(prefix.rstrip("/")), create=True))
                if self._locked(folder, prefix):
                    # Not by closing the folder: a child that was forked meanwhile holds it open.
                    stack.callback(fcntl.flock, folder, fcntl.LOCK_UN)
            yield

    def list(self, prefix: str) -> Paths:
        folders = self._parts(prefix.rstrip("/")) if prefix else ()
        with suppress(NotFoundError), self._reporting("list", prefix), self._folder(folders) as folder:
            return sorted(self._walk(folder, "".join(f"{part}/" for part in folders)))
        return []

    def folders(self, prefix: str) -> Paths:
        folders = self._parts(prefix.rstrip("/"))
        with suppress(NotFoundError), self._reporting("list", prefix), self._folder(folders) as folder:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
            return sorted("/".join((*folders, name)) for name in names if not name.startswith("."))
        return []

    def delete(self, path: str) -> None:
        """Delete one file, and the folder of its commit or compaction if that is empty then."""
        *folders, name = self._parts(path)
        with self._reporting("delete", path), self._folder(folders) as folder:
            self._call(os.unlink, name, dir_fd=folder)
        if folders[0] == "data":  # others are shared with records to come
            with suppress(OSError, TimstoreError), self._folder(folders[:-1]) as above:
                self._call(os.rmdir, folders[-1], dir_fd=above)

    def delete_prefix(self, prefix: str) -> None:
        """Delete a folder with all that is below it; links in it are deleted, never followed."""
        *folders, name = self._parts(prefix.rstrip("/"))
        with suppress(NotFoundError), self._reporting("delete", prefix), self._folder(folders) as folder:
            self._call(shutil.rmtree, name, dir_fd=folder)

    def _call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    def _write_new(self, name: str, data: bytes, folder: int) -> None:
        file = self._call(os.open, name, _NEW, 0o600, dir_fd=folder)
        try:
            left = memoryview(data)
            if self.durable and _DIRECT and len(data) >= _DIRECT_BYTES:
                left = left[self._write_direct(file, data) :]
            while left:
                left = left[self._written(file, left) :]
            if self.durable:
                self._call(os.fsync, file)
        finally:
            os.close(file)

    def _write_direct(self, file: int, data: bytes) -> int:
        """Write past the page cache as much as the file system lets, and return how much.

        What is synced at once gains nothing from the cache, and filling it takes more of a core than all else that is
        done with the bytes.
        """
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        try:
            fcntl.fcntl(file, fcntl.F_SETFL, flags | _DIRECT)
        except OSError:
            return 0  # a file system that knows no such thing
        # One that no other thread uses: memory at an even address, kept since new memory costs as much as a copy.
        aligned = self._aligned.pop() if self._aligned else mmap.mmap(-1, _ALIGNED_BYTES)
        done = 0
        try:
            while len(data) - done >= _BLOCK_BYTES and done % _BLOCK_BYTES == 0:
                size = min(len(data) - done, _ALIGNED_BYTES) // _BLOCK_BYTES * _BLOCK_BYTES
                aligned[:size] = memoryview(data)[done : done + size]
                with memoryview(aligned) as whole, whole[:size] as part:
                    done += self._written(file, part)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        finally:
            self._aligned.append(aligned)
            fcntl.fcntl(file, fcntl.F_SETFL, flags)
        return done

    def _written(self, file: int, left: memoryview) -> int:
        written: int = self._call(os.write, file, left)
        if written == 0:
            raise OSError(errno.EIO, "the file system accepts no more bytes and gives no reason")
        return written

    def _link(self, temporary: str, name: str, folder: int) -> None:
        try:
            self._call(os.link, temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                message = (
                    f"the file system of {self.root} makes no hard links, without which a store cannot be written "
                    "safely. Put the store on another file system"
                )
                raise _with_errno(StorageError, message, error, name) from error
            raise

    @contextmanager
    def _folder(self, folders: Sequence[str], *, create: bool = False) -> Iterator[int]:
        """Open a folder below the root one component at a time: O_NOFOLLOW guards only the last one of a path."""
        folder = self._open_root(create)
        try:
            for name in folders:
                inner = self._open_folder(name, folder, create)
                os.close(folder)
                folder = inner
            yield folder
        finally:
            os.close(folder)

    def _open_folder(self, name: str, folder: int, create: bool) -> int:
        try:
            return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
        except FileNotFoundError:
            if not create:
                raise
        with suppress(FileExistsError):
            self._call(os.mkdir, name, 0o700, dir_fd=folder)
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)

    def _open_root(self, create: bool) -> int:
        try:
            # Made once: a store that was removed, settings and all, must not come to life again without them.
            if create and not self._was_there:
                self._make_root()
            folder = os.open(self.root, _FOLDER)
            self._was_there = True
            return folder
        except NotADirectoryError as error:
            raise InvalidInputError(f"{self.root} is not a folder; a store is one", path=str(self.root)) from error

    def _make_root(self) -> None:
        missing = []
        path = self.root
        while not path.exists():
            missing.append(path)
            path = path.parent
        for path in reversed(missing):
            with suppress(FileExistsError):
                self._call(os.mkdir, path, 0o700 if path == self.root else 0o777)
            if self.durable:
                parent = os.open(path.parent, _FOLDER)
                try:
                    self._call(os.fsync, parent)
                finally:
                    os.close(parent)

    def _walk(self, folder: int, prefix: str) -> Iterator[str]:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = prefix + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink():
                    raise self._not_plain(path)
                if not entry.is_dir(follow_symlinks=False):
                    yield path
                    continue
                with suppress(FileNotFoundError):  # deleted since it was listed
                    inner = self._open_folder(entry.name, folder, create=False)
                    try:
                        yield from self._walk(inner, f"{path}/")
                    finally:
                        os.close(inner)

    def _locked(self, folder: int, prefix: str) -> bool:
        """Take the lock of an open folder; False where the file system has none."""
        until = time.monotonic() + _SECONDS
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > until:
                    raise StorageError(
                        f"another process has held {self.root / prefix} for {_SECONDS} s: is it stopped? End it, and "
                        "commit again",
                        kind="locked",
                    ) from None
                time.sleep(_PAUSE)
            except OSError:
                return False

    def _parts(self, path: str) -> tuple[str, ...]:
        if not paths.is_object_path(path):
            raise InvalidInputError(f"{path!r} cannot name an object of a store", path=path)
        return tuple(path.split("/"))

    def _not_plain(self, path: str) -> CorruptionError:
        return CorruptionError(
            f"{self.root / path} is, or lies behind, a symbolic link or something else that is neither file nor "
            "folder. timstore follows none: put the real file there",
            kind="not-a-file",
            path=path,
        )

    @contextmanager
    def _reporting(self, doing: str, path: str, data: bytes = b"", *, kind: str | None = None) -> Iterator[None]:
        """Turn what the system says into errors of ours that name the path; those of ours go on as they are."""
        try:
            yield
        except TimstoreError:
            raise
        except OSError as error:
            raise self._translated(error, doing, path, len(data), kind) from error

    def _translated(self, error: OSError, doing: str, path: str, size: int, kind: str | None) -> TimstoreError:
        """Return the error that says what could not be done.

        Args:
            doing: a verb: read, list, look for, write, create, delete, fsync, lock.
            size: of what was to be written.
            kind: of the error; by what the system says when None.
        """
        where = self.root / path
        reads = doing in ("read", "list", "look for")
        message = f"cannot {doing} {where}: {error.strerror or error}"
        if kind is not None:
            return _with_errno(
                StorageError, f"{message}. What was written there may not survive a power loss", error, path, kind
            )
        if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.EISDIR):
            return self._not_plain(path)
        if error.errno == errno.ENOENT and (reads or doing == "delete"):
            return NotFoundError(f"{where} does not exist", path=path)
        if error.errno == errno.EEXIST:
            return AlreadyExistsError(f"{where} exists already, and objects are written once", path=path)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not reads:
            return _with_errno(
                ReadOnlyError, f"{message}. Open the store with mode='r', or where you may write", error, path
            )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = (
                f"no space left to {doing} {where} ({size} bytes); nothing became visible. Make room and try again"
            )
        return _with_errno(StorageError, message, error, path)


def _with_errno(
    ours: type[StorageError | ReadOnlyError], message: str, error: OSError, path: str, kind: str | None = None
) -> TimstoreError:
    """Return an error with the system's number for it, as OSError has it."""
    made = ours(message, kind=kind, path=path, errno=error.errno)
    made.errno = error.errno
    return made


@contextmanager
def folder_held(folder: Path, by_another: str) -> Iterator[None]:
    """Hold a folder against other processes of this machine, and other threads, while the block runs.

    Raises:
        StateError: another one holds it.
    """
    with reporting("read", folder):
        descriptor = os.open(folder, _FOLDER)
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
