"""Recording a transformers `Trainer`: one callback."""

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from timstore import Store
from timstore.errors import CoverageError, InvalidInputError, StateError
from timstore.integrations.collating import WithIds
from timstore.integrations.session import Session
from timstore.integrations.trl import check_packing, options_for
from timstore.model.distributed import world
from timstore.model.sample_ids import is_pair, row_ids
from timstore.model.unwrap import inner_model
from timstore.recording import Recorder

__all__ = ["TrajectoryCallback", "content_ids"]


class TrajectoryCallback(TrainerCallback):
    """Records what chosen samples do while a Trainer trains: `Trainer(..., callbacks=[TrajectoryCallback(store)])`.

    Rows are known by `id_column`, or without one by their tokens. The column travels through collator and workers
    whatever `remove_unused_columns` says, and never reaches the model. Evaluation and prediction record nothing.

    Durability: committed before a checkpoint is saved, when training ends, and by itself every 256 MB or 30 s. Training
    that goes on from a checkpoint begins a new attempt there, which supersedes what was recorded after it.

    Args:
        store: an open store, or the path of one, which is opened for the training and closed after it.
        samples: ids to record (`content_ids(split)` without an `id_column`); all when None.
        id_column: of the training set: integers, or text that a column of this name in `store.samples` knows.
        options: of `Store.record`: `probe`, `optimizer_history`, `capture`, ...

    Raises, at the first step or before:
        InvalidInputError: the rows carry no such column, or ids that cannot be right.
        CoverageError: the model is compiled, spread over processes, or cannot be recorded.
        StateError: steps between the store's last one and the checkpoint were never recorded.
    """

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        samples: Iterable[int | str] | None = None,
        *,
        id_column: str | None = None,
        **options: Any,
    ) -> None:
        self._session = Session(store, samples, id_column, options)
        self._column = id_column
        self._trainer: Trainer | None = None
        self._epoch: int | None = None
        self._collator: WithIds | None = None
        self._handles: list[Any] = []

    def attach(self, trainer: Any) -> None:
        """Have the trainer's rows carry their ids. Done by itself when the callback is given to the Trainer's maker."""
        self._trainer = trainer
        trainer.model.register_forward_pre_hook(_without_ids, with_kwargs=True)
        if self._column is not None:
            trainer._set_signature_columns_if_needed()
            trainer._signature_columns.append(self._column)
        trainer.data_collator = self._collator = WithIds(trainer.data_collator, self._column)

    def close(self) -> None:
        """End a recording whose training ended in an error: what was recorded is committed, the hooks come off."""
        self._end(StateError("training did not end"))

    # --- what the Trainer calls ------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.attach(_maker_of(self))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        if self._trainer is None:
            raise StateError(
                "this TrajectoryCallback came to the Trainer after it was made: pass it in callbacks=[...], or call "
                "callback.attach(trainer) before trainer.train()"
            )
        trainer, model = self._trainer, kwargs["model"]
        _check_arguments(args)
        check_packing(args, self._column)
        inner_model(trainer.model_wrapped)  # Accelerate may have compiled it without a word in the arguments
        self._epoch = _epoch_of(args, state)
        self._session.begin(
            model,
            kwargs["optimizer"],
            epoch=self._epoch,
            steps=state.global_step,
            by_content=self._column is None,
            process_group=world() if args.world_size > 1 else None,
            **options_for(trainer, model, self._session.options),
        )
        assert self._collator is not None
        self._collator.keys, self._collator.recording = self._session.keys, True
        reference = getattr(trainer, "ref_model", None)
        if isinstance(reference, torch.nn.Module):
            self._handles.append(reference.register_forward_pre_hook(_without_ids, with_kwargs=True))
        if self._column is not None or is_pair(getattr(trainer.train_dataset, "column_names", None) or ()):
            self._handles.append(model.register_forward_pre_hook(self._ids_came, with_kwargs=True, prepend=True))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._recorder is not None and self._epoch is not None:
            self._recorder.epoch = self._epoch
            self._epoch += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Before a checkpoint is saved, not after: one that counts has everything up to it on disk. And before the best
        # model takes the last one's place.
        if self._recorder is not None and (control.should_save or control.should_training_stop):
            self._recorder.save_point()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Another callback may have asked for it after ours.
        if self._recorder is not None:
            self._recorder.save_point()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # By now the parameters may be those of another moment.
        self._end(None, known=not args.load_best_model_at_end)

    # --- the way there ---------------------------------------------------------------------------------

    @property
    def _recorder(self) -> Recorder | None:
        return self._session.recorder

    def _end(self, error: BaseException | None, *, known: bool = True) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._collator is not None:
            self._collator.recording = False
        self._session.end(error, known=known)

    def _ids_came(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        assert self._recorder is not None
        if self._recorder.is_looking:
            return
        if torch.is_grad_enabled() and model.training and "sample_ids" not in kwargs:
            maker = f"{type(self._trainer).__name__} makes what the model is given by itself, and leaves them out"
            raise InvalidInputError(
                f"the pairs of the training set have lost their ids: {maker}. It cannot be recorded"
                if self._column is None
                else f"the rows of the training set carry no {self._column!r}, or {maker}: name the column that holds "
                "their ids, or leave id_column out to know them by their tokens",
                kind="no-ids",
            )


def content_ids(dataset: Iterable[Mapping[str, Any]]) -> list[int]:
    """Return the ids that rows are recorded under without an `id_column`: of their tokens, padding left out.

    A split with rows of its own numbering finds them again: `store.rollback(model, content_ids(forget_split))`. Rows of
    the same tokens are one sample.

    Args:
        dataset: rows with `input_ids`, and an `attention_mask` where they are padded; a packed row with `seq_lengths`
            gives an id for each of its pieces. Preference pairs have `chosen_ids` and `rejected_ids`, and `prompt_ids`
            where there are prompts: an id for each pair.

    Raises:
        InvalidInputError: a row has no tokens.
    """
    found: list[int] = []
    for number, row in enumerate(dataset):
        try:
            found += row_ids(row)
        except InvalidInputError as error:
            raise InvalidInputError(f"row {number}: {error}") from error
    return found


def _without_ids(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Keep ids from a model that is not being recorded."""
    kwargs.pop("sample_ids", None)
    return args, kwargs


def _maker_of(callback: TrainerCallback) -> Trainer:
    """Return the Trainer that is being made with this callback.

    A Trainer tells its callbacks nothing of itself, and it alone knows which columns it is going to drop.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    raise StateError("no Trainer is being made: call callback.attach(trainer)")


def _check_arguments(args: Any) -> None:
    """Refuse ways to train in which no process sees a whole model's gradients in its hooks."""
    for is_on, what in (
        (getattr(args, "torch_compile", False), "torch_compile=True hides the model from hooks"),
        (
            args.n_gpu > 1,
            "several GPUs in one process (DataParallel) copy the model: use torchrun",
        ),
        (getattr(args, "deepspeed", None), "DeepSpeed spreads gradients over processes"),
        (getattr(args, "fsdp", None), "FSDP spreads parameters over processes"),
    ):
        if is_on:
            raise CoverageError(f"this training cannot be recorded: {what}")


def _epoch_of(args: Any, state: Any) -> int:
    """Return the epoch that training is about to begin or go on in, as the Trainer counts it."""
    if state.global_step == 0:
        return 0
    if args.max_steps <= 0:
        return int(state.global_step // max(1, round(state.max_steps / args.num_train_epochs)))
    return int(state.epoch or 0)
