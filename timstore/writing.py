"""The background writer: records in at training speed, segments and commits out, nothing lost between."""

import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from timstore.encoding import Matrix, encode
from timstore.errors import ReadOnlyError, StateError, StorageError, TimstoreWarning
from timstore.format.columns import joined
from timstore.format.log import LogWriter
from timstore.format.segment import EncodedRecord, build_segment
from timstore.ledger import check_rows, row_bytes, table
from timstore.records import Parameter, Record

_log = logging.getLogger(__name__)

# What may be held in memory: accepted, and not yet on disk. Half of it is written while the other half comes in.
QUEUE_BYTES = 512 * 1024 * 1024
COMMIT_BYTES = QUEUE_BYTES // 2
COMMIT_SECONDS = 30.0
ROLL_UP_COMMITS = 1000


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


class _Batch:
    """What the next commit will hold."""

    def __init__(self) -> None:
        self.records: list[EncodedRecord] = []
        self.tables: dict[str, list[pa.Table]] = {}
        self.rows: dict[str, list[Mapping[str, Any]]] = {}
        self.blobs: dict[str, bytes] = {}
        self.states: list[tuple[str, Matrix]] = []
        self.moments: list[tuple[int, int]] = []
        self.items = 0
        self.bytes = 0
        self.since = time.monotonic()

    def __bool__(self) -> bool:
        return self.items > 0

    @property
    def rank(self) -> int:
        return self.records[0].record.rank if self.records else 0

    def build(self) -> Iterator[tuple[str, bytes, str, int, int]]:
        tables = {
            kind: joined(parts) if kind == "samples" else pa.concat_tables(parts, promote_options="permissive")
            for kind, parts in self.tables.items()
        }
        tables.update((kind, table(kind, rows)) for kind, rows in self.rows.items())
        states = self.states
        if states:
            # Parameter by parameter, as gradients are laid down: a replay reads one through all steps.
            names = tables["states"]["parameter"].to_pylist()
            first = {name: number for number, name in reversed(list(enumerate(names)))}
            order = sorted(range(len(names)), key=lambda number: first[names[number]])
            tables["states"] = tables["states"].take(order)
            states = [states[number] for number in order]
        return build_segment(self.records, tables, self.blobs, states)


class BackgroundWriter:
    """One thread that encodes and writes behind a bounded queue.

    Args:
        roll_up: folds the row files of all commits so far; called after every `ROLL_UP_COMMITS` of them.
        unfolded: how many commits there are already that no roll-up covers.

    An error of the thread is raised once, by the next call from the training thread, and what was
    accepted before it stays in memory: the next commit tries again.
    """

    def __init__(
        self,
        log: LogWriter,
        *,
        attempt: int,
        precision: str,
        max_rel_error: float,
        roll_up: Callable[[], object],
        unfolded: int,
    ) -> None:
        self._roll_up = roll_up
        self._unfolded = unfolded
        self._untold: list[str] = []
        self.attempt = attempt
        self._log = log
        self._precision = precision
        self._max_rel_error = max_rel_error
        self._condition = threading.Condition()
        self._queue: deque[Item] = deque()
        self._held_bytes = 0
        self._waiting = 0
        self._batch = _Batch()
        self._error: Exception | None = None
        self._broken = False
        self._asked = 0
        self._answered = 0
        self._stopping = False
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
        """
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

    def close(self) -> None:
        """Commit, write the closing record, and end the thread; `tell` says afterwards where that record is missing.

        The closing record says only that nothing follows; without it everything is on disk all the same.
        """
        self.commit()
        try:
            self._log.close()
        except (StorageError, ReadOnlyError) as error:
            self._untold.append(f"everything is on disk, but for the record that ends this writer's log: {error}")
        self.stop()

    def stop(self) -> None:
        """End the thread without another commit."""
        with self._condition:
            self._stopping = True
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
        if self._stopping:
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
            encoded = self._encoded(item)
        except Exception as error:  # whatever it is, the training thread must hear of it
            self._break(error)
            return
        if not self._batch:
            self._batch.since = time.monotonic()
        self._batch.items += 1
        if encoded is not None:
            self._batch.records.append(encoded)
        for kind, rows in item.tables.items():
            self._batch.tables.setdefault(kind, []).append(rows)
        for kind, listed in item.rows.items():
            self._batch.rows.setdefault(kind, []).extend(listed)
        self._batch.blobs.update(item.blobs)
        self._batch.states.extend(item.states)
        stored_bytes = item.size_bytes if encoded is None else encoded.stored_bytes
        self._batch.bytes += stored_bytes
        if item.moment is not None:
            self._batch.moments.append(item.moment)
        with self._condition:
            self._held_bytes += stored_bytes - item.size_bytes
            self._condition.notify_all()

    def _encoded(self, item: Item) -> EncodedRecord | None:
        if item.record is None:
            return None
        parts, norm = encode(
            item.record.gradients,
            item.parameters,
            precision=self._precision,
            max_rel_error=self._max_rel_error,
            drop_zero_rows=item.finite,
        )
        # Not the gradients: what is stored of them is in the parts.
        return EncodedRecord(replace(item.record, gradients={}), self.attempt, parts, norm)

    def _commit(self, answers: int) -> None:
        batch = self._batch
        try:
            if batch:
                steps = (min(batch.moments), max(batch.moments)) if batch.moments else None
                self._log.commit(
                    attempt=self.attempt, rank=batch.rank, steps=steps, records=len(batch.records), build=batch.build
                )
        except (StorageError, ReadOnlyError) as error:
            batch.since = time.monotonic()
            _log.info("%d records were not committed, and are kept to try again: %s", len(batch.records), error)
            with self._condition:
                self._error = error
                self._condition.notify_all()
            return
        except Exception as error:
            self._break(error)
            return
        with self._condition:
            if batch:
                self._held_bytes -= batch.bytes
                self._batch = _Batch()
                self._unfolded += 1
            self._answered = max(self._answered, answers)
            self._condition.notify_all()
        if self._unfolded >= ROLL_UP_COMMITS:
            self._fold()

    def _fold(self) -> None:
        """Fold the row files of many small commits. Whatever fails, no record is concerned: tried again later."""
        self._unfolded = 0
        try:
            self._roll_up()
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
