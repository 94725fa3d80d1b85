"""The recorder: batch to hooks to records to store, around a training loop that does not know of it."""

import weakref
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from timstore.errors import InvalidInputError, StateError, TimstoreError
from timstore.fingerprints import digests
from timstore.format.commits import Scope
from timstore.intake import whole_number
from timstore.recording import checks
from timstore.recording.capture import Capture, MicroBatch
from timstore.recording.optimizer import GradientScale, step_groups, trained_parameters
from timstore.records import Factors, Gradient, Parameter, Rows, StepGroup
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
        resume_from: tuple[int, int] | None,
        probe: Iterable[Any] | None,
        rank: int,
        allow_zero: bool,
    ) -> None:
        self._store = store
        self._model = model
        self._optimizer = optimizer
        self._samples = None if samples is None else frozenset(whole_number(one, "sample id") for one in samples)
        self._resume_from = resume_from
        self._probe = None if probe is None else [_on_host(batch) for batch in probe]
        self._rank = rank
        self._allow_zero = allow_zero
        self._trained = trained_parameters(model, optimizer)
        self._names = {id(parameter): name for name, (parameter, _) in self._trained.items()}
        self._parameters = {name: parameter for name, (parameter, _) in self._trained.items()}
        self._epoch = 0
        self.step = 0
        self._pending: list[MicroBatch] = []
        self._current: MicroBatch | None = None
        self._held = False
        self._watched: list[tuple[str, torch.Tensor]] | None = None
        self._order_checked = False
        self._sum_checked = False
        self._last: tuple[int, int] | None = None
        self._ahead: tuple[list[StepGroup], float] | None = None
        self._handles: list[Any] = []
        self._capture: Capture | None = None
        self._scale: GradientScale | None = None

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
        scope: Scope = "all" if self._samples is None else tuple(sorted(self._samples))
        if self._resume_from is not None:
            self._store.begin_attempt(*self._resume_from, scope=scope)
            self._epoch, self.step = self._resume_from
        else:
            self._store.claim_scope(scope)
            self._continue()
        self._store.declare(
            [
                Parameter(name, tuple(one.shape), str(one.dtype).removeprefix("torch."), group)
                for name, (one, group) in self._trained.items()
            ]
        )
        if self._probe is not None:
            self._store.keep_probe(self._probe, loss="cross_entropy")
        _recorded.add(self._model)
        try:
            self._capture = Capture(self._model, self._parameters.values(), lambda: self._current, self._see)
            self._scale = GradientScale(self._parameters)
            self._handles = [
                self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True),
                self._model.register_forward_hook(self._after_forward, always_call=True),
                self._optimizer.register_step_pre_hook(self._before_step),
                self._optimizer.register_step_post_hook(self._after_step),
            ]
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()
        try:
            if self._last is not None:
                self._store.append_fingerprints(*self._last, digests(self._model))
            self._store.commit()
        except TimstoreError as failure:
            if error is None:
                raise
            # The error of the training loop is the one to see.
            error.add_note(f"timstore: what was recorded last could not be committed: {failure}")

    def _continue(self) -> None:
        """Take up the count where the store's history ends, if the model is still the one it ended with."""
        frontier = self._store.frontier
        if frontier is None:
            return
        self._epoch, self.step = frontier[0], frontier[1] + 1
        known = self._store.latest_fingerprints()
        if known is not None and known[2] != digests(self._model):
            raise StateError(
                f"the model is not the one that recording stopped with (epoch {known[0]}, step {known[1]}): a resumed "
                "or repeated run passes resume_from=(epoch, step), which supersedes what was recorded from there on",
                kind="model-changed",
            )

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for held in (self._capture, self._scale):
            if held is not None:
                held.remove()
        self._pending.clear()
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
        self._check_length(self._current, args, kwargs)
        if not self._order_checked and len(self._current.ids) > 1:
            self._check_order(args, kwargs, len(self._current.ids))
        return args, kwargs

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._watched is None and not self._held:
            self._current = None

    def _begin(self, ids: Any) -> None:
        checked = _ids(ids)
        if self._pending and not self._gradients_held():
            # The step they belonged to was skipped: their gradients are gone.
            self._pending.clear()
        positions = None
        # Until the first step has proved that the parts add up, all of them are needed.
        if self._samples is not None and self._sum_checked:
            positions = [position for position, one in enumerate(checked) if one in self._samples]
        self._current = MicroBatch(checked, positions)
        self._pending.append(self._current)

    def _gradients_held(self) -> bool:
        held = sorted((one for one in self._parameters.values() if one.grad is not None), key=lambda one: one.numel())
        return any(bool(one.grad.any()) for one in held if one.grad is not None)

    def _check_length(self, batch: MicroBatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.ndim:
                if len(value) != len(batch.ids):
                    raise InvalidInputError(
                        f"the batch has {len(value)} rows and {len(batch.ids)} sample ids; give one id per row",
                        kind="wrong-ids",
                    )
                return

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
        assert self._scale is not None
        ratio = self._scale.ratio()
        self._check_step(ratio)
        self._ahead = step_groups(optimizer, self._names), ratio

    def _check_step(self, ratio: float) -> None:
        found: dict[int, list[Gradient]] = {}
        for batch in self._pending:
            for parameter, parts in batch.captured:
                found.setdefault(id(parameter), []).extend(parts)
        if not self._sum_checked:
            checks.check_sum(self._parameters, found, ratio)
            self._sum_checked = True
        elif any(not batch.empty for batch in self._pending):
            checks.check_captured(self._parameters, found)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._ahead is not None and self._scale is not None
        groups, ratio = self._ahead
        pending, self._pending = self._pending, []
        moment = self._epoch, self.step
        self.step += 1
        self._last = moment
        self._scale.clear()
        drawn = [one for batch in pending for one in batch.ids]
        self._store.append_step(*moment, groups, rank=self._rank, consumed_ratio=ratio, sample_ids=drawn)
        for sample, gradients in self._records(pending).items():
            self._store.append(*moment, sample, gradients, rank=self._rank, allow_zero=self._allow_zero, copy=False)

    def _records(self, pending: Sequence[MicroBatch]) -> dict[int, dict[str, list[Gradient]]]:
        """Return sample to parameter to parts, micro-batches and repeated draws joined."""
        records: dict[int, dict[str, list[Gradient]]] = {}
        for batch in pending:
            for index, sample in batch.rows():
                if self._samples is not None and sample not in self._samples:
                    continue
                gradients = records.setdefault(sample, {})
                for parameter, parts in batch.captured:
                    _join(gradients.setdefault(self._names[id(parameter)], []), parts[index])
        return {sample: gradients for sample, gradients in records.items() if gradients}


class _Batch:
    """What `Recorder.batch` returns: nothing to keep, or a `with` block over several forward passes."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __enter__(self) -> None:
        self._recorder._held = True

    def __exit__(self, *_: object) -> None:
        self._recorder._held = False
        self._recorder._current = None


def _join(parts: list[Gradient], part: Gradient) -> None:
    """Add a part: dense ones are summed, factors and rows stand beside each other."""
    if not isinstance(part, Factors | Rows):
        for number, other in enumerate(parts):
            if not isinstance(other, Factors | Rows) and other.dtype == part.dtype and other.dtype.names is None:
                parts[number] = other + part
                return
    parts.append(part)


def _ids(ids: Any) -> list[int]:
    """Return sample ids as integers, from a tensor, an array or a sequence."""
    values = ids.tolist() if hasattr(ids, "tolist") else list(ids) if isinstance(ids, Iterable) else ids
    if not isinstance(values, list) or not values or isinstance(ids, str):
        raise InvalidInputError(f"sample_ids holds one integer per row of the batch, not {ids!r}", kind="wrong-ids")
    return [whole_number(one, "sample id") for one in values]


def _on_host(batch: Any) -> Any:
    """Return a probe batch as numpy arrays."""
    if isinstance(batch, torch.Tensor):
        return batch.detach().cpu().numpy()
    if isinstance(batch, dict) or hasattr(batch, "items"):
        return {str(name): _on_host(value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_on_host(value) for value in batch)
    if isinstance(batch, np.ndarray):
        return batch
    raise InvalidInputError(f"a probe batch is a mapping, a tuple or a tensor, not {type(batch).__name__}")
