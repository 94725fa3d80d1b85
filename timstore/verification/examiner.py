"""Data objects read one at a time, each against its size and checksum, and what was counted on the way."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from timstore.errors import CorruptionError, InvalidInputError, StorageError
from timstore.format.checksums import fault_of
from timstore.format.local_files import LocalObjects
from timstore.format.log import Commit, Moment, ObjectInfo
from timstore.format.schemas import ADDED, COMMITS, OBJECTS, SCHEMAS, as_text, numbered, read_rows
from timstore.verification.findings import LEFTOVER, Finding, of_commit
from timstore.verification.inventory import Inventory

# Columns that may hold nothing; in the others every row says something.
_KEYS = {
    "records": ("attempt", "epoch", "step", "rank", "sample"),
    "gradients": ("attempt", "epoch", "step", "rank", "sample", "parameter", "part", "encoding", "precision"),
    "slices": ("owner", "role", "array", "start", "rows"),
    "chunks": ("array", "chunk", "offset", "bytes", "crc32"),
    "steps": ("attempt", "epoch", "step", "rank", "group_id"),
    "parameters": ("parameter", "shape"),
    "samples": ("sample",),
    "fingerprints": ("attempt", "epoch", "step", "parameter", "digest"),
    "states": ("attempt", "epoch", "step", "role", "parameter"),
    "rollbacks": (),
    "commits": ("writer", "seq", "at", "attempt", "rank", "records", "digest"),
    "objects": ("commit", "path", "bytes", "crc32", "kind", "rows"),
}
_FOLDED = {
    kind: numbered(schema.empty_table(), kind, 0).schema for kind, schema in SCHEMAS.items() if kind != "samples"
}


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with an object: the kind of finding, and in words."""

    kind: str
    message: str


@dataclass(slots=True)
class Examiner:
    """What one verification reads and finds.

    Attributes:
        read_bytes, read_objects: so far.
        told: called with (bytes read, bytes to read).
        done: (writer, seq) of commits whose arrays were read.
    """

    objects: LocalObjects
    inventory: Inventory
    told: Callable[[int, int], None]
    total_bytes: int = 0
    read_bytes: int = 0
    read_objects: int = 0
    findings: list[Finding] = field(default_factory=list)
    done: set[tuple[str, int]] = field(default_factory=set)

    def read(self, info: ObjectInfo) -> bytes | Fault:
        """Return an object's bytes if they are what was written."""
        try:
            data, problem = fault_of(self.objects, info)
        except (CorruptionError, InvalidInputError):
            sort = self.inventory.sort_of(info.path)
            lies = "it lies behind something that is no folder" if sort in (None, "file") else f"it is {sort}"
            return Fault("not-a-file", f"{lies}: readers follow none")
        except StorageError as error:
            return Fault("unreadable", str(error))
        finally:
            self.read_objects += 1
            self.read_bytes += info.bytes
            self.told(self.read_bytes, max(self.total_bytes, self.read_bytes))
        if problem is None:
            return data
        return Fault("missing" if problem == "is missing" else "altered", f"it {problem}")

    def table(self, info: ObjectInfo, *, folded: bool = False) -> pa.Table | Fault:
        """Return a row file's rows if they are what was written, and of the columns that they should have."""
        data = self.read(info)
        return data if isinstance(data, Fault) else parse_table(data, info, folded=folded)

    def add(
        self,
        kind: str,
        path: str,
        message: str,
        commit: Commit | None = None,
        *,
        steps: tuple[Moment, Moment] | None = None,
        samples: Sequence[int] = (),
    ) -> None:
        """Take down one finding that is damage; `steps` where it is known better than of the whole commit."""
        where: dict[str, Any] = {} if commit is None else of_commit(commit)
        if steps is not None:
            where["steps"] = steps
        self.findings.append(Finding(kind, path, message, samples=tuple(samples), **where))

    def beside(self, folder: str, named: Container[str], message: str, commit: Commit | None = None) -> None:
        """Take down what lies below a folder and is not named: no reader looks at it."""
        where: dict[str, Any] = {} if commit is None else of_commit(commit)
        for entry in self.inventory.below(folder):
            if entry.path not in named:
                kind = "temporary" if entry.hidden else "unreferenced" if entry.sort == "file" else "not-a-file"
                self.findings.append(Finding(kind, entry.path, message, LEFTOVER, **where))


def parse_table(data: bytes, info: ObjectInfo, *, folded: bool = False) -> pa.Table | Fault:
    """Return the rows of a row file, if there are as many as its record says, of the columns of its kind."""
    try:
        table = read_rows(data, info.path)
        table.validate(full=True)
    except Exception as error:  # whatever a decoder makes of bytes that are no Parquet file
        return Fault("malformed", f"it holds no readable rows: {error!s:.200}")
    table = as_text(table)
    if table.num_rows != info.rows:
        return Fault("count", f"it holds {table.num_rows} rows instead of {info.rows}")
    problem = _misfit(table, info.kind, _schema(info.kind, folded))
    return Fault("malformed", problem) if problem else table


def _schema(kind: str, folded: bool) -> pa.Schema:
    if kind in ("commits", "objects"):
        return COMMITS if kind == "commits" else OBJECTS
    return _FOLDED.get(kind, SCHEMAS[kind]) if folded else SCHEMAS[kind]


def _misfit(table: pa.Table, kind: str, schema: pa.Schema) -> str | None:
    """Return in what way a table is not of a schema; further columns are those of a newer version."""
    for expected in schema:
        if expected.name not in table.column_names:
            if expected.name in ADDED.get(kind, ()):
                continue
            return f"it has no column {expected.name}"
        if table.column_names.count(expected.name) > 1:
            return f"it has column {expected.name} twice"
        found = table.schema.field(expected.name).type
        # Of a column in which no row says anything, a file need not know the type.
        if found != expected.type and not pa.types.is_null(found):
            return f"its column {expected.name} holds {found}, not {expected.type}"
    keys = [name for name in ("commit", "owner") if name in schema.names] + list(_KEYS[kind])
    for name in keys:
        if table[name].null_count:
            return f"its column {name} is empty in {table[name].null_count} rows"
    return None
