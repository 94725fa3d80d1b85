"""Where a changed checkpoint goes: copied beside its place under hidden names, changed there, synced, and renamed.

A process that is killed while it renames files in place leaves a mixture of two models; the next one takes it back.
"""

import fcntl
import os
import re
import secrets
import shutil
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

from timstore.checkpoints.discover import Checkpoint
from timstore.checkpoints.files import StoredTensor, TensorFile, plain_file, read
from timstore.errors import (
    AlreadyExistsError,
    InvalidInputError,
    ReadOnlyError,
    StateError,
    StorageError,
    TimstoreError,
)
from timstore.interrupts import Held
from timstore.os_errors import reporting

# `.<name>.<token>.new` is a file on its way, `.<name>.<token>.old` a second name of the one that it replaces.
_HIDDEN = re.compile(r"\.(.+)\.([0-9a-f]{8})\.(old|new)")
_BLOCK_BYTES = 1024 * 1024
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


class Output:
    """Where a changed checkpoint goes; checked when this is made, and nothing is written then.

    Args:
        path: to which it goes; None for over the input.

    Raises:
        AlreadyExistsError: something is there already.
        NotFoundError: the folder that it is to be in is not there.
        ReadOnlyError: this process may not write there.
        InvalidInputError: it lies within the input; or the input is a link, and to be replaced.
    """

    def __init__(self, checkpoint: Checkpoint, path: Path | None) -> None:
        self._checkpoint = checkpoint
        self._path = path
        # The files of a checkpoint lie in one folder, so that everything is renamed within one.
        self._folder = (path or checkpoint.files[0].path).absolute().parent
        self._changed: dict[Path, list[tuple[int, int]]] = defaultdict(list)  # the bytes that the caller writes
        self._token = secrets.token_hex(4)
        self._moves: list[tuple[Path, Path]] = []  # from a hidden name to where it belongs
        self._copies: dict[Path, Path] = {}  # of files and folders, each after the folder that it is in
        if path is None:
            for file in checkpoint.files:
                _check_replaceable(file.path)
        else:
            self._check_new(path)

    def __str__(self) -> str:
        return "over the input" if self._path is None else f"to {self._path}"

    @contextmanager
    def copied(self, changed: Iterable[StoredTensor]) -> Iterator[None]:
        """Copy what goes there under hidden names; what was not published is gone when the block ends.

        Args:
            changed: tensors that the caller writes; all else is copied, but in place files without any are left alone.

        Raises:
            StorageError, ReadOnlyError: no space, no permission; nothing is left.
        """
        for tensor in changed:
            self._changed[tensor.file.path].append((tensor.start, tensor.stop))
        try:
            if self._path is None:
                for path in list(self._changed):
                    self._copy(path, self._on_its_way(path))
            elif self._checkpoint.is_folder:
                with reporting("read", self._checkpoint.path):
                    self._copy_folder(self._on_its_way(self._path))
            else:
                self._copy(self._checkpoint.path, self._on_its_way(self._path))
            yield
        finally:
            for hidden, _ in self._moves:
                _remove(hidden)

    def write(self, file: TensorFile, offset: int, data: memoryview) -> None:
        """Write into the copy of a file; several threads may, each its own bytes."""
        copy = self._copies[file.path]
        with reporting("write", copy), _opened(copy, os.O_WRONLY) as descriptor:
            _write(descriptor, data, offset)

    def finish(self) -> None:
        """Give the copies the modes of what they were made of, and put them on disk, a folder after what is in it."""
        for source, copy in reversed(self._copies.items()):
            with reporting("write", copy), _opened(copy) as descriptor:
                mode = stat.S_IMODE(source.stat().st_mode)
                os.fchmod(descriptor, mode | stat.S_IRWXU if copy.is_dir() else mode)
                os.fsync(descriptor)

    def publish(self) -> list[Path]:
        """Rename everything to where it belongs; after an error it is as it was, unless the error says otherwise.

        Files that are replaced keep a second name, `.<name>.<token>.old`, until all of them are.

        Returns:
            The old files that could not be deleted.

        Raises:
            AlreadyExistsError: something is there now.
            StorageError: a rename failed; kind `half-replaced` if it could not be taken back.
        """
        old: list[Path] = []
        with _renaming(self._folder):
            try:
                if self._path is not None:
                    _check_free(self._path, self._checkpoint.is_folder)
                else:
                    for _, final in self._moves:
                        with reporting("keep a second name of", final):
                            os.link(final, self._hidden(final, "old"))
                        old.append(self._hidden(final, "old"))
                for hidden, final in self._moves:
                    with reporting("write", final):
                        os.replace(hidden, final)
                _sync(self._folder)
            except BaseException as error:
                self._take_back(old, error)
                raise
            return [path for path in old if not _remove(path)]

    def _take_back(self, old: Sequence[Path], error: BaseException) -> None:
        try:
            _put_back(old)
        except TimstoreError as second:
            raise StorageError(
                f"replacing the files failed ({error}), and some that were replaced could not be put back ({second}): "
                f"the old ones lie beside them as .<name>.{self._token}.old",
                kind="half-replaced",
            ) from error
        for hidden, final in self._moves:
            if self._path is not None and not os.path.lexists(hidden):
                _remove(final)

    def _hidden(self, final: Path, what: str) -> Path:
        return self._folder / f".{final.name}.{self._token}.{what}"

    def _on_its_way(self, final: Path) -> Path:
        self._moves.append((self._hidden(final, "new"), final))
        return self._moves[-1][0]

    def _copy(self, source: Path, copy: Path) -> None:
        """Copy a file but for the bytes that the caller writes: writing them twice costs a sixth of a rollback."""
        with plain_file(source) as original, reporting("write", copy), _opened(copy, _NEW) as descriptor:
            size = os.fstat(original).st_size
            spans = [(0, 0), *sorted(self._changed.get(source, ())), (size, size)]
            for (_, start), (stop, _) in pairwise(spans):
                for offset in range(start, stop, _BLOCK_BYTES):
                    block = read(original, source, offset, min(stop, offset + _BLOCK_BYTES))
                    _write(descriptor, block.numpy().data, offset)
        self._copies[source] = copy

    def _copy_folder(self, to: Path) -> None:
        root = self._checkpoint.path
        for folder, inner, names in os.walk(root, onerror=_refuse):
            source = Path(folder)
            copy = to / source.relative_to(root)
            with reporting("write", copy):
                copy.mkdir(0o700)
            self._copies[source] = copy
            for path in (source / name for name in inner):
                if path.is_symlink():
                    raise InvalidInputError(f"{path} is a link to a folder, which is not followed: take it away")
            for name in names:
                self._copy(source / name, copy / name)

    def _check_new(self, path: Path) -> None:
        source = self._checkpoint.path
        if os.path.exists(path) and path.samefile(source):
            message = f"{path} is the checkpoint itself: in_place=True rolls it back there"
            raise AlreadyExistsError(message, path=str(path))
        _check_free(path, self._checkpoint.is_folder)
        with reporting("write to", self._folder):
            os.stat(self._folder)
        _check_writable(self._folder, path)
        folder = self._folder.resolve()
        if self._checkpoint.is_folder and source.resolve() in (folder, *folder.parents):
            raise InvalidInputError(f"output {path} lies within {source}, of which it is a copy", path=str(path))


def restored(folder: Path, *, in_place: bool) -> list[str]:
    """Put the old files of a folder back where a rollback was killed that had replaced some; return what was done.

    Args:
        in_place: whether files of the folder may be changed at all.

    Raises:
        StateError: kind `half-replaced`: there is such a mixture of two models, and not in_place.
        StorageError, ReadOnlyError: a file could not be renamed; calling again goes on.
    """
    if not _mixtures(folder):
        return []
    with _renaming(folder), Held():
        # Once more: it may have been a process at work.
        mixtures = _mixtures(folder)
        if mixtures and not in_place:
            raise StateError(
                f"In {folder} lies {mixtures[0][0][0].name}: a rollback in place was cut off while it renamed files, "
                "and the folder is a mixture of two models. A rollback with in_place=True (of no matter which samples) "
                "puts the old files back first; or do so by hand: rename all .old files of that number back to the "
                "names in them, and delete the .new ones",
                kind="half-replaced",
                path=str(folder),
            )
        for old, new in mixtures:
            _put_back(old)
            _sync(folder)
            # As long as a new one is there, what was cut off is known.
            for path in new:
                with reporting("delete", path):
                    path.unlink()
    return [
        f"a rollback in place had been cut off in {folder} while it renamed files: {len(old)} of them were put back "
        "first, to what they had been before it"
        for old, _ in mixtures
    ]


def left_of(checkpoint: Checkpoint) -> str | None:
    """Return a sentence on the files that rollbacks left when they were cut off; None where there are none."""
    folder = checkpoint.path if checkpoint.is_folder else checkpoint.path.absolute().parent
    paths = checkpoint.files_below() if checkpoint.is_folder else sorted(folder.glob(".*"))
    left = [path for path in paths if _HIDDEN.fullmatch(path.name)]
    if not checkpoint.is_folder:  # what is left of other files beside it is theirs
        left = [path for path in left if _final(path).name == checkpoint.path.name]
    if not left:
        return None
    return (
        f"{folder} holds {len(left)} hidden file{'s' * (len(left) > 1)} of a rollback that was cut off (the first is "
        f"{left[0].relative_to(folder)}): .old ones are weights from before it, with the samples in them; delete them "
        "where the checkpoint is whole without"
    )


def _mixtures(folder: Path) -> list[tuple[list[Path], list[Path]]]:
    """Return, of each rollback of which some files were replaced and others not, its old files and its new ones."""
    with reporting("read", folder):
        names = sorted(os.listdir(folder))
    rollbacks: dict[str, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    for match in filter(None, map(_HIDDEN.fullmatch, names)):
        old, new = rollbacks[match[2]]
        (old if match[3] == "old" else new).append(folder / match[0])
    return [(old, new) for old, new in rollbacks.values() if _is_mixture(old, new)]


def _is_mixture(old: Sequence[Path], new: Sequence[Path]) -> bool:
    pairs = [(path, _final(path)) for path in old]
    replaced = {final for path, final in pairs if not (final.exists() and final.samefile(path))}
    # A new file that waits for a place that has another one by now: someone wrote there since.
    return bool(replaced and new) and replaced.isdisjoint(map(_final, new))


def _final(hidden: Path) -> Path:
    match = _HIDDEN.fullmatch(hidden.name)
    assert match is not None
    return hidden.with_name(match[1])


def _put_back(old: Sequence[Path]) -> None:
    for path in old:
        with reporting("put back", path):
            os.replace(path, _final(path))
            # Of two names of one file, renaming one to the other does nothing.
            path.unlink(missing_ok=True)


@contextmanager
def _renaming(folder: Path) -> Iterator[None]:
    """Let one process at a time rename the files of a folder, where the file system can."""
    with reporting("rename files in", folder), _opened(folder) as descriptor:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextmanager
def _opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    # Nobody else may read a copy before it has its mode.
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


def _sync(folder: Path) -> None:
    with reporting("write", folder), _opened(folder) as descriptor:
        os.fsync(descriptor)


def _remove(path: Path) -> bool:
    """Delete a file or a folder of ours, and return whether it is gone; what cannot be deleted stays."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return not os.path.lexists(path)


def _check_free(path: Path, is_folder: bool) -> None:
    """Refuse a path at which something is; an empty folder may become another folder."""
    is_empty = is_folder and path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if os.path.lexists(path) and not is_empty:
        raise AlreadyExistsError(f"{path} exists already: choose another output, or delete it first", path=str(path))


def _check_replaceable(path: Path) -> None:
    if path.is_symlink():
        raise InvalidInputError(
            f"{path} is a link to {path.resolve()}, perhaps into a cache that others use: roll back into an output=, "
            "or pass the file itself",
            path=str(path),
        )
    _check_writable(path, path)
    _check_writable(path.absolute().parent, path)


def _check_writable(place: Path, wanted: Path) -> None:
    wish = os.W_OK | os.X_OK if place.is_dir() else os.W_OK
    if not os.access(place, wish, effective_ids=os.access in os.supports_effective_ids):
        raise ReadOnlyError(
            f"{place} is not writable for this process, so that {wanted} cannot be written: choose an output where you "
            "may write",
            path=str(place),
        )


def _refuse(error: OSError) -> None:
    raise error
