"""What lies in a store's folder, everything: also what readers ignore or refuse. Follows no link, writes nothing."""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Entry:
    """One name.

    Attributes:
        path: relative to the store.
        sort: `file`, `folder`, or what else it is, in words.
    """

    path: str
    sort: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def hidden(self) -> bool:
        """Whether it is a file in the making: readers ignore such names."""
        return self.name.startswith(".")


class Inventory:
    """The names below a store's folder.

    Attributes:
        refused: path to reason of every folder that the system did not let be listed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.refused: dict[str, str] = {}

    def entries(self, folder: str = "") -> list[Entry]:
        """Return what lies right in a folder, sorted; nothing when there is no such folder."""
        if folder and self.sort_of(folder) != "folder":
            return []
        prefix = f"{folder}/" if folder else ""
        try:
            with os.scandir(self.root / folder) as found:
                return sorted((Entry(prefix + one.name, _sort(one)) for one in found), key=lambda entry: entry.path)
        except FileNotFoundError:  # deleted since it was listed
            return []
        except OSError as error:
            self.refused[folder] = error.strerror or str(error)
            return []

    def below(self, folder: str) -> Iterator[Entry]:
        """Yield everything below a folder; of folders, only hidden ones, which are not walked into."""
        for entry in self.entries(folder):
            if entry.sort == "folder" and not entry.hidden:
                yield from self.below(entry.path)
            else:
                yield entry

    def sort_of(self, path: str) -> str | None:
        """Return what lies at a path, as `Entry.sort`; None for nothing."""
        with suppress(OSError):
            return _named(os.lstat(self.root / path).st_mode)
        return None

    def size_below(self, folder: str) -> tuple[int, int]:
        """Return how many files there are below a folder, and their bytes."""
        files, size = 0, 0
        for entry in self.below(folder):
            with suppress(OSError):
                size += os.lstat(self.root / entry.path).st_size
                files += 1
        return files, size


def _sort(entry: "os.DirEntry[str]") -> str:
    with suppress(OSError):
        return _named(entry.stat(follow_symlinks=False).st_mode)
    return "file"


def _named(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    return "a symbolic link" if stat.S_ISLNK(mode) else "neither file nor folder"
