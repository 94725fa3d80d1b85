"""The last step: add the deltas to the parameters, once to each, in its own precision."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from timstore.fingerprints import digest_of_blocks
from timstore.rollbacks.targets import Place
from timstore.rollbacks.vectors import Vector, Workspace
from timstore.rollbacks.workers import side_by_side

# So many numbers, and the copies in float64 that are made of them, stay in a core's cache.
_CACHED_NUMEL = 1 << 16


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


def moved_blocks(
    place: Place, delta: Vector, name: str, block_numel: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (old values, their change, new values), flat and in order, a block at a time; nothing is changed."""
    start = 0
    for old in place.blocks(block_numel if place.device.type != "cpu" else min(block_numel, _CACHED_NUMEL)):
        change = delta.read(name, start, start + len(old)).to(old.device)
        wider = torch.promote_types(old.dtype, change.dtype)
        yield old, change, (old.to(wider) + change).to(old.dtype)
        start += len(old)


def foresee(places: Mapping[str, Place], delta: Vector, workspace: Workspace, workers: int = 1) -> Change:
    """Return what `apply` will do. Cost: one pass over the delta, memory of a block for each worker."""
    found: dict[str, _Foreseen] = {}

    def look(name: str, place: Place) -> Iterator[int]:
        found[name] = _Foreseen()
        blocks = found[name].seen(moved_blocks(place, delta, name, workspace.block_numel))
        found[name].digest = digest_of_blocks(place.dtype, place.shape, blocks)
        yield 0

    _each(places, look, workers)
    ordered = [found[name] for name in places]
    norm, before_norm, lost_norm = torch.stack([one.squares for one in ordered]).sum(0).sqrt().tolist()
    finite = all(one.finite for one in ordered)
    return Change(norm, before_norm, lost_norm, finite, {name: found[name].digest for name in places})


class _Foreseen:
    """One parameter's share in a `Change`."""

    def __init__(self) -> None:
        self.squares = torch.zeros(3, dtype=torch.float64, device="cpu")
        self.finite = True
        self.digest = ""

    def seen(self, blocks: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Iterator[torch.Tensor]:
        """Yield the new values, block by block, and take what is to be known of each."""
        for block, change, new in blocks:
            old, wanted = block.double(), change.double()
            lost = (new.double() - old).sub_(wanted)
            squares = torch.stack([one.dot(one) for one in (wanted, old, lost)]).cpu()
            self.squares += squares
            # A new value that is not finite is a loss that is not; large losses may overflow as well.
            self.finite = self.finite and (bool(squares[2].isfinite()) or bool(new.isfinite().all()))
            yield new


def apply(places: Mapping[str, Place], delta: Vector, workspace: Workspace, workers: int = 1) -> None:
    """Add the delta to the parameters, where they are."""

    def add(name: str, place: Place) -> Iterator[int]:
        place.write(new for _, _, new in moved_blocks(place, delta, name, workspace.block_numel))
        yield 0

    _each(places, add, workers)


def _each(places: Mapping[str, Place], run: Callable[[str, Place], Iterator[int]], workers: int) -> None:
    """Run something for every parameter, several at a time."""
    tasks = [(number, partial(run, *one)) for number, one in enumerate(places.items())]
    side_by_side(tasks, max(1, min(workers, len(tasks))), lambda _: None)
