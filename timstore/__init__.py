"""timstore: a storage-efficient database of training trajectories, and rollback of samples from a model."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from timstore.database.lifetime import attended_stores as _attended_stores
from timstore.database.store import Store as _Store
from timstore.errors import (
    AlreadyExistsError,
    CorruptionError,
    CoverageError,
    FormatError,
    InvalidInputError,
    ModelMismatchError,
    NotFoundError,
    ReadOnlyError,
    StateError,
    StorageError,
    TimstoreError,
    TimstoreWarning,
)
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
from timstore.os_errors import user_path as _user_path
from timstore.records import Factors, Rows

if TYPE_CHECKING:
    import torch

    from timstore.legacy import (
        Exported,
        Imported,
        export_trajectories,
        import_trajectories,
        save_gradient_trajectory,
    )
    from timstore.recording import Forecast, Recorder
    from timstore.rollbacks import RollbackReport
    from timstore.verification import Finding, Verification, verify

__version__ = "0.1.0"

# What happens behind, for who listens: silent until a program sets its logging up.
logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "AlreadyExistsError",
    "CorruptionError",
    "CoverageError",
    "Exported",
    "Factors",
    "Finding",
    "Forecast",
    "FormatError",
    "Imported",
    "InvalidInputError",
    "ModelMismatchError",
    "NotFoundError",
    "ReadOnlyError",
    "Recorder",
    "RollbackReport",
    "Rows",
    "StateError",
    "StorageError",
    "Store",
    "TimstoreError",
    "TimstoreWarning",
    "Verification",
    "export_trajectories",
    "import_trajectories",
    "open",
    "rollback",
    "save_gradient_trajectory",
    "verify",
]


_LAZY = {
    "Exported": "legacy",
    "Finding": "verification",
    "Forecast": "recording",
    "Imported": "legacy",
    "Recorder": "recording",
    "RollbackReport": "rollbacks",
    "Verification": "verification",
    "export_trajectories": "legacy",
    "import_trajectories": "legacy",
    "save_gradient_trajectory": "legacy",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"timstore.{_LAZY[name]}"), name)


class Store(_Store):
    __doc__ = _Store.__doc__

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
        from timstore.recording import Recorder

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
        return Recorder(self, model, optimizer, samples, options)

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
        from timstore.recording import forecast_of

        return forecast_of(
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
        return _way(target)(self, target, ids, options)

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
        from timstore.rollbacks import undo

        undo(self, model, rollback_id)

    def verify(self, *, progress: "bool | Callable[[int, int], None] | None" = None) -> "Verification":
        """Find every defect of the store as it lies on disk; commits nothing, changes nothing. See `timstore.verify`.

        What this handle has accepted and not committed is not looked at.
        """
        self._check_open()
        from timstore.verification import verify

        return verify(self.path, progress=progress)


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


def _way(target: Any) -> "Callable[..., RollbackReport]":
    """Return what rolls back such a target: checkpoints are given by their paths."""
    room = "checkpoints" if isinstance(target, str | os.PathLike) else "rollbacks"
    return import_module(f"timstore.{room}").rollback  # type: ignore[no-any-return]


def rollback(
    target: "torch.nn.Module | str | os.PathLike[str]",
    ids: Iterable[int] | None = None,
    store: _Store | str | os.PathLike[str] | None = None,
    **options: Any,
) -> "RollbackReport":
    """Remove the contribution of samples from a model or a checkpoint; see `Store.rollback` for the options.

    Args:
        target: a model, or the path of a checkpoint; then `output=` says where it goes (or `in_place=True`).
        store: a store or its path; when None, the only store that is open in this process.

    Raises:
        StateError: no store, or several, are open.
    """
    roll_back, chosen = _way(target), RollbackOptions(**options)
    if isinstance(store, _Store):
        return roll_back(store, target, ids, chosen)
    if store is not None:
        if not os.path.exists(_user_path(store)):
            raise NotFoundError(f"there is no store at {store}", path=str(store))
        with CriticalSection("the rollback had ended") as section, open(store) as opened:
            return section.finish(roll_back(opened, target, ids, chosen))
    found = _attended_stores()
    if len(found) != 1:
        which = "no store is" if not found else f"{len(found)} stores are"
        raise StateError(f"{which} open in this process: pass store=, a store or its path")
    return roll_back(found[0], target, ids, chosen)
