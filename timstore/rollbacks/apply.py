"""The last step: add the deltas to the model, once per parameter, in the parameter's own precision."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from timstore.rollbacks.vectors import Vector, Workspace


@dataclass(frozen=True, slots=True)
class Change:
    """What applying a delta does to the parameters, known before it is applied.

    Attributes:
        norm: of the delta.
        before_norm: of the changed parameters.
        lost_norm: of what their precision cannot take up.
        finite: whether every new value is.
    """

    norm: float
    before_norm: float
    lost_norm: float
    finite: bool


def new_values(parameter: torch.Tensor, delta: Vector, name: str, block_numel: int) -> Iterator[torch.Tensor]:
    """Yield the parameter's new values, flat and in order, a block at a time; the parameter is not changed."""
    flat = parameter.detach().reshape(-1)
    for start in range(0, flat.numel(), block_numel):
        block = flat[start : start + block_numel]
        change = delta.read(name, start, start + len(block)).to(block.device)
        yield (block.to(change.dtype) + change).to(block.dtype)


def foresee(parameters: Mapping[str, torch.nn.Parameter], delta: Vector, workspace: Workspace) -> Change:
    """Return what `apply` will do. Cost: one pass over the delta, memory of a block."""
    squares = torch.zeros(3, dtype=torch.float64)
    finite = True
    for name, parameter in parameters.items():
        flat = parameter.detach().reshape(-1)
        start = 0
        for new in new_values(parameter, delta, name, workspace.block_numel):
            old = flat[start : start + len(new)].double()
            wanted = delta.read(name, start, start + len(new)).to(old.device).double()
            finite = finite and bool(torch.isfinite(new).all())
            lost = (new.double() - old) - wanted
            squares += torch.stack([wanted.square().sum(), old.square().sum(), lost.square().sum()]).cpu()
            start += len(new)
    norm, before_norm, lost_norm = squares.sqrt().tolist()
    return Change(norm, before_norm, lost_norm, finite)


def apply(parameters: Mapping[str, torch.nn.Parameter], delta: Vector, workspace: Workspace) -> None:
    """Add the delta to the parameters, in place."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            start = 0
            flat = parameter.view(-1) if parameter.is_contiguous() else None
            new_blocks = new_values(parameter, delta, name, workspace.block_numel)
            if flat is None:
                parameter.copy_(torch.cat(list(new_blocks)).view(parameter.shape))
                continue
            for new in new_blocks:
                flat[start : start + len(new)] = new
                start += len(new)
