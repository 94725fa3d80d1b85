"""The streaming sum: chunks in, one matrix product per parameter and segment, deltas out; memory bounded."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from timstore.errors import InvalidInputError
from timstore.format.reader import ByteCache, SegmentReader
from timstore.records import Parameter
from timstore.rollbacks.plan import ENCODINGS, ParameterRows, Plan
from timstore.rollbacks.vectors import Vector
from timstore.snapshot import Snapshot


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


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows [first, last) of one parameter's matrix."""

    parameter: Parameter
    first: int
    last: int

    @property
    def width(self) -> int:
        return self.parameter.matrix_shape[1]


@dataclass(frozen=True, eq=False, slots=True)
class _Unit:
    """One addition to a piece: `left.T @ right` for factors and dense, indexed rows for rows.

    `left` holds the weights already.
    """

    piece: int
    bin: int
    left: np.ndarray
    right: np.ndarray
    indices: np.ndarray | None = None


def stream(
    plan: Plan,
    snapshot: Snapshot,
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
    cache = ByteCache(budget.cache_bytes)
    for group in _groups(plan, budget, len(vectors), dtype.itemsize):
        sums = [torch.zeros(len(vectors), p.last - p.first, p.width, dtype=dtype, device=device) for p in group]
        for unit, done in _ahead(_units(plan, snapshot, group, budget, cache)):
            _add(sums[unit.piece][unit.bin], unit, dtype)
            advance(done)
        for piece, total in zip(group, sums, strict=True):
            for number, vector in enumerate(vectors):
                vector.write(piece.parameter.name, piece.first * piece.width, total[number].flatten())


def _groups(plan: Plan, budget: Budget, bins: int, itemsize: int) -> Iterator[list[_Piece]]:
    """Cut the parameters into pieces of rows, and gather pieces into groups whose sums fit the budget."""
    group: list[_Piece] = []
    used = 0
    for parameter in plan.parameters.values():
        rows, width = parameter.matrix_shape
        row_bytes = max(1, bins * width * itemsize)
        fitting = max(1, budget.sums_bytes // row_bytes)
        for first in range(0, rows, fitting):
            piece = _Piece(parameter, first, min(rows, first + fitting))
            size = (piece.last - piece.first) * row_bytes
            if group and used + size > budget.sums_bytes:
                yield group
                group, used = [], 0
            group.append(piece)
            used += size
    if group:
        yield group


def _units(
    plan: Plan, snapshot: Snapshot, group: list[_Piece], budget: Budget, cache: ByteCache
) -> Iterator[tuple[_Unit, int]]:
    """Yield the additions of one group, segment by segment, and how many gradients each one finishes."""
    commits = np.unique(np.concatenate([plan.rows[piece.parameter.name].commit for piece in group]))
    for commit in commits.tolist():
        reader = snapshot.reader(commit, cache)
        for number, piece in enumerate(group):
            rows = plan.rows[piece.parameter.name]
            for bin_number, encoding, owners, weights in _runs(rows, commit):
                load = _LOADERS[encoding]
                for left, right, indices, done in load(reader, owners, weights, piece, budget.unit_bytes):
                    yield _Unit(number, bin_number, left, right, indices), done


def _runs(rows: ParameterRows, commit: int) -> Iterator[tuple[int, str, list[int], np.ndarray]]:
    """Yield (bin, encoding, owners, weights) of one segment, each run in reading order."""
    mine = np.flatnonzero(rows.commit == commit)
    kinds = rows.bin[mine] * len(ENCODINGS) + rows.encoding[mine]
    for kind in np.unique(kinds).tolist():
        chosen = mine[kinds == kind]
        number, encoding = divmod(kind, len(ENCODINGS))
        yield number, ENCODINGS[encoding], rows.owner[chosen].tolist(), rows.weight[chosen]


Loaded = tuple[np.ndarray, np.ndarray, np.ndarray | None, int]


def _load_factors(
    reader: SegmentReader, owners: list[int], weights: np.ndarray, piece: _Piece, unit_bytes: int
) -> Iterator[Loaded]:
    rows, width = piece.parameter.matrix_shape
    for batch, first, last in _batches(reader, owners, "output_gradients", (rows + width) * 8, unit_bytes):
        chosen = [owners[number] for number in batch]
        outputs = reader.rows(chosen, "output_gradients", first, last)[:, piece.first : piece.last]
        counts = [min(reader.count(owner, "output_gradients"), last) - first for owner in chosen]
        inputs = _inputs(reader, chosen, first, last)
        scale = np.repeat(weights[batch], counts).astype(outputs.dtype)
        yield outputs * scale[:, None], inputs, None, _finished(reader, chosen, "output_gradients", last)


def _inputs(reader: SegmentReader, owners: list[int], first: int, last: int) -> np.ndarray:
    """Return the input rows that belong to rows [first, last) of the output gradients, each by its row map."""
    found = []
    # Neighbours without a row map are read as one range.
    for mapped, run in groupby(owners, key=lambda owner: reader.row_map(owner) is not None):
        if not mapped:
            found.append(reader.rows(list(run), "inputs", first, last))
            continue
        for owner in run:
            row_map = reader.row_map(owner)
            assert row_map is not None
            wanted = row_map[first:last]
            low = int(wanted.min())
            found.append(reader.rows([owner], "inputs", low, int(wanted.max()) + 1)[wanted - low])
    return found[0] if len(found) == 1 else np.concatenate(found)


def _load_dense(
    reader: SegmentReader, owners: list[int], weights: np.ndarray, piece: _Piece, unit_bytes: int
) -> Iterator[Loaded]:
    height = piece.last - piece.first
    at_once = max(1, unit_bytes // max(1, height * piece.width * 8))
    held = [number for number, owner in enumerate(owners) if reader.has(owner, "values")]
    for start in range(0, len(held), at_once):
        batch = held[start : start + at_once]
        values = reader.rows([owners[number] for number in batch], "values", piece.first, piece.last)
        flat = values.reshape(len(batch), height * piece.width)
        yield weights[batch].astype(flat.dtype)[:, None], flat, None, len(batch)


def _load_rows(
    reader: SegmentReader, owners: list[int], weights: np.ndarray, piece: _Piece, unit_bytes: int
) -> Iterator[Loaded]:
    for batch, first, last in _batches(reader, owners, "values", piece.width * 8, unit_bytes):
        chosen = [owners[number] for number in batch]
        indices = reader.rows(chosen, "indices", first, last)
        values = reader.rows(chosen, "values", first, last)
        counts = [min(reader.count(owner, "values"), last) - first for owner in chosen]
        scale = np.repeat(weights[batch], counts).astype(values.dtype)
        inside = (indices >= piece.first) & (indices < piece.last)
        done = _finished(reader, chosen, "values", last)
        yield scale[inside, None], values[inside], indices[inside].astype(np.int64) - piece.first, done


_LOADERS: dict[str, Callable[..., Iterator[Loaded]]] = {
    "factors": _load_factors,
    "dense": _load_dense,
    "rows": _load_rows,
}


def _batches(
    reader: SegmentReader, owners: list[int], role: str, row_bytes: int, unit_bytes: int
) -> Iterator[tuple[list[int], int, int]]:
    """Yield (positions in owners, first, last): gradients read together, or a range of one that is too large."""
    most = max(1, unit_bytes // row_bytes)
    batch: list[int] = []
    total = 0
    for number, owner in enumerate(owners):
        if not reader.has(owner, role):
            continue
        count = reader.count(owner, role)
        if batch and total + count > most:
            yield batch, 0, most
            batch, total = [], 0
        if count > most:
            for first in range(0, count, most):
                yield [number], first, min(count, first + most)
        else:
            batch.append(number)
            total += count
    if batch:
        yield batch, 0, most


def _finished(reader: SegmentReader, owners: list[int], role: str, last: int) -> int:
    return sum(reader.count(owner, role) <= last for owner in owners)


def _add(total: torch.Tensor, unit: _Unit, dtype: torch.dtype) -> None:
    left, right = (torch.from_numpy(one).to(total.device, dtype) for one in (unit.left, unit.right))
    if unit.indices is not None:
        total.index_add_(0, torch.from_numpy(unit.indices).to(total.device), left * right)
    elif left.shape[1] == 1 and right.shape[1] == total.numel():
        total.view(-1).addmv_(right.T, left[:, 0])
    else:
        total.addmm_(left.T, right)


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
