"""The background writer: records in at training speed, segments and commits out, nothing lost between."""

import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pyarrow as pa

from timstore.database.batch import Batch, EncodedItem, Item
from timstore.database.doubles import Doubles
from timstore.encoding import encode
from timstore.errors import (
    LOST,
    CorruptionError,
    ReadOnlyError,
    StateError,
    StorageError,
    TimstoreError,
    TimstoreWarning,
)
from timstore.format.compacting import compact
from timstore.format.local_files import Objects
from timstore.format.log import LogWriter, Overtaken
from timstore.format.log_reader import View
from timstore.format.segments import EncodedRecord
from timstore.format.settings import Settings

_log = logging.getLogger(__name__)

# What may be held in memory: accepted, and not yet on disk. Half of it is written while the other half comes in.
QUEUE_BYTES = 512 * 1024 * 1024
COMMIT_BYTES = QUEUE_BYTES // 2
COMMIT_SECONDS = 30.0
COMPACT_COMMITS = 1000


class BackgroundWriter:
    """One thread that encodes and writes behind a bounded queue.

    Args:
        doubles: keeps out of a commit what others have committed.
        compact: folds the row files of all commits so far; called after every `COMPACT_COMMITS` of them.
        unfolded: how many commits there are already that no compaction covers.

    An error of the thread is raised once, by the next call from the training thread, and what was
    accepted before it stays in memory: the next commit tries again. What is left out of a commit alone, while all
    else goes to disk, `commit` or `close` tells.
    """

    def __init__(
        self,
        log: LogWriter,
        *,
        attempt: int,
        precision: str,
        max_rel_error: float,
        doubles: Doubles,
        compact: Callable[[], object],
        unfolded: int,
    ) -> None:
        self._compact = compact
        self._unfolded = unfolded
        self._untold: list[str] = []
        self.attempt = attempt
        self._log = log
        self._doubles = doubles
        self._left_out: list[str] = []
        self._precision = precision
        self._max_rel_error = max_rel_error
        self._condition = threading.Condition()
        self._queue: deque[Item] = deque()
        self._held_bytes = 0
        self._waiting = 0
        self._batch = Batch()
        self._error: Exception | None = None
        self._broken = False
        self._asked = 0
        self._answered = 0
        self._stopping = False
        # Arrow imports pandas, where there is one, at its first array; the thread could not once the interpreter ends.
        pa.array([0])
        self._thread = threading.Thread(target=self._run, name="timstore-writer", daemon=True)
        self._thread.start()

    @classmethod
    def begin(
        cls, objects: Objects, settings: Settings, attempt: int, known: View, unfolded: int
    ) -> "BackgroundWriter":
        """Return a new writer of an attempt.

        Args:
            known: what was committed when the ledger of the attempt was begun.
        """
        return cls(
            LogWriter(objects, settings),
            attempt=attempt,
            precision=settings.precision,
            max_rel_error=settings.max_rel_error,
            doubles=Doubles(objects, settings, attempt, known),
            compact=partial(compact, objects.synced(), settings),
            unfolded=unfolded,
        )

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
    def is_stopped(self) -> bool:
        """Whether the thread has ended."""
        return self._stopping

    @property
    def _records_held(self) -> int:
        """How many records were accepted and are not on disk."""
        with self._condition:
            queued = sum(item.record is not None for item in self._queue)
            return queued + len(self._batch.records)

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
            precision=self._precision,
            max_rel_error=self._max_rel_error,
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
            self._compact()
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
