"""Hooks on the model's leaf modules: inputs going forward, gradients coming back, parts of each sample out.

A hook is a tensor's or a module's and holds neither the output nor, once its gradient has come, the input.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from timstore.errors import CoverageError, InvalidInputError
from timstore.recording.modules import Call, Captured, EmbeddingKind, Input, Kind, check_separable, kind_of
from timstore.records import Gradient


@dataclass(eq=False)
class MicroBatch:
    """One forward and backward pass.

    Attributes:
        ids: the sample id of every row.
        positions: rows to capture, None for all of them.
        parts: parameter (by identity) to, per captured row, its parts.
    """

    ids: list[int]
    positions: list[int] | None
    captured: list[tuple[nn.Parameter, list[Gradient]]] = field(default_factory=list)
    inputs: dict[int, tuple[Callable[[], torch.Tensor | None], int, Input]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether no row of it is to be captured."""
        return self.positions is not None and not self.positions

    def rows(self) -> Iterator[tuple[int, int]]:
        """Yield (index among the captured rows, sample id)."""
        chosen = self.ids if self.positions is None else [self.ids[position] for position in self.positions]
        yield from enumerate(chosen)

    def share(self, tensor: torch.Tensor) -> Input:
        """Return the Input of a tensor, the same for all layers that were given this very tensor."""
        known = self.inputs.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        made = Input(tensor.detach())
        self.inputs[id(tensor)] = weakref.ref(tensor), tensor._version, made
        return made


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
        self._inside = False
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
            if not self._inside:
                self._forward(kind, args, kwargs, output)

        self._handles.append(kind.module.register_forward_hook(forward, with_kwargs=True))
        if isinstance(kind, EmbeddingKind):
            self._handles.append(kind.module.register_forward_pre_hook(self._expand))

    def _expand(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Give position ids (1, T) the batch's rows, so that each sample has a gradient of its own."""
        batch = self._current()
        if batch is None or not args or not torch.is_grad_enabled():
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
        chosen = None if batch.positions is None else torch.tensor(batch.positions, device=output.device)
        arguments = (_detached(args), _detached(kwargs)) if kind.needs_arguments else None
        # Only factors keep their input beyond backward; anything else must not hold on to an activation.
        shared = batch.share(given) if kind.keeps_input else Input(given.detach())
        call = Call(rows, chosen, shared, output.shape, arguments)
        # In-place operations on a view would lose a hook on it.
        target = output._base if output._is_view() and output._base is not None else output
        target.register_hook(self._backward(kind, call, batch))  # type: ignore[no-untyped-call]

    def _backward(self, kind: Kind, call: Call, batch: MicroBatch) -> Callable[[torch.Tensor], None]:
        def arrived(gradient: torch.Tensor) -> None:
            self._inside = True
            try:
                found: Captured = kind.capture(call, gradient, self._wanted)
            finally:
                self._inside = False
            batch.captured.extend(found)

        return arrived


def _detached(values: Any) -> Any:
    def one(value: Any) -> Any:
        return value.detach() if isinstance(value, torch.Tensor) else value

    if isinstance(values, dict):
        return {name: one(value) for name, value in values.items()}
    return tuple(one(value) for value in values)
