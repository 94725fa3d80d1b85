"""The last step: new values of the parameters, each written once in its own precision, and of all or of none."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from timstore.errors import StateError
from timstore.model.fingerprints import digest_of_blocks
from timstore.rollbacks.places import Place
from timstore.rollbacks.streaming_sum import crew
from timstore.rollbacks.vectors import Vector, Workspace

# So many numbers, and the copies in float64 that are made of them, stay in a core's cache.
_CACHED_NUMEL = 1 << 16


@dataclass(frozen=True, slots=True)
class Change:
    """What adding a delta does to the parameters, known before they are changed.

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
        # Added in the wider of both precisions and rounded once.
        wider = torch.promote_types(old.dtype, change.dtype)
        yield old, change, (old.to(wider) + change).to(old.dtype)
        start += len(old)


def foresee(places: Mapping[str, Place], delta: Vector, workspace: Workspace, workers: int = 1) -> Change:
    """Return what adding a delta will do. Cost: one pass over the delta, memory of a block for each worker."""

    def look(name: str) -> tuple[torch.Tensor, bool, str]:
        place, squares, finite = places[name], torch.zeros(3, dtype=torch.float64, device="cpu"), True

        def new_values() -> Iterator[torch.Tensor]:
            nonlocal finite
            for block, change, new in moved_blocks(place, delta, name, workspace.block_numel):
                old, wanted = block.double(), change.double()
                # What the parameter's own precision did not take up: (new - old) - wanted.
                lost = (new.double() - old).sub_(wanted)
                of_block = torch.stack([numbers.dot(numbers) for numbers in (wanted, old, lost)]).cpu()
                squares.add_(of_block)
                # A new value that is not finite is a loss that is not; large losses may overflow as well.
                finite = finite and (bool(of_block[2].isfinite()) or bool(new.isfinite().all()))
                yield new

        digest = digest_of_blocks(place.dtype, place.shape, new_values())
        return squares, finite, digest

    with crew(max(1, min(workers, len(places)))) as pool:
        squares, finite, digests = zip(*pool.map(look, places), strict=True)
    norm, before_norm, lost_norm = torch.stack(squares).sum(0).sqrt().tolist()
    return Change(norm, before_norm, lost_norm, all(finite), dict(zip(places, digests, strict=True)))


@dataclass(frozen=True, eq=False, slots=True)
class Write:
    """What one place is to hold.

    Attributes:
        blocks: yields the new values, flat and in order; each block may be made of the old values of its elements.
    """

    place: Place
    blocks: Callable[[], Iterator[torch.Tensor]]


def moves(places: Mapping[str, Place], delta: Vector) -> list[Write]:
    """Return what adds the delta to the parameters, where they are."""
    return [Write(place, partial(_moved, place, delta, name)) for name, place in places.items()]


@dataclass(frozen=True, eq=False, slots=True)
class Writes:
    """New values of several places, written all or none."""

    each: Sequence[Write]
    workspace: Workspace
    workers: int = 1

    def keep(self) -> "Writes":
        """Return what writes the values of now back, bit for bit.

        Raises:
            StorageError: they fit neither into the workspace's limit nor on the disk.
        """
        writes = []
        for place in (write.place for write in self.each):
            blocks = place.blocks(self.workspace.block_numel)
            old = self.workspace.keep(blocks, math.prod(place.shape), place.dtype, place.device)
            writes.append(Write(place, old.blocks))
        return Writes(writes, self.workspace, self.workers)

    def make(self) -> None:
        """Write, several places at a time. Where it fails, some are written; no thread is at it any more."""
        with crew(max(1, min(self.workers, len(self.each)))) as pool:
            for _ in pool.map(lambda write: write.place.write(write.blocks()), self.each):
                pass

    def make_or_restore(self, old: "Writes") -> None:
        """Write all; where it fails, write the old values back.

        Raises:
            BaseException: what failed; every place is as it was.
            StateError: kind `half-changed`: and the old values cannot be had any more.
        """
        try:
            self.make()
        except BaseException as error:
            try:
                old.make()
            except BaseException as second:
                raise StateError(
                    f"writing the parameters failed ({error!r}), and so did writing the old ones back ({second!r}): "
                    "they are neither the old nor the new ones; load the model again",
                    kind="half-changed",
                ) from error
            raise


def _moved(place: Place, delta: Vector, name: str) -> Iterator[torch.Tensor]:
    return (new for _, _, new in moved_blocks(place, delta, name, delta.workspace.block_numel))
