"""Where a changed checkpoint goes, over its input or to a place of its own; checked before any work is done."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from timstore.checkpoints.discover import Checkpoint
from timstore.checkpoints.files import PlainFile, TensorFile
from timstore.checkpoints.publish import Span, Writing, check_free
from timstore.errors import AlreadyExistsError, InvalidInputError, ReadOnlyError
from timstore.os_errors import reporting


@dataclass(frozen=True, slots=True)
class Output:
    """Where the changed files of a checkpoint go: to a path, or over the input where that is None."""

    checkpoint: Checkpoint
    path: Path | None

    @classmethod
    def choose(cls, checkpoint: Checkpoint, path: Path | None) -> "Output":
        """Check, before any work, that the files can go there; nothing is written.

        Raises:
            AlreadyExistsError: something is there already.
            NotFoundError: the folder that it is to be in is not there.
            ReadOnlyError: this process may not write there.
            InvalidInputError: it lies within the input; or the input is a link, and to be replaced.
        """
        if path is None:
            for file in checkpoint.files:
                _check_replaceable(file.path)
        else:
            _check_new(checkpoint, path)
        return cls(checkpoint, path)

    def __str__(self) -> str:
        return "over the input" if self.path is None else f"to {self.path}"

    @contextmanager
    def begun(self, spans: Mapping[TensorFile, Sequence[Span]]) -> Iterator[Writing]:
        """Write everything but these spans beside where it goes; what was not published is gone when the block ends.

        Args:
            spans: of files that change, the bytes that the caller writes.

        Raises:
            StorageError, ReadOnlyError: no space, no permission; nothing is left.
        """
        writing = Writing(replaces=self.path is None)
        try:
            if self.path is None:
                for file in spans:
                    writing.copy(file, writing.beside(file.path), spans[file])
            elif not self.checkpoint.is_folder:
                file = self.checkpoint.files[0]
                writing.copy(file, writing.beside(self.path), spans.get(file, ()))
            else:
                with reporting("read", self.checkpoint.path):
                    self._copy_folder(writing, writing.beside(self.path), spans)
            yield writing
        finally:
            writing.end()

    def _copy_folder(self, writing: Writing, to: Path, spans: Mapping[TensorFile, Sequence[Span]]) -> None:
        root, held = self.checkpoint.path, {file.path: file for file in self.checkpoint.files}
        writing.make(to, root)
        for folder, inner, names in os.walk(root, onerror=_raise):
            here, below = Path(folder), to / Path(folder).relative_to(root)
            for name in inner:
                if (here / name).is_symlink():
                    raise InvalidInputError(f"{here / name} is a link to a folder, which is not followed: take it away")
                writing.make(below / name, here / name)
            for name in names:
                if here / name in held:
                    file = held[here / name]
                    writing.copy(file, below / name, spans.get(file, ()))
                else:
                    with PlainFile(here / name) as other:
                        writing.copy(other, below / name, ())


def _check_new(checkpoint: Checkpoint, path: Path) -> None:
    if os.path.exists(path) and path.samefile(checkpoint.path):
        raise AlreadyExistsError(f"{path} is the checkpoint itself: in_place=True rolls it back there", path=str(path))
    check_free(path, checkpoint.is_folder)
    folder = path.absolute().parent
    with reporting("write to", folder):
        os.stat(folder)
    _check_writable(folder, path)
    if checkpoint.is_folder and checkpoint.path.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise InvalidInputError(f"output {path} lies within {checkpoint.path}, of which it is a copy", path=str(path))


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


def _raise(error: OSError) -> None:
    raise error
