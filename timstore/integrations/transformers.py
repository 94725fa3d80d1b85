"""Recording a transformers `Trainer`: one callback, and the ids beside its rows on their way through the collator."""

import os
import sys
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from timstore import Store
from timstore.arguments import whole_number
from timstore.database.samples import sample_named
from timstore.errors import CoverageError, InvalidInputError, StateError
from timstore.integrations.session import Session
from timstore.integrations.trl import check_packing, options_for
from timstore.model.distributed import world
from timstore.model.sample_ids import is_pair, row_hash, row_ids, row_tokens
from timstore.model.unwrap import inner_model
from timstore.recording import Recorder
from timstore.recording.packing import pieces_of

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
        self._collator: _WithIds | None = None
        self._handles: list[Any] = []

    def attach(self, trainer: Any) -> None:
        """Have the trainer's rows carry their ids. Done by itself when the callback is given to the Trainer's maker."""
        self._trainer = trainer
        trainer.model.register_forward_pre_hook(_without_ids, with_kwargs=True)
        if self._column is not None:
            trainer._set_signature_columns_if_needed()
            trainer._signature_columns.append(self._column)
        trainer.data_collator = self._collator = _WithIds(trainer.data_collator, self._column)

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

    on_epoch_end = on_step_end

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
    ids: list[int] = []
    for number, row in enumerate(dataset):
        try:
            ids += row_ids(row)
        except InvalidInputError as error:
            raise InvalidInputError(f"row {number}: {error}") from error
    return ids


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


class _WithIds:
    """A collator that takes the ids out before another one, and hands them on beside its batch as `sample_ids`.

    Usually one row of the dataset is one of the model. A collator may also flatten all of them into one (padding-free),
    make several of each (a preference pair), or sort them. Which is whose is found by their tokens, and by asking the
    collator for each row of the dataset alone. A column holds an id for each row; of packed rows it may be a list, of
    an id for each piece, or for each token (-1 for none).

    Args:
        column: that the ids are in; None to know rows by content. The recorder knows them by itself then, but for
            preference pairs, of which the model is given parts.

    Attributes:
        keys: the samples that go by names.
        recording: hand ids on. What is collated before and after training goes to models that know of none.
    """

    def __init__(self, collate: Any, column: str | None) -> None:
        self._collate = collate
        self._column = column
        self.keys: Mapping[str, int] | None = None
        self.recording = False

    def __call__(self, features: Sequence[Any]) -> Any:
        ids = self._ids(features)
        plain = [self._plain(row) for row in features]
        batch = self._collate(plain)
        if not self.recording or (isinstance(batch, Mapping) and "sample_ids" in batch):
            return batch
        if ids is not None:
            if not isinstance(batch, MutableMapping):
                raise _no_place(batch)
            batch["sample_ids"] = self._placed(ids, plain, batch)
        elif self._column is None and _count(batch) not in (None, len(features)) and pieces_of(batch) is None:
            raise _untold(len(features), batch)
        return batch

    def _ids(self, features: Sequence[Any]) -> list[int | list[int]] | None:
        """Return the ids of rows, None where they have none: rows for evaluation, or known by the recorder."""
        if self._column is None:
            pairs = all(isinstance(row, Mapping) and is_pair(row) for row in features)
            return [row_ids(row)[0] for row in features] if pairs else None
        named = [isinstance(row, Mapping) and self._column in row for row in features]
        if not any(named):
            return None
        if not all(named):
            raise InvalidInputError(f"row {named.index(False)} of a batch has no {self._column!r}, and others have")
        return [self._id(row[self._column]) for row in features]

    def _id(self, value: Any) -> int | list[int]:
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, list | tuple):
            return [-1 if part == -1 else self._sample(part) for part in value]
        return self._sample(value)

    def _sample(self, value: Any) -> int:
        if isinstance(value, str):
            return sample_named(value, self.keys, self._column)
        return whole_number(value, f"{self._column}, a sample's id,")

    def _plain(self, row: Any) -> Any:
        if isinstance(row, Mapping) and self._column in row:
            return {name: value for name, value in row.items() if name != self._column}
        return row

    def _placed(self, ids: list[int | list[int]], features: Sequence[Any], batch: Any) -> torch.Tensor:
        """Return the sample of every row that the model is given, or of every token (negative: of none).

        Raises:
            InvalidInputError: it cannot be told.
        """
        if _count(batch) in (None, len(features)) and not any(isinstance(row, list) for row in ids):
            order = None if _count(batch) is None else _order(_contents(batch), [[_tokens_of(row)] for row in features])
            # Rows that are cut, masked or no tokens are taken to be in their order.
            return torch.tensor(ids if order is None else [ids[row] for row, _ in order], device="cpu")
        alone = [_contents(self._collate([row])) for row in features]
        order = _order(_contents(batch), alone)
        if order is None:
            raise _untold(len(features), batch)
        return _spread([_owners(ids[row], alone[row], part) for row, part in order], batch)


def _count(batch: Any) -> int | None:
    """Return how many rows of tokens a batch has, None where it has none."""
    tokens = batch.get("input_ids") if hasattr(batch, "get") else None
    return len(tokens) if isinstance(tokens, torch.Tensor) and tokens.ndim == 2 else None


def _places(batch: Any) -> tuple[torch.Tensor, bool]:
    """Return the number of the row or piece that each token is in, negative for padding; and whether it is a piece."""
    pieces = pieces_of(batch)
    if pieces is not None:
        return pieces, True
    tokens, attended = batch["input_ids"], batch.get("attention_mask")
    rows = torch.arange(len(tokens), device="cpu")[:, None].repeat(1, tokens.shape[1])
    if isinstance(attended, torch.Tensor) and attended.shape == tokens.shape:
        rows[attended.cpu() == 0] = -1
    return rows, False


def _contents(batch: Any) -> list[torch.Tensor]:
    """Return the tokens of each row, or of each piece of packed ones."""
    if _count(batch) is None:
        raise InvalidInputError(
            "lists of ids are for rows of tokens, and this batch has no input_ids", kind="wrong-ids"
        )
    places, _ = _places(batch)
    tokens = batch["input_ids"].cpu().long()
    return [tokens[places == number] for number in range(int(places.max()) + 1)]


def _tokens_of(row: Any) -> torch.Tensor:
    """Return what a row of the dataset consists of, nothing where it has no tokens."""
    known = isinstance(row, Mapping) and "input_ids" in row
    return row_tokens(row) if known else torch.empty(0, dtype=torch.long, device="cpu")


def _order(contents: Sequence[torch.Tensor], alone: Sequence[Sequence[torch.Tensor]]) -> list[tuple[int, int]] | None:
    """Return which part of which row of the dataset each content is, None where it cannot be told."""
    in_turn = [(row, part) for row, parts in enumerate(alone) for part in range(len(parts))]
    # Pairs are collated one way, chosen rows first; pieces, and rows that others repeat, one after the other.
    all_first = sorted(in_turn, key=lambda pair: pair[1])
    for order in (all_first, in_turn):
        parts = [alone[row][part] for row, part in order]
        if len(parts) == len(contents) and all(map(torch.equal, contents, parts)):
            return order
    known = {row_hash(alone[row][part]): (row, part) for row, part in in_turn}
    order = [known[content] for content in map(row_hash, contents) if content in known]
    return order if len(order) == len(contents) == len(in_turn) == len(set(order)) else None


def _owners(ids: int | list[int], parts: Sequence[torch.Tensor], number: int) -> torch.Tensor:
    """Return the sample of each token of one part of a row of the dataset."""
    lengths = [len(part) for part in parts]
    if not isinstance(ids, list) or len(ids) == len(parts):
        return torch.full((lengths[number],), ids[number] if isinstance(ids, list) else ids, device="cpu")
    if len(ids) != sum(lengths):
        raise InvalidInputError(
            f"a row of {len(parts)} pieces and {sum(lengths)} tokens has a list of {len(ids)} ids: give it one for "
            "each piece, or for each token",
            kind="wrong-ids",
        )
    first = sum(lengths[:number])
    return torch.tensor(ids[first : first + lengths[number]], device="cpu")


def _spread(owners: Sequence[torch.Tensor], batch: Any) -> torch.Tensor:
    """Return the sample of each row where every row is of one, else of each token (negative: of none)."""
    places, packed = _places(batch)
    if not packed and all(bool((tokens == tokens[0]).all()) for tokens in owners):
        return torch.stack([tokens[0] for tokens in owners])
    samples = torch.full(places.shape, -1, device="cpu")
    for number, tokens in enumerate(owners):
        samples[places == number] = tokens
    return samples


def _no_place(batch: Any) -> InvalidInputError:
    return InvalidInputError(
        f"the collator returns a {type(batch).__name__}, which has no place for ids: have it return a mapping. Rows "
        "that the trainer makes itself, as where it generates answers, can be known by their tokens alone: leave "
        "id_column out",
        kind="wrong-ids",
    )


def _untold(count: int, batch: Any) -> InvalidInputError:
    return InvalidInputError(
        f"the collator makes {_count(batch)} rows for the model of {count} of the dataset, and which is whose cannot "
        "be told: no position_ids, cu_seq_lens_q or seq_idx say where one ends, or their tokens are not those of the "
        "dataset's rows, or of several of them. Make one row of each, or have the "
        "collator add sample_ids, one for each row or token that the model is given",
        kind="wrong-ids",
    )
