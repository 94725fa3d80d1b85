"""The probe filter: let the other samples' gradients answer, by the model's own curvature on a probe.

    d  <-  d + s phi(s H s) (inc / s - s H d),      phi(x) = (1 - exp(-x)) / x

bin after bin, where inc is the bin's first-order change, s the square root of its remaining step length
(one number per parameter) and H the Gauss-Newton matrix of the probe's mean loss. It is the closed form of
training's linear response with constant curvature: steep directions, where later training has undone most of
a sample's push already, are damped, flat ones pass.

For Adam s differs from element to element: the step length times what Adam multiplied a gradient by, so that
the filter works in the coordinates in which Adam's steps are plain ones.

Source: docs/design/rollback.md.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from timstore.errors import InvalidInputError
from timstore.rollbacks.krylov import Apply, krylov
from timstore.rollbacks.probe import Answer, Probe, tensors_of
from timstore.rollbacks.vectors import Vector, Workspace

# Parameter to s: one number for all its elements, or one each.
Scale = Callable[[str], Any]
# Whole change in the filter's coordinates, products with s H s of the probe's halves, to what tau is multiplied by.
Match = Callable[[Vector, tuple[Apply, Apply]], float]


@dataclass(frozen=True, eq=False, slots=True)
class Filtered:
    """What the filter returns.

    Attributes:
        moved: |first order - delta| / |delta|, how much curvature mattered.
        multiplier: of tau; 1 where it was not measured.
    """

    delta: Vector
    products: int
    moved: float
    multiplier: float


@dataclass(frozen=True, eq=False, slots=True)
class _Graph:
    """One batch's outputs, and J' u as a function of the dummy u."""

    outputs: torch.Tensor
    dummy: torch.Tensor
    pulled: tuple[torch.Tensor, ...]


def _graph_bytes(roots: Iterable[torch.Tensor], held: Set[int]) -> int:
    """Return the bytes of the storages that an autograd graph saves, but for those held anyway (by address)."""
    storages: dict[int, int] = {}
    waiting: list[Any] = [root.grad_fn for root in roots]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        for name in dir(node):
            saved = getattr(node, name) if name.startswith("_saved_") or name == "saved_tensors" else None
            for one in saved if isinstance(saved, tuple | list) else (saved,):
                if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in held:
                    storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(storages.values())


class GaussNewton:
    """Products with H = (1/N) sum of J' H_out J over the probe's N counted positions.

    J is the outputs' Jacobian, H_out the loss's second derivative by the outputs: diag(p) - p p' for cross
    entropy, 2 / values for mse.

    Cost: a product takes about two and a half gradients of the probe, half of that where the batch's graph was
    kept; memory of two parameter-sized tensors, one batch's graph, and `keep_bytes` for graphs kept between
    products.

    Args:
        keep_bytes: for the tensors that kept graphs hold; batches whose graphs do not fit are asked again in
            every product. The products are the same.
    """

    def __init__(self, model: torch.nn.Module, names: Sequence[str], probe: Probe, *, keep_bytes: int = 0) -> None:
        self.products = 0
        self._probe = probe
        self._tensors = tensors_of(model)
        self._names = list(names)
        self._free_bytes = keep_bytes
        self._kept: list[_Graph] = []
        self._keeping = True
        self._positions = 0
        with torch.no_grad():
            for number, answer in enumerate(probe.answers(self._tensors)):
                self._positions += len(answer.outputs)
                if not bool(torch.isfinite(answer.outputs).all()):
                    raise InvalidInputError(
                        f"the model's outputs on probe batch {number} hold NaN or Inf: leave that batch out",
                        kind="not-finite",
                    )
        self._leaves = {name: self._tensors[name].requires_grad_() for name in self._names}

    def product(self, vector: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return H v; parameter name to a flat tensor, in and out."""
        self.products += 1
        wanted = list(self._leaves.values())
        direction = [vector[name].to(leaf.dtype).view(leaf.shape) for name, leaf in self._leaves.items()]
        total = {name: torch.zeros_like(leaf).view(-1) for name, leaf in self._leaves.items()}
        for graph in self._graphs():
            (pushed,) = torch.autograd.grad(graph.pulled, graph.dummy, direction, retain_graph=True)
            bent = self._second_derivative(graph.outputs.detach(), pushed) / self._positions
            grads = torch.autograd.grad(graph.outputs, wanted, bent, retain_graph=True, materialize_grads=True)
            for name, grad in zip(self._leaves, grads, strict=True):
                total[name] += grad.reshape(-1)
        return total

    def _graphs(self) -> Iterator["_Graph"]:
        """Yield every batch's graph; keep the first ones for the next product, as many as fit."""
        yield from self._kept
        keeping, self._keeping = self._keeping, False
        held = {tensor.untyped_storage().data_ptr() for tensor in self._tensors.values()}
        leaves = list(self._leaves.values())
        for answer in self._probe.answers(self._tensors, first=len(self._kept)):
            if not answer.outputs.requires_grad:
                raise InvalidInputError(
                    "the model's outputs on the probe cannot be differentiated by its parameters: outputs= must return "
                    "logits that the model computed with gradients on, not labels or detached numbers",
                    kind="not-differentiable",
                )
            # J v: J' u is linear in u, so its derivative by u, along v, is J v.
            dummy = torch.zeros_like(answer.outputs, requires_grad=True)
            pulled = torch.autograd.grad(answer.outputs, leaves, dummy, create_graph=True, materialize_grads=True)
            graph = _Graph(answer.outputs, dummy, pulled)
            if keeping:
                self._free_bytes -= _graph_bytes((answer.outputs, *pulled), held)
                keeping = self._free_bytes >= 0
            if keeping:
                self._kept.append(graph)
            yield graph

    def _second_derivative(self, outputs: torch.Tensor, pushed: torch.Tensor) -> torch.Tensor:
        if self._probe.loss == "mse":
            return pushed * (2 / outputs.shape[-1])
        chances = outputs.softmax(-1)
        return chances * (pushed - (chances * pushed).sum(-1, keepdim=True))


def probe_filter(
    model: torch.nn.Module,
    increments: Sequence[Vector],
    lengths: Sequence[Mapping[str, float]],
    probe: Probe,
    workspace: Workspace,
    *,
    steps: int,
    coordinates: Vector | None = None,
    decays: Mapping[str, float] | None = None,
    match: Match | None = None,
    keep_bytes: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Filtered:
    """Return the change that remains when the other samples have answered.

    Cost: up to `steps` products for each bin and one more, and with `match` as many as four times `steps` with
    half of the probe; `steps` vectors in the workspace.

    Args:
        increments: first-order change of each time bin, in order of time; they are used up.
        lengths: of each bin, parameter to its remaining step length tau = s * s; a parameter with 0 passes.
        steps: Lanczos steps per bin.
        coordinates: what multiplies tau element by element (Adam); 1 when None.
        decays: parameter to a weight decay that is not in the increments, and bends as curvature does.
        match: measures what tau is multiplied by, from the whole change and the two halves' products.
        keep_bytes: for graphs of the probe's batches that are kept between products, which halves their time.
        advance: called after every product.
    """
    names = list(workspace.sizes)
    delta, first_order = workspace.new(), workspace.new()
    for increment in increments:
        first_order.add(increment)
    whole = _scale({name: sum(taus[name] for taus in lengths) for name in names}, coordinates)
    with probe.undisturbed():

        def asked(one: Probe, kept: int) -> _Bent:
            return _Bent(GaussNewton(model, names, one, keep_bytes=kept), decays or {}, advance)

        factor, products = 1.0, 0
        if match is not None:
            halves = [asked(one, keep_bytes // 2) for one in probe.halves()]
            start = workspace.new()
            _pushed(start, first_order, whole)
            factor = match(start, (halves[0].within(whole), halves[1].within(whole)))
            start.free()
            products = sum(one.curvature.products for one in halves) // 2
            del halves  # and the graphs that they kept
        bent = asked(probe, keep_bytes)
        for number, (increment, taus) in enumerate(zip(increments, lengths, strict=True)):
            scale = _scale({name: tau * factor for name, tau in taus.items()}, coordinates)
            held = bent.product(delta, lambda name: 1.0) if number else None
            for name in names:
                if taus[name] <= 0:
                    delta.write(name, 0, delta.read(name) + increment.read(name))
            _pushed(increment, increment, scale)
            if held is not None:
                for name, one in held.items():
                    increment.write(name, 0, increment.read(name) - scale(name) * one)
            held = None
            _add_filtered(delta, increment, scale, bent.within(scale), workspace, steps)
            increment.free()
    first_order.add(delta, -1.0)
    norm = delta.norm()
    moved = first_order.norm() / norm if norm else 0.0
    first_order.free()
    return Filtered(delta, products + bent.curvature.products, moved, factor)


class _Bent:
    """Products with a probe's curvature and the decays."""

    def __init__(self, curvature: GaussNewton, decays: Mapping[str, float], advance: Callable[[], None]) -> None:
        self.curvature = curvature
        self._decays = decays
        self._advance = advance

    def product(self, vector: Vector, scale: Scale) -> dict[str, torch.Tensor]:
        """Return H s v, in parameter-sized tensors."""
        scaled = {name: vector.read(name) * scale(name) for name in vector.workspace.sizes}
        bent = self.curvature.product(scaled)
        for name, decay in self._decays.items():
            bent[name] = bent[name] + decay * scaled[name]
        self._advance()
        return bent

    def within(self, scale: Scale) -> Apply:
        """Return products with s H s."""
        return lambda vector: {name: one * scale(name) for name, one in self.product(vector, scale).items()}


def _scale(taus: Mapping[str, float], coordinates: Vector | None) -> Scale:
    if coordinates is None:
        return lambda name: taus[name] ** 0.5
    return lambda name: (coordinates.read(name) * taus[name]).sqrt()


def _pushed(result: Vector, change: Vector, scale: Scale) -> None:
    """Write a change over s; 0 where an element has no length, and where its parameter has none."""
    for name in change.workspace.sizes:
        size, numbers = scale(name), change.read(name)
        size = size if isinstance(size, torch.Tensor) else torch.full_like(numbers, size)
        result.write(name, 0, torch.where(size > 0, numbers / size, 0.0))


def _add_filtered(delta: Vector, start: Vector, scale: Scale, apply: Apply, workspace: Workspace, steps: int) -> None:
    """Add s phi(s H s) start to delta."""
    space = krylov(start, apply, workspace, steps)
    if space is None:
        return
    values, vectors, weights = space.eigen()
    for vector, weight in zip(space.basis, (vectors @ (phi(values) * weights)).tolist(), strict=True):
        for name in workspace.sizes:
            delta.write(name, 0, delta.read(name) + weight * vector.read(name) * scale(name))
    space.free()


def phi(values: torch.Tensor) -> torch.Tensor:
    """Return (1 - exp(-x)) / x of every element, x >= 0."""
    small = values < 1e-8
    return torch.where(small, 1 - values / 2, -torch.expm1(-values) / torch.where(small, 1.0, values))


def probe_losses(model: torch.nn.Module, probe: Probe, delta: Vector, names: Sequence[str]) -> tuple[float, float]:
    """Return the probe's own mean loss before and after the change; the model itself is left alone.

    Where a batch names no targets, the model's outputs before the change are the targets.
    """
    before = tensors_of(model)
    after = dict(before)
    for name in names:
        after[name] = before[name] + delta.read(name).to(before[name]).view(before[name].shape)
    totals, positions = torch.zeros(2, dtype=torch.float64, device="cpu"), 0
    with torch.no_grad(), probe.undisturbed():
        for old, new in zip(probe.answers(before), probe.answers(after), strict=True):
            losses = [_loss(probe.loss, one.outputs, old) for one in (old, new)]
            totals += torch.tensor(losses, dtype=torch.float64, device="cpu")
            positions += len(old.outputs)
    return totals[0].item() / positions, totals[1].item() / positions


def _loss(kind: str, outputs: torch.Tensor, old: Answer) -> float:
    if kind == "mse":
        targets = old.outputs if old.targets is None else old.targets
        return float(F.mse_loss(outputs, targets.to(outputs.dtype)) * len(outputs))
    targets = old.outputs.softmax(-1) if old.targets is None else old.targets
    return float(F.cross_entropy(outputs, targets, reduction="sum"))
