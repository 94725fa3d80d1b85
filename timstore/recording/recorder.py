"""The recorder: batch to hooks to records to store, around a training loop that does not know of it."""

import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from torch import nn

from timstore.arguments import listed, sample_id, whole_number
from timstore.database.kept_rows import asks_kept
from timstore.database.samples import names_of_samples
from timstore.database.store import Store
from timstore.errors import InvalidInputError, StateError
from timstore.format.log import Scope
from timstore.model.distributed import Ranks
from timstore.model.fingerprints import digests
from timstore.model.unwrap import inner_model, inner_optimizers
from timstore.options import RecordOptions
from timstore.recording.batches import on_host
from timstore.recording.beginning import Beginning
from timstore.recording.history import History
from timstore.recording.misuse import Drawn, Unentered, note_compiled, refuse_compiled
from timstore.recording.model_hooks import ModelHooks
from timstore.recording.optimizer import trained_by
from timstore.recording.optimizer_hooks import OptimizerHooks
from timstore.recording.pending import Clock, Running
from timstore.recording.reservoir import Reservoir
from timstore.recording.standstill import Standstill
from timstore.records import Parameter

_recorded: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class Recorder:
    """Records a training loop while its `with` block runs; made by `Store.record`."""

    def __init__(
        self, store: Store, model: nn.Module, optimizers: Any, samples: Iterable[int] | None, options: RecordOptions
    ) -> None:
        self._store, self._options = store, options
        self._samples = _chosen(samples)
        self._model, group = inner_model(model)
        self._optimizers, scaler = inner_optimizers(optimizers)
        self._scaler = options.scaler if options.scaler is not None else scaler
        self._ranks = Ranks(options.process_group if options.process_group is not None else group)
        self._rank = self._ranks.rank if options.rank is None else options.rank
        self._probe = [on_host(batch) for batch in options.probe] if isinstance(options.probe, list) else options.probe
        self._keys = None if options.id_column is None else _keys(store, options.id_column)
        self._clock = Clock()
        # Rows on another axis could not be joined again.
        keeps_rows = asks_kept(self._probe) and options.batch_axis == 0
        self._reservoir = Reservoir(self._model, self._samples, self._clock) if keeps_rows else None
        self._trained = trained_by(self._model, self._optimizers)
        self._parameters = {name: parameter for one in self._trained for name, parameter in one.parameters.items()}
        self._history = History(
            store,
            self._optimizers,
            self._parameters,
            options.optimizer_history,
            self._rank,
            waypoints=options.waypoints,
        )
        self._hooks: ModelHooks | None = None
        self._stills: list[Standstill] = []
        self._drawn: Drawn | None = None
        self._entered = ExitStack()  # what leaving the block takes off
        self._is_on = False
        self._saved_at: tuple[int, int] | None = None
        self._unentered = Unentered(self._model, self._optimizers, _recorded)

    @property
    def epoch(self) -> int:
        """The epoch that steps are recorded under; set it as training goes on."""
        return self._clock.epoch

    @epoch.setter
    def epoch(self, number: int) -> None:
        number = whole_number(number, "epoch")
        before = self._clock.epoch
        if number < before:
            raise InvalidInputError(
                f"epoch {number} is before epoch {before}; a resumed run passes resume_from", kind="earlier-epoch"
            )
        self._clock.epoch = number
        # What the other processes have drawn is known to all at the end alone.
        if self._is_on and self._drawn is not None and number > before and self._ranks.alone:
            self._drawn.epoch_over(before)

    @property
    def step(self) -> int:
        """The number of the next optimizer step, counted over the whole run."""
        return self._clock.step

    @property
    def is_looking(self) -> bool:
        """Whether the model runs to be looked at, beside training."""
        return self._hooks is not None and self._hooks.forwards.is_looking

    def batch(self, ids: Any) -> "_Batch":
        """Name the samples of the next forward pass, or of every one in a `with` block, for models called otherwise."""
        self._unentered.check()
        assert self._hooks is not None
        self._hooks.forwards.begin(ids)
        return _Batch(self._hooks.running)

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
        self._is_on = True
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
        if self._ranks.rank == 0 and self._drawn is not None:
            self._drawn.end(refresh=not self._ranks.alone)

    def save_point(self) -> None:
        """Commit, and keep what a rollback of the model as it is now needs; call it beside saving a checkpoint.

        The end of the block does so by itself. Of several processes each calls it: what one of them acknowledges, all
        have on disk. Cost: at most 2 bytes per trained parameter for Adam's second moment, a digest per parameter.

        Raises:
            StorageError, ReadOnlyError, StateError: as `Store.commit`.
        """
        self._unentered.check()
        self._keep(self._clock.last if self._is_on else None)

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
        if last is None or last == self._saved_at:
            return
        for still in self._stills:
            still.check(f"after epoch {last[0]}, step {last[1]},")
        self._ranks.wait()
        if self._ranks.rank == 0:
            self._store.append_fingerprints(*last, digests(self._model))
            self._history.save_point(*last)
            self._store.commit()
        self._saved_at = last

    def _hook(self) -> None:
        """Put all hooks on."""
        options, entered = self._options, self._entered
        self._stills = [] if self._history.is_replayed else [Standstill(one.parameters) for one in self._trained]
        self._hooks = ModelHooks(
            self._model,
            [one.parameters for one in self._trained],
            self._samples,
            options,
            processes=self._ranks.count,
            whole=self._history.keeps_gradients,
            keys=self._keys,
            reservoir=self._reservoir,
            keep_hashes=self._store.append_hashes,
            stills=self._stills,
        )
        entered.callback(self._hooks.remove)
        self._drawn = Drawn(
            self._store,
            self._model,
            self._optimizers,
            self._parameters.values(),
            self._samples,
            by_content=options.by_content,
        )
        entered.callback(self._drawn.remove)
        entered.callback(self._model.register_forward_pre_hook(refuse_compiled, prepend=True).remove)
        stepping = OptimizerHooks(
            self._store,
            self._model,
            self._trained,
            self._hooks,
            self._stills,
            self._samples,
            options,
            history=self._history,
            ranks=self._ranks,
            drawn=self._drawn,
            scaler=self._scaler,
            rank=self._rank,
            clock=self._clock,
        )
        entered.callback(stepping.remove)

    def _begin_attempt(self) -> None:
        number, self._clock.epoch, self._clock.step = self._ranks.lead(self._claim)
        self._clock.last = None
        self._store.join_attempt(number)
        if self._reservoir is not None:
            self._reservoir.go_on(self._store.snapshot().kept_rows())

    def _claim(self) -> tuple[int, int, int]:
        """Begin the attempt, or go on with it; returns its number and where it goes on."""
        scope: Scope = "all" if self._samples is None else tuple(sorted(self._samples))
        beginning = Beginning(self._store, self._model, self._optimizers, scope, self._ranks.count)
        resume_from = self._options.resume_from
        moment = beginning.go_on() if resume_from is None else beginning.resume(resume_from)
        self._store.declare(
            [
                Parameter(name, tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."), one.groups[name])
                for one in self._trained
                for name, parameter in one.parameters.items()
            ]
        )
        if isinstance(self._probe, list):
            self._store.keep_probe(self._probe, loss="cross_entropy")
        if not self._ranks.alone:
            self._store.commit()
        return self._store.attempt, *moment

    def _release(self) -> tuple[int, int] | None:
        """Take all hooks off; returns the latest step."""
        last = self._clock.last if self._is_on else None
        self._is_on = False
        self._entered.close()
        _recorded.discard(self._model)
        return last


class _Batch:
    """What `Recorder.batch` returns: nothing to keep, or a `with` block over several forward passes."""

    def __init__(self, running: Running) -> None:
        self._running = running

    def __enter__(self) -> None:
        self._running.hold()

    def __exit__(self, *_: object) -> None:
        self._running.end()


def _chosen(samples: Iterable[int] | None) -> frozenset[int] | None:
    if samples is None:
        return None
    chosen = frozenset(sample_id(one, "sample id") for one in listed(samples, "samples"))
    if not chosen:
        raise InvalidInputError("samples is empty: name the ids to record, or leave it out to record all")
    return chosen


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
