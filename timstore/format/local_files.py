"""Where objects lie: named, immutable byte strings, written once and never replaced."""

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
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeAlias, TypeVar

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


def not_plain(where: Path, path: str) -> CorruptionError:
    """Return the error of what is neither file nor folder."""
    return CorruptionError(
        f"{where} is, or lies behind, a symbolic link or something else that is neither file nor folder. timstore "
        "follows none: put the real file there",
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


# What is done under a lock takes milliseconds.
_SECONDS = 60
_PAUSE = 0.001


@contextmanager
def locked(folder: int, where: Path) -> Iterator[None]:
    """Hold the lock of an open folder, which ends with the process; on a file system without locks hold nothing.

    Raises:
        StorageError: kind `locked`: another holds it for a minute.
    """
    is_held = _take(folder, where)
    try:
        yield
    finally:
        if is_held:  # not by closing the folder: a child that was forked meanwhile holds it open
            fcntl.flock(folder, fcntl.LOCK_UN)


def _take(folder: int, where: Path) -> bool:
    until = time.monotonic() + _SECONDS
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                message = f"another process has held {where} for {_SECONDS} s: is it stopped? End it, and commit again"
                raise StorageError(message, kind="locked") from None
            time.sleep(_PAUSE)
        except OSError:
            return False


# Some network file systems have no locks: two processes at one place then are as they were without.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def held(folder: Path, by_another: str) -> Iterator[None]:
    """Hold a folder against other processes of this machine, and other threads, while the block runs.

    Raises:
        StateError: another one holds it.
    """
    with reporting("read", folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
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


class Objects(Protocol):
    """What a store needs of the place it lies in. Paths are those that `paths.is_object_path` accepts."""

    def put(self, path: str, data: bytes) -> None:
        """Write one new data object. On disk, and found again after a power loss, only after `sync`."""

    def sync(self, paths: Iterable[str]) -> None:
        """Make the names of objects that were put survive a power loss."""

    def create(self, path: str, data: bytes) -> None:
        """Create an object whole and durable, or raise `AlreadyExistsError`: of several callers one succeeds."""

    def read(self, path: str, start: int = 0, size: int | None = None, *, most: int | None = None) -> bytes:
        """Return the whole object, or `size` bytes from `start` on (fewer where it ends), or raise `NotFoundError`; of
        an object of more than `most` bytes `CorruptionError`, kind `too-large`, before it is read."""

    def mark(self, path: str) -> Mark:
        """Return what tells an object from any other that took its place, or raise `NotFoundError`; reads nothing."""

    def alone(self, prefix: str) -> AbstractContextManager[None]:
        """Keep every other process and thread that asks likewise out of a folder; where there are no locks, nobody."""

    def list(self, prefix: str) -> Paths:
        """Return the sorted paths of all objects below a folder; none when there is no such folder."""

    def exists(self, path: str) -> bool:
        """Say whether an object of that name exists."""

    def folders(self, prefix: str) -> Paths:
        """Return the sorted paths of the folders right below a folder, without their slash."""

    def delete(self, path: str) -> None:
        """Delete one object, or raise `NotFoundError`."""

    def delete_prefix(self, prefix: str) -> None:
        """Delete a folder and all objects below it; nothing happens when there is none."""


class LocalObjects:
    """Objects as files of mode 0600 in folders of mode 0700, on a POSIX file system with hard links.

    No symbolic link is followed below `root`. Every system call that changes the disk goes through
    `_call`, where fault tests take hold.

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
        """Return the same objects, every write of them fsynced: for what copies before it deletes."""
        objects = LocalObjects(self.root, durable=True)
        objects._was_there = self._was_there
        return objects

    def put(self, path: str, data: bytes) -> None:
        """Write a new file, and fsync it; its name is durable after `sync`.

        Raises:
            AlreadyExistsError: objects are written once.
            StorageError, ReadOnlyError: the file system refused; part of the file may be left.
        """
        *folders, name = self._parts(path)
        with self._reporting("write", path, data), self._folder(folders, create=True) as folder:
            self._write_new(name, data, folder)

    def sync(self, paths: Iterable[str]) -> None:
        """Fsync every folder above the paths, deepest first, the root last.

        Raises:
            StorageError: kind `not-durable`.
        """
        if not self.durable:
            return
        above = {parts[:depth] for parts in map(self._parts, paths) for depth in range(len(parts))}
        for folders in sorted(above, key=lambda folders: (-len(folders), folders)):
            path = "/".join(folders)
            with self._reporting("fsync", path, kind="not-durable"), self._folder(folders) as folder:
                self._call(os.fsync, folder)

    def create(self, path: str, data: bytes) -> None:
        """Create a file whole: written under a temporary name, fsynced, then linked to its own.

        Raises:
            AlreadyExistsError: another caller was first; its file is untouched.
            StorageError: nothing became visible, except with kind `not-durable`: then the file is there, but
                a power loss may take it away.
            ReadOnlyError: this process may not write here.
        """
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
        """Return the whole file, or `size` bytes from `start` on; fewer where it ends before.

        Raises:
            NotFoundError: there is none.
            CorruptionError: it is a symbolic link or otherwise no regular file; kind `too-large`: it has more than
                `most` bytes, the field `bytes`, and was not read.
            StorageError: it cannot be read.
        """
        *folders, name = self._parts(path)
        with self._reporting("read", path), self._folder(folders) as folder:

            def opener(name: str, flags: int) -> int:
                return os.open(name, flags | _READ, dir_fd=folder)

            with open(name, "rb", buffering=0, opener=opener) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise self._not_plain(path)
                if most is not None and status.st_size > most:
                    raise too_large(self.root / path, path, status.st_size, most)
                file.seek(start)
                # `read` takes memory for all that it is asked for.
                return file.read(-1 if size is None else min(size, max(0, status.st_size - start)))

    def mark(self, path: str) -> Mark:
        """Return device, inode, size and the time of the last change of a file's entry, in one system call."""
        with self._reporting("look for", path):
            found = os.stat(self.root / path)
        return found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns

    @contextmanager
    def alone(self, prefix: str) -> Iterator[None]:
        """Hold the folder's lock, which goes with the process that holds it.

        Raises:
            StorageError: another holds it for a minute.
        """
        with ExitStack() as held:
            with self._reporting("lock", prefix):
                folder = held.enter_context(self._folder(self._parts(prefix.rstrip("/")), create=True))
                held.enter_context(locked(folder, self.root / prefix))
            yield

    def list(self, prefix: str) -> Paths:
        """Return the sorted paths of all files below a folder, without those that begin with a dot.

        Raises:
            CorruptionError: a symbolic link lies there.
            StorageError: a folder cannot be read.
        """
        folders = self._parts(prefix.rstrip("/")) if prefix else ()
        with suppress(NotFoundError), self._reporting("list", prefix), self._folder(folders) as folder:
            return sorted(self._walk(folder, "".join(f"{part}/" for part in folders)))
        return []

    def exists(self, path: str) -> bool:
        """Say whether a file of that name exists, without reading it.

        Raises:
            StorageError: its folder cannot be searched.
        """
        *folders, name = self._parts(path)
        with suppress(NotFoundError), self._reporting("look for", path), self._folder(folders) as folder:
            os.stat(name, dir_fd=folder, follow_symlinks=False)
            return True
        return False

    def folders(self, prefix: str) -> Paths:
        """Return the sorted paths of the folders right below a folder, hidden ones and links left out."""
        folders = self._parts(prefix.rstrip("/"))
        with suppress(NotFoundError), self._reporting("list", prefix), self._folder(folders) as folder:
            with os.scandir(folder) as entries:
                names = [one.name for one in entries if one.is_dir(follow_symlinks=False)]
            return sorted("/".join((*folders, name)) for name in names if not name.startswith("."))
        return []

    def delete(self, path: str) -> None:
        """Delete one file, and its folder if that is empty then.

        Raises:
            NotFoundError: there is none.
            StorageError, ReadOnlyError: the file system refused.
        """
        *folders, name = self._parts(path)
        with self._reporting("delete", path), self._folder(folders) as folder:
            self._call(os.unlink, name, dir_fd=folder)
        if folders[0] == "data":  # the folder of one commit or compaction; others are shared with records to come
            with suppress(OSError, TimstoreError), self._folder(folders[:-1]) as above:
                self._call(os.rmdir, folders[-1], dir_fd=above)

    def delete_prefix(self, prefix: str) -> None:
        """Delete a folder with all that is below it; links in it are deleted, never followed.

        Raises:
            StorageError, ReadOnlyError: the file system refused; part of it may be left.
        """
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
                raise with_errno(
                    StorageError(
                        f"the file system of {self.root} makes no hard links, without which a store cannot be written "
                        "safely. Put the store on another file system",
                        path=name,
                        errno=error.errno,
                    ),
                    error,
                ) from error
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

    def _parts(self, path: str) -> tuple[str, ...]:
        if not paths.is_object_path(path):
            raise InvalidInputError(f"{path!r} cannot name an object of a store", path=path)
        return tuple(path.split("/"))

    def _not_plain(self, path: str) -> CorruptionError:
        return not_plain(self.root / path, path)

    @contextmanager
    def _reporting(self, doing: str, path: str, data: bytes = b"", *, kind: str | None = None) -> Iterator[None]:
        """Turn what the system says into errors of ours that name the path."""
        try:
            yield
        except TimstoreError:
            raise
        except OSError as error:
            raise translated(error, doing, self.root / path, path, len(data), kind) from error
