"""Modules computed again, alone, to know one sample's gradient: norms, layers of one's own, bare parameters."""

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from timstore.errors import CoverageError
from timstore.model.eval_guard import RandomState
from timstore.recording.batch_axis import Axis, Parts, only
from timstore.recording.calls import Arguments, Call, rows_of, wide_dtype, with_each_tensor
from timstore.recording.modules import Captured, Kind, Wanted, check_embedding, looked_up
from timstore.records import Gradient


class ReplayedKind(Kind):
    """A module whose own parameters get a vector-Jacobian product for each sample.

    Norms, layers of one's own, and modules that hold parameters beside their children, such as a class token. A call
    that drew no random numbers is computed from one sample's rows; another one from all of them, with the numbers that
    it drew, and the gradient at its output masked. A module that was seen to do no more than to scale and to shift by
    its parameters (norms) is computed once for all samples.

    Args:
        replaying: a context in which no module's hook of ours does anything.
        apart: parameters, by identity, that are captured elsewhere.
    """

    needs_arguments = True

    def __init__(
        self, name: str, module: nn.Module, replaying: Callable[[], Any], *, apart: Collection[int] = ()
    ) -> None:
        super().__init__(name, module)
        self._replaying = replaying
        self._held = {key: one for key, one in module.named_parameters(recurse=False) if id(one) not in apart}
        self._only_scales: bool | None = None  # not known yet

    def parameters(self) -> list[nn.Parameter]:
        return list(self._held.values())

    def capture(self, call: Call, gradient: torch.Tensor, wanted: Wanted) -> Captured:
        assert call.arguments is not None
        call.held()  # the same that it was
        held = {name: one for name, one in self._held.items() if wanted(one)}
        if not held:
            return []
        # Other tensors than the input may have as many rows by chance.
        sliced = call.layout == Axis(0) and call.random is None and _tensors_in(call.arguments) == 1
        with self._replaying(), torch.enable_grad(), call.autocast.again(), _numbers_of(call, gradient):
            quick = self._from_scales(call, gradient, held) if sliced and self._only_scales is not False else None
            if quick is None or self._only_scales is None:
                computed = self._from_rows(call, gradient, held) if sliced else None
                sliced = computed is not None
                each = computed if computed is not None else self._from_all(call, gradient, held)
                rows = [torch.stack(of_one) for of_one in zip(*each, strict=True)]
                if sliced:
                    self._only_scales = quick is not None and all(map(_alike, quick, rows))
            else:
                rows = quick
            # Copied: a gradient may be a view of the one that came in, which autograd goes on adding to.
            copies = [call.buffers.copy(one) for one in rows]
        return [(parameter, list(parts)) for parameter, parts in zip(held.values(), copies, strict=True)]

    def _from_scales(
        self, call: Call, gradient: torch.Tensor, held: Mapping[str, nn.Parameter]
    ) -> list[torch.Tensor] | None:
        """Return (n, *shape) for each parameter, as if the output were linear in them, element by element.

        None where it surely is not: where parameters have other shapes than the output's last axes.
        """
        assert call.arguments is not None
        shapes = [tuple(one.shape) for one in held.values()]
        if any(
            not 0 < len(shape) < len(call.output_shape) or tuple(call.output_shape[-len(shape) :]) != shape
            for shape in shapes
        ):
            return None
        args, kwargs = _of_samples(call.arguments, call.chosen.batch, call.chosen.take)
        grads = call.chosen.take(gradient)
        with torch.no_grad():
            without = {f"module.{name}": torch.zeros_like(one) for name, one in held.items()}
            base = self._of_rows(without, args, kwargs, grads.shape)
            if base is None:
                return None
            found, combined = [], base
            for name, one in held.items():
                scale = self._run({**without, f"module.{name}": torch.ones_like(one)}, args, kwargs) - base
                product = (grads * scale).reshape(len(grads), -1, *one.shape)
                rows = call.chosen.by_sample(product.sum(1, dtype=wide_dtype(product.dtype)))
                summed = rows.sum(1) if isinstance(rows, torch.Tensor) else torch.stack([part.sum(0) for part in rows])
                found.append(summed.to(one.dtype))
                combined = combined + scale * one
            if self._only_scales is None and not _alike(combined, self._run(_leaves(held), args, kwargs)):
                return None
        return found

    def _from_rows(
        self, call: Call, gradient: torch.Tensor, held: Mapping[str, nn.Parameter]
    ) -> list[Sequence[torch.Tensor]] | None:
        """Return each sample's gradients, by its rows alone; None where the module does not map rows to rows."""
        assert call.arguments is not None
        each = []
        for rows in call.chosen.rows:
            args, kwargs = _of_samples(call.arguments, call.chosen.batch, operator.itemgetter(rows))
            leaves = _leaves(held)
            output = self._of_rows(leaves, args, kwargs, gradient[rows].shape)
            if output is None:
                return None
            each.append(_pull_back(output, leaves, gradient[rows]))
        return each

    def _from_all(
        self, call: Call, gradient: torch.Tensor, held: Mapping[str, nn.Parameter]
    ) -> list[Sequence[torch.Tensor]]:
        """Return each sample's gradients, by what the module makes of all rows."""
        assert call.arguments is not None and call.layout is not None
        args, kwargs = call.arguments
        leaves = _leaves(held)
        output = self._run(leaves, args, kwargs)
        masked = (only(gradient, call.layout, call.chosen.batch, rows) for rows in call.chosen.rows)
        return [_pull_back(output, leaves, one) for one in masked]

    def _of_rows(
        self, leaves: Mapping[str, torch.Tensor], args: Any, kwargs: Any, shape: torch.Size
    ) -> torch.Tensor | None:
        """Return what the module makes of some rows; None where it does not take them alone."""
        try:
            output = self._run(leaves, args, kwargs)
        except RuntimeError:
            return None
        return output if output.shape == shape else None

    def _run(self, leaves: Mapping[str, torch.Tensor], args: Any, kwargs: Any) -> torch.Tensor:
        # Statistics that the module keeps have seen this pass already.
        kept = dict(self.module.named_buffers())
        kept |= {name: one for name, one in self.module.named_parameters(recurse=False) if not one.requires_grad}
        buffers = {f"module.{name}": one.clone() for name, one in kept.items()}
        with _attributes_put_back(self.module):
            output: torch.Tensor = functional_call(_Unhooked(self.module), {**leaves, **buffers}, args, kwargs)
        return output


class BatchNormKind(Kind):
    """Batch norm: its scale and shift, by the row that a gradient comes through."""

    @property
    def mixes(self) -> bool:
        """Whether its output for one sample depends on the others."""
        return self.module.training

    def capture(self, call: Call, gradient: torch.Tensor, wanted: Wanted) -> Captured:
        module: Any = self.module
        captured: Captured = []
        for parameter in (module.weight, module.bias):
            if not isinstance(parameter, nn.Parameter) or not wanted(parameter):
                continue
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                parts = call.samples(
                    self._added_up(gradient * self._normal(call) if parameter is module.weight else gradient)
                )
            captured.append((parameter, list(call.buffers.copy(_totals(parts, parameter)))))
        return captured

    def _normal(self, call: Call) -> torch.Tensor:
        """Return what is scaled and shifted."""
        module: Any = self.module
        mean, variance = (None, None) if module.training else (module.running_mean, module.running_var)
        given = call.held()
        return nn.functional.batch_norm(
            given.to(wide_dtype(given.dtype)), mean, variance, training=mean is None, momentum=0.0, eps=module.eps
        )

    def _added_up(self, images: torch.Tensor) -> torch.Tensor:
        """Return (rows, channels), the sums over all places of an image."""
        return images.flatten(2).sum(2, dtype=wide_dtype(images.dtype)) if images.ndim > 2 else images


class LayerNormKind(BatchNormKind):
    """Layer norm: the same, by each sample's own statistics."""

    mixes = False

    def _normal(self, call: Call) -> torch.Tensor:
        module: Any = self.module
        given = call.held()
        return nn.functional.layer_norm(given.to(wide_dtype(given.dtype)), module.normalized_shape, eps=module.eps)

    def _added_up(self, images: torch.Tensor) -> torch.Tensor:
        return images


def _totals(parts: Parts, parameter: nn.Parameter) -> torch.Tensor:
    """Return (n, *shape), the sum of all of each sample's parameter-shaped pieces."""
    if isinstance(parts, list):
        return torch.cat([_totals(part[None], parameter) for part in parts])
    pieces = parts.reshape(len(parts), -1, *parameter.shape)
    return pieces.sum(1, dtype=wide_dtype(parts.dtype)).to(parameter.dtype)


class LookUpKind(Kind):
    """A table with a forward of its own, such as Gemma's scaled one: computed again, to see what it looks up."""

    needs_arguments = True

    def __init__(self, name: str, module: nn.Embedding, replaying: Callable[[], Any]) -> None:
        super().__init__(name, module)
        check_embedding(name, module)
        self._replaying = replaying

    def capture(self, call: Call, gradient: torch.Tensor, wanted: Wanted) -> Captured:
        weight = self.module.weight
        assert call.arguments is not None and isinstance(weight, nn.Parameter)
        if not wanted(weight):
            return []
        args, kwargs = call.arguments
        seen: list[tuple[torch.Tensor, torch.Tensor, Any]] = []
        with (
            self._replaying(),
            torch.enable_grad(),
            call.autocast.again(),
            _numbers_of(call, gradient),
            _LookUps(weight, seen),
        ):
            output = self.module.forward(*args, **kwargs)
        if len(seen) != 1:
            raise CoverageError(
                f"module {self.name} ({type(self.module).__name__}) looks up {len(seen)} times in one call, where one "
                "can be followed; freeze it",
                module=self.name,
            )
        ids, rows, padding = seen[0]
        (grads,) = torch.autograd.grad(output, rows, gradient)
        found: list[Gradient] = [
            looked_up(call, one.reshape(-1), rows_of(part), weight, padding)
            for one, part in zip(call.samples(ids), call.samples(grads), strict=True)
        ]
        return [(weight, found)]


class _LookUps(torch.overrides.TorchFunctionMode):
    """Notes what is looked up in a table, as leaves of their own."""

    def __init__(self, weight: torch.Tensor, seen: list[tuple[torch.Tensor, torch.Tensor, Any]]) -> None:
        super().__init__()
        self._weight = weight
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.embedding or len(args) < 2 or args[1] is not self._weight:
            return func(*args, **kwargs)
        padding = args[2] if len(args) > 2 else kwargs.get("padding_idx")
        rows = self._weight.detach()[args[0]].requires_grad_()
        self._seen.append((args[0], rows, padding))
        return rows


class _Unhooked(nn.Module):
    """Computes a module again without its hooks, ours and the user's: they have seen this pass already."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


@contextmanager
def _attributes_put_back(module: nn.Module) -> Iterator[None]:
    """Put back what a forward pass leaves on a module, and on those in it: counters, averages, its last output."""
    attributes = [(inner, dict(vars(inner))) for inner in module.modules()]
    values = [value for _, named in attributes for value in named.values() if isinstance(value, torch.Tensor)]
    copies = [(value, value.detach().clone()) for value in values if not value.requires_grad]
    try:
        yield
    finally:
        for inner, named in attributes:
            vars(inner).clear()
            vars(inner).update(named)
        with torch.no_grad():
            for value, copy in copies:
                if not torch.equal(value, copy):
                    value.copy_(copy)


def _leaves(held: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {f"module.{name}": one.detach().requires_grad_() for name, one in held.items()}


def _pull_back(
    output: torch.Tensor, leaves: Mapping[str, torch.Tensor], gradient: torch.Tensor
) -> Sequence[torch.Tensor]:
    if not output.requires_grad:  # a layer that was left out, and gave back what it was given
        return [torch.zeros_like(leaf) for leaf in leaves.values()]
    return torch.autograd.grad(
        output, list(leaves.values()), gradient, allow_unused=True, materialize_grads=True, retain_graph=True
    )


@contextmanager
def _numbers_of(call: Call, gradient: torch.Tensor) -> Iterator[None]:
    """Give a module that is computed again the random numbers that its call drew; training goes on with its own."""
    if call.random is None:
        yield
        return
    state = RandomState([gradient.device])
    call.random.rewind()
    try:
        yield
    finally:
        state.rewind()


def _tensors_in(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return 1
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_tensors_in, value)) if isinstance(value, tuple | list) else 0


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two ways to compute the same numbers agree up to rounding."""
    allowed = 1e-4 if wide_dtype(other.dtype) == other.dtype else 2e-2
    return float((one - other).norm()) <= allowed * float(other.norm())


def _of_samples(arguments: Arguments, batch: int, take: Callable[[torch.Tensor], torch.Tensor]) -> Arguments:
    """Return the arguments for some of the samples, which `take` picks along axis 0."""
    return with_each_tensor(arguments, lambda value: take(value) if value.shape[:1] == (batch,) else value)
