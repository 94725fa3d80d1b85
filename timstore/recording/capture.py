"""Hooks on the model's leaf modules: inputs going forward, gradients coming back, parts of each sample out.

A hook is a tensor's or a module's and holds neither the output nor, once its gradient has come, the input.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from timstore.errors import CoverageError, InvalidInputError, StateError
from timstore.recording.batches import MicroBatch
from timstore.recording.buffers import Buffers
from timstore.recording.modules import Call, EmbeddingKind, Input, Kind, check_separable, kind_of


class Capture:
    """Puts the hooks on and takes them off.

    Args:
        trained: the parameters to capture.
        current: returns the micro-batch of the forward pass that runs; None when there is none.
        seen: told every hooked module's name and input while the order of samples is checked.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Iterable[nn.Parameter],
        current: Callable[[], MicroBatch | None],
        seen: Callable[[str, torch.Tensor], bool],
    ) -> None:
        self._trained = {id(parameter) for parameter in trained}
        self._current = current
        self._seen = seen
        self._buffers = Buffers()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        try:
            for name, module in model.named_modules():
                own = any(self._wanted(parameter) for parameter in module.parameters(recurse=False))
                # A module with children and parameters of its own is no leaf: only the sum check sees those.
                if own and not next(module.children(), None):
                    self._hook(kind_of(name or type(module).__name__, module))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _wanted(self, parameter: Any) -> bool:
        return id(parameter) in self._trained

    def _hook(self, kind: Kind) -> None:
        def forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._forward(kind, args, kwargs, output)

        self._handles.append(kind.module.register_forward_hook(forward, with_kwargs=True))
        if isinstance(kind, EmbeddingKind):
            self._handles.append(kind.module.register_forward_pre_hook(self._expand))

    def _expand(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Give position ids (1, T) the batch's rows, so that each sample has a gradient of its own."""
        batch = self._current()
        if batch is None or batch.empty or not args or not torch.is_grad_enabled():
            return None
        ids, rows = args[0], len(batch.ids)
        if isinstance(ids, torch.Tensor) and ids.ndim == 2 and len(ids) == 1 and rows > 1:
            return (ids.expand(rows, -1), *args[1:])
        return None

    def _forward(self, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(given, torch.Tensor) and self._seen(kind.name, given):
            return
        if not torch.is_grad_enabled():
            return
        batch = self._current()
        if batch is None:
            if isinstance(output, torch.Tensor) and not output.requires_grad:
                return
            if torch._C._current_graph_task_id() != -1:
                return  # a checkpoint computes again during backward; its first pass has the hooks
            raise InvalidInputError(
                f"module {kind.name} ran a training forward without sample ids: pass sample_ids=... to the model, use "
                "recorder.batch(ids), or wrap what is no training in torch.no_grad()",
                kind="no-ids",
            )
        if batch.empty:
            return
        if not isinstance(output, torch.Tensor) or not isinstance(given, torch.Tensor):
            raise CoverageError(
                f"module {kind.name} ({type(kind.module).__name__}) does not map one tensor to one tensor: its "
                "gradient cannot be taken per sample; freeze it, or build it from Linear layers",
                module=kind.name,
            )
        if not output.requires_grad:
            return
        check_separable(kind.name, kind.module)
        rows = len(batch.ids)
        if given.shape[:1] != (rows,) or output.shape[:1] != (rows,):
            raise CoverageError(
                f"module {kind.name} maps {tuple(given.shape)} to {tuple(output.shape)}, and the batch has {rows} "
                "sample ids: axis 0 must be the batch. Keep it so, or freeze the module",
                module=kind.name,
            )
        arguments = (_detached(args), _detached(kwargs)) if kind.needs_arguments else None
        # Only factors keep their input beyond backward; anything else must not hold on to an activation.
        shared = batch.share(given) if kind.keeps_input else Input(given.detach())
        call = Call(rows, batch.chosen(output.device), shared, given._version, output.shape, arguments, self._buffers)
        batch.watch(call)
        _hooked(output).register_hook(self._backward(kind, call, weakref.ref(batch)))  # type: ignore[no-untyped-call]

    def _backward(self, kind: Kind, call: Call, owner: "weakref.ref[MicroBatch]") -> Callable[[torch.Tensor], None]:
        def arrived(gradient: torch.Tensor) -> None:
            if not self._handles:
                return
            batch = owner()
            if batch is None or call.released:
                raise StateError(
                    f"module {kind.name}: a backward pass came after the optimizer step that its forward pass belonged "
                    "to; run every backward before the step",
                    kind="late-backward",
                )
            batch.captured.extend(kind.capture(call, gradient, self._wanted))

        return arrived


def _hooked(output: torch.Tensor) -> torch.Tensor:
    """Return the tensor to hook: an in-place operation on a view would lose a hook on the view itself."""
    base = output._base if output._is_view() else None
    whole = base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    # A permuted view has its elements in another order than what it is a view of.
    return base if base is not None and whole and base.requires_grad else output


def _detached(values: Any) -> Any:
    def one(value: Any) -> Any:
        return value.detach() if isinstance(value, torch.Tensor) else value

    if isinstance(values, dict):
        return {name: one(value) for name, value in values.items()}
    return tuple(one(value) for value in values)
