"""Recording a Lightning `Trainer`: one callback."""

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from timstore import Store
from timstore.errors import CoverageError, InvalidInputError, StateError
from timstore.integrations.session import Session
from timstore.recording import Recorder

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:  # the same by its older name
    from pytorch_lightning import Callback

__all__ = ["TrajectoryCallback"]


class TrajectoryCallback(Callback):  # type: ignore[misc]
    """Records what chosen samples do while Lightning trains: `Trainer(callbacks=[TrajectoryCallback(store, ...)])`.

    Automatic and manual optimization; a batch may be part of several steps. Gradients are those that the optimizer
    consumes, accumulated and clipped. Validation, testing and prediction record nothing.

    Durability: committed before a checkpoint is saved, when training ends, and by itself every 256 MB or 30 s. Training
    that goes on from a checkpoint begins a new attempt there, which supersedes what was recorded after it.

    Args:
        store: an open store, or the path of one, which is opened for the training and closed after it.
        samples: ids to record; all when None.
        id_column: of the batch: a key, or a place in a tuple, where it holds the ids of its rows, integers, or text
            that a column of this name in `store.samples` knows. The batch keeps it. None when the model is called with
            `sample_ids=...`, or `training_step` calls `callback.recorder.batch(ids)`.
        module: name of the part of the LightningModule that is trained and whose forward pass gets the batch's rows;
            records name the parameters of that part. The LightningModule itself when None: `training_step` calls
            `self(...)` then, or layers whose batch is on axis 0.
        options: of `Store.record`: `probe`, `optimizer_history`, `capture`, ...

    Raises, at the first step or before:
        InvalidInputError: the batch carries no such ids, or ids that cannot be right.
        CoverageError: the model is compiled, spread over processes, or cannot be recorded.
        StateError: steps between the store's last one and the checkpoint were never recorded.
    """

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        samples: Iterable[int | str] | None = None,
        *,
        id_column: str | int | None = None,
        module: str | None = None,
        **options: Any,
    ) -> None:
        self._session = Session(store, samples, id_column, options)
        self._column = id_column
        self._module = module
        self._block = ExitStack()  # the batch that runs

    @property
    def recorder(self) -> Recorder:
        """The recorder of the training that runs.

        Raises:
            StateError: none does.
        """
        if self._session.recorder is None:
            raise StateError("nothing is being recorded: the recorder is there while trainer.fit trains")
        return self._session.recorder

    def close(self) -> None:
        """End a recording whose training ended in an error that Lightning told nobody of."""
        self._end(StateError("training did not end"))

    # --- what Lightning calls ----------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.close()
        _check(trainer, pl_module)
        recorder = self._session.begin(
            pl_module if self._module is None else pl_module.get_submodule(self._module),
            trainer.optimizers[0] if len(trainer.optimizers) == 1 else list(trainer.optimizers),
            epoch=trainer.current_epoch,
            steps=trainer.global_step,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
        )
        recorder.epoch = max(recorder.epoch, trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.recorder.epoch = trainer.current_epoch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._column is not None:
            self._block.close()
            self._block.enter_context(self.recorder.batch(self._ids(batch)))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._block.close()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._session.recorder is not None:
            self._session.recorder.save_point()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end(None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end(exception)

    # --- the way there -----------------------------------------------------------------------------------

    def _end(self, error: BaseException | None) -> None:
        self._block.close()
        self._session.end(error)

    def _ids(self, batch: Any) -> Any:
        try:
            ids = batch[self._column]
        except (KeyError, IndexError, TypeError) as error:
            has = f"the keys {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else f"{type(batch).__name__}"
            raise InvalidInputError(
                f"the training batch has no ids at {self._column!r}: it has {has}. Name the key, or the place in a "
                "tuple, that holds an id for each row",
                kind="no-ids",
            ) from error
        if isinstance(ids, list | tuple):
            return [self._session.named(sample) for sample in ids]
        return ids


def _check(trainer: Any, model: Any) -> None:
    """Refuse ways to train in which no process sees a whole model's gradients in its hooks."""
    strategy = type(trainer.strategy).__name__
    if trainer.world_size > 1 or any(name in strategy for name in ("DDP", "FSDP", "DeepSpeed", "Parallel", "XLA")):
        raise CoverageError(
            f"this training cannot be recorded: {strategy} runs training_step, not the model, in several processes. "
            "Train in one (devices=1), or record transformers' Trainer or a loop of your own under torchrun"
        )
    if getattr(model, "_compiler_ctx", None) is not None:
        raise CoverageError("this training cannot be recorded: torch.compile hides the model from hooks")
