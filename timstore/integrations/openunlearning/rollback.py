"""The trainer that does not train: what the forget split did to the model is rolled back."""

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.trainer_utils import TrainOutput

from timstore import open as open_store
from timstore import rollback
from timstore.errors import CoverageError, InvalidInputError, NotFoundError
from timstore.format.paths import SETTINGS
from timstore.integrations.openunlearning.splits import (
    ForgetRows,
    RetainProbe,
    find_forget_rows,
    hashes_of,
    probe_of,
)
from timstore.integrations.openunlearning.trainer import (
    AUTO,
    OpenUnlearningTrainer,
    RollbackArguments,
    errors_spelled,
    spelled,
    warnings_spelled,
)
from timstore.legacy import import_trajectories
from timstore.legacy.importing import STAGED
from timstore.legacy.layout import FORMATS, find
from timstore.legacy.staging import beside
from timstore.legacy.trajectory import STORE
from timstore.os_errors import reporting
from timstore.rollbacks import RollbackReport
from timstore.rollbacks.probe import keeps_probe

REPORT = "timstore_report.json"
# Rows of the retain split that are asked where the store keeps none of the training.
RETAINED = 64
# What an older layout is imported into, and a note of which files that was, and with which numbers.
IMPORTED, ORIGIN = "imported.tim", "imported.json"

logger = logging.getLogger(__name__)


class TIMParameterRollback(OpenUnlearningTrainer):
    """Rolls the forget split back once, where another trainer would train; saves and evaluates like any.

    The rows of `train_dataset.forget` are found among the recorded samples by their tokens. The probe is what the store
    keeps of the training, or drawn from `train_dataset.retain`. `train` returns a `TrainOutput`, logs what was removed,
    and writes `timstore_report.json` into the output directory.

    Args:
        kwargs: what `RollbackArguments.defaults()` names, and what a Trainer takes.

    Raises, at `train()`, before the model is touched:
        CoverageError: no forget row was ever recorded, or not all; several processes hold the model.
        NotFoundError: `tim_output_dir` holds no trajectories.
        InvalidInputError: the data set has no forget split, or an empty one; a method argument that cannot be right.
        StateError: these samples were removed from this model before.
        ModelMismatchError: the model is not the one that the recorded run ended with.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._asked = RollbackArguments.taken_from(kwargs)
        self.rollback_report: RollbackReport | None = None
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Roll back; train on the retain split afterwards only where `train_after` says so.

        Args:
            args, kwargs: of `Trainer.train`, for that training.
        """
        started = time.perf_counter()
        self._check_alone()
        forget = getattr(self.train_dataset, "forget", None)
        if forget is None:
            raise InvalidInputError(
                f"{type(self.train_dataset).__name__} has no forget split: run src/train.py with "
                "--config-name=unlearn.yaml, whose data set has one"
            )
        if not len(forget):
            raise InvalidInputError("the forget split is empty: there is nothing to roll back; name one that has rows")
        retain = getattr(self.train_dataset, "retain", None)
        with errors_spelled(), warnings_spelled():
            rows, probe, report = self._roll_back(forget, retain)
        self.rollback_report = report
        logger.info("%s", report)
        metrics = {"rollback_rows": rows.rows, "rollback_rows_missing": len(rows.missing), **_numbers(report)}
        self.log(metrics)
        self._write(rows, probe, report)
        metrics["train_runtime"] = round(time.perf_counter() - started, 4)
        if not self._asked.train_after:
            return TrainOutput(self.state.global_step, 0.0, metrics)
        told = self.state.log_history
        output = self._train_on(retain, *args, **kwargs)
        self.state.log_history[:0] = told  # a training begins with an empty one
        return TrainOutput(output.global_step, output.training_loss, {**metrics, **output.metrics})

    def _roll_back(self, forget: Any, retain: Any) -> tuple[ForgetRows, RetainProbe | None, RollbackReport]:
        asked = self._asked
        hashes = hashes_of(forget, self.data_collator, "forget")
        if asked.probe is not None:
            self._check_differentiable()
        path = _store_of(asked)
        with open_store(path) as store:
            rows = find_forget_rows(
                store,
                hashes,
                asked.id_map,
                skips_missing=asked.options.get("missing") == "skip",
                # Of the original's files and by `save_gradient_trajectory`, whose callers chose whose gradients to
                # save, and saved those of the samples to be forgotten.
                holds_forget_alone=path != Path(asked.tim_output_dir),
            )
            logger.info("%s", rows)
            is_kept = asked.probe == AUTO and keeps_probe(store.snapshot(), rows.samples)
            probe = None
            if asked.probe is not None and not is_kept:
                count = RETAINED if asked.probe == AUTO else int(asked.probe)
                batch_rows = self.args.per_device_train_batch_size
                probe = probe_of(retain, self.data_collator, count, set(hashes), batch_rows)
            model: Any = self.model
            report = rollback(
                model,
                rows.samples,
                store,
                probe=AUTO if is_kept else False if probe is None else probe.batches,
                progress=not self.args.disable_tqdm,
                **asked.options,
            )
        return rows, probe, replace(report, warnings=tuple(map(spelled, report.warnings)))

    def _train_on(self, retain: Any, *args: Any, **kwargs: Any) -> TrainOutput:
        whole, self.train_dataset = self.train_dataset, retain
        try:
            return super().train(*args, **kwargs)
        finally:
            self.train_dataset = whole

    def _check_alone(self) -> None:
        """Refuse processes that each hold a part of the model, or a copy that would go its own way."""
        if self.args.world_size > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise CoverageError(
                "a rollback changes the model in one process that holds all of it: run python src/train.py without "
                "accelerate launch, DeepSpeed and FSDP"
            )

    def _check_differentiable(self) -> None:
        kind = str(getattr(getattr(self.model, "config", None), "_attn_implementation", ""))
        if "flash" in kind:
            raise InvalidInputError(
                f"the probe needs second derivatives, which {kind} has not: set "
                "model.model_args.attn_implementation=sdpa, or probe: null",
                kind="flash-attention",
            )

    def _write(self, rows: ForgetRows, probe: RetainProbe | None, report: RollbackReport) -> None:
        path = Path(str(self.args.output_dir)) / REPORT
        told = {
            "tim_output_dir": str(self._asked.tim_output_dir),
            "forget_rows": rows.rows,
            "rows_known_by": rows.known_by,
            "missing_rows": list(rows.missing),
            "probe_rows": [] if probe is None else probe.rows,
            **report.to_dict(),
        }
        with reporting("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(told, indent=1) + "\n")


def _store_of(asked: RollbackArguments) -> Path:
    """Return the store that holds the trajectories; an older layout is imported into one beside its files, once.

    Raises:
        NotFoundError: there is no directory, or nothing in it that was asked for.
        InvalidInputError: both a store and an older layout are there; what `import_trajectories` refuses.
    """
    folder = Path(asked.tim_output_dir)
    if not folder.is_dir():
        raise NotFoundError(
            f"there is no directory {folder}: tim_output_dir is the one that TIMRecorder recorded into",
            path=str(folder),
        )
    store = next((path for path in (folder, folder / STORE) if (path / SETTINGS).is_file()), None)
    endings = {ending for endings in FORMATS.values() for ending in endings}
    has_older = any(path.suffix in endings for path in folder.glob("epoch_*"))
    wanted = asked.trajectory_format
    if wanted == "timstore" or (wanted == AUTO and not has_older):
        if store is None:
            older = "" if wanted == "timstore" else ", and no epoch_N.json or epoch_N.pkl"
            raise NotFoundError(f"{folder} holds no store {STORE}{older}: nothing was recorded there", path=str(folder))
        return store
    if wanted == AUTO and store is not None:
        raise InvalidInputError(
            f"{folder} holds a store and files of the older layout: set trajectory_format to timstore, json or pickle"
        )
    return _imported(folder, asked)


def _imported(folder: Path, asked: RollbackArguments) -> Path:
    """Return the store that an older layout was imported into, now or before.

    Raises:
        InvalidInputError: it was made of other files, or with other numbers.
    """
    files = find(folder, asked.trajectory_format).files.values()
    origin = {"files": {path.name: path.stat().st_size for path in files}, "lr": asked.lr, "scale": asked.scale}
    store, note = folder / IMPORTED, folder / ORIGIN
    half = beside(store, STAGED)
    with reporting("write", note):
        if (store.exists() or half.exists()) and note.exists() and json.loads(note.read_bytes()) != origin:
            raise InvalidInputError(
                f"{store} was made of other files, or with another lr or scale: remove it, or {half.name} if that is "
                "there, to import again"
            )
        note.write_text(json.dumps(origin, indent=1))
    if not store.exists():
        report = import_trajectories(
            folder,
            store,
            format=asked.trajectory_format,
            lr=asked.lr,
            scale=asked.scale,
            allow_pickle=asked.allow_pickle,
            progress=False,
        )
        logger.info("imported %s into %s: %s", folder, store, report)
    return store


def _numbers(report: RollbackReport) -> dict[str, float]:
    """Return what a log can plot."""
    names = ("records", "delta_norm", "relative_change", "error_bound", "rounding", "strength", "seconds")
    numbers = {f"rollback_{name}": getattr(report, name) for name in names}
    numbers["rollback_samples"] = len(report.samples)
    if report.probe is not None:
        numbers["rollback_probe_loss_before"] = report.probe.loss_before
        numbers["rollback_probe_loss_after"] = report.probe.loss_after
    return numbers
