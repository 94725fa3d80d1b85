"""The recorder: batch to hooks to records to store, around a training loop that does not know of it."""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from timstore.database.arguments import (
    choice,
    counting_number,
    listed,
    moment,
    plain_name,
    rank_number,
    sample_id,
    whole_number,
)
from timstore.database.kept_rows import KEPT, asks_kept
from timstore.database.samples import names_of_samples
from timstore.database.store import Store
from timstore.errors import InvalidInputError, StateError, shown
from timstore.format.commits import Scope
from timstore.model.distributed import Ranks
from timstore.model.fingerprints import digests
from timstore.model.unwrap import inner_model, inner_optimizers
from timstore.recording.batches import on_host
from timstore.recording.beginning import Beginning
from timstore.recording.capture import Capture
from timstore.recording.drawn import Drawn
from timstore.recording.forecast import Budget
from timstore.recording.forward_hooks import Forwards
from timstore.recording.history import History
from timstore.recording.misuse import Unentered, note_compiled, refuse_compiled
from timstore.recording.optimizer import trained_parameters
from timstore.recording.pending import Pending
from timstore.recording.per_sample_backward import Passes
from timstore.recording.reservoir import Reservoir
from timstore.recording.standstill import Standstill
from timstore.recording.stepping import Stepping, Trained
from timstore.records import Parameter

CAPTURES = ("auto", "modules", "per-sample")

_recorded: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to record; see `timstore.Store.record`."""

    samples: Iterable[int] | None = None
    resume_from: tuple[int, int] | None = None
    probe: Any = KEPT
    optimizer_history: str = "final"
    waypoints: bool = True
    scaler: Any = None
    mean_over: str | None = None
    budget: Budget | None = None
    rank: int | None = None
    allow_zero: bool = False
    capture: str = "auto"
    batch_axis: int = 0
    id_column: str | None = None
    by_content: bool = False
    process_group: Any = None


class Recorder:
    """Records a training loop while its `with` block runs; made by `Store.record`."""

    def __init__(self, store: Store, model: nn.Module, optimizers: Any, options: Options) -> None:
        self._store = store
        self._model, group = inner_model(model)
        self._optimizers, scaler = inner_optimizers(optimizers)
        self._ranks = Ranks(options.process_group if options.process_group is not None else group)
        self._samples = _chosen(options.samples)
        choice(options.capture, CAPTURES, "capture")
        self._resume_from = None if options.resume_from is None else _moment(options.resume_from)
        self._probe = _probe(options.probe)
        # Rows on another axis could not be joined again.
        self._axis = counting_number(options.batch_axis, "batch_axis")
        keeps_rows = self._probe == KEPT and self._axis == 0
        self._reservoir = Reservoir(self._model, self._samples, lambda: (self.epoch, self.step)) if keeps_rows else None
        rank = self._ranks.rank if options.rank is None else rank_number(options.rank)
        self._trained = trained_parameters(self._model, self._optimizers)
        self._parameters = {name: one for mine in self._trained for name, (one, _) in mine.items()}
        self._history = History(
            store,
            self._optimizers,
            self._parameters,
            options.optimizer_history,
            rank,
            waypoints=options.waypoints,
        )
        self._stills: list[Standstill] = []
        self._forwards = Forwards(
            store,
            self._model,
            samples=self._samples,
            axis=self._axis,
            keys=None if options.id_column is None else _keys(store, plain_name(options.id_column, "id_column")),
            by_content=options.by_content,
            reservoir=self._reservoir,
        )
        self._options = options
        self._scaler = options.scaler if options.scaler is not None else scaler
        if self._scaler is not None and not callable(getattr(self._scaler, "get_scale", None)):
            raise InvalidInputError(f"scaler is the GradScaler around the optimizer, not {shown(self._scaler)}")
        self._rank = rank
        self._epoch, self._step = 0, 0
        self._kept_at: tuple[int, int] | None = None
        self._handles: list[Any] = []
        self._stepping: Stepping | None = None
        self._unentered = Unentered(self._model, self._optimizers, _recorded)

    @property
    def epoch(self) -> int:
        """The epoch that steps are recorded under; set it as training goes on."""
        return self._epoch

    @epoch.setter
    def epoch(self, number: int) -> None:
        number = whole_number(number, "epoch")
        if number < self._epoch:
            raise InvalidInputError(
                f"epoch {number} is before epoch {self._epoch}; a resumed run passes resume_from", kind="earlier-epoch"
            )
        before, self._epoch = self._epoch, number
        if self._stepping is not None:
            self._stepping.epoch = number
            # What the other processes have drawn is known to all at the end alone.
            if number > before and self._ranks.alone:
                self._drawn.epoch_over(before)

    @property
    def step(self) -> int:
        """The number of the next optimizer step, counted over the whole run."""
        return self._step if self._stepping is None else self._stepping.step

    @property
    def is_looking(self) -> bool:
        """Whether the model runs to be looked at, beside training."""
        return self._forwards.is_looking

    def batch(self, ids: Any) -> "_Batch":
        """Name the samples of the next forward pass, or of every one in a `with` block, for models called otherwise."""
        self._unentered.check()
        self._forwards.begin(ids)
        return _Batch(self._forwards)

    def __enter__(self) -> Self:
        if self._model in _recorded:
            raise StateError(
                "this model is being recorded already: one block records all of its optimizers, "
                "record(model, [one, two])",
                kind="already-recording",
            )
        _recorded.add(self._model)
        self._unentered.end()
        try:
            self._hook()
            self._begin_attempt()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        last = self._release()
        note_compiled(error)
        try:
            if error is None or self._ranks.alone:
                self._keep(last)
            else:
                self._commit()  # the other processes may never come to an agreement
        except Exception as failure:
            if error is None:
                raise
            # The error of the training loop is the one to see.
            if getattr(error, "kind", None) != getattr(failure, "kind", ""):
                error.add_note(f"timstore: the end of the recording could not be kept: {failure}")
        if error is None:
            self._warn()

    def stop(self) -> None:
        """End recording, and commit; the parameters are not taken for those that the last step left."""
        self._release()
        self._commit()
        self._warn()

    def _warn(self) -> None:
        """Say what never came; of several processes the first one knows, once all have committed."""
        if self._ranks.rank == 0:
            self._drawn.end(refresh=not self._ranks.alone)

    def checkpoint(self) -> None:
        """Commit, and keep what a rollback of the model as it is now needs; call it beside saving a checkpoint.

        The end of the block does so by itself. Of several processes each calls it: what one of them acknowledges, all
        have on disk. Cost: at most 2 bytes per trained parameter for Adam's second moment, a digest per parameter.

        Raises:
            StorageError, ReadOnlyError, StateError: as `Store.commit`.
        """
        self._unentered.check()
        self._keep(self._stepping.last if self._stepping is not None else None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise StateError(
            "a recorder cannot be copied or sent to another process (pickle, deepcopy, workers): make one with "
            "store.record(...) where the training runs",
            kind="not-copied",
        )

    def _commit(self) -> None:
        try:
            if self._reservoir is not None:
                self._reservoir.keep(self._store)
        finally:  # a device that failed takes the rows that lie there along, and no records
            self._store.commit()

    def _keep(self, last: tuple[int, int] | None) -> None:
        self._commit()
        if last is None or last == self._kept_at:
            return
        for still in self._stills:
            still.check(f"after epoch {last[0]}, step {last[1]},")
        self._ranks.wait()
        if self._ranks.rank == 0:
            self._store.append_fingerprints(*last, digests(self._model))
            self._history.checkpoint(*last)
            self._store.commit()
        self._kept_at = last

    def _hook(self) -> None:
        forwards, keep, options = self._forwards, self._handles.append, self._options
        by_sample, scale = options.capture == "per-sample", 1 / self._ranks.count

        capture = Capture(
            self._model,
            self._parameters,
            lambda: forwards.current,
            lambda module: passes.running(module, forwards.pending),
            mode=options.capture,
            scale=scale,
        )
        keep(capture)
        trained = [
            self._watched(optimizer, mine, capture)
            for optimizer, mine in zip(self._optimizers, self._trained, strict=True)
        ]
        for one in trained:
            keep(one.pending.accumulation)
        passes = Passes(
            self._parameters,
            capture,
            axis=self._axis,
            scale=scale,
            arriving=[one.pending.accumulation.settle_later for one in trained],
        )
        self._stills = [one.still for one in trained if one.still is not None]
        forwards.attach(capture, [one.pending for one in trained], passes, self._stills, keep)
        self._drawn = Drawn(
            self._store,
            self._model,
            self._optimizers,
            self._parameters.values(),
            self._samples,
            by_content=options.by_content,
        )
        keep(self._drawn)
        keep(self._model.register_forward_pre_hook(refuse_compiled, prepend=True))
        self._stepping = Stepping(
            self._store,
            self._model,
            trained,
            {name: one for name, one in self._model.named_parameters() if name not in self._parameters and one.numel()},
            forwards=forwards,
            history=self._history,
            ranks=self._ranks,
            drawn=self._drawn,
            samples=self._samples,
            scaler=self._scaler,
            mean_over=options.mean_over,
            budget=options.budget,
            rank=self._rank,
            allow_zero=options.allow_zero,
            by_sample=by_sample,
        )
        keep(self._stepping)

    def _watched(
        self, optimizer: torch.optim.Optimizer, mine: Mapping[str, tuple[nn.Parameter, int]], capture: Capture
    ) -> Trained:
        """Return an optimizer with hooks on its parameters."""
        parameters = {name: one for name, (one, _) in mine.items()}
        number = self._optimizers.index(optimizer)
        return Trained(
            optimizer,
            parameters,
            sum(len(one.param_groups) for one in self._optimizers[:number]),
            Pending(
                parameters,
                whole=self._history.keeps_gradients,
                averaged=not self._ranks.alone,
                paused=lambda: capture.is_replaying,
            ),
            None if self._history.is_replayed else Standstill(parameters),
        )

    def _begin_attempt(self) -> None:
        assert self._stepping is not None
        number, self._epoch, self._stepping.step = self._ranks.lead(self._claim)
        self._stepping.epoch = self._epoch
        self._store.join_attempt(number)
        if self._reservoir is not None:
            self._reservoir.go_on(self._store.snapshot().kept_rows())

    def _claim(self) -> tuple[int, int, int]:
        """Begin the attempt, or go on with it; returns its number and where it goes on."""
        scope: Scope = "all" if self._samples is None else tuple(sorted(self._samples))
        beginning = Beginning(self._store, self._model, self._optimizers, scope, self._ranks.count)
        moment = beginning.go_on() if self._resume_from is None else beginning.resume(self._resume_from)
        self._store.declare(
            [
                Parameter(name, tuple(one.shape), str(one.dtype).removeprefix("torch."), group)
                for mine in self._trained
                for name, (one, group) in mine.items()
            ]
        )
        if isinstance(self._probe, list):
            self._store.keep_probe(self._probe, loss="cross_entropy")
        if not self._ranks.alone:
            self._store.commit()
        return self._store.attempt, *moment

    def _release(self) -> tuple[int, int] | None:
        """Take all hooks off; returns the latest step."""
        stepping = self._stepping
        if stepping is not None:
            self._forwards.discard()
            self._forwards.end()
            self._epoch, self._step = stepping.epoch, stepping.step
            self._stepping = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _recorded.discard(self._model)
        return None if stepping is None else stepping.last


class _Batch:
    """What `Recorder.batch` returns: nothing to keep, or a `with` block over several forward passes."""

    def __init__(self, forwards: Forwards) -> None:
        self._forwards = forwards

    def __enter__(self) -> None:
        self._forwards.hold()

    def __exit__(self, *_: object) -> None:
        self._forwards.end()


def _chosen(samples: Iterable[int] | None) -> frozenset[int] | None:
    if samples is None:
        return None
    chosen = frozenset(sample_id(one, "sample id") for one in listed(samples, "samples"))
    if not chosen:
        raise InvalidInputError("samples is empty: name the ids to record, or leave it out to record all")
    return chosen


def _probe(given: Any) -> list[Any] | str | None:
    """Return the batches that are given, or what stands for rows of the training; None for nothing to be kept."""
    if given is None or given is False or asks_kept(given):
        return given or None
    return [on_host(batch) for batch in listed(given, f"probe, unless it is {KEPT!r} or False,")]


def _keys(store: Store, column: str) -> dict[str, int]:
    """Return the user's names of samples, from a column of the samples table.

    Raises:
        InvalidInputError: there is no such column, or a name is two samples'.
    """
    rows = store.snapshot().catalog.rows("SELECT * FROM samples")
    keys = names_of_samples(rows, column)
    if keys is None:
        raise InvalidInputError(
            f"store.samples has no column {column!r} (it has {', '.join(rows.column_names)}): name the samples with "
            f"store.samples.update([{{'sample': 0, {column!r}: 'first'}}, ...]) before recording"
        )
    return keys


def _moment(given: Any) -> tuple[int, int]:
    pair = listed(given, "resume_from", "a pair (epoch, step)")
    if len(pair) != 2:
        raise InvalidInputError(f"resume_from is a pair (epoch, step), not {shown(given)}")
    return moment(*pair)
