"""Hooks on the model's modules: inputs going forward, gradients coming back, parts of each sample out.

A hook is a tensor's or a module's and holds neither the output nor, once its gradient has come, the input.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from timstore.errors import CoverageError, InvalidInputError, StateError, TimstoreWarning
from timstore.model.eval_guard import RandomState
from timstore.recording.attention import Projections
from timstore.recording.batches import MicroBatch
from timstore.recording.buffers import Buffers
from timstore.recording.calls import Arguments, Autocast, Call, Input, with_each_tensor
from timstore.recording.kinds import hooked_modules
from timstore.recording.layouts import Axis, Layout, Whole
from timstore.recording.looking import Look
from timstore.recording.modules import EmbeddingKind, Kind
from timstore.recording.pending import OwnPass, Running
from timstore.recording.replays import BatchNormKind
from timstore.recording.watching import Place, Watch

WAY_OUT = "freeze it, or record with capture='per-sample' (one more backward pass for each recorded sample)"


class Capture:
    """Puts the hooks on and takes them off.

    Args:
        trained: the parameters to capture.
        running: which micro-batch runs.
        own: passes of our own, of which hooks take nothing.
        by_sample: what no module's hook can see is left to a backward pass of each sample, instead of refused.
        scale: of the gradients that arrive in those that the optimizer consumes: 1 / ranks.

    Attributes:
        watch: filled instead of recording while the model is looked at.
        seen: where each module has the samples, once that was looked for.
        names: of the modules that are seen.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Iterable[nn.Parameter],
        running: Running,
        own: OwnPass,
        *,
        by_sample: bool = False,
        scale: float = 1.0,
    ) -> None:
        self._trained = {id(parameter) for parameter in trained}
        self._running = running
        self._own = own
        self._by_sample = by_sample
        self._scale = scale
        self.buffers = Buffers()
        self.watch: Watch | None = None
        self.seen: Look | None = None
        self._warned: set[str] = set()
        self._kinds: list[Kind] = []
        self.names: set[str] = set()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        try:
            for kind in hooked_modules(model, lambda one: id(one) in self._trained, self.replaying):
                if isinstance(kind, Kind):
                    self._hook(kind)
                else:
                    self._hook_attention(*kind)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def warns_of_coupling(self) -> bool:
        """Whether a module that mixes samples says so itself."""
        return any(isinstance(kind, BatchNormKind) and kind.mixes for kind in self._kinds)

    @property
    def is_replaying(self) -> bool:
        """Whether a module is being computed again, or differentiated once more, by ourselves."""
        return self._own.runs()

    def replaying(self) -> AbstractContextManager[None]:
        """Let no hook of ours do anything."""
        return self._own.running()

    def _hook(self, kind: Kind) -> None:
        self._kinds.append(kind)
        self.names.add(kind.name)
        random: list[RandomState] = []

        def forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self.is_replaying:
                given = args[0] if args else next(iter(kwargs.values()), None)
                self._seen(kind, given, output, (args, kwargs), _drawn(kind, random.pop()) if random else None)

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            batch = self._running.current
            idle = self.watch is not None or self.is_replaying or (batch is not None and batch.empty)
            random.clear()
            if not idle and torch.is_grad_enabled():
                devices = (one.device for one in kind.parameters())
                random.append(RandomState(devices, beyond_torch=kind.draws_elsewhere is not False))

        if kind.needs_arguments:  # nothing else is computed again
            self._handles.append(kind.module.register_forward_pre_hook(before))
        self._handles.append(kind.module.register_forward_hook(forward, with_kwargs=True))
        if isinstance(kind, EmbeddingKind):

            def spread(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
                return self._spread(kind, args)

            self._handles.append(kind.module.register_forward_pre_hook(spread))

    def _hook_attention(self, name: str, module: nn.MultiheadAttention) -> None:
        def see(kind: Kind, given: torch.Tensor, output: torch.Tensor, layout: Layout) -> None:
            if not self.is_replaying:
                self._seen(kind, given, output, None, None, layout)

        self.names.add(name)
        projections = Projections(name, module, see)
        self._handles.append(module.register_forward_pre_hook(lambda *_: projections.begin()))
        self._handles.append(module.register_forward_hook(lambda *_: projections.end(), always_call=True))

    def _spread(self, kind: Kind, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Give a row of ids, (1, T), the batch's rows, so that each sample has a gradient of its own.

        Where the model was seen to do the same with them, as with positions; not with one row of which it makes
        something for all samples.
        """
        if self.is_replaying or not args or not _is_row_of_ids(args[0]):
            return None
        if self.watch is not None:
            rows, proved = self.watch.rows, kind.name in self.watch.spread
            if rows > 1:
                self.watch.tables.setdefault(kind.name, [])
        else:
            batch = self._batch(kind.module)
            if batch is None or batch.empty or not torch.is_grad_enabled():
                return None
            rows, proved = batch.rows_given, self.seen is not None and self.seen.tables.get(kind.name, False)
        return (args[0].expand(rows, -1), *args[1:]) if proved and rows > 1 else None

    def _is_trained(self, parameter: Any) -> bool:
        """Whether a backward pass accumulates into it: it may have been frozen on the way."""
        return id(parameter) in self._trained and parameter.requires_grad

    def _batch(self, module: nn.Module) -> MicroBatch | None:
        batch = self._running.current
        if batch is None and _in_backward():
            batch = self._running.recomputed(module)
        return batch

    def _seen(
        self,
        kind: Kind,
        given: Any,
        output: Any,
        arguments: Arguments | None,
        random: RandomState | None,
        layout: Layout | None = None,
    ) -> None:
        if self.watch is not None:
            # Of an attention's projections the first ones, (L, N, E), say where the samples are.
            if isinstance(given, torch.Tensor) and (layout is None or given.ndim == 3):
                self.watch.note(kind.name, given, output)
            return
        batch = self._batch(kind.module)
        if not torch.is_grad_enabled():
            if batch is not None:
                batch.unseen.add(id(kind.module))
            return
        if batch is None:
            if _in_backward() or not _requires_grad(output):
                return  # a checkpoint that computes again what has its hooks
            raise InvalidInputError(
                f"module {kind.name} ran a training forward without sample ids: pass sample_ids=... to the model, use "
                "recorder.batch(ids), or wrap what is no training in torch.no_grad()",
                kind="no-ids",
            )
        if batch.empty or not _requires_grad(output):
            return
        if isinstance(kind, EmbeddingKind) and _is_row_of_ids(given) and batch.rows_given > 1:
            self._warn_once(
                kind,
                "is looked up by one row of ids for all samples, so that its gradient is taken by one more backward "
                "pass for each recorded sample. To save these, give it a row of ids for each sample, or freeze it",
            )
            self._leave_to_passes(kind, batch)
            return
        try:
            if layout is None:
                layout = self._place(kind, given, output, batch)
            else:
                self._check_attention(kind, given, batch, layout)
        except CoverageError:
            if not self._by_sample:
                raise
            self._leave_to_passes(kind, batch)
            return
        self._check_separable(kind)
        kept = with_each_tensor(arguments, torch.Tensor.detach) if kind.needs_arguments and arguments else None
        # Only factors keep their input beyond backward; anything else must not hold on to an activation.
        shared = batch.share(given) if kind.keeps_input else Input(given.detach())
        call = Call(
            f"{kind.name} ({type(kind.module).__name__})",
            batch.chosen,
            layout,
            shared,
            given._version,
            output.shape,
            kept,
            Autocast.now(output.device),
            random,
            self.buffers,
        )
        batch.watch(call)
        _hooked(output).register_hook(self._backward(kind, call, weakref.ref(batch)))  # type: ignore[no-untyped-call]

    def _leave_to_passes(self, kind: Kind, batch: MicroBatch) -> None:
        """Have the gradients of a module's parameters taken by a backward pass of each sample."""
        batch.whole.update(id(parameter) for parameter in kind.parameters() if id(parameter) in self._trained)

    def _warn_once(self, kind: Kind, what: str) -> None:
        """Say something of a module, the first time that it is so."""
        if kind.name not in self._warned:
            self._warned.add(kind.name)
            text = f"module {kind.name} ({type(kind.module).__name__}) {what}"
            warnings.warn(text, TimstoreWarning, stacklevel=3)

    def _place(self, kind: Kind, given: Any, output: Any, batch: MicroBatch) -> Layout:
        """Return where the samples are.

        Raises:
            CoverageError: they cannot be told apart there.
        """
        if not isinstance(output, torch.Tensor) or not isinstance(given, torch.Tensor):
            raise CoverageError(
                f"module {kind.name} ({type(kind.module).__name__}) does not map one tensor to one tensor: its "
                f"gradient cannot be taken per sample; {WAY_OUT}, or build it from Linear layers",
                module=kind.name,
            )
        rows = len(batch.ids)
        found: Layout | None
        if batch.layout is not None:
            found = batch.layout
        elif rows == 1:
            found = Axis(0) if Axis(0).fits(given.shape, 1) else Whole()
        else:
            # Layers that are called one by one, in a block of `recorder.batch`, have the batch on axis 0.
            found = None if self.seen is None and _is_square(output, rows) else Axis(0)
            if self.seen is not None:
                found = self.seen.layout(kind.name, given.shape, rows, batch.sizes)
        if found is None:
            raise CoverageError(
                f"module {kind.name}: its input {tuple(given.shape)} does not follow the order of the batch's rows on "
                "any axis, or did not while the batch was looked at (some layers run in training only, or for some "
                f"data): no gradient could be told from another. Keep the batch on axis 0; or {WAY_OUT}",
                kind="order-check",
                module=kind.name,
            )
        if not found.fits(given.shape, rows) or not found.fits(output.shape, rows):
            raise CoverageError(
                f"module {kind.name} maps {tuple(given.shape)} to {tuple(output.shape)}, and the batch has {rows} "
                f"sample ids: no axis of it is the batch. Keep axis 0 so; or {WAY_OUT}",
                module=kind.name,
            )
        return found

    def _check_attention(self, kind: Kind, given: torch.Tensor, batch: MicroBatch, layout: Layout) -> None:
        """Refuse an attention whose own axis of samples is not the batch."""
        rows = len(batch.ids)
        place = self.seen.places.get(kind.name) if self.seen is not None and rows > 1 else Place(Axis(1))
        seen = batch.layout is None and place is not None and place.layout == Axis(1)
        seen = seen and not (self.seen is None and rows > 1 and _is_square(given, rows))
        if not seen or not layout.fits(given.shape, rows):
            raise CoverageError(
                f"module {kind.name} (MultiheadAttention) has the batch of {rows} samples on another axis than it "
                f"takes for it (batch_first={kind.module.batch_first}), or packed: {WAY_OUT}",
                kind="order-check",
                module=kind.name,
            )

    def _check_separable(self, kind: Kind) -> None:
        """Warn of a module whose output for one sample depends on the others."""
        if isinstance(kind, BatchNormKind) and kind.mixes:
            if isinstance(kind.module, nn.SyncBatchNorm):
                raise CoverageError(
                    f"module {kind.name} (SyncBatchNorm) mixes the samples of several processes; put it in eval mode",
                    module=kind.name,
                )
            self._warn_once(
                kind,
                "mixes the samples of a batch in training mode: a record holds what came through its sample's row, a "
                "part of which other samples' losses caused, and the running statistics keep what a rollback removes "
                "from the parameters. The records still add up to the gradient. To keep samples apart: "
                f"{kind.name}.eval(), or GroupNorm or LayerNorm",
            )

    def _backward(self, kind: Kind, call: Call, owner: "weakref.ref[MicroBatch]") -> Callable[[torch.Tensor], None]:
        def arrived(gradient: torch.Tensor) -> None:
            if not self._handles or self.is_replaying:
                return
            batch = owner()
            if batch is None or call.released:
                raise StateError(
                    f"module {kind.name}: a backward pass came after the optimizer step that its forward pass belonged "
                    "to; run every backward before the step",
                    kind="late-backward",
                )
            whole = batch.whole
            scaled = gradient.reshape(call.output_shape)
            scaled = scaled if self._scale == 1.0 else scaled * self._scale
            batch.arrive(kind.capture(call, scaled, lambda one: self._is_trained(one) and id(one) not in whole))

        return arrived


def _drawn(kind: Kind, began: RandomState) -> RandomState | None:
    """Return where the generators were when a module's call began; None where it drew no random numbers."""
    if kind.draws_elsewhere is None and kind.module.training:
        kind.draws_elsewhere = began.moved_beyond_torch()
    return began if began.moved() else None


def _is_row_of_ids(given: Any) -> bool:
    """Say whether a table is given one row of ids, (1, T)."""
    return isinstance(given, torch.Tensor) and given.ndim == 2 and len(given) == 1


def _is_square(tensor: torch.Tensor, rows: int) -> bool:
    """Say whether the tokens are as many as the rows, so that shapes cannot tell which axis is the batch."""
    return tensor.ndim == 3 and tensor.shape[0] == tensor.shape[1] == rows


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _requires_grad(output: Any) -> bool:
    if isinstance(output, torch.Tensor):
        return output.requires_grad
    if isinstance(output, tuple | list):
        return any(_requires_grad(one) for one in output)
    return isinstance(output, dict) and _requires_grad(list(output.values()))


def _hooked(output: torch.Tensor) -> torch.Tensor:
    """Return the tensor to hook: an in-place operation on a view would lose a hook on the view itself."""
    base = output._base if output._is_view() else None
    whole = base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    # A permuted view has its elements in another order than what it is a view of.
    return base if base is not None and whole and base.requires_grad else output
