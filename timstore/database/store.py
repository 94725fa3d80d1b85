"""`Store`: one handle on a store. Its verbs, what they write by, and a steady view to ask in SQL and to read."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa

from timstore import arguments, errors
from timstore.catalog import remove_leftovers
from timstore.database import entries, kept_rows, lifetime
from timstore.database.entries import Entry
from timstore.database.ledger import CurrentAttempt, Ledger, parameter_rows
from timstore.database.opening import open_settings
from timstore.database.samples import ColumnTypes, Samples, hash_rows
from timstore.database.snapshot import Snapshot, StoredRecord
from timstore.database.states import state_item, state_precision
from timstore.database.writer import BackgroundWriter, Item, rows_items
from timstore.format.compacting import CompactionReport, compact
from timstore.format.log import Scope
from timstore.format.segments import Arrays
from timstore.format.settings import Place
from timstore.interrupts import CriticalSection
from timstore.options import (
    Accumulate,
    Capture,
    Denominator,
    Loss,
    MeanOver,
    Method,
    Missing,
    OptimizerHistory,
    RecordOptions,
    RollbackOptions,
)
from timstore.os_errors import user_path
from timstore.records import Parameter, StepGroup

# The verbs `record`, `forecast`, `rollback`, `undo` and `verify` are done by rooms that are built on this one. Each is
# imported when its verb is called: so imports run one way, and a store that is only read needs no torch.
if TYPE_CHECKING:
    import duckdb
    import torch

    from timstore.recording import Forecast, Recorder
    from timstore.rollbacks import RollbackReport
    from timstore.verification import Verification

_LEAST_SQL_MEMORY = 32 * 10**6  # below, DuckDB cannot count the rows of each group


class Store:
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
        self.path = user_path(path)
        self.mode = mode
        self._sql_memory = _sql_memory(sql_memory)
        options = {"precision": precision, "max_rel_error": max_rel_error, "durability": durability}
        self._objects, self.settings = open_settings(self.path, mode, options)
        self._place = Place(self._objects, self.settings)
        lifetime.commit_unattended(self.path)
        remove_leftovers()
        self._snapshot = Snapshot(self._objects, self.settings, self._sql_memory)
        self._stale = False
        self._restored = False
        self._pid = os.getpid()
        self._closed = False
        attempts = self._snapshot.view.attempts
        self._attempt = CurrentAttempt(self._objects, self.path, attempts[-1] if attempts else None)
        self._writer: BackgroundWriter | None = None
        self._ledger: Ledger | None = None
        self._known = self._snapshot.view
        lifetime.watched.add(self)

    def record(
        self,
        model: "torch.nn.Module",
        optimizer: "torch.optim.Optimizer | Sequence[torch.optim.Optimizer]",
        samples: Iterable[int] | None = None,
        *,
        resume_from: tuple[int, int] | None = None,
        probe: Iterable[Any] | Literal["auto", False] | None = "auto",
        optimizer_history: OptimizerHistory = "final",
        waypoints: bool = True,
        scaler: Any = None,
        mean_over: MeanOver | None = None,
        budget: int | str | None = None,
        steps: int | None = None,
        epochs: int = 1,
        rank: int | None = None,
        allow_zero: bool = False,
        capture: Capture = "auto",
        batch_axis: int = 0,
        id_column: str | None = None,
        by_content: bool = False,
        process_group: Any = None,
    ) -> "Recorder":
        """Record what the chosen samples do to the model while the `with` block trains it.

        The batch carries `sample_ids`, one integer per row (or per token, of packed rows), among the model's keyword
        arguments; they are taken out before the model sees them. Models called otherwise: `recorder.batch(ids)`.
        What Accelerate prepared is looked through, and DistributedDataParallel.

        Durability: committed when the block ends, and by itself every 256 MB or 30 s.

        Args:
            optimizer: the one that trains the model, or a list of all that do; each `step` of each is a step here.
            samples: ids to record; all when None. The others cost nothing.
            resume_from: (epoch, step) at which a resumed run goes on; begins a new attempt, which supersedes
                everything recorded from there on. Not needed where recording stopped, nor after a rollback.
            probe: what `rollback` asks the model about, kept in the store: `auto`, up to 256 rows (64 MB) of the
                training itself, drawn from the samples that are not recorded, or from all where all are; or batches of
                any data like the training data; False or None for nothing. Rows are written where the recorder commits.
            optimizer_history: `final` keeps, beside every step's scalars, the second moment at the end (2 bytes per
                parameter); `gradients` also every step's whole gradient, which makes exact replay possible, of any
                optimizer, at the price of a model's size per step.
            waypoints: keep the trained parameters after 8, 16, 32, ... steps (2 bytes per parameter each), so that a
                rollback asks for the curvature that there was on the way, not at the end alone.
            scaler: the `torch.amp.GradScaler`, where there is one; without it only clip / scale is visible.
            mean_over: what the loss's mean divides by, `samples` or `tokens`; found when None: tokens if the model
                is given `labels`.
            budget: bytes, or text like "20GB", that recording may take; refused at the first recorded step, by what
                that step's records take, if `steps` optimizer steps (in which each sample is drawn `epochs` times)
                would take more. `forecast` says so before.
            rank: of this process; found when None.
            allow_zero: accept a step in which no sample has any gradient; one sample without any is recorded as zero.
            capture: `auto`, gradients as modules show them in the ordinary backward pass, and those that no module
                shows (an LSTM, a weight used directly) by one more backward pass for each recorded sample, to these
                parameters alone, with one warning that names them; `per-sample`, the same without a warning;
                `modules`, such parameters are refused.
            batch_axis: of the tensors that the model is given and returns.
            id_column: of `samples`, by which ids that are text are looked up.
            by_content: know the rows of a batch without `sample_ids` by their tokens: the id is the first 63 bits of
                their hash, column `content_hash` of `samples`.
            process_group: of processes that average their gradients, unless the model is DistributedDataParallel.

        Raises:
            CoverageError: a trained parameter's gradient cannot be seen per sample, or no recorded optimizer holds it.
            InvalidInputError: a training forward without ids, or with the wrong number of them.
            StateError: the model is being recorded already, or changed since recording stopped; over the budget; a
                parameter was changed between two steps by something else than its optimizer.
        """
        options = RecordOptions(
            resume_from=resume_from,
            probe=probe,
            optimizer_history=optimizer_history,
            waypoints=waypoints,
            scaler=scaler,
            mean_over=mean_over,
            budget=budget,
            steps=steps,
            epochs=epochs,
            rank=rank,
            allow_zero=allow_zero,
            capture=capture,
            batch_axis=batch_axis,
            id_column=id_column,
            by_content=by_content,
            process_group=process_group,
        )
        recorder: Recorder = import_module("timstore.recording").Recorder(self, model, optimizer, samples, options)
        return recorder

    def forecast(
        self,
        model: "torch.nn.Module",
        *,
        samples: int,
        steps: int,
        tokens: int | None = None,
        epochs: int = 1,
        batch: Any = None,
        optimizer: "torch.optim.Optimizer | None" = None,
        optimizer_history: OptimizerHistory = "final",
        waypoints: bool = True,
    ) -> "Forecast":
        """Measure what recording will write, before hours are spent; prints well. Model and store stay as they are.

        Cost: one forward and backward pass of 4 rows, whose records are encoded in memory.

        Args:
            samples: how many are recorded.
            steps: optimizer steps in all.
            tokens: length of a sequence, for language models of transformers; others pass `batch`.
            epochs: how often each sample is drawn.
            batch: one as the model takes it (mapping, tuple or tensor); it is measured, not its size alone.
            optimizer: tells whether there is a second moment to keep; taken to be so when None.
            optimizer_history, waypoints: as in `record`.

        Raises:
            InvalidInputError: numbers below 1, or nothing to measure on.
            CoverageError: the model cannot be recorded.
        """
        forecast: Forecast = import_module("timstore.recording").forecast_of(
            self,
            model,
            samples=samples,
            steps=steps,
            tokens=tokens,
            epochs=epochs,
            batch=batch,
            optimizer=optimizer,
            optimizer_history=optimizer_history,
            waypoints=waypoints,
        )
        return forecast

    def rollback(
        self,
        target: "torch.nn.Module | str | os.PathLike[str]",
        ids: Iterable[int] | None = None,
        *,
        where: str | None = None,
        strength: float = 1.0,
        epochs: Iterable[int] | None = None,
        parameters: Iterable[str] | None = None,
        method: Method = "auto",
        denominator: Denominator = "kept",
        optimizer: "torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None" = None,
        probe: Iterable[Any] | Literal["auto", False] | None = None,
        bins: int = 4,
        outputs: Callable[[Any], Any] | None = None,
        loss: Loss | None = None,
        memory_limit: int | str = "512MB",
        accumulate: Accumulate = "float32",
        missing: Missing = "error",
        keep_delta: bool = False,
        dry_run: bool = False,
        force: bool = False,
        progress: bool | None = None,
        output: str | os.PathLike[str] | None = None,
        in_place: bool = False,
        model: "torch.nn.Module | None" = None,
    ) -> "RollbackReport":
        """Remove the contribution of samples from a model, in place, or from a checkpoint, streaming their records.

        With a probe (64 examples of any data like the training data, public will do) the removed sum passes once
        through a filter made of the model's own curvature; without one, first order alone damages a fine-tuned
        transformer, and the report says so. Where rows of the training are asked, the report tells how far from a
        retrained model this is expected to end (`expected_kl`), and warns where it may be farther than another
        retraining. The model changes last, after a row is in the `rollbacks` table, and with
        the optimizer wholly or not at all, whatever signal comes: an error raised after that, a late Ctrl-C included,
        has the report as its attribute `report`. A checkpoint (safetensors) is rolled back block by block, and loaded
        only where a probe asks it; what a kill leaves of one is in docs/checkpoints.md.

        Args:
            target: the model, or the path of a checkpoint, file or folder.
            ids: the samples to remove; or `where`, an SQL condition on the `records` table.
            strength: between 0 and 1, the share that is removed.
            epochs, parameters: only these.
            method: `closed form` (SGD and its variants), `final moment` (Adam, AdamW, AMSGrad, by the second moment at
                the end) or `exact replay` (any optimizer, where every whole gradient was kept); `auto` is the best of
                them that the records allow.
            denominator: `kept`: the mean divides by what it did; `renormalised`: by the samples (tokens) that stay.
            optimizer: the one that trained the model, or a list of all that did: momentum and moments are corrected as
                far as the records determine them; the report says which.
            probe: an iterable of what the model takes (mapping, tuple or tensor); `auto`: the one that
                `record(probe=...)` was given, or 128 of the rows that it kept of the training, without what is to be
                forgotten; None: `auto`, unless that takes loading a checkpoint; False for none.
            bins: time bins of the filter.
            outputs: takes the logits out of what the model returns; by default the tensor itself, or `.logits`.
            loss: the training loss, `cross_entropy` or `mse`, a mean; when None what is kept with the probe, else
                `cross_entropy`. Rows kept of a training whose loss was not recognised are asked only if it is named.
            memory_limit: bytes, or text like "512MB", for everything but the model and its own passes.
            accumulate: `float32` or `float64`.
            missing: `error`, or `skip` to go on without samples that were never recorded.
            keep_delta: keep the parameters as they are in the store first, so that `undo` can restore them.
            dry_run: compute and report, change nothing.
            force: subtract also the records that were removed from this model before; else they are left out.
            progress: True for bars, or lines where there is no terminal; by default bars on a terminal.
            output, in_place: where a changed checkpoint goes: a new path (a folder is copied whole), or over the input.
            model: what a probe asks instead of the one that transformers loads; it gets the checkpoint's parameters.

        Raises:
            AlreadyExistsError, ReadOnlyError, StorageError: the output is there already, or cannot be written.
            CoverageError: samples, steps or learning rates that were never recorded; a method or denominator that the
                records do not allow, with what would have had to be recorded.
            ModelMismatchError: another model, or one that was trained on without recording.
            StateError: all of these records were removed before.
            InvalidInputError: an argument that cannot be right, or a memory limit below what one chunk needs.
            FormatError, CorruptionError: the checkpoint is not whole; an object of the store is missing or was changed.
        """
        options = RollbackOptions(
            where=where,
            strength=strength,
            epochs=epochs,
            parameters=parameters,
            method=method,
            denominator=denominator,
            optimizer=optimizer,
            probe=probe,
            bins=bins,
            outputs=outputs,
            loss=loss,
            memory_limit=memory_limit,
            accumulate=accumulate,
            missing=missing,
            keep_delta=keep_delta,
            dry_run=dry_run,
            force=force,
            progress=progress,
            output=output,
            in_place=in_place,
            model=model,
        )
        return _rollback_of(target)(self, target, ids, options)

    def undo(self, model: "torch.nn.Module", rollback_id: str) -> None:
        """Restore the parameters that a rollback changed, to the last bit; the `rollbacks` table gets a row.

        The model changes last, wholly or not at all, whatever signal comes.

        Args:
            model: as the rollback left it.
            rollback_id: `report.rollback_id`, or `digest_after` in the `rollbacks` table.

        Raises:
            NotFoundError: no such rollback.
            CoverageError: it was not made with keep_delta=True.
            StateError, ModelMismatchError: the model was changed since.
            CorruptionError: an object of the store is missing or was changed.
        """
        import_module("timstore.rollbacks").undo(self, model, rollback_id)

    def verify(self, *, progress: "bool | Callable[[int, int], None] | None" = None) -> "Verification":
        """Find every defect of the store as it lies on disk; commits nothing, changes nothing. See `timstore.verify`.

        What this handle has accepted and not committed is not looked at.
        """
        self._check_open()
        verification: Verification = import_module("timstore.verification").verify(self.path, progress=progress)
        return verification

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
        return entries.record_entry(self._writing(), *given, **options)

    def step_entry(self, *given: Any, **options: Any) -> Entry:
        """Check and take in what `append_step` would accept, and change nothing; arguments and errors as there."""
        return entries.step_entry(self._writing(), *given, **options)

    def accept(self, *taken: Entry) -> None:
        """Accept what was checked and taken in, all or none; durability as `append`.

        Raises:
            StateError, StorageError: as `append`; never for what the entries hold.
        """
        ledger = self._writing()
        if not all(isinstance(entry, Entry) for entry in taken):
            raise errors.InvalidInputError("an entry is what record_entry or step_entry returned")
        self._put(*(item for entry in taken for item in entry.items))
        for entry in taken:
            entry.accepted(ledger)

    def declare(self, parameters: Sequence[Parameter]) -> None:
        """Name the parameters of the model, their shapes and optimizer groups, before they are recorded.

        Raises:
            InvalidInputError: if one is known with another shape.
        """
        ledger, declared = self._writing(), arguments.listed(parameters, "parameters")
        new = ledger.new_parameters(map(entries.parameter, declared))
        self._put(*rows_items("parameters", parameter_rows(new, ledger.attempt)))
        ledger.know(new)

    def append_fingerprints(self, epoch: int, step: int, digests: Mapping[str, str]) -> None:
        """Keep the digests that the parameters had after (epoch, step), so that the model is known again."""
        moment, attempt = arguments.moment(epoch, step), self._writing().attempt
        shared = {"attempt": attempt, "epoch": moment[0], "step": moment[1]}
        rows = [{**shared, "parameter": name, "digest": digest} for name, digest in entries.digests(digests).items()]
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
        data = kept_rows.pack_probe(arguments.listed(batches, "batches"), arguments.plain_name(loss, "loss"))
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
        taken = entries.scope(scope)
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
        self._attempt.claim(entries.scope(scope), arguments.positive_number(ranks, "ranks"), digest_before)

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

    def refresh(self) -> None:
        """See what others have committed since. Questions asked before keep their answers."""
        self._check_same()
        # A copy of the store may hold less than what was seen.
        before = None if self._restored else self._snapshot
        newer = Snapshot(self._objects, self.settings, self._sql_memory, before)
        if newer.view != self._snapshot.view:
            self._snapshot = newer
        self._stale = self._restored = False

    def snapshot(self) -> Snapshot:
        """Return what this handle sees now; everything committed through it is in."""
        self._check_same()
        if self._stale or self._restored:
            self.refresh()
        return self._snapshot

    def sql(self, query: str, params: Sequence[Any] | Mapping[str, Any] | None = None) -> "duckdb.DuckDBPyRelation":
        """Ask one question in SQL: a DuckDB relation (`.df()`, `.pl()`, `.arrow()`, `.fetchall()`).

        Tables: records, gradients, steps, parameters, samples, attempts, fingerprints, rollbacks, commits;
        live rows only. The query can read these tables and nothing else, and changes nothing.

        Raises:
            InvalidInputError: if it is not one SELECT, or DuckDB does not understand it.
        """
        return self.snapshot().catalog.sql(arguments.text(query, "a query"), params)

    def read(self, where: str | None = None) -> Iterator[StoredRecord]:
        """Iterate over records, all or those where an SQL condition on the `records` table holds.

        Cost: memory of one record and a cache of 64 MB.

        Raises:
            CorruptionError: if an object is missing or is not what was written.
        """
        return self.snapshot().read(None if where is None else arguments.text(where, "where"))

    def zarr(self) -> Iterator[Arrays]:
        """Iterate over the arrays of the store as zarr-python opens them, for tools that read Zarr: read-only, checked.

        Yields (group, rows) for each commit that has arrays, in the order of the SQL table `commits`.

        `group` is a `zarr.Group`. Its arrays are named `w<width>-<dtype>` and have the shape (rows, width); bfloat16 is
        uint16, the upper half of a float32. An object is read, and checked whole, when a slice of its array is taken.

        `rows` is an arrow table that says where gradients lie. Of the gradient part of (attempt, epoch, step, rank,
        sample, parameter, part), the key of the SQL table `gradients`, the rows [start, start + rows) of `array` are
        its `role`. Of encoding `dense` it is its `values`; of `rows`, zeros but for `values` in the rows `indices`; of
        `factors`, `output_gradients.T @ inputs`, where there is a `row_map` of these rows of the inputs alone. The
        roles with `_scales` (int8), and matrices in several `block`s (rows above 1 MB), are explained in
        docs/format.md. Rows that a later attempt supersedes are among them, though SQL leaves them out; what the arrays
        hold of the SQL table `states` is not.

        Raises:
            CorruptionError: an object is missing or is not what was written, also when an array is read.
        """
        return self.snapshot().arrays()

    def gradient(self, epoch: int, step: int, sample: int, parameter: str, *, rank: int = 0) -> np.ndarray:
        """Return one gradient as a dense array of the parameter's shape, float64 if recorded so, else float32.

        Raises:
            NotFoundError: if it was not recorded.
        """
        epoch, step = arguments.moment(epoch, step)
        sample, rank = arguments.sample_id(sample), arguments.rank_number(rank)
        for record in self.read(f"epoch = {epoch} AND step = {step} AND sample = {sample} AND rank = {rank}"):
            return record.dense(parameter)
        raise errors.NotFoundError(
            f"{self.path} has no record of epoch {epoch}, step {step}, sample {sample}, rank {rank}", sample=sample
        )

    def latest_fingerprints(self) -> tuple[int, int, dict[str, str]] | None:
        """Return the newest (epoch, step) whose parameters' digests were kept, and the digests."""
        return self.snapshot().latest_fingerprints()

    def probe(self) -> tuple[list[Any], str] | None:
        """Return (batches, loss) of the probe given last; without one, of rows that were kept of the training; or None.

        The loss of such rows may be `unknown`, and what is to be forgotten may be among them: a rollback that is given
        no probe leaves it out.
        """
        given = self.snapshot().probe()
        if given is not None:
            return given
        rows = self.snapshot().kept_rows()
        return (rows.batches(), rows.loss or "unknown") if rows else None

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
        lifetime.watched.discard(self)
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

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._snapshot.view.commits)} commits"
        return f"<timstore.Store {str(self.path)!r} mode={self.mode!r} {state}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise errors.StateError(
            f"a store cannot be copied or sent to another process (pickle, deepcopy, workers): give them the path "
            f"{str(self.path)!r}, and open it there",
            kind="not-copied",
        )

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise errors.StateError(
                f"{self.path} was opened in process {self._pid}: a forked child opens its own handle", kind="forked"
            )
        if self._closed:
            raise errors.StateError(f"{self.path} is closed; open it again", kind="closed")
        self._place.require()

    def _check_same(self) -> None:
        """Refuse a store that another one took the place of; a copy of it is read from the start."""
        self._check_open()
        self._restored |= not self._place.check()

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
            self._writer = BackgroundWriter(self._objects, self.settings, attempt, self._known, unfolded)
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


def open(
    path: str | os.PathLike[str],
    mode: str = "a",
    *,
    precision: str | None = None,
    max_rel_error: float | None = None,
    durability: str | None = None,
    sql_memory: int | str = "1GB",
) -> Store:
    """Open or create the store at a path; see `Store` for the arguments and errors."""
    return Store(
        path, mode, precision=precision, max_rel_error=max_rel_error, durability=durability, sql_memory=sql_memory
    )


def _rollback_of(target: Any) -> "Callable[..., RollbackReport]":
    """Return the function that rolls back such a target: checkpoints are given by their paths."""
    room = "checkpoints" if isinstance(target, str | os.PathLike) else "rollbacks"
    function: Callable[..., RollbackReport] = import_module(f"timstore.{room}").rollback
    return function


def rollback(
    target: "torch.nn.Module | str | os.PathLike[str]",
    ids: Iterable[int] | None = None,
    store: Store | str | os.PathLike[str] | None = None,
    **options: Any,
) -> "RollbackReport":
    """Remove the contribution of samples from a model or a checkpoint; see `Store.rollback` for the options.

    Args:
        target: a model, or the path of a checkpoint; then `output=` says where it goes (or `in_place=True`).
        store: a store or its path; when None, the only store that is open in this process.

    Raises:
        StateError: no store, or several, are open.
    """
    roll_back, chosen = _rollback_of(target), RollbackOptions(**options)
    if isinstance(store, Store):
        return roll_back(store, target, ids, chosen)
    if store is not None:
        if not os.path.exists(user_path(store)):
            raise errors.NotFoundError(f"there is no store at {store}", path=str(store))
        with CriticalSection("the rollback had ended") as section, open(store) as opened:
            return section.finish(roll_back(opened, target, ids, chosen))
    stores = lifetime.attended_stores()
    if len(stores) != 1:
        which = "no store is" if not stores else f"{len(stores)} stores are"
        raise errors.StateError(f"{which} open in this process: pass store=, a store or its path")
    return roll_back(stores[0], target, ids, chosen)


def _sql_memory(size: Any) -> int:
    taken = arguments.byte_count(size, "sql_memory")
    if taken < _LEAST_SQL_MEMORY:
        raise errors.InvalidInputError(
            f'sql_memory is at least "{_LEAST_SQL_MEMORY // 10**6}MB", not {errors.shown(size)}'
        )
    return taken
