"""New files on their way: written beside their place under hidden names, on disk as a whole, and then renamed."""

import os
import secrets
import shutil
import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from timstore.checkpoints.cut_off import renaming
from timstore.checkpoints.files import BLOCK_BYTES, PlainFile
from timstore.checkpoints.header import spans_between
from timstore.errors import AlreadyExistsError, StorageError
from timstore.os_errors import reporting

# Bytes [start, stop) of a file.
Span = tuple[int, int]
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, eq=False, slots=True)
class NewFile:
    """A file that is being written, made of another one."""

    path: Path
    like: PlainFile
    descriptor: int

    @classmethod
    def begin(cls, path: Path, like: PlainFile) -> "NewFile":
        """Make it, with nothing in it."""
        with reporting("write", path):
            return cls(path, like, os.open(path, _NEW, 0o600))

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of some bytes."""
        done = 0
        with reporting("write", self.path):
            while done < len(data):
                done += os.pwrite(self.descriptor, data[done:], offset + done)

    def finish(self) -> None:
        """Give it the other one's mode, and put it on disk."""
        with reporting("write", self.path):
            os.fchmod(self.descriptor, stat.S_IMODE(self.like.status.st_mode))
            os.fsync(self.descriptor)


class Writing:
    """Files and folders on their way.

    Args:
        replaces: whether they go over what is there.

    Attributes:
        files: those that are not finished, by the open file that each is made of.
    """

    def __init__(self, *, replaces: bool) -> None:
        self.files: dict[PlainFile, NewFile] = {}
        self._replaces = replaces
        self._token = secrets.token_hex(4)
        self._moves: list[tuple[Path, Path]] = []
        self._folders: list[Path] = []

    def beside(self, final: Path) -> Path:
        """Return the hidden name, in the same folder, under which something is written until it is published."""
        self._moves.append((self._named(final, "new"), final))
        return self._moves[-1][0]

    def make(self, folder: Path, like: Path) -> None:
        """Make a folder with the mode of another one."""
        with reporting("write", folder):
            folder.mkdir(0o700)
            self._folders.append(folder)
            folder.chmod(stat.S_IMODE(like.stat().st_mode) | stat.S_IRWXU)

    def copy(self, file: PlainFile, path: Path, spans: Sequence[Span]) -> None:
        """Copy a file but for some spans, which are left to the caller. Memory of one block."""
        new = self.files[file] = NewFile.begin(path, file)
        for start, stop in spans_between(list(spans), file.size):
            for first in range(start, stop, BLOCK_BYTES):
                new.write(file.read(first, min(stop, first + BLOCK_BYTES)).numpy().data, first)
        if not spans:
            self._finish(file)

    def finish(self) -> None:
        """Put everything on disk, under the hidden names."""
        for file in list(self.files):
            self._finish(file)
        for folder in reversed(self._folders):
            _sync_folder(folder)

    def publish(self) -> list[Path]:
        """Rename everything to where it belongs; after an error it is as it was, unless the error says otherwise.

        Files that are replaced keep a second name, `.<name>.<token>.old` beside `.<name>.<token>.new`, until all of
        them are. A process that is killed in between leaves both; `cut_off` tells what that means.

        Returns:
            The old files that could not be deleted.

        Raises:
            AlreadyExistsError: something is there now.
            StorageError: a rename failed; kind `half-replaced` if it could not be taken back.
        """
        with ExitStack() as locks:
            for folder in sorted({final.absolute().parent for _, final in self._moves}):
                locks.enter_context(renaming(folder))
            return self._rename()

    def end(self) -> None:
        """Delete what was not published."""
        for new in self.files.values():
            os.close(new.descriptor)
        self.files.clear()
        for temporary, _ in self._moves:
            _removed(temporary)

    def _rename(self) -> list[Path]:
        kept: list[Path] = []
        try:
            if self._replaces:
                for _, final in self._moves:
                    with reporting("keep a second name of", final):
                        os.link(final, self._named(final, "old"))
                    kept.append(final)
            for temporary, final in self._moves:
                if not self._replaces:
                    check_free(final, temporary.is_dir())
                with reporting("write", final):
                    os.replace(temporary, final)
            for folder in {final.absolute().parent for _, final in self._moves}:
                _sync_folder(folder)
        except BaseException as error:
            self._take_back(kept, error)
            raise
        self._moves.clear()
        return [old for final in kept if not _removed(old := self._named(final, "old"))]

    def _take_back(self, kept: Sequence[Path], error: BaseException) -> None:
        try:
            for final in kept:
                os.replace(self._named(final, "old"), final)
                # Two names of one file: renaming one to the other does nothing.
                self._named(final, "old").unlink(missing_ok=True)
        except OSError as second:
            raise StorageError(
                f"replacing the files failed ({error}), and some that were replaced could not be put back ({second}): "
                f"the old ones lie beside them as .<name>.{self._token}.old",
                kind="half-replaced",
            ) from error
        for temporary, final in self._moves:
            if not self._replaces and not os.path.lexists(temporary):
                _removed(final)

    def _finish(self, file: PlainFile) -> None:
        new = self.files.pop(file)
        try:
            new.finish()
        finally:
            os.close(new.descriptor)

    def _named(self, final: Path, what: str) -> Path:
        return final.absolute().parent / f".{final.name}.{self._token}.{what}"


def check_free(path: Path, is_folder: bool) -> None:
    """Refuse a path at which something is; an empty folder may become another folder.

    Raises:
        AlreadyExistsError: something is there.
    """
    is_empty = is_folder and path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if os.path.lexists(path) and not is_empty:
        raise AlreadyExistsError(f"{path} exists already: choose another output, or delete it first", path=str(path))


def _sync_folder(path: Path) -> None:
    with reporting("write", path):
        folder = os.open(path, _FOLDER)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _removed(path: Path) -> bool:
    """Delete a file or a folder of ours, and return whether it is gone; what cannot be deleted stays."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return not os.path.lexists(path)
