"""The streaming sum: chunks in, one matrix product per parameter and segment, deltas out; memory bounded."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from timstore.database.snapshot import Snapshot
from timstore.errors import InvalidInputError
from timstore.format.cache import ByteCache
from timstore.format.reader import SegmentReader
from timstore.rollbacks.gradient_blocks import ParameterRows, Piece, additions, pieces_of
from timstore.rollbacks.plan import Plan
from timstore.rollbacks.vectors import Vector
from timstore.rollbacks.workers import MOST, Task, side_by_side

# So many readers are kept whatever their tables take.
_READERS = MOST + 1


@dataclass(frozen=True, slots=True)
class Budget:
    """How `memory_limit` is divided while records stream.

    Two fifths stay free for copies under way and for freed memory that the allocator keeps.

    Attributes:
        deltas_bytes: vectors kept in memory before they go to the spill file.
        sums_bytes: the rows of the deltas that are being summed.
        unit_bytes: numbers handed to one product; a few copies of them live at a time.
        cache_bytes: objects and decoded chunks.
        workers: threads that load and add; each may hold one object and one chunk that the cache has let go.
    """

    deltas_bytes: int
    sums_bytes: int
    unit_bytes: int
    cache_bytes: int
    workers: int

    @classmethod
    def divide(cls, limit_bytes: int, snapshot: Snapshot) -> "Budget":
        """Divide a limit.

        Raises:
            InvalidInputError: if it is too small for the largest object and its decoded chunks.
        """
        largest = snapshot.view.largest_object()
        # An eighth is the cache: one whole object, and the chunk that is decoded from it.
        held = largest + 2 * 1024 * 1024
        needed = 8 * held
        if limit_bytes < needed:
            raise InvalidInputError(
                f"memory_limit is {limit_bytes:,} bytes; the objects of this store need at least {needed:,}",
                kind="memory-limit",
                needed_bytes=needed,
            )
        cache_bytes = limit_bytes // 8
        workers = min(MOST, torch.get_num_threads(), max(1, cache_bytes // held))
        return cls(limit_bytes // 4, limit_bytes * 3 // 32, limit_bytes * 3 // 64, cache_bytes, workers)


class Readers:
    """The readers of a store's commits, the latest few kept, and more while their tables are small.

    May be used by several threads.
    """

    def __init__(self, snapshot: Snapshot, budget: Budget) -> None:
        self.snapshot = snapshot
        self.cache = ByteCache(budget.cache_bytes)
        self._kept: OrderedDict[int, SegmentReader] = OrderedDict()
        self._tables_bytes = budget.cache_bytes // 4
        self._lock = threading.Lock()

    def __getitem__(self, commit: int) -> SegmentReader:
        with self._lock:
            if commit in self._kept:
                self._kept.move_to_end(commit)
            else:
                self._kept[commit] = self.snapshot.reader(commit, self.cache)
                total = sum(reader.nbytes for reader in self._kept.values())
                while len(self._kept) > _READERS and total > self._tables_bytes:
                    total -= self._kept.popitem(last=False)[1].nbytes
            return self._kept[commit]


def stream(
    plan: Plan,
    readers: Readers,
    vectors: Sequence[Vector],
    budget: Budget,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the weighted sum of the plan's gradients into one vector per time bin, summed where these are.

    Cost: reads every chunk that holds a chosen row once per group of parameters whose sums fit the budget,
    usually one; memory within the budget whatever the store's and the parameters' size.

    Args:
        advance: told how many gradients were added.

    Raises:
        CorruptionError: an object is missing or was changed; nothing but the vectors was written.
    """
    like = vectors[0].workspace
    for group in _groups(plan, budget, len(vectors), like.dtype.itemsize):
        sums = [
            torch.zeros(len(vectors), p.last - p.first, p.width, dtype=like.dtype, device=like.device) for p in group
        ]
        tasks = _tasks(plan, group, sums, readers, budget.unit_bytes)
        side_by_side(tasks, min(budget.workers, len(group)), advance)
        for piece, total in zip(group, sums, strict=True):
            for number, vector in enumerate(vectors):
                vector.write(piece.parameter.name, piece.span[0], total[number].flatten())


def sums_by_bin(
    rows: ParameterRows, piece: Piece, readers: Readers, unit_bytes: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (bin, weighted sum of its gradients), bins in order; one (rows, columns) tensor is alive at a time.

    For what is nonlinear from step to step, with a bin for each step. Cost: every chunk is read about once, since a
    segment lays the gradients of one parameter side by side.
    """
    order = np.argsort(rows.bin, kind="stable")
    edges = np.flatnonzero(np.diff(rows.bin[order])) + 1
    for members in np.split(order, edges) if len(order) else ():
        total = torch.zeros(piece.last - piece.first, piece.width, dtype=dtype, device=device)
        mine = rows.take(members)
        for commit, here in mine.by_commit():
            for _, one in additions(readers[commit], here, piece, unit_bytes):
                one.add_to(total)
        yield int(mine.bin[0]), total


def _groups(plan: Plan, budget: Budget, bins: int, itemsize: int) -> Iterator[list[Piece]]:
    """Cut the parameters into pieces of rows, and gather pieces into groups whose sums fit the budget."""
    group: list[Piece] = []
    used = 0
    for parameter in plan.parameters.values():
        for piece in pieces_of(parameter, budget.sums_bytes, bins * itemsize):
            size = (piece.last - piece.first) * piece.width * bins * itemsize
            if group and used + size > budget.sums_bytes:
                yield group
                group, used = [], 0
            group.append(piece)
            used += size
    if group:
        yield group


def _tasks(
    plan: Plan, group: list[Piece], sums: list[torch.Tensor], readers: Readers, unit_bytes: int
) -> Iterator[Task]:
    """Yield what is to be added to each piece of a group, segment by segment, in the order that a segment has."""
    waiting: dict[int, list[tuple[int, ParameterRows]]] = {}
    for number, piece in enumerate(group):
        for commit, rows in plan.rows[piece.parameter.name].by_commit():
            waiting.setdefault(commit, []).append((number, rows))
    for commit in sorted(waiting):
        for number, rows in waiting.pop(commit):
            yield number, partial(_add, readers, commit, rows, group[number], sums[number], unit_bytes)


def _add(
    readers: Readers, commit: int, rows: ParameterRows, piece: Piece, sums: torch.Tensor, unit_bytes: int
) -> Iterator[int]:
    for number, one in additions(readers[commit], rows, piece, unit_bytes):
        one.add_to(sums[number])
        yield one.done
