"""The streaming sum: chunks in, one matrix product per parameter and segment, deltas out; memory bounded."""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from timstore.errors import InvalidInputError
from timstore.format.reader import ByteCache, SegmentReader
from timstore.rollbacks.loading import Addition, ParameterRows, Piece, additions, pieces_of
from timstore.rollbacks.plan import Plan
from timstore.rollbacks.vectors import Vector
from timstore.snapshot import Snapshot

_READERS = 8


@dataclass(frozen=True, slots=True)
class Budget:
    """How `memory_limit` is divided while records stream.

    Two fifths stay free for copies under way and for freed memory that the allocator keeps.

    Attributes:
        deltas_bytes: vectors kept in memory before they go to the spill file.
        sums_bytes: the rows of the deltas that are being summed.
        unit_bytes: numbers handed to one product; a few copies of them live at a time.
        cache_bytes: objects and decoded chunks.
    """

    deltas_bytes: int
    sums_bytes: int
    unit_bytes: int
    cache_bytes: int

    @classmethod
    def divide(cls, limit_bytes: int, snapshot: Snapshot) -> "Budget":
        """Divide a limit.

        Raises:
            InvalidInputError: if it is too small for the largest object and its decoded chunks.
        """
        largest = max((info.bytes for commit in snapshot.view.commits for info in commit.objects), default=0)
        # An eighth is the cache: one whole object, and the chunk that is decoded from it.
        needed = 8 * (largest + 2 * 1024 * 1024)
        if limit_bytes < needed:
            raise InvalidInputError(
                f"memory_limit is {limit_bytes:,} bytes; the objects of this store need at least {needed:,}",
                kind="memory-limit",
                needed_bytes=needed,
            )
        return cls(limit_bytes // 4, limit_bytes * 3 // 32, limit_bytes * 3 // 64, limit_bytes // 8)


class Readers:
    """The readers of a store's commits, the last few kept: their tables are a few bytes for each gradient."""

    def __init__(self, snapshot: Snapshot, budget: Budget) -> None:
        self.snapshot = snapshot
        self.cache = ByteCache(budget.cache_bytes)
        self._kept: OrderedDict[int, SegmentReader] = OrderedDict()

    def __getitem__(self, commit: int) -> SegmentReader:
        if commit in self._kept:
            self._kept.move_to_end(commit)
        else:
            self._kept[commit] = self.snapshot.reader(commit, self.cache)
            if len(self._kept) > _READERS:
                self._kept.popitem(last=False)
        return self._kept[commit]


def stream(
    plan: Plan,
    readers: Readers,
    vectors: Sequence[Vector],
    budget: Budget,
    *,
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[int], None],
) -> None:
    """Write the weighted sum of the plan's gradients into one vector per time bin.

    Cost: reads every chunk that holds a chosen row once per group of parameters whose sums fit the budget,
    usually one; memory within the budget whatever the store's and the parameters' size.

    Args:
        dtype: of the sums.
        advance: told how many gradients were added.

    Raises:
        CorruptionError: an object is missing or was changed; nothing but the vectors was written.
    """
    for group in _groups(plan, budget, len(vectors), dtype.itemsize):
        sums = [torch.zeros(len(vectors), p.last - p.first, p.width, dtype=dtype, device=device) for p in group]
        for piece_number, bin_number, one in _ahead(_units(plan, group, readers, budget.unit_bytes)):
            one.add_to(sums[piece_number][bin_number])
            advance(one.done)
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
        for commit in np.unique(mine.commit).tolist():
            for _, one in additions(
                readers[commit], mine.take(np.flatnonzero(mine.commit == commit)), piece, unit_bytes
            ):
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


def _units(plan: Plan, group: list[Piece], readers: Readers, unit_bytes: int) -> Iterator[tuple[int, int, Addition]]:
    """Yield (number of the piece, bin, addition) of one group, segment by segment."""
    commits = np.unique(np.concatenate([plan.rows[piece.parameter.name].commit for piece in group]))
    for commit in commits.tolist():
        for number, piece in enumerate(group):
            rows = plan.rows[piece.parameter.name]
            mine = rows.take(np.flatnonzero(rows.commit == commit))
            for bin_number, one in additions(readers[commit], mine, piece, unit_bytes):
                yield number, bin_number, one


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Make the next item in a thread while this one is used: decoding beside multiplying."""
    done = object()
    made: queue.Queue[Any] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def run() -> None:
        try:
            for item in items:
                if not _offer(made, item, stop):
                    return
            _offer(made, done, stop)
        except BaseException as error:
            _offer(made, error, stop)

    thread = threading.Thread(target=run, name="timstore-read-ahead", daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not done:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def _offer(made: "queue.Queue[Any]", item: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            made.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
