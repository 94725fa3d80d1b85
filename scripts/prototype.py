"""The plain probe filter, densely and for SGD only: what timstore's own filter is measured against.

Four bins of equal step length, eight steps of Lanczos each, no correction of any kind (rollback-math, 2.8).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import timstore

BINS, STEPS = 4, 8


def prototype_change(store: timstore.Store, model: torch.nn.Module, probe: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Return the change of the trained parameters, flat; mappings with `input_ids`, the loss a mean over tokens."""
    wanted = {name: one for name, one in model.named_parameters() if one.requires_grad}
    increments, lengths = _increments(store, wanted)

    def bend(vector: torch.Tensor) -> torch.Tensor:
        return _product(model, wanted, probe, vector)

    change = torch.zeros_like(increments[0])
    with sdpa_kernel(SDPBackend.MATH):  # the one that can be differentiated twice
        for increment, tau in zip(increments, lengths, strict=True):
            rest = increment / tau - (bend(change) if change.any() else 0)
            change = change + tau * _phi_of(bend, rest, tau)
    return change


def _increments(
    store: timstore.Store, wanted: Mapping[str, torch.nn.Parameter]
) -> tuple[list[torch.Tensor], list[float]]:
    """Return each bin's first-order change, and its step length."""
    steps = store.sql("SELECT epoch, step, lr, momentum, consumed_ratio FROM steps ORDER BY epoch, step").fetchall()
    weight, buffer = {}, 0.0
    for epoch, step, lr, momentum, ratio in reversed(steps):
        buffer = lr + momentum * buffer
        weight[epoch, step] = buffer * ratio
    lengths, covered = [lr * ratio / (1 - momentum) for _, _, lr, momentum, ratio in steps], 0.0
    bins, taus = {}, [0.0] * BINS
    for (epoch, step, *_), length in zip(steps, lengths, strict=True):
        number = min(BINS - 1, int(BINS * covered / sum(lengths)))
        bins[epoch, step] = number
        taus[number] += length
        covered += length
    size = sum(one.numel() for one in wanted.values())
    increments = [torch.zeros(size) for _ in range(BINS)]
    for record in store.read():
        moment = record.epoch, record.step
        dense = torch.cat([torch.from_numpy(record.dense(name)).reshape(-1) for name in wanted])
        increments[bins[moment]] += weight[moment] * dense
    return increments, taus


def _product(
    model: torch.nn.Module,
    wanted: Mapping[str, torch.nn.Parameter],
    probe: Iterable[Mapping[str, Any]],
    vector: torch.Tensor,
) -> torch.Tensor:
    """Return H v of the probe's mean cross entropy, Gauss-Newton."""
    leaves = {name: one.detach().requires_grad_() for name, one in wanted.items()}
    parts = vector.split([one.numel() for one in leaves.values()])
    direction = [part.view(one.shape) for part, one in zip(parts, leaves.values(), strict=True)]
    total, positions = torch.zeros_like(vector), 0
    for batch in probe:
        outputs = functional_call(model, leaves, (), dict(batch)).logits[:, :-1]
        dummy = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, list(leaves.values()), dummy, create_graph=True)
        (pushed,) = torch.autograd.grad(pulled, dummy, direction, retain_graph=True)
        chances = outputs.detach().softmax(-1)
        bent = chances * (pushed - (chances * pushed).sum(-1, keepdim=True))
        grads = torch.autograd.grad(outputs, list(leaves.values()), bent)
        total += torch.cat([grad.reshape(-1) for grad in grads])
        positions += outputs[..., 0].numel()
    return total / positions


def _phi_of(bend: Any, start: torch.Tensor, tau: float) -> torch.Tensor:
    """Return phi(tau H) start, phi(x) = (1 - exp(-x)) / x, by Lanczos with full re-orthogonalisation."""
    length = start.norm()
    if length == 0:
        return start
    basis = [start / length]
    small = torch.zeros(STEPS, STEPS, dtype=torch.float64)
    for step in range(STEPS):
        candidate = tau * bend(basis[-1])
        small[step, step] = candidate @ basis[-1]
        for vector in (*basis, *basis):
            candidate = candidate - (candidate @ vector) * vector
        if step + 1 < STEPS:
            small[step, step + 1] = small[step + 1, step] = candidate.norm()
            basis.append(candidate / candidate.norm())
    values, vectors = torch.linalg.eigh(small)
    values = values.clamp(min=1e-12)
    weights = vectors @ (-torch.expm1(-values) / values * vectors[0])
    return length * (torch.stack(basis, 1) @ weights.float())
