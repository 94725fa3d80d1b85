"""A rollback in place that was killed while it renamed files: known by what it left, and taken back by the next one."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from timstore.errors import StateError
from timstore.interrupts import Held
from timstore.os_errors import reporting

# What is left of a file's names when a process was killed: `.<name>.<token>.old` or `.new`.
LEFT = re.compile(r"\.(.+)\.([0-9a-f]{8})\.(old|new)")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@contextmanager
def renaming(folder: Path) -> Iterator[int]:
    """Let one process at a time rename the files of a folder, where the file system can; yields the open folder."""
    with reporting("read", folder):
        descriptor = os.open(folder, _FOLDER)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def take_back(folder: Path, *, in_place: bool) -> list[str]:
    """Put the old files of a folder back where some of them were replaced and others not; return what was done.

    Args:
        in_place: whether files of the folder may be changed at all.

    Raises:
        StateError: kind `half-replaced`: there is such a mixture of two models, and not in_place.
        StorageError, ReadOnlyError: a file could not be renamed; calling again goes on.
    """
    if not _mixtures(folder):
        return []
    with renaming(folder) as opened, Held():
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
            for path in old:
                with reporting("put back", path):
                    os.replace(path, _final(path))
                    # Two names of one file: renaming one to the other does nothing.
                    path.unlink(missing_ok=True)
            with reporting("write", folder):
                os.fsync(opened)
            # The last of them goes last: as long as one is there, what was cut off is known.
            for path in new:
                with reporting("delete", path):
                    path.unlink()
    return [
        f"a rollback in place had been cut off in {folder} while it renamed files: {len(old)} of them were put back "
        "first, to what they had been before it"
        for old, _ in mixtures
    ]


def _mixtures(folder: Path) -> list[tuple[list[Path], list[Path]]]:
    """Return, of each rollback of which some files were replaced and others not, its old files and its new ones."""
    groups: dict[str, dict[str, dict[str, Path]]] = {}
    with reporting("read", folder):
        names = sorted(os.listdir(folder))
    for match in filter(None, map(LEFT.fullmatch, names)):
        groups.setdefault(match[2], {"old": {}, "new": {}})[match[3]][match[1]] = folder / match[0]
    found = []
    for group in groups.values():
        old, new = group["old"], group["new"]
        replaced = {name for name, path in old.items() if not _is_same(path, folder / name)}
        # A new file that waits for a place that has another one by now: someone wrote there since.
        if replaced and new and not replaced & new.keys():
            found.append((list(old.values()), list(new.values())))
    return found


def _is_same(left: Path, right: Path) -> bool:
    return right.exists() and right.samefile(left)


def _final(left: Path) -> Path:
    match = LEFT.fullmatch(left.name)
    assert match is not None
    return left.with_name(match[1])
