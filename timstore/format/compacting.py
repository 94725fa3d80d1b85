"""Compaction: a new compaction that covers every commit there is, and what it makes superfluous deleted. Tensors stay.

A reader or writer that is at work meanwhile loses nothing:

* Each compaction is created exclusively, under the number after the one it goes on from, and once it is there
  `ckpt/` is listed again: if there is a higher number, it was made from an outdated look, and deletes nothing.
* The newest record of every writer stays in the log: a writer that has lost the reply to its last record must find it
  there, and a writer that was fenced must find the fence.
* Row files go first, then the log records that name them, then older compactions: what one that died left behind is
  found by the next.
"""

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import pyarrow as pa
from isal.isal_zlib import crc32

from timstore.errors import CorruptionError, FormatError, NotFoundError, TimstoreError
from timstore.format import paths
from timstore.format.compaction import (
    Compaction,
    commit_rows,
    object_rows,
    parse_compaction,
    read_rows,
    seal_compaction,
)
from timstore.format.local_files import Objects
from timstore.format.log import Commit, ObjectInfo, create_settled, drop, now, parse_info
from timstore.format.log_reader import View, read_view
from timstore.format.schemas import FOLDED, numbered, write_rows
from timstore.format.settings import Settings
from timstore.format.user_columns import joined
from timstore.interrupts import CriticalSection

_log = logging.getLogger(__name__)

# A row file with so many rows is left as it is by later compactions: each then costs what is new and little more.
FILE_ROWS = 500_000


@dataclass(frozen=True, slots=True)
class CompactionReport:
    """What a compaction did.

    Attributes:
        compaction: its number; None when there was nothing to do, or another process did it at the same time.
        commits: how many it added to those that earlier compactions covered.
        rows: their rows.
        deleted: files that it made superfluous.
        bytes_before, bytes_after: of the row files of those commits, and of the row files written.
        undeleted: why not all of those files could be deleted, which a later compaction does; None where all were.
    """

    compaction: int | None = None
    commits: int = 0
    rows: int = 0
    deleted: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    undeleted: str | None = None


def compact(
    objects: Objects, settings: Settings, progress: Callable[[int, int], None] | None = None
) -> CompactionReport:
    """Fold the row files of all commits since the last compaction into few, under a new one.

    Durability: the compaction is durable before anything is deleted, if `objects` is; make it so whatever the store's
    own durability is. Memory: about `FILE_ROWS` rows of each table.

    Args:
        progress: called with (commits folded, commits to fold).

    Raises:
        CorruptionError: a row file is missing or altered. Nothing was changed, as after any error but one:
        StorageError: kind `outcome-unknown` when the compaction may or may not last; nothing was deleted.
    """
    with CriticalSection("the store was folded") as section:
        return _compacted(objects, settings, progress, section)


def _compacted(
    objects: Objects, settings: Settings, progress: Callable[[int, int], None] | None, section: CriticalSection
) -> CompactionReport:
    view = read_view(objects, settings)
    if not view.since_compaction:
        return CompactionReport()
    number = (view.compaction.number if view.compaction else 0) + 1
    folder = paths.fold_prefix(number, secrets.token_hex(paths.NONCE_BYTES))
    try:
        fold = _Fold(objects, folder, view)
        for done, commit in enumerate(view.since_compaction, 1):
            fold.add(commit)
            if progress is not None:
                progress(done, len(view.since_compaction))
        files = fold.finish()
        compaction = Compaction(number, now(), len(view.commits), view.newest, files)
        data = seal_compaction(compaction, settings)
        parse_compaction(data, paths.compaction_path(number), settings)  # a record that readers refuse never appears
        section.enter()
        ours = create_settled(objects, paths.compaction_path(number), data) == data
    except Exception as error:  # after an interrupt the next compaction deletes it
        if getattr(error, "kind", None) != "outcome-unknown":
            drop(objects, folder)
        if isinstance(error, CorruptionError) and error.kind == "missing" and _newest(objects) >= number:
            return CompactionReport()  # another compaction was faster, and deleted what this one was reading
        raise
    if not ours:
        drop(objects, folder)
        return CompactionReport()
    sizes = [info.bytes for commit in view.since_compaction for info in commit.objects if info.kind in FOLDED]
    written = sum(info.bytes for info in files if info.path.startswith(folder))
    result = CompactionReport(number, len(view.since_compaction), fold.rows, 0, sum(sizes), written)
    _log.info("folded %d commits, %d rows, into compaction %d", result.commits, result.rows, number)
    section.finish(result)
    # Whatever fails from here on, the store is folded.
    deleted, undeleted = 0, None
    try:
        for _ in _vacuum(objects, compaction, view):
            deleted += 1
    except TimstoreError as error:
        undeleted = str(error)
    return section.finish(replace(result, deleted=deleted, undeleted=undeleted))


class _Fold:
    """Gathers rows kind by kind, and writes a file when there are enough."""

    def __init__(self, objects: Objects, folder: str, view: View) -> None:
        self._objects = objects
        self._folder = folder
        self._waiting: dict[str, list[pa.Table]] = {}
        self._counts: dict[str, int] = {}
        self._files: list[ObjectInfo] = []
        self._made = 0
        self._number = len(view.commits) - len(view.since_compaction)
        self.rows = 0
        for info in view.compaction.files if view.compaction else ():
            if info.rows >= FILE_ROWS:
                self._files.append(info)
            else:
                self._gather(info.kind, read_rows(objects, info, view.compaction))  # type: ignore[arg-type]

    def add(self, commit: Commit) -> None:
        self._gather("commits", commit_rows([commit]))
        self._gather("objects", object_rows(self._number, [info for info in commit.objects if info.kind not in FOLDED]))
        for info in commit.objects:
            if info.kind in FOLDED:
                table = read_rows(self._objects, info, commit)
                self.rows += table.num_rows
                # The order of samples says all, and their other columns are the user's.
                self._gather(info.kind, table if info.kind == "samples" else numbered(table, info.kind, self._number))
        self._number += 1

    def finish(self) -> tuple[ObjectInfo, ...]:
        """Write what is left, make it durable, and return all files in order."""
        for kind in list(self._waiting):
            self._write(kind)
        self._objects.sync([info.path for info in self._files if info.path.startswith(self._folder)])
        return tuple(self._files)

    def _gather(self, kind: str, table: pa.Table) -> None:
        self._waiting.setdefault(kind, []).append(table)
        self._counts[kind] = self._counts.get(kind, 0) + table.num_rows
        if self._counts[kind] >= FILE_ROWS:
            self._write(kind)

    def _write(self, kind: str) -> None:
        tables = self._waiting.pop(kind)
        self._counts[kind] = 0
        try:
            table = joined(tables) if kind == "samples" else pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise FormatError(f"the {kind} of different commits do not fit together: {error}") from error
        path = f"{self._folder}{kind}-{self._made:04d}.parquet"
        self._made += 1
        data = write_rows(table.unify_dictionaries(), kind)
        self._objects.put(path, data)
        self._files.append(ObjectInfo(path, len(data), crc32(data), kind, table.nbytes, table.num_rows))


def _vacuum(objects: Objects, compaction: Compaction, view: View) -> Iterator[str]:
    """Delete what the compaction made superfluous, unless it is outdated itself; yield the path of each file."""
    if _newest(objects) > compaction.number:
        return
    known = {(commit.writer, commit.seq): commit for commit in view.since_compaction}
    for path in objects.list(paths.LOG):
        name = paths.parse_record_path(path)
        if name is None or not compaction.covers(*name):
            continue
        infos = known[name].objects if name in known else _named(objects, path)
        yield from _delete(objects, [info.path for info in infos if info.kind in FOLDED])
        if name[1] < compaction.newest[name[0]].seq:
            yield from _delete(objects, [path])
    row_files = {info.path for info in compaction.files}
    for path in objects.list(paths.COMPACTIONS):
        if (paths.parse_compaction_path(path) or compaction.number) >= compaction.number:
            continue
        yield from _delete(objects, [info.path for info in _named(objects, path) if info.path not in row_files])
        yield from _delete(objects, [path])
    # Folders of compactions that died before their compaction. One that is still at work on so low a number will not
    # count any more.
    folders = {path.rpartition("/")[0] for path in row_files}
    for folder in objects.folders(paths.DATA):
        number_of = paths.parse_fold_prefix(folder)
        if number_of is not None and number_of <= compaction.number and folder not in folders:
            drop(objects, folder)


def _newest(objects: Objects) -> int:
    return max((paths.parse_compaction_path(path) or 0 for path in objects.list(paths.COMPACTIONS)), default=0)


def _named(objects: Objects, path: str) -> Sequence[ObjectInfo]:
    """Return the objects that a record left behind by an earlier compaction names; none if it cannot be read."""
    try:
        fields, _ = paths.unseal(objects.read(path, most=paths.RECORD_BYTES), path)
        return [parse_info(entry, path) for entry in fields.get("objects", ())]
    except (NotFoundError, CorruptionError):
        return []


def _delete(objects: Objects, superfluous: Iterable[str]) -> Iterator[str]:
    for path in superfluous:
        with suppress(NotFoundError):  # another compaction was here
            objects.delete(path)
            yield path
