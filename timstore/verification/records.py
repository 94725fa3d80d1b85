"""Checked records read one by one: what is wrong with one is told, and the next is looked at."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from timstore.errors import CorruptionError, FormatError, NotFoundError, StorageError
from timstore.format import paths
from timstore.format.compaction import Compaction, parse_compaction
from timstore.format.local_files import LocalObjects
from timstore.format.log import Attempt, parse_attempt
from timstore.format.settings import Settings, read_settings
from timstore.verification.findings import Finding
from timstore.verification.inventory import Inventory

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sealed:
    """A record whose check line matches."""

    fields: Mapping[str, Any]
    digest: str
    data: bytes


class RecordReader:
    """The records of one store.

    Attributes:
        settings: those of the store; a stand-in if they cannot be read.
        durable: whether a torn newest record is damage. Taken to be so if nothing says otherwise.
        store_id: that of the settings, or the one that most records carry; None if there are none.
    """

    def __init__(self, objects: LocalObjects, inventory: Inventory) -> None:
        self.objects = objects
        self.inventory = inventory
        self.findings: list[Finding] = []
        settings = self._settings()
        self.store_id = settings.store_id if settings else self._store_of_most()
        self.settings = settings or Settings(self.store_id or "", "commit", "exact", 0.0)
        self.durable = self.settings.durable

    def sealed(self, path: str) -> Sealed | Finding:
        """Return the record at a path, or what is wrong with the file."""
        try:
            data = self.objects.read(path, most=paths.RECORD_BYTES)
            fields, digest = paths.unseal(data, path)
        except (FormatError, NotFoundError, StorageError) as error:
            return self.fault(path, error)
        return Sealed(fields, digest, data)

    def fault(self, path: str, error: Exception) -> Finding:
        """Return the finding that says what an error said of the file at a path."""
        sort = self.inventory.sort_of(path)
        if isinstance(error, NotFoundError):
            return Finding("missing", path, "there is no such file, which was there a moment ago")
        if sort not in ("file", None):
            return Finding("not-a-file", path, f"it is {_a(sort)}: readers follow none")
        if isinstance(error, StorageError):
            return Finding("unreadable", path, str(error))
        if not isinstance(error, CorruptionError):
            return Finding("newer", path, str(error))
        return Finding("torn" if error.kind == "torn" else "malformed", path, str(error))

    def foreign(self, path: str, sealed: Sealed) -> Finding | None:
        """Return what is wrong if a record is of another store."""
        store = sealed.fields.get("store")
        if self.store_id is None or store == self.store_id:
            return None
        return Finding("foreign", path, f"it belongs to store {store!r:.80}, this one is {self.store_id!r:.80}")

    def attempt(self, path: str) -> Attempt | Finding:
        """Return the attempt that a file describes, or what is wrong with it."""
        number = paths.parse_attempt_path(path)
        return self._parsed(path, "attempt", number, lambda sealed: parse_attempt(sealed.data, path))

    def checkpoint(self, path: str) -> Compaction | Finding:
        """Return the checkpoint that a file describes, or what is wrong with it."""

        def parse(sealed: Sealed) -> Compaction | Finding:
            return self.foreign(path, sealed) or parse_compaction(sealed.data, path, self.settings_of(sealed))

        return self._parsed(path, "checkpoint", paths.parse_compaction_path(path), parse)

    def _parsed(self, path: str, name: str, number: int | None, parse: Callable[[Sealed], T | Finding]) -> T | Finding:
        sealed = self.sealed(path)
        if isinstance(sealed, Finding):
            return sealed
        # A file of another sort has no such field, and says what it lacks.
        if name in sealed.fields and sealed.fields[name] != number:
            return Finding("misplaced", path, f"it describes {name} {sealed.fields[name]!r:.80}")
        try:
            return parse(sealed)
        except FormatError as error:
            return self.fault(path, error)

    def settings_of(self, sealed: Sealed) -> Settings:
        """Return settings that fit a record whose store was looked at already."""
        return Settings(str(sealed.fields.get("store")), "commit", "exact", 0.0)

    def _settings(self) -> Settings | None:
        path = paths.SETTINGS
        try:
            return read_settings(self.objects)
        except NotFoundError:
            self.findings.append(Finding("missing", path, "without it the store cannot be opened"))
        except (FormatError, StorageError) as error:
            if isinstance(error, FormatError) and not isinstance(error, CorruptionError):
                raise
            self.findings.append(self.fault(path, error))
        return None

    def _store_of_most(self) -> str | None:
        stores: Counter[str] = Counter()
        for folder in (paths.LOG, paths.COMPACTIONS):
            for entry in self.inventory.below(folder.rstrip("/")):
                sealed = None if entry.hidden or not paths.is_object_path(entry.path) else self.sealed(entry.path)
                if isinstance(sealed, Sealed) and isinstance(sealed.fields.get("store"), str):
                    stores[sealed.fields["store"]] += 1
        return stores.most_common(1)[0][0] if stores else None


def _a(sort: str | None) -> str:
    return "a folder" if sort == "folder" else str(sort)
