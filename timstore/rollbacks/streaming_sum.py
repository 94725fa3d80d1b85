"""The streaming sum: chunks in, one matrix product per parameter and segment, deltas out; memory bounded."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from timstore.database.snapshot import Snapshot
from timstore.errors import InvalidInputError
from timstore.format.segments import ByteCache, SegmentReader
from timstore.interrupts import Held
from timstore.records import Parameter
from timstore.rollbacks.gradient_blocks import GradientRows, Piece, add_gradients, pieces_of
from timstore.rollbacks.vectors import Vector

_MOST_WORKERS = 4


@dataclass(frozen=True, slots=True)
class MemoryShares:
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
    def divide(cls, limit_bytes: int, snapshot: Snapshot) -> "MemoryShares":
        """Divide a limit."""
        # An eighth is the cache: one whole object, and the chunk that is decoded from it.
        object_bytes = snapshot.view.largest_object() + 2 * 1024 * 1024
        needed = 8 * object_bytes
        if limit_bytes < needed:
            raise InvalidInputError(
                f"memory_limit is {limit_bytes:,} bytes; the objects of this store need at least {needed:,}",
                kind="memory-limit",
                needed_bytes=needed,
            )
        # 1/4 + 3/32 + 3/64 + 1/8 is a little more than half; products take copies of what they are handed.
        cache_bytes = limit_bytes // 8
        workers = min(_MOST_WORKERS, torch.get_num_threads(), max(1, cache_bytes // object_bytes))
        return cls(limit_bytes // 4, limit_bytes * 3 // 32, limit_bytes * 3 // 64, cache_bytes, workers)


class Readers:
    """The readers of a store's commits, the latest of them kept while their tables are small.

    May be used by several threads.
    """

    def __init__(self, snapshot: Snapshot, memory: MemoryShares) -> None:
        self.snapshot = snapshot
        self.memory = memory
        self.cache = ByteCache(memory.cache_bytes)
        self._readers = ByteCache(memory.cache_bytes // 4)

    def __getitem__(self, commit: int) -> SegmentReader:
        reader: SegmentReader = self._readers.get(
            commit, lambda: self.snapshot.reader(commit, self.cache), lambda made: made.nbytes
        )
        return reader


@contextmanager
def crew(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yield threads that share torch's own among them; when the block ends, however it does, none of them runs.

    Torch's threads are divided since those of several products at once would wait for each other.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        workers, "timstore-rollback", torch.set_num_threads, initargs=(max(1, threads // workers),)
    )
    met = threading.Barrier(workers)
    try:
        # All begin here: an interrupt while one begins would leave it behind, unknown to the pool.
        with Held():
            for _ in range(workers):
                pool.submit(met.wait)
        yield pool
    finally:
        with Held():
            met.abort()
            pool.shutdown(cancel_futures=True)
        # Set by a worker, the number holds for that worker and for threads made later.
        torch.set_num_threads(threads)


def stream(
    parameters: Mapping[str, Parameter],
    rows: Mapping[str, GradientRows],
    readers: Readers,
    vectors: Sequence[Vector],
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the weighted sum of gradients into one vector per time bin, summed where these are.

    Cost: reads every chunk that holds a chosen row once per group of parameters whose sums fit the budget, usually one;
    memory within the budget whatever the store's and the parameters' size.

    Args:
        rows: of each parameter, the gradients that are summed.
        advance: told how many gradients were added.
    """
    workspace, memory = vectors[0].workspace, readers.memory
    for group in _groups(parameters.values(), memory.sums_bytes, len(vectors) * workspace.dtype.itemsize):
        sums = [
            torch.zeros(len(vectors), *piece.shape, dtype=workspace.dtype, device=workspace.device) for piece in group
        ]
        with crew(min(memory.workers, len(group))) as pool:
            _add_up(pool, group, sums, rows, readers, advance)
        for piece, total in zip(group, sums, strict=True):
            for number, vector in enumerate(vectors):
                vector.write(piece.parameter.name, piece.span[0], total[number].flatten())


def _add_up(
    pool: ThreadPoolExecutor,
    group: Sequence[Piece],
    sums: Sequence[torch.Tensor],
    rows: Mapping[str, GradientRows],
    readers: Readers,
    advance: Callable[[int], None],
) -> None:
    """Add to the sum of each piece of a group, segment by segment, in the order that a segment has."""
    # A segment's chunks are read and decoded once while all pieces take what they need of it.
    by_commit: dict[int, list[tuple[int, GradientRows]]] = {}
    for number, piece in enumerate(group):
        for commit, mine in rows[piece.parameter.name].by_commit():
            by_commit.setdefault(commit, []).append((number, mine))

    def add(earlier: Future[int] | None, commit: int, mine: GradientRows, number: int) -> int:
        # Each sum is added to in one order, so that its rounding is the same however many threads there are. The
        # earlier one of the same sum was begun before this one: whoever waits for it waits for a running thread.
        if earlier is not None:
            earlier.result()
        return add_gradients(readers[commit], mine, group[number], readers.memory.unit_bytes, sums[number])

    latest: dict[int, Future[int]] = {}
    waiting: deque[Future[int]] = deque()
    for commit in sorted(by_commit):
        for number, mine in by_commit.pop(commit):
            latest[number] = pool.submit(add, latest.get(number), commit, mine, number)
            waiting.append(latest[number])
            if len(waiting) > 2 * _MOST_WORKERS:
                advance(waiting.popleft().result())
    for future in waiting:
        advance(future.result())


def sums_by_bin(
    rows: GradientRows, piece: Piece, readers: Readers, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (bin, weighted sum of its gradients), bins in order; one (rows, columns) tensor is alive at a time.

    For what is nonlinear from step to step, with a bin for each step. Cost: every chunk is read about once, since a
    segment lays the gradients of one parameter side by side.
    """
    order = np.argsort(rows.bin, kind="stable")
    edges = np.flatnonzero(np.diff(rows.bin[order])) + 1
    for members in np.split(order, edges) if len(order) else ():
        mine = rows.take(members)
        number, total = int(mine.bin[0]), torch.zeros(piece.shape, dtype=dtype, device=device)
        for commit, here in mine.by_commit():
            add_gradients(readers[commit], here, piece, readers.memory.unit_bytes, {number: total})
        yield number, total


def _groups(parameters: Iterable[Parameter], limit_bytes: int, element_bytes: int) -> Iterator[list[Piece]]:
    """Cut the parameters into pieces of rows, and gather pieces into groups whose sums fit the limit."""
    group: list[Piece] = []
    used = 0
    for parameter in parameters:
        for piece in pieces_of(parameter, limit_bytes, element_bytes):
            size = piece.shape[0] * piece.shape[1] * element_bytes
            if group and used + size > limit_bytes:
                yield group
                group, used = [], 0
            group.append(piece)
            used += size
    if group:
        yield group
