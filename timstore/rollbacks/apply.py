"""The last step: add the deltas to the model, once per parameter, in the parameter's own precision."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from timstore.fingerprints import digest_of_blocks
from timstore.rollbacks.vectors import Vector, Workspace
from timstore.rollbacks.workers import side_by_side


@dataclass(frozen=True, slots=True)
class Change:
    """What applying a delta does to the parameters, known before it is applied.

    Attributes:
        norm: of the delta.
        before_norm: of the changed parameters.
        lost_norm: of what their precision cannot take up.
        finite: whether every new value is.
        digests: of the new values.
    """

    norm: float
    before_norm: float
    lost_norm: float
    finite: bool
    digests: dict[str, str]


def new_values(parameter: torch.Tensor, delta: Vector, name: str, block_numel: int) -> Iterator[torch.Tensor]:
    """Yield the parameter's new values, flat and in order, a block at a time; the parameter is not changed."""
    flat = parameter.detach().reshape(-1)
    for start in range(0, flat.numel(), block_numel):
        block = flat[start : start + block_numel]
        change = delta.read(name, start, start + len(block)).to(block.device)
        yield (block.to(change.dtype) + change).to(block.dtype)


def foresee(
    parameters: Mapping[str, torch.nn.Parameter], delta: Vector, workspace: Workspace, workers: int = 1
) -> Change:
    """Return what `apply` will do. Cost: one pass over the delta, memory of a block for each worker."""
    found: dict[str, _Foreseen] = {}

    def look(name: str, parameter: torch.nn.Parameter) -> Iterator[int]:
        found[name] = _Foreseen()
        blocks = found[name].seen(parameter, delta, name, workspace.block_numel)
        found[name].digest = digest_of_blocks(parameter.dtype, tuple(parameter.shape), blocks)
        yield 0

    _each(parameters, look, workers)
    ordered = [found[name] for name in parameters]
    norm, before_norm, lost_norm = torch.stack([one.squares for one in ordered]).sum(0).sqrt().tolist()
    finite = all(one.finite for one in ordered)
    return Change(norm, before_norm, lost_norm, finite, {name: found[name].digest for name in parameters})


class _Foreseen:
    """One parameter's share in a `Change`."""

    def __init__(self) -> None:
        self.squares = torch.zeros(3, dtype=torch.float64, device="cpu")
        self.finite = True
        self.digest = ""

    def seen(self, parameter: torch.Tensor, delta: Vector, name: str, block_numel: int) -> Iterator[torch.Tensor]:
        """Yield the new values, block by block, and take what is to be known of each."""
        flat = parameter.detach().reshape(-1)
        start = 0
        for new in new_values(parameter, delta, name, block_numel):
            old = flat[start : start + len(new)].double()
            wanted = delta.read(name, start, start + len(new)).to(old.device).double()
            lost = (new.double() - old).sub_(wanted)
            squares = torch.stack([one.dot(one) for one in (wanted, old, lost)]).cpu()
            self.squares += squares
            # A new value that is not finite is a loss that is not; large losses may overflow as well.
            self.finite = self.finite and (bool(squares[2].isfinite()) or bool(new.isfinite().all()))
            start += len(new)
            yield new


def apply(parameters: Mapping[str, torch.nn.Parameter], delta: Vector, workspace: Workspace, workers: int = 1) -> None:
    """Add the delta to the parameters, in place."""

    def add(name: str, parameter: torch.nn.Parameter) -> Iterator[int]:
        with torch.no_grad():
            new_blocks = new_values(parameter, delta, name, workspace.block_numel)
            if parameter.is_contiguous():
                start, flat = 0, parameter.view(-1)
                for new in new_blocks:
                    flat[start : start + len(new)] = new
                    start += len(new)
            else:
                parameter.copy_(torch.cat(list(new_blocks)).view(parameter.shape))
        yield 0

    _each(parameters, add, workers)


def _each(
    parameters: Mapping[str, torch.nn.Parameter],
    run: Callable[[str, torch.nn.Parameter], Iterator[int]],
    workers: int,
) -> None:
    """Run something for every parameter, several at a time."""
    tasks = [(number, partial(run, *one)) for number, one in enumerate(parameters.items())]
    side_by_side(tasks, max(1, min(workers, len(tasks))), lambda _: None)
