"""Chosen gradients as numbers to multiply: rows out of segments, a bounded number at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from timstore.format.reader import SegmentReader
from timstore.format.tables import coded
from timstore.records import Parameter

# How a gradient is stored; `whole` is that of a whole step, kept beside the records.
ENCODINGS = ("factors", "dense", "rows", "whole")


@dataclass(frozen=True, eq=False, slots=True)
class ParameterRows:
    """Chosen gradients of one parameter, in reading order: by commit, then owner; arrays of one length.

    Attributes:
        encoding: index into `ENCODINGS`.
        weight: what the gradient is multiplied by.
        bin: which of several sums it belongs to.
    """

    commit: np.ndarray
    owner: np.ndarray
    encoding: np.ndarray
    weight: np.ndarray
    bin: np.ndarray

    def take(self, chosen: np.ndarray | slice) -> "ParameterRows":
        """Return some of them; a slice of them without a copy."""
        return ParameterRows(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    def by_commit(self) -> Iterator[tuple[int, "ParameterRows"]]:
        """Yield (commit, its gradients), commits in order."""
        commits, starts = np.unique(self.commit, return_index=True)
        stops = [*starts[1:].tolist(), len(self.commit)]
        for commit, start, stop in zip(commits.tolist(), starts.tolist(), stops, strict=True):
            yield commit, self.take(slice(start, stop))


def by_parameter(table: pa.Table) -> dict[str, pa.Table]:
    """Return the rows of each parameter, in the order that they have in a table."""
    codes, names = coded(table["parameter"])
    order = np.argsort(codes, kind="stable")
    sorted_rows = table.take(order)
    edges = np.searchsorted(codes[order], np.arange(len(names) + 1))
    return {
        name: sorted_rows.slice(start, stop - start)
        for name, start, stop in zip(names, edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    }


def encodings_of(table: pa.Table) -> np.ndarray:
    """Return the place in `ENCODINGS` of each row's encoding."""
    codes, words = coded(table["encoding"].cast(pa.string()))
    places: np.ndarray = np.array([ENCODINGS.index(one) for one in words], np.int8)[codes]
    return places


def rows_of(table: pa.Table, bins: np.ndarray) -> ParameterRows:
    """Return the rows of a table of gradients (commit, owner, encoding), weight 1."""
    columns = table["commit"].to_numpy(), table["owner"].to_numpy(), encodings_of(table)
    return ParameterRows(*columns, np.ones(len(bins)), bins)


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [first, last) of one parameter's matrix."""

    parameter: Parameter
    first: int
    last: int

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.parameter.matrix_shape[1]

    @property
    def span(self) -> tuple[int, int]:
        """Elements [start, stop) of the flat parameter."""
        return self.first * self.width, self.last * self.width


def pieces_of(parameter: Parameter, limit_bytes: int, element_bytes: int) -> Iterator[Piece]:
    """Cut a parameter into pieces of rows, as many in each as the limit holds, one at least."""
    rows, width = parameter.matrix_shape
    fitting = max(1, limit_bytes // max(1, width * element_bytes))
    for first in range(0, rows, fitting):
        yield Piece(parameter, first, min(rows, first + fitting))


@dataclass(frozen=True, eq=False, slots=True)
class Addition:
    """One addition to a piece: `left.T @ right` for factors and dense, indexed rows for rows.

    Attributes:
        left: holds the weights already.
        done: how many gradients it finishes.
    """

    left: np.ndarray
    right: np.ndarray
    indices: np.ndarray | None
    done: int

    def add_to(self, total: torch.Tensor) -> None:
        """Add it to a (rows, columns) tensor, in place."""
        left, right = (torch.from_numpy(one).to(total.device, total.dtype) for one in (self.left, self.right))
        if self.indices is not None:
            total.index_add_(0, torch.from_numpy(self.indices).to(total.device), left * right)
        elif left.shape[1] == 1 and right.shape[1] == total.numel():
            total.view(-1).addmv_(right.T, left[:, 0])
        else:
            total.addmm_(left.T, right)


def additions(
    reader: SegmentReader, rows: ParameterRows, piece: Piece, unit_bytes: int
) -> Iterator[tuple[int, Addition]]:
    """Yield (bin, addition) for gradients of one segment, each run of equals in reading order."""
    kinds = rows.bin.astype(np.int64) * len(ENCODINGS) + rows.encoding
    for kind in np.unique(kinds).tolist():
        chosen = np.flatnonzero(kinds == kind)
        number, encoding = divmod(kind, len(ENCODINGS))
        load = _LOADERS[ENCODINGS[encoding]]
        for left, right, indices, done in load(reader, rows.owner[chosen], rows.weight[chosen], piece, unit_bytes):
            yield number, Addition(left, right, indices, done)


Loaded = tuple[np.ndarray, np.ndarray, np.ndarray | None, int]


def _load_factors(
    reader: SegmentReader, owners: np.ndarray, weights: np.ndarray, piece: Piece, unit_bytes: int
) -> Iterator[Loaded]:
    rows, width = piece.parameter.matrix_shape
    owners, weights, counts = _held(reader, owners, weights, "output_gradients")
    maps = reader.row_maps(owners)
    # Of the inputs, everything between the first and the last row of a map is read.
    spans = [0 if one is None or not len(one) else int(one.max() - one.min()) + 1 for one in maps]
    for batch, first, last in _batches(np.maximum(counts, spans), counts, (rows + width) * 8, unit_bytes):
        chosen = owners[batch]
        outputs = reader.rows(chosen, "output_gradients", first, last)[:, piece.first : piece.last]
        taken = np.minimum(counts[batch], last) - first
        _weigh(outputs, weights[batch], taken)
        inputs = _inputs(reader, chosen, maps[batch], first, last)
        yield outputs, inputs, None, int(np.sum(counts[batch] <= last))


def _inputs(
    reader: SegmentReader, owners: np.ndarray, maps: list[np.ndarray | None], first: int, last: int
) -> np.ndarray:
    """Return the input rows that belong to rows [first, last) of the output gradients, each by its row map."""
    if all(one is None for one in maps):
        return reader.rows(owners, "inputs", first, last)
    counts = np.minimum(reader.counts(owners, "inputs"), last).tolist()
    wanted = [
        np.arange(first, count) if one is None else one[first:last] for one, count in zip(maps, counts, strict=True)
    ]
    low = np.array([one.min() for one in wanted])
    high = np.array([one.max() + 1 for one in wanted])
    begins = np.concatenate([[0], np.cumsum(high - low)[:-1]])
    places = np.concatenate([one + shift for one, shift in zip(wanted, begins - low, strict=True)])
    found: np.ndarray = reader.rows(owners, "inputs", low, high)[places]
    return found


def _load_dense(
    reader: SegmentReader,
    owners: np.ndarray,
    weights: np.ndarray,
    piece: Piece,
    unit_bytes: int,
    role: str = "values",
) -> Iterator[Loaded]:
    height = piece.last - piece.first
    at_once = max(1, unit_bytes // max(1, height * piece.width * 8))
    owners, weights, _ = _held(reader, owners, weights, role)
    for start in range(0, len(owners), at_once):
        batch = slice(start, start + at_once)
        values = reader.rows(owners[batch], role, piece.first, piece.last)
        flat = values.reshape(len(owners[batch]), height * piece.width)
        yield weights[batch].astype(flat.dtype)[:, None], flat, None, len(flat)


def _load_rows(
    reader: SegmentReader, owners: np.ndarray, weights: np.ndarray, piece: Piece, unit_bytes: int
) -> Iterator[Loaded]:
    owners, weights, counts = _held(reader, owners, weights, "values")
    for batch, first, last in _batches(counts, counts, piece.width * 8, unit_bytes):
        indices = reader.rows(owners[batch], "indices", first, last)
        values = reader.rows(owners[batch], "values", first, last)
        inside = (indices >= piece.first) & (indices < piece.last)
        scale = np.repeat(weights[batch], np.minimum(counts[batch], last) - first).astype(values.dtype)
        done = int(np.sum(counts[batch] <= last))
        yield scale[inside, None], values[inside], indices[inside].astype(np.int64) - piece.first, done


_LOADERS: dict[str, Callable[..., Iterator[Loaded]]] = {
    "factors": _load_factors,
    "dense": _load_dense,
    "rows": _load_rows,
    "whole": partial(_load_dense, role="gradient"),
}


def _held(
    reader: SegmentReader, owners: np.ndarray, weights: np.ndarray, role: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (owners, weights, rows of each) of those gradients that are not zero."""
    counts = reader.counts(owners, role)
    held = counts > 0
    return (owners, weights, counts) if held.all() else (owners[held], weights[held], counts[held])


def _weigh(values: np.ndarray, weights: np.ndarray, counts: np.ndarray) -> None:
    """Multiply each gradient's rows by its weight, in place."""
    if not (weights == 1).all():
        values *= np.repeat(weights, counts).astype(values.dtype)[:, None]


def _batches(
    sizes: np.ndarray, counts: np.ndarray, row_bytes: int, unit_bytes: int
) -> Iterator[tuple[slice, int, int]]:
    """Yield (which gradients, first, last): those read together, or a range of rows of one that is too large.

    Args:
        sizes: rows that each takes in memory, no less than its counts.
        counts: rows that each has.
    """
    most = max(1, unit_bytes // row_bytes)
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + most, "right"))
        if stop > start:
            yield slice(start, stop), 0, most
            start = stop
            continue
        count = int(counts[start])
        for first in range(0, count, most):
            yield slice(start, start + 1), first, min(count, first + most)
        start += 1
