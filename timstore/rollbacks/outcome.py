"""What changes make of the model's answers on a probe. The model itself is left alone."""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F

from timstore.rollbacks.probe import Answer, Probe, tensors_of
from timstore.rollbacks.room import Room
from timstore.rollbacks.vectors import Vector


class Outcome:
    """A model and a probe, asked before a change and after it.

    Args:
        room: for answers before a change, which another change is held against as well; batches whose answers do not
            fit are asked again.
    """

    def __init__(self, model: torch.nn.Module, probe: Probe, *, room: Room | None = None) -> None:
        self._model, self._probe = model, probe
        self._room = room or Room()
        self._kept: list[Answer] = []

    def divergence(self, delta: Vector) -> float:
        """Return the mean over positions of KL(before || after), or of the mean squared difference for mse."""
        total, positions = 0.0, 0
        for old, new in self._answers(delta):
            if self._probe.loss == "mse":
                total += float(F.mse_loss(new.outputs, old.outputs)) * len(old.outputs)
            else:
                before, after = (one.outputs.double().log_softmax(-1) for one in (old, new))
                total += float(F.kl_div(after, before, log_target=True, reduction="sum"))
            positions += len(old.outputs)
        return total / positions

    def losses(self, delta: Vector) -> tuple[float, float]:
        """Return the probe's own mean loss before and after the change.

        Where a batch names no targets, the model's outputs before the change are the targets.
        """
        totals, positions = torch.zeros(2, dtype=torch.float64, device="cpu"), 0
        for old, new in self._answers(delta):
            losses = [_loss(self._probe.loss, one.outputs, old) for one in (old, new)]
            totals += torch.tensor(losses, dtype=torch.float64)
            positions += len(old.outputs)
        return totals[0].item() / positions, totals[1].item() / positions

    def _answers(self, delta: Vector) -> Iterator[tuple[Answer, Answer]]:
        """Yield the answers to each batch before and after a change."""
        before = tensors_of(self._model)
        after = dict(before)
        for name in delta.workspace.sizes:
            after[name] = before[name] + delta.read(name).to(before[name]).view(before[name].shape)
        with torch.no_grad(), self._probe.undisturbed():
            yield from zip(self._before(before), self._probe.answers(after), strict=True)

    def _before(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[Answer]:
        """Yield the answers before a change; keep the first ones for another, as many as fit."""
        kept = list(self._kept)
        yield from kept
        for answer in self._probe.answers(tensors, first=len(kept)):
            if self._room.is_left and self._room.take(answer.outputs.nbytes):
                self._kept.append(answer)
            yield answer


def _loss(kind: str, outputs: torch.Tensor, old: Answer) -> float:
    if kind == "mse":
        targets = old.outputs if old.targets is None else old.targets
        return float(F.mse_loss(outputs, targets.to(outputs.dtype)) * len(outputs))
    targets = old.outputs.softmax(-1) if old.targets is None else old.targets
    return float(F.cross_entropy(outputs, targets, reduction="sum"))
