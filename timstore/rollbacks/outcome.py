"""What a change makes of the model's answers on a probe. The model itself is left alone."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from timstore.rollbacks.probe import Answer, Probe, tensors_of
from timstore.rollbacks.vectors import Vector


def divergence(model: torch.nn.Module, probe: Probe, delta: Vector, names: Sequence[str]) -> float:
    """Return the mean over positions of KL(before || after), or of the mean squared difference for mse."""
    total, positions = 0.0, 0
    for old, new in _answers(model, probe, delta, names):
        if probe.loss == "mse":
            total += float(F.mse_loss(new.outputs, old.outputs)) * len(old.outputs)
        else:
            before, after = (one.outputs.double().log_softmax(-1) for one in (old, new))
            total += float(F.kl_div(after, before, log_target=True, reduction="sum"))
        positions += len(old.outputs)
    return total / positions


def probe_losses(model: torch.nn.Module, probe: Probe, delta: Vector, names: Sequence[str]) -> tuple[float, float]:
    """Return the probe's own mean loss before and after the change.

    Where a batch names no targets, the model's outputs before the change are the targets.
    """
    totals, positions = torch.zeros(2, dtype=torch.float64, device="cpu"), 0
    for old, new in _answers(model, probe, delta, names):
        totals += torch.tensor([_loss(probe.loss, one.outputs, old) for one in (old, new)], dtype=torch.float64)
        positions += len(old.outputs)
    return totals[0].item() / positions, totals[1].item() / positions


def _answers(
    model: torch.nn.Module, probe: Probe, delta: Vector, names: Sequence[str]
) -> Iterator[tuple[Answer, Answer]]:
    """Yield the answers to each batch before and after a change."""
    before = tensors_of(model)
    after = dict(before)
    for name in names:
        after[name] = before[name] + delta.read(name).to(before[name]).view(before[name].shape)
    with torch.no_grad(), probe.undisturbed():
        yield from zip(probe.answers(before), probe.answers(after), strict=True)


def _loss(kind: str, outputs: torch.Tensor, old: Answer) -> float:
    if kind == "mse":
        targets = old.outputs if old.targets is None else old.targets
        return float(F.mse_loss(outputs, targets.to(outputs.dtype)) * len(outputs))
    targets = old.outputs.softmax(-1) if old.targets is None else old.targets
    return float(F.cross_entropy(outputs, targets, reduction="sum"))
