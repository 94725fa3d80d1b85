"""One steady view of a store: its commits, their tables in DuckDB, their arrays on request."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa

from timstore.arguments import plain_name
from timstore.catalog import AttemptRow, Catalog, CommitRows
from timstore.database.kept_rows import KIND, KeptRows, unpack_probe
from timstore.encoding import densify
from timstore.errors import CorruptionError, NotFoundError
from timstore.format.checksums import read_verified
from timstore.format.compaction import read_rows
from timstore.format.local_files import Objects
from timstore.format.log import Commit
from timstore.format.log_reader import View, read_view
from timstore.format.schemas import FOLDED
from timstore.format.segments import Arrays, ByteCache, SegmentReader
from timstore.format.settings import Settings
from timstore.records import Gradient, Parameter, Record

_CACHE_BYTES = 64 * 1024 * 1024
# Records read together, in bytes of the numbers handed out and in their number.
_BLOCK_BYTES = 128 * 1024 * 1024
_WIDENED = {"exact": 1, "bfloat16": 2, "int8": 4}
_BLOCK_RECORDS = 256
_RECORD = "attempt, epoch, step, rank, sample"


@dataclass(frozen=True, eq=False, slots=True)
class StoredRecord(Record):
    """A record read back. Its parts hold float32 or float64 numbers, whatever they are stored as.

    Attributes:
        shapes: parameter name to its shape.
    """

    shapes: Mapping[str, tuple[int, ...]] = None  # type: ignore[assignment]

    def dense(self, parameter: str) -> np.ndarray:
        """Return one gradient as an array of the parameter's shape, the sum of its parts."""
        if plain_name(parameter, "parameter") not in self.gradients:
            raise NotFoundError(f"this record has no gradient of {parameter}", parameter=parameter)
        shape = self.shapes[parameter]
        matrix = Parameter(parameter, shape, "").matrix_shape
        return densify(self.gradients[parameter], matrix).reshape(shape)


class Snapshot:
    """What one handle sees until it refreshes. Writes nothing.

    Row files are checked and loaded when the first question is asked, arrays when they are read.
    """

    def __init__(
        self, objects: Objects, settings: Settings, sql_memory: int, previous: "Snapshot | None" = None
    ) -> None:
        self.objects = objects
        self.settings = settings
        self._sql_memory = sql_memory
        # A snapshot whose tables were never asked for is no help to the next one.
        self._previous: Snapshot | None = (
            previous._previous if previous is not None and previous._catalog is None else previous
        )
        self.view: View = read_view(objects, settings, previous.view if previous else None)
        self._catalog: Catalog | None = None

    @property
    def catalog(self) -> Catalog:
        """The DuckDB tables, built at the first use from those of the snapshot before."""
        if self._catalog is None:
            self._catalog = self._build()
            self._previous = None
        return self._catalog

    def _build(self) -> Catalog:
        while True:
            try:
                return self._build_from(self._previous)
            except CorruptionError as error:
                # Row files that a newer compaction folded are gone: then this is a snapshot of what it covers.
                newer = read_view(self.objects, self.settings) if error.kind == "missing" else self.view
                if newer.compaction is None or newer.compaction == self.view.compaction:
                    raise
                self.view = newer

    def _build_from(self, previous: "Snapshot | None") -> Catalog:
        view, before, known = self.view, None, 0
        if previous and previous._catalog and previous.view.compaction == view.compaction:
            before, known = previous._catalog, len(previous.view.commits)
        folded: Iterator[tuple[str, pa.Table]] = iter(())
        if before is None and view.compaction is not None:
            known = view.compaction.commits
            files = (info for info in view.compaction.files if info.kind != "objects")
            folded = ((info.kind, read_rows(self.objects, info, view.compaction)) for info in files)
        new = (self._commit_rows(number, view.commits[number]) for number in range(known, len(view.commits)))
        return Catalog.build(new, self._attempt_rows(), before, folded, self._sql_memory)

    def close(self) -> None:
        """Drop the tables."""
        if self._catalog is not None:
            self._catalog.close()

    def reader(self, number: int, cache: ByteCache) -> SegmentReader:
        """Return the arrays of commit `number`."""
        return SegmentReader(self.view.commits[number], self.objects, cache)

    def arrays(self) -> Iterator[Arrays]:
        """Iterate over the arrays of each commit that has any, as `Store.zarr` says."""
        columns = f"{_RECORD}, parameter, part, encoding::VARCHAR AS encoding, precision::VARCHAR AS precision"
        query = f"SELECT {columns} FROM stored.gradients WHERE commit = ? ORDER BY owner"
        for number in range(len(self.view.commits)):
            reader = self.reader(number, ByteCache(0))
            group = reader.group()
            if group is None:
                continue
            # A gradient's owner number is its row number in its commit.
            slices = reader.slices()
            gradients = self.catalog.rows(query, [number]).take(slices["owner"])
            for name in slices.column_names[1:]:
                gradients = gradients.append_column(name, slices[name])
            yield group, gradients

    def parameters(self) -> dict[str, Parameter]:
        """Return every parameter that was ever declared or recorded, in the order of their names, by which sums run."""
        rows = self.catalog.rows("SELECT parameter, shape, dtype, group_id FROM parameters ORDER BY parameter")
        return {
            row["parameter"]: Parameter(row["parameter"], tuple(row["shape"]), row["dtype"], row["group_id"])
            for row in rows.to_pylist()
        }

    def read(self, where: str | None = None) -> Iterator[StoredRecord]:
        """Iterate live records in order of (epoch, step, rank, sample).

        Cost: records are read 128 MB at a time, beside a cache of 64 MB; a segment is read once for each such
        block that has records in it.
        """
        parameters = self.parameters()
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        chosen = f"SELECT * FROM records WHERE ({where})" if where else "SELECT * FROM records"
        columns = f"{_RECORD}, loss, tokens, bytes"
        records = self.catalog.fetch(f"SELECT {columns} FROM ({chosen}) ORDER BY epoch, step, rank, sample")
        cache = ByteCache(_CACHE_BYTES)
        readers: dict[int, SegmentReader] = {}
        for block in _blocks(records, _BLOCK_BYTES // _WIDENED[self.settings.precision]):
            gradients = self._gradients([row[:5] for row in block], parameters, readers, cache)
            for row, mine in zip(block, gradients, strict=True):
                attempt, epoch, step, rank, sample, loss, tokens, _ = row
                yield StoredRecord(epoch, step, sample, mine, rank, loss, tokens, attempt, shapes=shapes)

    def latest_fingerprints(self) -> tuple[int, int, dict[str, str]] | None:
        """Return the newest live (epoch, step) at which the parameters' digests were kept, and the digests."""
        rows = self.catalog.rows(
            "SELECT epoch, step, parameter, digest FROM fingerprints "
            "WHERE (attempt, epoch, step) = (SELECT (attempt, epoch, step) FROM fingerprints "
            "ORDER BY attempt DESC, epoch DESC, step DESC LIMIT 1)"
        ).to_pylist()
        if not rows:
            return None
        return rows[0]["epoch"], rows[0]["step"], {row["parameter"]: row["digest"] for row in rows}

    def probe(self) -> tuple[list[Any], str] | None:
        """Return (batches, loss) of the newest probe that was given, or None."""
        found = self.view.objects_of("probe")
        return unpack_probe(read_verified(self.objects, *found[-1])) if found else None

    def kept_rows(self) -> KeptRows:
        """Return the rows of the training stream that recorders kept by themselves."""
        scopes = [one.scope for one in self.view.attempts]
        chosen = [scope for scope in scopes if isinstance(scope, tuple)]
        tables = (read_rows(self.objects, *found) for found in self.view.objects_of(KIND))
        return KeptRows.read(tables, None if "all" in scopes else frozenset().union(*chosen))

    def _gradients(
        self,
        keys: Sequence[tuple[int, ...]],
        parameters: Mapping[str, Parameter],
        readers: dict[int, SegmentReader],
        cache: ByteCache,
    ) -> Iterator[dict[str, tuple[Gradient, ...]]]:
        """Yield the gradients of each record, the first to come first; a record that was yielded is let go.

        Args:
            readers: by commit; those that are not needed again are dropped.
        """
        table = pa.table(list(zip(*keys, strict=True)), names=_RECORD.split(", "))
        table = table.append_column("number", pa.array(range(len(keys)), pa.int64()))
        unnested = ", ".join(f"unnest(?::BIGINT[]) AS {name}" for name in table.column_names)
        rows = self.catalog.rows(
            f"SELECT number, commit, owner, parameter, encoding::VARCHAR AS encoding FROM (SELECT {unnested}) "
            f"JOIN stored.gradients USING ({_RECORD}) ORDER BY commit, owner",
            [column.to_pylist() for column in table.columns],
        )
        found: list[dict[str, list[Gradient]]] = [{} for _ in keys]
        columns = [column.to_pylist() for column in rows.columns]
        # In the order that they lie in, so that each chunk is decoded once for all records.
        for (commit, name, encoding), run in groupby(zip(*columns, strict=True), key=itemgetter(1, 3, 4)):
            numbers, _, owners, _, _ = zip(*run, strict=True)
            if name not in parameters:
                raise CorruptionError(f"commit {commit} has gradients of {name!r}, which no commit declares")
            if commit not in readers:
                readers[commit] = self.reader(commit, cache)
            parts = readers[commit].parts(owners, encoding, parameters[name].matrix_shape)
            for number, part in zip(numbers, parts, strict=True):
                found[number].setdefault(name, []).append(part)
        for commit in readers.keys() - set(rows["commit"].unique().to_pylist()):
            del readers[commit]
        found.reverse()
        while found:
            yield {name: tuple(parts) for name, parts in found.pop().items()}

    def _commit_rows(self, number: int, commit: Commit) -> CommitRows:
        tables = {info.kind: read_rows(self.objects, info, commit) for info in commit.objects if info.kind in FOLDED}
        size = sum(info.bytes for info in commit.objects)
        return CommitRows(number, commit.writer, commit.seq, commit.at, commit.records, size, tables)

    def _attempt_rows(self) -> list[AttemptRow]:
        rows = []
        for attempt in self.view.attempts:
            recorded = None if attempt.scope is None else "all" if attempt.scope == "all" else "selected"
            # Earlier versions took ids of any size; no sample has one that is beyond 63 bits.
            chosen = attempt.scope if isinstance(attempt.scope, tuple) else None
            scope = None if chosen is None else [sample for sample in chosen if -(2**63) <= sample < 2**63]
            start = attempt.from_epoch, attempt.from_step
            rows.append(AttemptRow(attempt.attempt, *start, attempt.ranks, scope, recorded, attempt.digest_before))
        return rows


def _blocks(records: Sequence[tuple[Any, ...]], most_bytes: int) -> Iterator[Sequence[tuple[Any, ...]]]:
    """Cut records, whose last column is their size, into blocks to be read together."""
    start, size = 0, 0
    for number, row in enumerate(records):
        if number > start and (size + row[-1] > most_bytes or number - start == _BLOCK_RECORDS):
            yield records[start:number]
            start, size = number, 0
        size += row[-1]
    if records:
        yield records[start:]
