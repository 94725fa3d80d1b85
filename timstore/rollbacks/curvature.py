"""The curvature of a probe's loss at a model: products of its Gauss-Newton matrix with vectors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from timstore.errors import InvalidInputError
from timstore.rollbacks.probe import Probe, Room, tensors_of
from timstore.rollbacks.vectors import Vector


@dataclass(frozen=True, eq=False, slots=True)
class _Graph:
    """One batch's outputs, and J' u as a function of the dummy u."""

    outputs: torch.Tensor
    dummy: torch.Tensor
    pulled: tuple[torch.Tensor, ...]


def _graph_bytes(roots: Iterable[torch.Tensor], ours: Set[int]) -> int:
    """Return the bytes of the storages that an autograd graph saves, but for ours (by address)."""
    # Tensors that share a storage take its bytes once.
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
            for tensor in saved if isinstance(saved, tuple | list) else (saved,):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in ours:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


class GaussNewton:
    """Products with H = (1/N) sum of J' H_out J over the probe's N counted positions.

    J is the outputs' Jacobian, H_out the loss's second derivative by the outputs: diag(p) - p p' for cross
    entropy, 2 / values for mse.

    Cost: a product takes about two and a half gradients of the probe, half of that where the batch's graph was
    kept; memory of two parameter-sized tensors (three with `instead`), one batch's graph, and the room for graphs kept
    between products.

    Args:
        instead: parameters to take in place of the model's.
        room: for the tensors that kept graphs hold; batches whose graphs do not fit are asked again in every product.
            The products are the same.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        names: Sequence[str],
        probe: Probe,
        *,
        instead: Vector | None = None,
        room: Room | None = None,
    ) -> None:
        self._model, self._probe = model, probe
        self._names = list(names)
        self._instead = instead
        self._room = room or Room()
        self._graphs_kept: list[_Graph] = []
        # What the kept graphs are of; others are made for each product.
        self._graph_tensors: dict[str, torch.Tensor] | None = None
        self.positions = 0
        with torch.no_grad():
            for number, answer in enumerate(probe.answers(self._tensors())):
                self.positions += len(answer.outputs)
                if not bool(torch.isfinite(answer.outputs).all()):
                    raise InvalidInputError(
                        f"the model's outputs on probe batch {number} hold NaN or Inf: leave that batch out",
                        kind="not-finite",
                    )

    def product(self, vector: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return H v; parameter name to a flat tensor, in and out."""
        tensors = self._tensors() if self._graph_tensors is None else self._graph_tensors
        leaves = {name: tensors[name] for name in self._names}
        wanted = list(leaves.values())
        direction = [vector[name].to(leaf.dtype).view(leaf.shape) for name, leaf in leaves.items()]
        total = {name: torch.zeros_like(leaf).view(-1) for name, leaf in leaves.items()}
        for graph in self._graphs(tensors):
            # J v, then H_out J v / N, then J' of it: one batch's part of H v.
            (pushed,) = torch.autograd.grad(graph.pulled, graph.dummy, direction, retain_graph=True)
            bent = self._second_derivative(graph.outputs.detach(), pushed) / self.positions
            grads = torch.autograd.grad(graph.outputs, wanted, bent, retain_graph=True, materialize_grads=True)
            for name, grad in zip(leaves, grads, strict=True):
                total[name] += grad.reshape(-1)
        if self._graphs_kept:
            self._graph_tensors = tensors
        return total

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = tensors_of(self._model)
        if self._instead is not None:
            for name in self._instead.workspace.sizes:
                tensors[name] = self._instead.read(name).to(tensors[name]).view(tensors[name].shape)
        for name in self._names:
            tensors[name] = tensors[name].detach().requires_grad_()
        return tensors

    def _graphs(self, tensors: Mapping[str, torch.Tensor]) -> Iterator["_Graph"]:
        """Yield every batch's graph; in the first product keep as many as fit for the others."""
        yield from self._graphs_kept
        keeping = self._graph_tensors is None and self._room.is_left
        leaves = [tensors[name] for name in self._names]
        own = chain(self._model.parameters(), self._model.buffers())
        ours = {tensor.untyped_storage().data_ptr() for tensor in own}
        for answer in self._probe.answers(tensors, first=len(self._graphs_kept)):
            if not answer.outputs.requires_grad:
                raise InvalidInputError(
                    "the model's outputs on the probe cannot be differentiated by its parameters: outputs= must return "
                    "logits that the model computed with gradients on, not labels or detached numbers",
                    kind="not-differentiable",
                )
            # Reverse mode gives J' u. That is linear in u, so that its derivative by u, along v, is J v: two reverse
            # passes in place of a forward mode, which not every operation has.
            dummy = torch.zeros_like(answer.outputs, requires_grad=True)
            pulled = torch.autograd.grad(answer.outputs, leaves, dummy, create_graph=True, materialize_grads=True)
            graph = _Graph(answer.outputs, dummy, pulled)
            keeping = keeping and self._room.take(_graph_bytes((answer.outputs, *pulled), ours))
            if keeping:
                self._graphs_kept.append(graph)
            yield graph

    def _second_derivative(self, outputs: torch.Tensor, pushed: torch.Tensor) -> torch.Tensor:
        """Return H_out v at each position."""
        # mse is the mean over values of (o - y)^2: 2 / values on the diagonal. Cross entropy is log sum exp(o) - o_y,
        # with the gradient p - e_y, whose derivative diag(p) - p p' turns v into p (v - <p, v>).
        if self._probe.loss == "mse":
            return pushed * (2 / outputs.shape[-1])
        chances = outputs.softmax(-1)
        return chances * (pushed - (chances * pushed).sum(-1, keepdim=True))
