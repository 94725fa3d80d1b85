"""What a store's records name, read as readers read it: each object, each row table, each gradient and state."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from timstore.database.kept_rows import KIND, KeptRows, unpack_probe
from timstore.errors import CorruptionError
from timstore.format import paths
from timstore.format.checksums import read_verified
from timstore.format.compaction import Compaction
from timstore.format.log import Commit, ObjectInfo
from timstore.format.schemas import FOLDED, as_text, numbered, read_rows
from timstore.format.segments import STATE_ROLES, ByteCache, SegmentReader
from timstore.records import Parameter
from timstore.verification.log import Disk, Log
from timstore.verification.report import Finding

_CACHE_BYTES = 64_000_000
# Of gradients as they are stored, that are restored at once.
_BLOCK_BYTES = 16_000_000
# Tables whose rows have numbers in the arrays of their commit. States first: damage is told with the gradients.
_WITH_NUMBERS = ("states", "gradients")
# Objects in which no sample's numbers lie.
_OF_NO_SAMPLE = ("steps", "parameters", "fingerprints", "rollbacks", "states", "samples", "probe")

_Faults = list[tuple[ObjectInfo, Exception]]


class Walk:
    """One walk over all data of a store: what readers refuse is a finding, and the walk goes on.

    Memory: one object, or the rows of one row file and one commit, and 100 MB of decoded numbers.

    Args:
        told: called with (bytes read, bytes to read).

    Attributes:
        objects, bytes: how many data objects were read whole, and their size.
    """

    def __init__(self, disk: Disk, told: Callable[[int, int], None]) -> None:
        self._disk = disk
        self._told = told
        self._total = 0
        self._sound: set[tuple[str, int]] = set()
        self._shapes: dict[str, tuple[int, int]] = {}
        self._all_declared = True
        self.findings: list[Finding] = []
        self.objects = 0
        self.bytes = 0

    def over(self, log: Log) -> None:
        """Read what a log names, but for commits that an earlier walk found sound."""
        compaction = log.view.compaction
        covered, fresh = self._unread(log.covered), self._unread(log.fresh)
        named: list[Sequence[ObjectInfo]] = [compaction.files if compaction else ()]
        named += [commit.objects for commit in (*covered.values(), *fresh.values())]
        self._total = self.bytes + sum(info.bytes for infos in named for info in infos)
        self._declare(log)
        if compaction is not None:
            self._folded(compaction, covered)
        for commit in fresh.values():
            self._commit(commit, maybe_covered=log.maybe_covered(commit.writer, commit.seq))

    def _unread(self, commits: Sequence[Commit]) -> dict[int, Commit]:
        """Return commits by their numbers."""
        return {n: commit for n, commit in enumerate(commits) if (commit.writer, commit.seq) not in self._sound}

    def _declare(self, log: Log) -> None:
        """Take up the shapes of all parameters; what is wrong with a file is found when all files are read."""
        owners: list[Compaction | Commit] = [log.view.compaction] if log.view.compaction else []
        self._all_declared = not log.findings
        for owner in (*owners, *log.fresh):
            for info in owner.files if isinstance(owner, Compaction) else owner.objects:
                if info.kind == "parameters":
                    self._declare_from(info, owner)

    def _declare_from(self, info: ObjectInfo, owner: Compaction | Commit) -> None:
        try:
            table = read_rows(read_verified(self._disk, info, owner), info.path, kind=info.kind)
            for row in table.select(["parameter", "shape"]).to_pylist():
                self._shapes[row["parameter"]] = Parameter(row["parameter"], tuple(row["shape"]), "").matrix_shape
        except Exception:  # as of a commit's objects
            self._all_declared = False

    def _folded(self, compaction: Compaction, covered: Mapping[int, Commit]) -> None:
        """Read the row files of a compaction, and the objects and numbers of the commits that it covers."""
        for info in compaction.files:
            if info.kind not in _WITH_NUMBERS:
                self._rows(info, compaction)
        faults = {number: self._objects_of(commit)[0] for number, commit in covered.items()}
        faults = {number: unreadable for number, unreadable in faults.items() if unreadable}
        for kind in _WITH_NUMBERS:
            for number, table in self._by_commit(compaction, kind):
                if number in faults and kind == "gradients":
                    self._tell(covered[number], faults.pop(number), table, table)
                elif number in covered and number not in faults:
                    self._restore(covered[number], table)
        for number, unreadable in faults.items():
            self._tell(covered[number], unreadable, None, None)

    def _by_commit(self, compaction: Compaction, kind: str) -> Iterator[tuple[int, pa.Table]]:
        """Yield the number of each covered commit and its rows, which may go on in the next file."""
        rest: pa.Table | None = None
        for info in compaction.files:
            table = self._rows(info, compaction) if info.kind == kind else None
            if table is None or table.num_rows == 0:
                continue
            table = table if rest is None else pa.concat_tables([rest, table])
            edges = np.flatnonzero(np.diff(table["commit"].to_numpy())) + 1
            for first, stop in pairwise([0, *edges.tolist()]):
                yield table["commit"][first].as_py(), table.slice(first, stop - first)
            rest = table.slice(edges[-1] if len(edges) else 0)
        if rest is not None:
            yield rest["commit"][0].as_py(), rest

    def _commit(self, commit: Commit, *, maybe_covered: bool) -> None:
        """Read a commit that no compaction covers, or perhaps one that is lost, which then took over its rows."""
        faults, tables = self._objects_of(commit)
        if maybe_covered:
            faults = [(info, error) for info, error in faults if info.kind not in FOLDED or not _is_missing(error)]
        gradients = tables.get("gradients")
        if faults:
            self._tell(commit, faults, tables.get("records", gradients), gradients)
            return
        for table in (tables[kind] for kind in _WITH_NUMBERS if kind in tables):
            self._restore(commit, table)

    def _objects_of(self, commit: Commit) -> tuple[_Faults, dict[str, pa.Table]]:
        """Read all objects of a commit; return those that cannot be read, and its records, gradients and states."""
        faults: _Faults = []
        tables: dict[str, pa.Table] = {}
        for info in commit.objects:
            try:
                table = _parsed(info, self._read(info, commit))
                if info.kind in _WITH_NUMBERS:
                    table = numbered(table, info.kind, 0)
                if info.kind in ("records", *_WITH_NUMBERS):
                    tables[info.kind] = table
            except Exception as error:  # whatever a decoder makes of bytes that no encoder of ours wrote
                faults.append((info, error))
        if not faults:
            self._sound.add((commit.writer, commit.seq))
        return faults, tables

    def _rows(self, info: ObjectInfo, compaction: Compaction) -> pa.Table | None:
        """Return the rows of a row file; None, and a finding, if it cannot be read."""
        try:
            return _parsed(info, self._read(info, compaction))
        except Exception as error:  # as of a commit's objects
            self.findings.append(Finding.of(error, info.path))
            return None

    def _read(self, info: ObjectInfo, owner: Commit | Compaction) -> bytes:
        try:
            return read_verified(self._disk, info, owner)
        finally:
            self.objects += 1
            self.bytes += info.bytes
            self._told(self.bytes, max(self._total, self.bytes))

    def _restore(self, commit: Commit, table: pa.Table) -> None:
        """Read the numbers of all gradients of a commit, or of all states; those that readers refuse are a finding."""
        path = paths.record_path(commit.writer, commit.seq)
        where: Mapping[str, Any] = {}
        try:
            reader = SegmentReader(commit, self._disk, ByteCache(_CACHE_BYTES))
            for name, word, rows in _blocks(table):
                where = _concerned(rows)
                owners = rows["owner"].to_numpy()
                if "encoding" not in table.column_names:
                    if word in STATE_ROLES:  # others are of a later version
                        reader.rows(owners, word)
                elif name in self._shapes:
                    reader.parts(owners, word, self._shapes[name])
                elif self._all_declared:
                    raise CorruptionError(f"{path} has gradients of {name!r}, which no commit declares", path=path)
        except Exception as error:  # as of a commit's objects
            self.findings.append(Finding.of(error, path, commit, **where))

    def _tell(self, commit: Commit, faults: _Faults, records: pa.Table | None, gradients: pa.Table | None) -> None:
        """Take down the objects of a commit that cannot be read, and whose numbers they hold.

        Args:
            records: rows that name all samples of the commit; None where there are none, or they cannot be read.
            gradients: with their numbers, likewise.
        """
        reader: SegmentReader | None = None
        with suppress(Exception):  # where the slices cannot be read, all samples are concerned
            reader = SegmentReader(commit, self._disk, ByteCache(0))
        for info, error in faults:
            rows = None if info.kind in _OF_NO_SAMPLE else records
            if info.kind == "shard" and reader is not None and gradients is not None:
                with suppress(Exception):
                    owners = reader.owners_in(info.path.split("/", 3)[3])
                    rows = gradients.filter(pc.is_in(gradients["owner"], pa.array(owners, pa.int32())))
            self.findings.append(Finding.of(error, info.path, commit, **({} if rows is None else _concerned(rows))))


def _parsed(info: ObjectInfo, data: bytes) -> pa.Table | None:
    """Return the rows of a row file; of the probe and other objects nothing, once they are what they should be."""
    if info.kind == "probe":
        unpack_probe(data)
    if not info.path.endswith(".parquet"):
        return None
    table = read_rows(data, info.path, kind=info.kind, rows=info.rows)
    if info.kind == KIND:
        KeptRows.read([table], None)
    return as_text(table)


def _blocks(table: pa.Table) -> Iterator[tuple[str, str, pa.Table]]:
    """Yield (parameter, encoding or role, rows) of gradients or states that lie next to each other, not too many."""
    table = table.filter(pc.greater(pc.fill_null(table["bytes"], 0), 0))  # the others are zero
    word = "encoding" if "encoding" in table.column_names else "role"
    blocks = np.cumsum(table["bytes"].to_numpy()) // _BLOCK_BYTES
    keys = zip(table["parameter"].to_pylist(), table[word].to_pylist(), blocks.tolist(), strict=True)
    first = 0
    for (name, kind, _), run in groupby(keys):
        count = sum(1 for _ in run)
        yield name, kind, table.slice(first, count)
        first += count


def _concerned(rows: pa.Table) -> dict[str, Any]:
    """Return the samples and steps of some rows, as a finding says them."""
    if "sample" not in rows.column_names or rows.num_rows == 0:
        return {}
    moments = list(zip(rows["epoch"].to_pylist(), rows["step"].to_pylist(), strict=True))
    return {"samples": tuple(sorted(set(rows["sample"].to_pylist()))), "steps": (min(moments), max(moments))}


def _is_missing(error: Exception) -> bool:
    return isinstance(error, CorruptionError) and error.kind == "missing"
