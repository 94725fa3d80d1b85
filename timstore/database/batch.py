"""What the next commit will hold: items in the order in which they were accepted."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from timstore.database.ledger import check_rows, row_bytes, table
from timstore.encoding import Matrix
from timstore.format.segments import EncodedRecord, build_segment
from timstore.format.user_columns import joined
from timstore.records import Parameter, Record


@dataclass(frozen=True, eq=False, slots=True)
class Item:
    """One thing to be written: a record, rows of a table, or a blob.

    Attributes:
        parameters: shapes of the record's parameters.
        finite: whether every number of the record is; if not, no row of it is left out.
        rows: rows of tables by kind, to be made a table of when they are written.
        states: (role, numbers) of each row of its `states` table.
    """

    size_bytes: int
    record: Record | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    finite: bool = True
    tables: Mapping[str, pa.Table] = field(default_factory=dict)
    rows: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    moment: tuple[int, int] | None = None
    states: Sequence[tuple[str, Matrix]] = ()

    def __str__(self) -> str:
        """Say what it is, for a message."""
        where = "" if self.moment is None else f"epoch {self.moment[0]}, step {self.moment[1]}, "
        if self.record is not None:
            return f"{where}sample {self.record.sample}, rank {self.record.rank}"
        return where + ", ".join([*self.rows, *self.tables, *self.blobs])


def rows_items(kind: str, rows: Sequence[Mapping[str, Any]], moment: tuple[int, int] | None = None) -> list[Item]:
    """Return the item that writes these rows of one table; none for no rows.

    Raises:
        InvalidInputError: naming the column that cannot hold what it was given.
    """
    if not rows:
        return []
    check_rows(kind, rows)
    # A table of one step costs as much as one of a hundred, so the writer makes it, once for all of a commit.
    return [Item(sum(map(row_bytes, rows)), rows={kind: rows}, moment=moment)]


@dataclass(frozen=True, eq=False, slots=True)
class EncodedItem:
    """An item that is ready to be written, its record encoded where it is one.

    Attributes:
        bytes: held in memory for it.
    """

    item: Item
    encoded: EncodedRecord | None
    bytes: int


class Batch:
    """What the next commit will hold."""

    def __init__(self, items: Sequence[EncodedItem] = ()) -> None:
        self.keep(items)
        self.since = time.monotonic()

    def __bool__(self) -> bool:
        return bool(self.items)

    def add(self, item: EncodedItem) -> None:
        """Add an item."""
        if not self.items:
            self.since = time.monotonic()
        self.items.append(item)
        self.bytes += item.bytes

    def keep(self, items: Sequence[EncodedItem]) -> None:
        """Hold these items, and no others."""
        self.items = list(items)
        self.bytes = sum(item.bytes for item in items)

    def halves(self) -> tuple["Batch", "Batch"]:
        """Return two batches that hold together what this one does."""
        middle = len(self.items) // 2
        return Batch(self.items[:middle]), Batch(self.items[middle:])

    @property
    def records(self) -> list[EncodedRecord]:
        """The records."""
        return [one.encoded for one in self.items if one.encoded is not None]

    @property
    def steps(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """The first and the last (epoch, step), None when there are none."""
        moments = {one.item.moment for one in self.items if one.item.moment is not None}
        return (min(moments), max(moments)) if moments else None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The processes whose records and steps it holds."""
        ranks = {one.record.rank for one in self.records}
        ranks.update(row["rank"] for one in self.items for row in one.item.rows.get("steps", ()))
        return tuple(sorted(ranks))

    def build(self) -> Iterator[tuple[str, bytes, str, int, int]]:
        """Return the objects of the commit, as `build_segment` does."""
        given: dict[str, list[pa.Table]] = {}
        rows: dict[str, list[Mapping[str, Any]]] = {}
        blobs: dict[str, bytes] = {}
        states: list[tuple[str, Matrix]] = []
        for item in (one.item for one in self.items):
            for kind, part in item.tables.items():
                given.setdefault(kind, []).append(part)
            for kind, listed in item.rows.items():
                rows.setdefault(kind, []).extend(listed)
            blobs.update(item.blobs)
            states.extend(item.states)
        tables = {
            kind: joined(parts) if kind == "samples" else pa.concat_tables(parts, promote_options="permissive")
            for kind, parts in given.items()
        }
        tables.update((kind, table(kind, listed)) for kind, listed in rows.items())
        if states:
            # Parameter by parameter, as gradients are laid down: a replay reads one through all steps.
            names = tables["states"]["parameter"].to_pylist()
            first = {name: number for number, name in reversed(list(enumerate(names)))}
            order = sorted(range(len(names)), key=lambda number: first[names[number]])
            tables["states"] = tables["states"].take(order)
            states = [states[number] for number in order]
        return build_segment(self.records, tables, blobs, states)
