"""A compaction: the commits up to some point, their small row files folded into few; tensors stay where they are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa

from timstore.errors import CorruptionError
from timstore.format import paths, schemas
from timstore.format.checksums import read_verified
from timstore.format.local_files import Objects
from timstore.format.log import Commit, Moment, ObjectInfo, misplaced, parse_head, parse_info, require_store, take_time
from timstore.format.paths import take
from timstore.format.schemas import COMMITS, OBJECTS
from timstore.format.settings import Settings


@dataclass(frozen=True, slots=True)
class Compaction:
    """One record of `ckpt/`.

    Attributes:
        number: from 1; the highest is the one that counts.
        commits: how many it covers. They are numbered from 0, in an order that later compactions go on with.
        newest: each writer's newest record that it covers, of any kind, without objects.
        files: the row files, in order: `commits`, `objects` and the row tables, each with the number of the commit.
    """

    number: int
    at: str
    commits: int
    newest: Mapping[str, Commit]
    files: tuple[ObjectInfo, ...]

    def __str__(self) -> str:
        return f"compaction {self.number} ({self.commits} commits)"

    def covers(self, writer: str, seq: int) -> bool:
        """Say whether it covers a writer's record."""
        return writer in self.newest and seq <= self.newest[writer].seq


def seal_compaction(compaction: Compaction, settings: Settings) -> bytes:
    """Return the bytes of a compaction's record."""
    writers = {
        writer: {name: getattr(newest, name) for name in ("seq", "kind", "at", "attempt", "rank", "digest")}
        for writer, newest in compaction.newest.items()
    }
    fields = {
        **paths.header(settings.reader_features, settings.writer_features),
        "store": settings.store_id,
        "checkpoint": compaction.number,
        "at": compaction.at,
        "commits": compaction.commits,
        "writers": writers,
        "objects": [asdict(info) for info in compaction.files],
    }
    return paths.seal(fields)


def parse_compaction(data: bytes, path: str, settings: Settings) -> Compaction:
    """Return the compaction that the bytes at `path` describe.

    Raises:
        CorruptionError: naming the file and the field.
        FormatError: a newer version is needed.
    """
    fields, _ = paths.unseal(data, path)
    number = take(fields, "checkpoint", int, path)
    if paths.compaction_path(number) != path:
        raise misplaced(path, f"compaction {number}")
    require_store(fields, path, settings)
    newest = {writer: _newest(writer, head, path) for writer, head in take(fields, "writers", dict, path).items()}
    files = tuple(parse_info(entry, path) for entry in take(fields, "objects", list, path))
    written_for = [paths.parse_folded_path(info.path) for info in files]
    if not all(earlier is not None and earlier <= number for earlier in written_for):
        raise CorruptionError(f"{path} names objects that are no row files of a compaction", path=path)
    return Compaction(number, take_time(fields, path), take(fields, "commits", int, path), newest, files)


def _newest(writer: str, head: Any, path: str) -> Commit:
    if type(head) is not dict:
        raise CorruptionError(f"{path}: the newest record of a writer is {head!r:.80}, not a description", path=path)
    return Commit(writer=writer, **parse_head(head, path), digest=take(head, "digest", str, path))


def read_rows(objects: Objects, info: ObjectInfo, owner: "Commit | Compaction") -> pa.Table:
    """Return the rows of a row file once it is verified, repeating words as dictionaries."""
    data = read_verified(objects, info, owner)
    return schemas.read_rows(data, info.path, kind=info.kind, rows=info.rows, words=True)


def read_tables(objects: Objects, compaction: Compaction, kind: str) -> list[pa.Table]:
    """Return the rows of one kind, file by file."""
    return [read_rows(objects, info, compaction) for info in compaction.files if info.kind == kind]


class CoveredObjects:
    """The data objects of the commits that a compaction covers, described only when they are asked for."""

    def __init__(self, table: pa.Table, commits: int) -> None:
        self._columns = [table[name].combine_chunks() for name in OBJECTS.names[1:]]
        self._starts = np.searchsorted(table["commit"].to_numpy(), np.arange(commits + 1))

    def of(self, number: int) -> "_Described":
        """Return those of one commit."""
        return _Described(self._columns, int(self._starts[number]), int(self._starts[number + 1]))

    def largest(self) -> int:
        """Return the size of the largest, in bytes."""
        sizes = self._columns[1].to_numpy()
        return int(sizes.max()) if len(sizes) else 0

    def holding(self, kind: str) -> list[int]:
        """Return the numbers of the commits that have objects of that kind."""
        found = np.flatnonzero(self._columns[3].to_numpy(zero_copy_only=False) == kind)
        return np.unique(np.searchsorted(self._starts, found, side="right") - 1).tolist()  # type: ignore[no-any-return]


class _Described(Sequence[ObjectInfo]):
    def __init__(self, columns: Sequence[pa.Array], start: int, stop: int) -> None:
        self._columns = columns
        self._start = start
        self._stop = stop

    def __len__(self) -> int:
        return self._stop - self._start

    @overload
    def __getitem__(self, index: int) -> ObjectInfo: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ObjectInfo]: ...
    def __getitem__(self, index: int | slice) -> ObjectInfo | Sequence[ObjectInfo]:
        return tuple(self)[index]

    def __iter__(self) -> Iterator[ObjectInfo]:
        size = self._stop - self._start
        return map(ObjectInfo, *(column.slice(self._start, size).to_pylist() for column in self._columns))


def read_commits(objects: Objects, compaction: Compaction) -> tuple[tuple[Commit, ...], CoveredObjects]:
    """Return the commits that a compaction covers, and their data objects.

    Raises:
        CorruptionError: a row file is missing (kind `missing`: perhaps a newer compaction took its place) or altered.
    """
    heads, named = (read_tables(objects, compaction, kind) for kind in ("commits", "objects"))
    if not heads or not named:
        path = paths.compaction_path(compaction.number)
        raise CorruptionError(f"{path} names no files of commits, or none of their objects", path=path)
    table = pa.concat_tables(heads)
    covered = CoveredObjects(pa.concat_tables(named), table.num_rows)
    if table.num_rows != compaction.commits:
        path = paths.compaction_path(compaction.number)
        raise CorruptionError(f"{path} covers {compaction.commits} commits, its row files {table.num_rows}", path=path)
    commits = tuple(
        Commit(
            writer=row["writer"],
            seq=row["seq"],
            kind="commit",
            at=row["at"],
            attempt=row["attempt"],
            rank=row["rank"],
            steps=_steps(row),
            objects=covered.of(number),
            records=row["records"],
            digest=row["digest"],
        )
        for number, row in enumerate(table.to_pylist())
    )
    return commits, covered


def _steps(row: Mapping[str, Any]) -> tuple[Moment, Moment] | None:
    if row["first_epoch"] is None:
        return None
    return (row["first_epoch"], row["first_step"]), (row["last_epoch"], row["last_step"])


def commit_rows(commits: Sequence[Commit]) -> pa.Table:
    """Return one row of `COMMITS` each."""
    rows = []
    for commit in commits:
        first, last = commit.steps or ((None, None), (None, None))
        rows.append(
            {
                **{name: getattr(commit, name) for name in ("writer", "seq", "at", "attempt", "rank", "records")},
                "first_epoch": first[0],
                "first_step": first[1],
                "last_epoch": last[0],
                "last_step": last[1],
                "bytes": sum(info.bytes for info in commit.objects),
                "digest": commit.digest,
            }
        )
    return pa.Table.from_pylist(rows, COMMITS)


def object_rows(number: int, infos: Sequence[ObjectInfo]) -> pa.Table:
    """Return one row of `OBJECTS` for each data object of commit `number`."""
    columns = {name: [getattr(info, name) for info in infos] for name in OBJECTS.names[1:]}
    return pa.Table.from_pydict({"commit": [number] * len(infos), **columns}, OBJECTS)
