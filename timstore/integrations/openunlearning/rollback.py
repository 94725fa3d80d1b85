"""The trainer that does not train: what the forget split did to the model is rolled back."""

import json
import logging
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.trainer_utils import TrainOutput

from timstore import Store, rollback
from timstore import open as open_store
from timstore.errors import CoverageError, InvalidInputError
from timstore.integrations.openunlearning.arguments import AUTO, RollbackArguments
from timstore.integrations.openunlearning.forget import ForgetRows, find_forget_rows
from timstore.integrations.openunlearning.keys import errors_spelled, spelled, warnings_spelled
from timstore.integrations.openunlearning.retained import RetainProbe, probe_of
from timstore.integrations.openunlearning.rows import hashes_of
from timstore.integrations.openunlearning.trainer import OpenUnlearningTrainer
from timstore.integrations.openunlearning.trajectories import trajectories_of
from timstore.os_errors import reporting
from timstore.rollbacks import RollbackReport

REPORT = "timstore_report.json"
# Rows of the retain split that are asked where the store keeps none of the training.
RETAINED = 64

logger = logging.getLogger(__name__)


class TIMParameterRollback(OpenUnlearningTrainer):
    """Rolls the forget split back once, where another trainer would train; saves and evaluates like any.

    The rows of `train_dataset.forget` are found among the recorded samples by their tokens. The probe is what the store
    keeps of the training, or drawn from `train_dataset.retain`. `train` returns a `TrainOutput`, logs what was removed,
    and writes `timstore_report.json` into the output directory.

    Args:
        kwargs: the fields of `RollbackArguments`, and what a Trainer takes.

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
        found = trajectories_of(asked)
        with open_store(found.path) as store:
            rows = find_forget_rows(store, hashes, asked.id_map, asked.missing, holds_forget_alone=found.as_original)
            logger.info("%s", rows)
            is_kept = asked.probe == AUTO and _keeps_probe(store, rows.samples, frozenset(hashes))
            probe = None
            if asked.probe is not None and not is_kept:
                count = RETAINED if asked.probe == AUTO else int(asked.probe)
                batch_rows = self.args.per_device_train_batch_size
                probe = probe_of(retain, self.data_collator, count, frozenset(hashes), batch_rows)
            model: Any = self.model
            report = rollback(
                model,
                ids=rows.samples,
                store=store,
                strength=asked.rollback_strength,
                method=asked.method,
                denominator=asked.denominator,
                probe=AUTO if is_kept else False if probe is None else probe.batches,
                memory_limit=asked.memory_limit,
                missing=asked.missing,
                keep_delta=asked.keep_delta,
                force=asked.force,
                progress=not self.args.disable_tqdm,
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


def _keeps_probe(store: Store, samples: Collection[int], hashes: Collection[str]) -> bool:
    """Say whether a store keeps what a rollback of these samples can ask."""
    snapshot = store.snapshot()
    rows = snapshot.kept_rows()
    return snapshot.probe() is not None or (rows.loss is not None and bool(rows.without(samples, hashes)))


def _numbers(report: RollbackReport) -> dict[str, float]:
    """Return what a log can plot."""
    names = ("records", "delta_norm", "relative_change", "error_bound", "rounding", "strength", "seconds")
    found = {f"rollback_{name}": getattr(report, name) for name in names}
    found["rollback_samples"] = len(report.samples)
    if report.probe is not None:
        found["rollback_probe_loss_before"] = report.probe.loss_before
        found["rollback_probe_loss_after"] = report.probe.loss_after
    return found
