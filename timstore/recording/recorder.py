"""The recorder: batch to hooks to records to store, around a training loop that does not know of it."""

import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from timstore.errors import InvalidInputError, StateError
from timstore.fingerprints import digests, row_hash
from timstore.format.commits import Scope
from timstore.intake import whole_number
from timstore.recording import checks
from timstore.recording.accumulation import Accumulation
from timstore.recording.batches import (
    MicroBatch,
    check_length,
    content,
    on_host,
    sample_ids,
    token_counts,
)
from timstore.recording.capture import Capture
from timstore.recording.forecast import Budget
from timstore.recording.history import History
from timstore.recording.optimizer import check_untrained, is_skipped, trained_parameters
from timstore.recording.steps import Ahead, look_ahead
from timstore.records import Gradient, Parameter
from timstore.store import Store

_recorded: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class Recorder:
    """Records a training loop while its `with` block runs; made by `Store.record`.

    Attributes:
        step: the number of the next optimizer step, counted over the whole run.
    """

    def __init__(
        self,
        store: Store,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        samples: Iterable[int] | None,
        *,
        resume_from: tuple[int, int] | None = None,
        probe: Iterable[Any] | None = None,
        optimizer_history: str = "final",
        scaler: Any = None,
        mean_over: str | None = None,
        budget: Budget | None = None,
        rank: int = 0,
        allow_zero: bool = False,
    ) -> None:
        self._store = store
        self._model = model
        self._optimizer = optimizer
        self._samples = None if samples is None else frozenset(whole_number(one, "sample id") for one in samples)
        if self._samples is not None and not self._samples:
            raise InvalidInputError("samples is empty: name the ids to record, or leave it out to record all")
        self._resume_from = None if resume_from is None else _moment(resume_from)
        self._probe = None if probe is None else [on_host(batch) for batch in probe]
        self._scaler = scaler
        self._mean_over = mean_over
        self._budget = budget
        self._rank = rank
        self._allow_zero = allow_zero
        self._trained = trained_parameters(model, optimizer)
        self._names = {id(parameter): name for name, (parameter, _) in self._trained.items()}
        self._parameters = {name: parameter for name, (parameter, _) in self._trained.items()}
        self._history = History(store, optimizer, self._names, optimizer_history, rank)
        self._untrained = {id(one): name for name, one in model.named_parameters() if id(one) not in self._names}
        self._epoch = 0
        self.step = 0
        self._pending: list[MicroBatch] = []
        self._earlier = 0  # how many of them had their forward pass before the latest backward pass was over
        self._current: MicroBatch | None = None
        self._held = False
        self._watched: list[tuple[str, torch.Tensor]] | None = None
        self._order_checked = False
        self._sum_checked = False
        self._last: tuple[int, int] | None = None
        self._kept_at: tuple[int, int] | None = None
        self._ahead: Ahead | None = None
        self._consumed: dict[str, torch.Tensor] = {}
        self._skipped = 0
        self._hashed: set[int] = set()
        self._handles: list[Any] = []
        self._capture: Capture | None = None
        self._accumulation: Accumulation | None = None

    @property
    def epoch(self) -> int:
        """The epoch that steps are recorded under; set it as training goes on."""
        return self._epoch

    @epoch.setter
    def epoch(self, number: int) -> None:
        number = whole_number(number, "epoch")
        if number < self._epoch:
            raise InvalidInputError(f"epoch {number} is before epoch {self._epoch}; a resumed run passes resume_from")
        self._epoch = number

    def batch(self, ids: Any) -> "_Batch":
        """Name the samples of the next forward pass, or of every one in a `with` block, for models called otherwise."""
        self._begin(ids)
        return _Batch(self)

    def __enter__(self) -> Self:
        if self._model in _recorded:
            raise StateError("this model is being recorded already", kind="already-recording")
        _recorded.add(self._model)
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
        self._release()
        try:
            self.checkpoint()
        except Exception as failure:
            if error is None:
                raise
            # The error of the training loop is the one to see.
            error.add_note(f"timstore: what was recorded last could not be committed: {failure}")

    def checkpoint(self) -> None:
        """Commit, and keep what a rollback of the model as it is now needs; call it beside saving a checkpoint.

        The end of the block does so by itself. Cost: at most 2 bytes per trained parameter for Adam's second
        moment, a digest per parameter.

        Raises:
            StorageError, ReadOnlyError, StateError: as `Store.commit`.
        """
        if self._last is not None and self._last != self._kept_at:
            self._store.append_fingerprints(*self._last, digests(self._model))
            self._history.checkpoint(*self._last)
        self._store.commit()
        self._kept_at = self._last

    def _hook(self) -> None:
        self._capture = Capture(self._model, self._parameters.values(), lambda: self._current, self._see)
        self._accumulation = Accumulation(self._parameters, self._skip, whole=self._history.keeps_gradients)
        model, optimizer, keep = self._model, self._optimizer, self._handles.append
        keep(model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True))
        keep(model.register_forward_hook(self._after_forward, always_call=True))
        keep(optimizer.register_step_pre_hook(self._before_step))
        keep(optimizer.register_step_post_hook(self._after_step))

    def _begin_attempt(self) -> None:
        scope: Scope = "all" if self._samples is None else tuple(sorted(self._samples))
        if self._resume_from is not None:
            self._store.begin_attempt(*self._resume_from, scope=scope)
            self._epoch, self.step = self._resume_from
        else:
            self._continue()
            self._store.claim_scope(scope)
        self._store.declare(
            [
                Parameter(name, tuple(one.shape), str(one.dtype).removeprefix("torch."), group)
                for name, (one, group) in self._trained.items()
            ]
        )
        if self._probe is not None:
            self._store.keep_probe(self._probe, loss="cross_entropy")

    def _continue(self) -> None:
        """Take up the count where the store's history ends, if the model is still the one it ended with."""
        frontier = self._store.frontier
        if frontier is None:
            return
        known = self._store.latest_fingerprints()
        where = f"epoch {frontier[0]}, step {frontier[1]}"
        resume = (
            "pass resume_from=(epoch, step) of the first step that the model has not seen; it supersedes what was "
            "recorded from there on, and (0, 0) starts over"
        )
        if known is None or known[:2] < frontier:
            raise StateError(
                f"the store's history ends at {where} without the fingerprint of a model, so recording was cut off "
                f"there, or done by append: {resume}",
                kind="unknown-model",
            )
        if known[2] != digests(self._model):
            raise StateError(f"the model changed since recording stopped at {where}: {resume}", kind="model-changed")
        self._epoch, self.step = frontier[0], frontier[1] + 1

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for held in (self._capture, self._accumulation):
            if held is not None:
                held.remove()
        self._discard(len(self._pending))
        self._current = None
        _recorded.discard(self._model)

    # --- forward ---------------------------------------------------------------------------------------

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._watched is not None:
            return None
        ids = kwargs.pop("sample_ids", None)
        if not torch.is_grad_enabled():
            return args, kwargs
        if ids is not None:
            self._begin(ids)
        if self._current is None:
            if module.training:
                raise InvalidInputError(
                    "a training forward without sample ids: pass sample_ids=... (one integer per row) to the model, or "
                    "call recorder.batch(ids) before it; wrap evaluation in torch.no_grad()",
                    kind="no-ids",
                )
            return args, kwargs
        check_length(self._current.ids, args, kwargs)
        self._current.tokens = token_counts(module, kwargs, len(self._current.ids))
        self._keep_hashes(self._current.ids, args, kwargs)
        if not self._order_checked and len(self._current.ids) > 1:
            self._check_order(args, kwargs, len(self._current.ids))
        return args, kwargs

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._watched is not None or self._held or not torch.is_grad_enabled():
            return
        if output is None and self._current in self._pending:
            self._pending.remove(self._current)  # the forward pass failed
        self._current = None

    def _begin(self, ids: Any) -> None:
        checked = sample_ids(ids)
        assert self._accumulation is not None
        if self._accumulation.begun:
            self._earlier = len(self._pending)
            if self._accumulation.lost():
                self._skip()
        positions = None
        # Until the first step has proved that the parts add up, all of them are needed.
        if self._samples is not None and self._sum_checked:
            positions = [position for position, one in enumerate(checked) if one in self._samples]
        self._current = MicroBatch(checked, positions)
        self._pending.append(self._current)
        self._accumulation.extremes = self._history.keeps_gradients or not all(one.empty for one in self._pending)

    def _keep_hashes(self, ids: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the recorded samples consist of, as a hash: a probe that holds one of them can be told."""
        rows = content(args, kwargs, len(ids))
        new = {
            sample: position
            for position, sample in enumerate(ids)
            if sample not in self._hashed and (self._samples is None or sample in self._samples)
        }
        if rows is not None and new:
            self._hashed.update(new)
            self._store.append_hashes({sample: row_hash(rows[position]) for sample, position in new.items()})

    def _skip(self) -> None:
        """The gradients accumulated so far were zeroed without a step."""
        self._skipped += 1
        self._discard(self._earlier)

    def _discard(self, count: int) -> None:
        """Drop the first micro-batches: the step that they were for is over, or was skipped."""
        for batch in self._pending[:count]:
            batch.release()
        del self._pending[:count]
        self._earlier = 0
        if self._accumulation is not None:
            self._accumulation.clear()

    def _check_order(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> None:
        self._watched = []
        try:
            checks.check_order(self._model, args, kwargs, rows, self._watched)
        finally:
            self._watched = None
        self._order_checked = True

    def _see(self, name: str, given: torch.Tensor) -> bool:
        if self._watched is None:
            return False
        self._watched.append((name, checks.summary(given)))
        return True

    # --- step ------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(one is not None for one in (*args[1:], *kwargs.values())):
            raise InvalidInputError("optimizer.step(closure) cannot be recorded: run backward first, then step()")
        assert self._accumulation is not None
        check_untrained(optimizer, self._untrained)
        self._ahead = None
        if is_skipped(optimizer):
            return
        ratio = self._accumulation.ratio()
        gradients = self._accumulation.gradients()
        self._check_step(ratio, gradients)
        self._ahead = look_ahead(
            optimizer,
            self._scaler,
            [batch for batch in self._pending if batch.used],
            gradients,
            ratio=ratio,
            clip_value=self._accumulation.clip_value,
            mean_over=self._mean_over,
            # Elsewhere they are of no use, or can be had from the records of the whole step when it comes to it.
            products=self._history.keeps_gradients,
            samples=self._samples,
            names=self._names,
        )
        if self._budget is not None and self._ahead.records:
            self._budget.check(self._store, self._optimizer, self._ahead.records, gradients, self._parameters)
            self._budget = None
        self._history.before_step(self._epoch, self.step, self._parameters)
        # Copied before the step, which may write into them.
        self._consumed = self._history.copied(gradients)

    def _check_step(self, ratio: float, gradients: dict[str, torch.Tensor]) -> None:
        found: dict[int, list[Gradient]] = {}
        for batch in self._pending:
            for parameter, parts in batch.captured:
                found.setdefault(id(parameter), []).extend(parts)
        if not self._sum_checked:
            checks.check_sum(self._model, self._parameters, gradients, found, ratio)
            self._sum_checked = True
        elif not any(batch.empty for batch in self._pending):
            # A module that only an empty batch went through is rightly not among them.
            checks.check_captured(self._model, self._parameters, found)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ahead, self._ahead = self._ahead, None
        self._discard(len(self._pending))
        if ahead is None:
            self._skipped += 1
            return
        moment = self._epoch, self.step
        self.step += 1
        self._last = moment
        skipped, self._skipped = self._skipped, 0
        self._store.append_step(*moment, ahead.groups, rank=self._rank, skipped=skipped, **ahead.scalars)
        self._history.after_step(*moment, self._consumed)
        for sample, gradients in ahead.records.items():
            self._store.append(
                *moment,
                sample,
                gradients,
                tokens=ahead.tokens.get(sample),
                dot=ahead.dots.get(sample),
                rank=self._rank,
                allow_zero=self._allow_zero,
                copy=False,
            )


class _Batch:
    """What `Recorder.batch` returns: nothing to keep, or a `with` block over several forward passes."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __enter__(self) -> None:
        self._recorder._held = True

    def __exit__(self, *_: object) -> None:
        self._recorder._held = False
        self._recorder._current = None


def _moment(given: Any) -> tuple[int, int]:
    try:
        epoch, step = given
    except (TypeError, ValueError):
        raise InvalidInputError(f"resume_from is a pair (epoch, step), not {given!r}") from None
    return whole_number(epoch, "epoch"), whole_number(step, "step")
