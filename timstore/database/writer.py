"""What is accepted, on its way to disk: what the next commit holds, less what others committed, and the thread."""

import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pyarrow as pa

from timstore.database.ledger import same
from timstore.encoding import Matrix, encode
from timstore.errors import (
    LOST,
    CorruptionError,
    FormatError,
    InvalidInputError,
    ReadOnlyError,
    StateError,
    StorageError,
    TimstoreError,
    TimstoreWarning,
)
from timstore.format.compacting import compact
from timstore.format.compaction import read_rows, read_tables
from timstore.format.local_files import Objects
from timstore.format.log import Commit, LogWriter, Overtaken
from timstore.format.log_reader import View, read_view
from timstore.format.schemas import SCHEMAS
from timstore.format.segments import EncodedRecord, build_segment
from timstore.format.settings import Settings
from timstore.format.user_columns import joined
from timstore.records import Parameter, Record

_log = logging.getLogger(__name__)

# What may be held in memory: accepted, and not yet on disk. Half of it is written while the other half comes in.
QUEUE_BYTES = 512 * 1024 * 1024
COMMIT_BYTES = QUEUE_BYTES // 2
COMMIT_SECONDS = 30.0
COMPACT_COMMITS = 1000

_GRADIENT = ("epoch", "step", "rank", "sample", "parameter")
_STEP = ("epoch", "step", "rank", "group_id")
_Key = tuple[Any, ...]


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
    # A table of one step costs as much as one of a hundred, so the writer makes it, once for all of a commit. What is
    # not of the very type that its column has is for Arrow to judge, now.
    tests = _plain_tests(kind)
    if not all(row.get(name) is None or fits(row[name]) for row in rows for name, fits in tests):
        table(kind, rows)
    numbers = sum(len(value) if isinstance(value, list) else 1 for row in rows for value in row.values())
    return [Item(8 * numbers, rows={kind: rows}, moment=moment)]


def table(kind: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return rows as the table of that kind.

    Raises:
        InvalidInputError: naming the column that cannot hold what it was given.
    """
    columns = []
    for column in SCHEMAS[kind]:
        try:
            columns.append(pa.array([row.get(column.name) for row in rows], column.type))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise InvalidInputError(f"{kind}: {column.name} holds {column.type}: {error}") from error
    return pa.Table.from_arrays(columns, schema=SCHEMAS[kind])


@cache
def _plain_tests(kind: str) -> list[tuple[str, Callable[[Any], bool]]]:
    """Return each column with a test for values that it surely holds."""
    return [(column.name, _plain_test(column.type)) for column in SCHEMAS[kind]]


def _plain_test(arrow: pa.DataType) -> Callable[[Any], bool]:
    if pa.types.is_list(arrow):
        fits = _plain_test(arrow.value_type)
        return lambda value: type(value) is list and all(map(fits, value))
    if pa.types.is_integer(arrow):
        limit = 2 ** (arrow.bit_width - 1)
        return lambda value: type(value) is int and -limit <= value < limit
    if pa.types.is_string(arrow):
        return lambda value: type(value) is str and value.isascii()
    plain = float if pa.types.is_floating(arrow) else bool
    return lambda value: type(value) is plain


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
        return [item.encoded for item in self.items if item.encoded is not None]

    @property
    def steps(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """The first and the last (epoch, step), None when there are none."""
        moments = {moment for item in self.items if (moment := item.item.moment) is not None}
        return (min(moments), max(moments)) if moments else None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The processes whose records and steps it holds."""
        ranks = {encoded.record.rank for encoded in self.records}
        ranks.update(row["rank"] for item in self.items for row in item.item.rows.get("steps", ()))
        return tuple(sorted(ranks))

    def build(self) -> Iterator[tuple[str, bytes, str, int, int]]:
        """Return the objects of the commit, as `build_segment` does."""
        parts: dict[str, list[pa.Table]] = {}
        rows: dict[str, list[Mapping[str, Any]]] = {}
        blobs: dict[str, bytes] = {}
        states: list[tuple[str, Matrix]] = []
        for item in (encoded.item for encoded in self.items):
            for kind, part in item.tables.items():
                parts.setdefault(kind, []).append(part)
            for kind, rows_of_item in item.rows.items():
                rows.setdefault(kind, []).extend(rows_of_item)
            blobs.update(item.blobs)
            states.extend(item.states)
        tables = {
            kind: joined(tables) if kind == "samples" else pa.concat_tables(tables, promote_options="permissive")
            for kind, tables in parts.items()
        }
        tables.update((kind, table(kind, rows_of_kind)) for kind, rows_of_kind in rows.items())
        if states:
            # Parameter by parameter, as gradients are laid down: a replay reads one through all steps.
            names = tables["states"]["parameter"].to_pylist()
            first = {name: number for number, name in reversed(list(enumerate(names)))}
            order = sorted(range(len(names)), key=lambda number: first[names[number]])
            tables["states"] = tables["states"].take(order)
            states = [states[number] for number in order]
        return build_segment(self.records, tables, blobs, states)


class Doubles:
    """Looks, at each commit of one writer, at what others have committed since.

    Args:
        attempt: the one that is written.
        base: what the ledger goes by: everything up to there it has looked up itself.

    Attributes:
        refused: an error for each batch of which something was refused, until it is told.
    """

    def __init__(self, objects: Objects, settings: Settings, attempt: int, base: View) -> None:
        self._objects = objects
        self._settings = settings
        self._attempt = attempt
        self._view = base
        self._seen = {writer: newest.seq for writer, newest in base.newest.items()}
        self._own: set[str] = set()
        self._others: list[Commit] = []
        self._shapes: dict[str, list[int]] = {}
        self.refused: list[InvalidInputError] = []

    def keep_out(self, batch: Batch, writer: str) -> None:
        """Take out of a batch what is committed already. To be called while no other writer commits.

        Raises:
            Overtaken: the batch is another one now.
        """
        self._own.add(writer)
        try:
            items = self._without(batch.items, *self._committed(batch))
        except (CorruptionError, FormatError, TimstoreWarning):
            # A log that is damaged keeps nobody from putting on disk what was accepted; readers say what is wrong.
            return
        if items != batch.items:
            batch.keep(items)
            raise Overtaken

    def _committed(self, batch: Batch, looks: int = 3) -> tuple[set[_Key], dict[_Key, Mapping[str, Any]]]:
        """Return what others have committed at the batch's moments: keys of gradients, and steps by their keys.

        Args:
            looks: how often the log is looked at: what a look names may be folded, and gone, when it is read.
        """
        gradients: set[_Key] = set()
        steps: dict[_Key, Mapping[str, Any]] = {}
        span, ranks = batch.steps, set(batch.ranks)
        try:
            self._look()
            for commit in self._others:
                if span is None or commit.steps is None or commit.steps[1] < span[0] or span[1] < commit.steps[0]:
                    continue
                if commit.ranks is not None and ranks.isdisjoint(commit.ranks):
                    continue
                for rows in self._rows(self._view, commit, "gradients"):
                    gradients.update(_keys(rows, _GRADIENT))
                for rows in self._rows(self._view, commit, "steps"):
                    steps.update(zip(_keys(rows, _STEP), rows.to_pylist(), strict=True))
        except CorruptionError as error:
            if error.kind != "missing" or looks == 1:
                raise
            return self._committed(batch, looks - 1)
        return gradients, steps

    def _look(self) -> None:
        """Take note of the commits that are new, but for one's own, and of those the ones to this attempt."""
        view = read_view(self._objects, self._settings, self._view)
        known = len(self._view.commits) if view.compaction == self._view.compaction else 0
        new = [commit for commit in view.commits[known:] if commit.seq > self._seen.get(commit.writer, -1)]
        others = [commit for commit in new if commit.writer not in self._own]
        for commit in others:
            for rows in self._rows(view, commit, "parameters"):
                self._shapes.update(_keys(rows, ("parameter", "shape")))
        # Last: what could not be read is looked at again.
        self._others += [commit for commit in others if commit.attempt == self._attempt and commit.steps is not None]
        self._seen.update((commit.writer, commit.seq) for commit in new)
        self._view = view

    def _rows(self, view: View, commit: Commit, kind: str) -> list[pa.Table]:
        """Return the rows of one kind of a commit, out of the compaction where they are folded."""
        compaction = view.compaction
        if compaction is None or not compaction.covers(commit.writer, commit.seq):
            return [read_rows(self._objects, info, commit) for info in commit.objects if info.kind == kind]
        number = [(other.writer, other.seq) for other in view.commits].index((commit.writer, commit.seq))
        folded = read_tables(self._objects, compaction, kind)
        return [rows.filter(pa.array(rows["commit"].to_numpy() == number)) for rows in folded]

    def _without(
        self, items: Sequence[EncodedItem], gradients: set[_Key], steps: Mapping[_Key, Mapping[str, Any]]
    ) -> list[EncodedItem]:
        """Return what is left of some items; what says something else than what is committed is refused by name."""
        refused: list[str] = []
        left = []
        for item in items:
            if item.encoded is not None and (reason := self._twice(item.encoded, item.item.parameters, gradients)):
                refused.append(f"{item.item}: {reason}")
                continue
            rows = {
                kind: [row for row in rows_of_kind if self._is_new(kind, row, steps, refused)]
                for kind, rows_of_kind in item.item.rows.items()
            }
            if rows == item.item.rows:
                left.append(item)
            elif rows := {kind: rows_of_kind for kind, rows_of_kind in rows.items() if rows_of_kind}:
                left.append(replace(item, item=replace(item.item, rows=rows)))
        if refused:
            more = "" if len(refused) == 1 else f", and {len(refused) - 1} more like it"
            message = (
                f"{refused[0]}{more}: committed by another handle since this one was opened, to attempt "
                f"{self._attempt}. It was left out, all else that was accepted is on disk"
            )
            self.refused.append(InvalidInputError(message, kind="duplicate"))
        return left

    def _twice(self, encoded: EncodedRecord, parameters: Mapping[str, Parameter], gradients: set[_Key]) -> str | None:
        """Return what is wrong with a record, None where nothing is."""
        record = encoded.record
        for name in dict.fromkeys(part.parameter for part in encoded.parts):
            if (record.epoch, record.step, record.rank, record.sample, name) in gradients:
                return f"the gradient of {name} is recorded already"
            shape = tuple(self._shapes.get(name, parameters[name].shape))
            if shape != parameters[name].shape:
                return f"{name} is recorded with shape {shape}, not {parameters[name].shape}"
        return None

    def _is_new(
        self, kind: str, row: Mapping[str, Any], steps: Mapping[_Key, Mapping[str, Any]], refused: list[str]
    ) -> bool:
        """Say whether a row is to be written; of one that contradicts what is committed, `refused` says so."""
        if kind == "parameters":
            shape = self._shapes.get(row["parameter"], row["shape"])
            if shape != row["shape"]:
                refused.append(f"parameter {row['parameter']} is recorded with shape {shape}, not {row['shape']}")
                return False
        if kind == "steps" and (stored := steps.get(tuple(row[name] for name in _STEP))) is not None:
            where = f"epoch {row['epoch']}, step {row['step']}, group {row['group_id']}"
            differ = [name for name in row if not same(stored.get(name), row[name])]
            refused += [f"{where}: recorded with {name} {stored.get(name)}, not {row[name]}" for name in differ[:1]]
            return False
        return True


def _keys(rows: pa.Table, columns: Sequence[str]) -> Iterator[_Key]:
    """Yield some columns of each row."""
    return zip(*(rows[name].to_pylist() for name in columns), strict=True)


class BackgroundWriter:
    """One thread that encodes and writes behind a bounded queue.

    An error of the thread is raised once, by the next call from the training thread, and what was
    accepted before it stays in memory: the next commit tries again. What is left out of a commit alone, while all
    else goes to disk, `commit` or `close` tells.

    Args:
        known: what was committed when the ledger of the attempt was begun.
        unfolded: how many commits there are already that no compaction covers.

    Attributes:
        is_stopped: whether the thread has ended, or is about to.
    """

    def __init__(self, objects: Objects, settings: Settings, attempt: int, known: View, unfolded: int) -> None:
        self.attempt = attempt
        self._objects = objects
        self._settings = settings
        self._log = LogWriter(objects, settings)
        self._doubles = Doubles(objects, settings, attempt, known)
        self._unfolded = unfolded
        self._untold: list[str] = []
        self._left_out: list[str] = []
        self._condition = threading.Condition()
        self._queue: deque[Item] = deque()
        self._held_bytes = 0
        self._waiting = 0
        self._batch = Batch()
        self._error: Exception | None = None
        self._broken = False
        self._asked = 0
        self._answered = 0
        self.is_stopped = False
        # Arrow imports pandas, where there is one, at its first array; the thread could not once the interpreter ends.
        pa.array([0])
        self._thread = threading.Thread(target=self._run, name="timstore-writer", daemon=True)
        self._thread.start()

    def put(self, *items: Item) -> None:
        """Accept items in order, all or none; wait while `QUEUE_BYTES` are held that are not on disk.

        Durability: none yet. They are on disk after the next `commit`, automatic or asked for.

        Raises:
            StorageError, ReadOnlyError: an earlier write failed; these items were not accepted, earlier ones are kept.
        """
        size_bytes = sum(item.size_bytes for item in items)
        with self._condition:
            self._raise_error()
            self.tell()
            self._wait_for_room(size_bytes)
            self._queue.extend(items)
            self._held_bytes += size_bytes
            self._condition.notify_all()

    def commit(self) -> None:
        """Write everything accepted so far, and return when it is on disk.

        Raises:
            StorageError, ReadOnlyError: if it could not be written; it is kept, and the next commit tries again.
            InvalidInputError: kind `duplicate`: another handle committed some of it first; the rest is on disk.
            StateError: kind `left-out`: some of it cannot be written; the rest is on disk.
        """
        self._flush()
        self._raise_left_out()

    def _flush(self) -> None:
        with self._condition:
            if not self._broken:
                self._error = None
            self._raise_error()
            self._asked += 1
            ticket = self._asked
            self._condition.notify_all()
            while self._answered < ticket and self._error is None:
                self._condition.wait()
            self._raise_error()
            self.tell()

    def _raise_left_out(self) -> None:
        """Tell, once, what is not on disk while all else that was accepted is."""
        with self._condition:
            refused, self._doubles.refused = self._doubles.refused, []
            left_out, self._left_out = self._left_out, []
        errors: list[TimstoreError] = [*refused]
        if left_out:
            more = "" if len(left_out) == 1 else f", and {len(left_out) - 1} more"
            message = f"left out, since it cannot be written: {left_out[0]}{more}. All else is on disk"
            errors.append(StateError(message, kind="left-out"))
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"timstore: {other}")
            raise errors[0]

    def close(self) -> None:
        """Commit, write the closing record, and end the thread; `tell` says afterwards where that record is missing.

        The closing record says only that nothing follows; without it everything is on disk all the same.

        Raises:
            StorageError: as `commit`, the thread goes on; of a store that is gone or replaced it says what is lost.
            InvalidInputError, StateError: as `commit`, once the thread has ended.
        """
        try:
            self._flush()
            self._end_log()
        except StorageError as error:
            if error.kind not in LOST:
                raise
            held = self._records_held
            lost = f"{held} accepted records that were never committed" if held else "no record that was not committed"
            self.stop()
            raise StorageError(f"{error} Closing this handle loses {lost}", kind=error.kind) from error
        except StateError:
            self.stop()
            raise
        self.stop()
        self._raise_left_out()

    def _end_log(self) -> None:
        try:
            self._log.close()
        except (StorageError, ReadOnlyError) as error:
            if error.kind in LOST:
                raise
            self._untold.append(f"everything is on disk, but for the record that ends this writer's log: {error}")

    @property
    def _records_held(self) -> int:
        """How many records were accepted and are not on disk."""
        with self._condition:
            queued = sum(item.record is not None for item in self._queue)
            return queued + len(self._batch.records)

    def stop(self) -> None:
        """End the thread without another commit."""
        with self._condition:
            self.is_stopped = True
            self._condition.notify_all()
        self._thread.join()

    def _wait_for_room(self, size_bytes: int) -> None:
        self._waiting += 1
        try:
            while self._held_bytes and self._held_bytes + size_bytes > QUEUE_BYTES:
                self._condition.notify_all()
                self._condition.wait()
                self._raise_error()
        finally:
            self._waiting -= 1

    def _raise_error(self) -> None:
        if self._error is not None:
            error = self._error
            if not self._broken:
                self._error = None
            raise error

    def tell(self) -> None:
        """Warn of what went wrong without harm, in the training thread: an error there would end the writer's."""
        while self._untold:
            warnings.warn(self._untold.pop(0), TimstoreWarning, stacklevel=4)

    def _run(self) -> None:
        while True:
            with self._condition:
                while not (work := self._next_work()):
                    self._condition.wait(self._seconds_left())
                if work == "stop":
                    return
                item = self._queue.popleft() if work == "encode" else None
                # A commit answers those who asked only when nothing accepted before is still in the queue.
                answers = self._answered if self._queue else self._asked
            if item is not None:
                self._encode(item)
            else:
                self._commit(answers)

    def _next_work(self) -> str | None:
        full = self._batch.bytes >= COMMIT_BYTES
        if self.is_stopped:
            return "stop"
        if self._error is not None:
            return None  # wait until the training thread has heard of it
        if self._queue and not full:
            return "encode"
        due = self._waiting or self._seconds_left() == 0
        if full or self._asked > self._answered or (self._batch and due):
            return "commit"
        return None

    def _seconds_left(self) -> float | None:
        if not self._batch or self._error is not None:
            return None
        return max(0.0, self._batch.since + COMMIT_SECONDS - time.monotonic())

    def _encode(self, item: Item) -> None:
        try:
            if item.moment is not None and not 0 <= min(item.moment) <= max(item.moment) < 2**63:
                raise ValueError(f"there is no epoch {item.moment[0]}, step {item.moment[1]}")
            encoded = self._encoded(item)
        except MemoryError as error:
            with self._condition:
                self._queue.appendleft(item)
            kept = StorageError(f"not enough memory to encode {item}; it is kept, commit again", kind="memory")
            self._report(kept, error)
            return
        except Exception as error:
            self._leave_out(item, item.size_bytes, error)
            return
        stored_bytes = item.size_bytes if encoded is None else encoded.stored_bytes
        with self._condition:
            self._batch.add(EncodedItem(item, encoded, stored_bytes))
            self._held_bytes += stored_bytes - item.size_bytes
            self._condition.notify_all()

    def _leave_out(self, item: Item, held_bytes: int, error: Exception) -> None:
        """Go on without what was accepted and cannot be written."""
        with self._condition:
            self._left_out.append(f"{item} ({type(error).__name__}: {error})")
            self._held_bytes -= held_bytes
            self._condition.notify_all()

    def _report(self, error: Exception, cause: Exception | None = None) -> None:
        """Let the training thread hear of an error; what is held stays, for the next commit."""
        _log.info("%d records were not committed, and are kept to try again: %s", self._records_held, error)
        error.__cause__ = error.__cause__ or cause
        with self._condition:
            self._batch.since = time.monotonic()
            self._error = error
            self._condition.notify_all()

    def _encoded(self, item: Item) -> EncodedRecord | None:
        if item.record is None:
            return None
        parts, norm = encode(
            item.record.gradients,
            item.parameters,
            precision=self._settings.precision,
            max_rel_error=self._settings.max_rel_error,
            drop_zero_rows=item.finite,
        )
        # Not the gradients: what is stored of them is in the parts.
        return EncodedRecord(replace(item.record, gradients={}), self.attempt, parts, norm)

    def _commit(self, answers: int) -> None:
        try:
            self._write()
        except (StorageError, ReadOnlyError) as error:
            self._report(error)
            return
        except MemoryError as error:
            self._report(StorageError("not enough memory to commit; all is kept, commit again", kind="memory"), error)
            return
        except Exception as error:
            self._break(error)
            return
        with self._condition:
            self._answered = max(self._answered, answers)
            self._condition.notify_all()
        if self._unfolded >= COMPACT_COMMITS:
            self._fold()

    def _write(self) -> None:
        """Write the batch as one commit; as several, where something in it cannot be written, without that."""
        parts = [self._batch]
        try:
            while parts:
                batch = parts[0]
                try:
                    while batch and not self._wrote(batch):
                        pass
                except (StorageError, ReadOnlyError, StateError, CorruptionError, MemoryError):
                    raise
                except Exception as error:
                    if len(batch.items) > 1:
                        parts[:1] = batch.halves()
                        continue
                    self._leave_out(batch.items[0].item, batch.bytes, error)
                parts.pop(0)
        finally:
            with self._condition:
                self._batch = Batch([item for batch in parts for item in batch.items])

    def _wrote(self, batch: Batch) -> bool:
        """Make one commit of a batch; False if others were faster with some of it, which is out of it now."""
        ranks, held_bytes, is_written = batch.ranks, batch.bytes, True
        try:
            self._log.commit(
                attempt=self.attempt,
                rank=ranks[0] if ranks else 0,
                steps=batch.steps,
                records=len(batch.records),
                build=batch.build,
                ranks=ranks,
                check=lambda: self._doubles.keep_out(batch, self._log.writer),
            )
            self._unfolded += 1
        except Overtaken:
            held_bytes, is_written = held_bytes - batch.bytes, False
        with self._condition:
            self._held_bytes -= held_bytes
        return is_written

    def _fold(self) -> None:
        """Fold the row files of many small commits. Whatever fails, no record is concerned: tried again later."""
        self._unfolded = 0
        try:
            compact(self._objects.synced(), self._settings)
        except Exception as error:
            _log.info("the row files of the last commits were not folded, which is tried again later: %s", error)
            with self._condition:
                self._untold.append(f"the row files of the last commits were not folded: {error}")

    def _break(self, error: Exception) -> None:
        """Stop for good: a record that was accepted cannot be written, so nothing more may be acknowledged."""
        with self._condition:
            self._broken = True
            self._error = StateError(
                f"the writer stopped: {type(error).__name__}: {error}. What was committed before is safe; "
                "open the store again and go on from its last committed step",
                kind="writer-stopped",
            )
            self._error.__cause__ = error
            self._condition.notify_all()
