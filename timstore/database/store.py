"""`Store`: open, append, commit, close; asking and reading are in `handle`."""

import os
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from timstore import arguments, errors
from timstore.database import kept_rows, lifetime, validation
from timstore.database.attempts import CurrentAttempt
from timstore.database.batch import Item, rows_items
from timstore.database.entries import Entry, record_entry, step_entry
from timstore.database.handle import Handle
from timstore.database.ledger import Ledger, parameter_rows
from timstore.database.samples import ColumnTypes, Samples, hash_rows
from timstore.database.snapshot import pack_probe
from timstore.database.states import state_item, state_precision
from timstore.database.writer import BackgroundWriter
from timstore.format.compacting import CompactionReport, compact
from timstore.format.log import Scope
from timstore.records import Parameter, StepGroup


class Store(Handle):
    """A database of training trajectories in one directory.

    A handle sees the commits that were there when it was opened, its own after `commit`, and all others after
    `refresh`. Any number of them, in any number of processes, may use one store; each is for one thread at a time.

    Args:
        path: the store's directory.
        mode: `r` to read (must exist, nothing is written), `a` to open or create, `x` to create, `w` to start over:
            a store that is there, and nothing else, is removed without asking (docs/design/storage.md).
        precision: `exact` (the default), `bfloat16` or `int8`; kept in the store when it is made.
        max_rel_error: a gradient that a lossy precision would change by more is kept finer; 0.02 by default.
        durability: `commit` (the default: synced to disk at each commit) or `os` (outlives the process only).
        sql_memory: bytes, or text like "1GB", for all questions together; one that takes more is refused.

    Raises:
        NotFoundError, AlreadyExistsError, ReadOnlyError: the path does not fit the mode.
        InvalidInputError: the path holds something else, or the store was made with other options.
        FormatError, CorruptionError: this version cannot read the store, or its files were changed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        mode: str = "a",
        *,
        precision: str | None = None,
        max_rel_error: float | None = None,
        durability: str | None = None,
        sql_memory: int | str = "1GB",
    ) -> None:
        options = {"precision": precision, "max_rel_error": max_rel_error, "durability": durability}
        super().__init__(path, mode, options, sql_memory)
        attempts = self._snapshot.view.attempts
        self._attempt = CurrentAttempt(self._objects, self.path, attempts[-1] if attempts else None)
        self._writer: BackgroundWriter | None = None
        self._ledger: Ledger | None = None
        self._known = self._snapshot.view
        lifetime.begun(self)

    def append(
        self,
        epoch: int,
        step: int,
        sample: int | Sequence[int],
        gradients: Mapping[str, Any],
        *,
        lr: float | None = None,
        loss: float | Sequence[float] | None = None,
        tokens: int | Sequence[int] | None = None,
        dot: float | Sequence[float] | None = None,
        rank: int = 0,
        allow_zero: bool = False,
        allow_nonfinite: bool = False,
        copy: bool = True,
    ) -> None:
        """Record what one sample, or B samples, contributed to the gradient of one optimizer step.

        Durability: accepted in memory; on disk after `commit`, or by itself every 256 MB or 30 s. Waits
        while 512 MB are not on disk. On an error nothing of the call was accepted.

        Args:
            sample: a stable integer id, or B of them with a leading axis of B on every array.
            gradients: parameter name to an array or tensor of the parameter's shape, `Factors`, `Rows`, or
                a list of those, whose sum is the gradient. Factors that hold the same `inputs` object share it.
            lr: shortcut for `append_step` of plain SGD with this rate.
            loss, tokens: of the sample (B of them for B samples), for the `records` table.
            dot: inner product with the whole step's gradient, before clipping: makes clipping exact.
            allow_zero, allow_nonfinite: accept a record that is all zero, or holds NaN or Inf.
            copy: False hands the arrays over: they must not change afterwards.

        Raises:
            InvalidInputError: wrong shape, dtype, name or id; all zero; not finite; recorded before.
            StateError: the store is closed, or this is a forked child.
            StorageError: an earlier write failed (no space left); earlier records are kept in memory.
        """
        self.accept(
            self.record_entry(
                epoch,
                step,
                sample,
                gradients,
                lr=lr,
                loss=loss,
                tokens=tokens,
                dot=dot,
                rank=rank,
                allow_zero=allow_zero,
                allow_nonfinite=allow_nonfinite,
                copy=copy,
            )
        )

    def append_step(
        self,
        epoch: int,
        step: int,
        groups: Sequence[Mapping[str, Any] | StepGroup],
        *,
        rank: int = 0,
        **scalars: Any,
    ) -> None:
        """Record the scalars that one optimizer step used, recorded samples in it or not.

        Durability: as `append`.

        Args:
            groups: one mapping per optimizer group with the fields of `records.StepGroup`: lr, momentum,
                dampening, nesterov, beta1, beta2, eps, weight_decay, decoupled, maximize, ...
            scalars: the fields of `records.Step`: consumed_ratio (consumed over accumulated gradient: the factor of
                clipping), sample_ids (ordered, of the whole batch), grad_norm (before clipping), tokens, mean_over, ...

        Raises:
            InvalidInputError: a field that does not exist, or a step recorded before with other values.
        """
        self.accept(self.step_entry(epoch, step, groups, rank=rank, **scalars))

    def record_entry(self, *given: Any, **options: Any) -> Entry:
        """Check and take in what `append` would accept, and change nothing; arguments and errors as there."""
        return record_entry(self._writing(), *given, **options)

    def step_entry(self, *given: Any, **options: Any) -> Entry:
        """Check and take in what `append_step` would accept, and change nothing; arguments and errors as there."""
        return step_entry(self._writing(), *given, **options)

    def accept(self, *entries: Entry) -> None:
        """Accept what was checked and taken in, all or none; durability as `append`.

        Raises:
            StateError, StorageError: as `append`; never for what the entries hold.
        """
        ledger = self._writing()
        if not all(isinstance(entry, Entry) for entry in entries):
            raise errors.InvalidInputError("an entry is what record_entry or step_entry returned")
        self._put(*(item for entry in entries for item in entry.items))
        for entry in entries:
            entry.accepted(ledger)

    def declare(self, parameters: Sequence[Parameter]) -> None:
        """Name the parameters of the model, their shapes and optimizer groups, before they are recorded.

        Raises:
            InvalidInputError: if one is known with another shape.
        """
        ledger, given = self._writing(), arguments.listed(parameters, "parameters")
        new = ledger.new_parameters(given)
        self._put(*rows_items("parameters", parameter_rows(new, ledger.attempt)))
        ledger.know(new)

    def append_fingerprints(self, epoch: int, step: int, digests: Mapping[str, str]) -> None:
        """Keep the digests that the parameters had after (epoch, step), so that the model is known again."""
        moment, attempt = arguments.moment(epoch, step), self._writing().attempt
        shared = {"attempt": attempt, "epoch": moment[0], "step": moment[1]}
        rows = [{**shared, "parameter": name, "digest": one} for name, one in validation.digests(digests).items()]
        self._put(*rows_items("fingerprints", rows, moment))

    def append_states(
        self, epoch: int, step: int, role: str, numbers: Mapping[str, Any], *, name: str | None = None
    ) -> None:
        """Keep whole parameters' worth of numbers that belong to (epoch, step): the optimizer's side of the history.

        Durability: as `append`; the arrays must not change before it is committed.

        Args:
            role: after the step `exp_avg_sq`, Adam's second moment (AMSGrad's maximum) before bias correction, and
                `theta`, the parameters, both kept as bfloat16; `gradient`, what the step consumed; before the step
                `start_theta` and `start_state`, the parameters and the optimizer's state that the run began with.
            numbers: parameter name to an array or tensor of the parameter's shape (of one element in `start_state`
                for a counter).
            name: of the optimizer's state (`exp_avg`, `momentum_buffer`, ...), for `start_state`.
        """
        ledger = self._writing()
        role = arguments.choice(role, ("exp_avg_sq", "theta", "gradient", "start_theta", "start_state"), "role")
        moment, precision = arguments.moment(epoch, step), state_precision(role, self.settings.precision)
        self._put(state_item(moment, ledger.attempt, role, numbers, precision, name=name, known=ledger.parameters()))

    def append_hashes(self, hashes: Mapping[int, str]) -> None:
        """Keep a hash of what samples consist of, in column `content_hash` of `samples`; durability as `append`."""
        self._writing()
        rows = hash_rows(hashes)
        self._put(Item(rows.nbytes, tables={"samples": rows}))

    def append_rollback(self, row: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> None:
        """Write one row of the `rollbacks` table; on disk when this returns.

        Args:
            before: the parameters that will change, as they are, for `undo`; they stay until this returns.
        """
        moment, attempt = self.frontier or (0, 0), self._writing().attempt
        row = arguments.mapped(row, "a row of `rollbacks` is a mapping")
        items = rows_items("rollbacks", [row])
        if before is not None:
            rollback_id = arguments.plain_name(row.get("digest_after"), "digest_after")
            items.append(state_item(moment, attempt, "theta", before, "exact", rollback_id=rollback_id))
        self._put(*items)
        self.commit()

    def keep_probe(self, batches: Sequence[Any], *, loss: str) -> None:
        """Keep probe batches (mappings, sequences or single numpy arrays) in the store, for later rollbacks."""
        self._writing()
        data = pack_probe(arguments.listed(batches, "batches"), arguments.plain_name(loss, "loss"))
        self._put(Item(len(data), blobs={"probe.npz": data}))

    def keep_rows(self, rows: pa.Table) -> None:
        """Keep rows of the training stream, as `kept_rows.rows_table` makes them; durability as `append`."""
        self._writing()
        kept_rows.check_table(rows)
        self._put(Item(rows.nbytes, tables={kept_rows.KIND: rows}))

    def begin_attempt(
        self, from_epoch: int, from_step: int, *, scope: Scope = None, ranks: int = 1, digest_before: str | None = None
    ) -> int:
        """Begin a new attempt, which supersedes everything recorded from (from_epoch, from_step) on; return its number.

        What was appended before is committed first; durable when this returns. `digest_before` is the model's then.
        """
        known = dict(self._writing().parameters())
        self._check_same()
        start, count = arguments.moment(from_epoch, from_step), arguments.positive_number(ranks, "ranks")
        taken = validation.scope(scope)
        self._end_writer()
        attempt = self._attempt.begin(*start, taken, count, digest_before).attempt
        self._stale = True
        # The attempt is named by a commit of its own at once: losing its file can then never pass unseen.
        self._put(*rows_items("parameters", parameter_rows(known.values(), attempt)), Item(0))
        self.commit()
        return attempt

    def join_attempt(self, attempt: int) -> None:
        """Go on in an attempt that another process began; what was appended before is committed first."""
        self._check_writable()
        attempt = arguments.counting_number(attempt, "attempt")
        if self._attempt.get().attempt != attempt or self._ledger is None:
            self._end_writer()
            self.refresh()
            self._attempt.join(attempt, self._snapshot.view.attempts)

    def claim_scope(self, scope: Scope, *, ranks: int = 1, digest_before: str | None = None) -> None:
        """Say which samples the current attempt records, `all` or the sorted ids, and in how many processes.

        Raises:
            StateError: if the attempt was begun with another scope.
        """
        self._check_writable()
        self._attempt.claim(validation.scope(scope), arguments.positive_number(ranks, "ranks"), digest_before)

    @property
    def attempt(self) -> int:
        """The number of the attempt that is written, begun if there is none."""
        return self._writing().attempt

    @property
    def samples(self) -> Samples:
        """The user's own columns beside sample ids: `store.samples.update(frame_or_rows)`."""
        return Samples(self._write_samples)

    @property
    def frontier(self) -> tuple[int, int] | None:
        """The last live (epoch, step), committed or appended here; None in an empty store."""
        return self._writing().frontier if self._attempt.is_begun else None

    def commit(self) -> None:
        """Put everything accepted so far on disk, and let this handle see it.

        Durability: when this returns, a kill (and with durability `commit` a power loss) loses nothing of it.

        Raises:
            StorageError, ReadOnlyError: nothing became visible, everything is kept in memory; call again after
                making room. Only with kind `outcome-unknown` may it be visible: open the store again to see.
            InvalidInputError: kind `duplicate`: another handle committed some of it first; all else is on disk.
            StateError: the writer stopped for good, or kind `left-out`: all but what the error names is on disk.
        """
        self._check_same()
        if self._writer is not None:
            self._stale = True  # also of a commit that left something out all else is there
            self._writer.commit()

    def compact(self, progress: bool | Callable[[int, int], None] | None = None) -> CompactionReport:
        """Fold the small row files of all commits into few, so that the store opens fast; tensors are not touched.

        Commits first. Readers and writers go on meanwhile. A writer does so by itself every 1,000 commits. Returns what
        was done; its `compaction` is None when there was nothing to do, and `undeleted` says what was left.

        Args:
            progress: as `timstore.verify` takes it, in commits.

        Raises:
            CorruptionError: a row file is missing or altered. As after any error, the store is what it was, unless:
            StorageError: kind `outcome-unknown`: it may be folded or not, and is sound in both cases.
        """
        from timstore.progress import told

        self._check_writable()
        self.commit()
        with told(progress, "folding commits", "pieces") as tell:
            done = compact(self._objects.synced(), self.settings, tell)
        self._stale = True
        return done

    def close(self) -> None:
        """Commit, and release the handle. Closing twice is harmless; a log that cannot be ended is only warned of.

        Raises:
            StorageError, ReadOnlyError: as `commit`; the store then stays open, and may be closed again, unless its
                folder is gone or another store's (kinds `gone`, `replaced`): the error says what is lost.
            StateError, InvalidInputError: as `commit`; the handle is closed all the same.
        """
        if self._closed or os.getpid() != self._pid:
            return
        try:
            self._end_writer()
        finally:
            if self._writer is None:
                self._release()

    def _release(self) -> None:
        """Release the handle without another commit."""
        if self._writer is not None:
            self._writer.stop()
            self._writer = None
        self._closed = True
        lifetime.ended(self)
        self._snapshot.close()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except errors.TimstoreError as failure:
            if error is None:
                raise
            # The error of the training loop is the one to see.
            error.add_note(f"timstore: closing {self.path} failed as well: {failure}")

    def _check_writable(self) -> None:
        self._check_open()
        if self.mode == "r":
            raise errors.ReadOnlyError(f"{self.path} was opened to read; open it with mode 'a' to write")

    def _writing(self) -> Ledger:
        """Return the ledger of the current attempt, begun if there is none."""
        self._check_writable()
        if self._ledger is None or self._ledger.attempt != self._attempt.get().attempt:
            self._known = self.snapshot().view
            self._ledger = Ledger(self._attempt.get().attempt, self.snapshot, self.commit)
        return self._ledger

    def _put(self, *items: Item) -> None:
        if not items:
            return
        if self._writer is None:
            attempt, unfolded = self._attempt.get().attempt, len(self._snapshot.view.since_compaction)
            self._writer = BackgroundWriter.begin(self._objects, self.settings, attempt, self._known, unfolded)
        self._writer.put(*items)

    def _end_writer(self) -> None:
        if self._writer is not None:
            writer = self._writer
            try:
                writer.close()
            finally:
                self._stale = True
                if writer.is_stopped:
                    self._writer = None
            writer.tell()

    def _write_samples(self, rows: pa.Table) -> None:
        self._writing()
        rows = ColumnTypes(self.snapshot().catalog.rows).fitted(rows)
        self._put(Item(rows.nbytes, tables={"samples": rows}))
        self.commit()
