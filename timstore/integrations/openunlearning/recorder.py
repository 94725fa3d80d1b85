"""The trainer that fine-tunes as ever, and records."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timstore import open as open_store
from timstore.errors import InvalidInputError, StateError, TimstoreError
from timstore.integrations.openunlearning.splits import hashes_of
from timstore.integrations.openunlearning.trainer import (
    METHOD,
    OpenUnlearningTrainer,
    RecorderArguments,
    errors_spelled,
)
from timstore.integrations.transformers import TrajectoryCallback
from timstore.legacy.trajectory import STORE
from timstore.model.sample_ids import sample_of

# Kinds of the refusal to record a training into the store of another one.
_OTHER_TRAININGS = ("model-changed", "unknown-model", "other-scope", "earlier-epoch")


class TIMRecorder(OpenUnlearningTrainer):
    """Fine-tunes, and records what the chosen rows do to the model into `tim_output_dir/trajectories.tim`.

    Rows are known by their tokens. A training that goes on from a checkpoint (`args.resume_from_checkpoint`, which
    `src/train.py` hands to nobody else) goes on in the store.

    Args:
        kwargs: what `RecorderArguments.defaults()` names, and what a Trainer takes.

    Raises, at `train()`:
        CoverageError, StateError: as `TrajectoryCallback`.
        InvalidInputError: samples that are no ids; a store that was made with another precision.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._asked = RecorderArguments.taken_from(kwargs)
        super().__init__(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as any Trainer does; what was recorded is on disk when this returns, or raises."""
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        asked = self._asked
        samples = self._samples()
        path = Path(asked.tim_output_dir) / STORE
        with open_store(path, precision=asked.precision, max_rel_error=asked.max_rel_error) as store:
            callback = TrajectoryCallback(store, samples, **asked.options)
            callback.attach(self)
            self.add_callback(callback)
            try:
                with errors_spelled():
                    return super().train(resume_from_checkpoint, *args, **kwargs)
            except TimstoreError as error:
                if error.kind not in _OTHER_TRAININGS:
                    raise
                raise StateError(
                    f"{path} holds the record of a training already, and this one does not go on where that ended: "
                    f"name another folder, {METHOD}tim_output_dir=..., or go on from one of its checkpoints, "
                    "+trainer.args.resume_from_checkpoint=true",
                    kind=error.kind,
                ) from error
            finally:
                self.remove_callback(callback)
                callback.close()

    def _samples(self) -> list[int] | None:
        """Return the ids to record, None for all.

        Raises:
            InvalidInputError: none can be made of what was asked for.
        """
        asked: Any = self._asked.samples
        if isinstance(asked, Mapping):
            rows = self._data_set(asked)
            return [sample_of(content) for content in hashes_of(rows, self.data_collator, "recorded")]
        if isinstance(asked, str | os.PathLike):
            try:
                asked = json.loads(Path(asked).read_bytes())
            except (OSError, ValueError) as error:
                raise InvalidInputError(f"samples: {self._asked.samples} is no JSON file: {error}") from None
        if asked is not None and (isinstance(asked, str) or not isinstance(asked, Sequence)):
            raise InvalidInputError(f"samples are ids, a JSON file of them, or a data set, not {asked!r:.80}")
        return None if asked is None else list(asked)

    def _data_set(self, configuration: Mapping[str, Any]) -> Any:
        """Return the data set of a configuration, made by OpenUnlearning as any other of the run."""
        make = getattr(sys.modules.get("data"), "get_datasets", None)
        if make is None:
            raise StateError("samples is the configuration of a data set, which OpenUnlearning's `data` has to make")
        tokenizer = getattr(self, "processing_class", None) or self.tokenizer
        return make(configuration, tokenizer=tokenizer, template_args=getattr(self, "template_args", None))
