"""Chosen gradients as blocks of numbers to multiply: rows out of segments, a bounded number at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from timstore.format.schemas import coded
from timstore.format.segments import SegmentReader
from timstore.records import Parameter

# How a gradient is stored; `whole` is that of a whole step, kept beside the records.
ENCODINGS = ("factors", "dense", "rows", "whole")


@dataclass(frozen=True, eq=False, slots=True)
class GradientRows:
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

    @classmethod
    def of(cls, table: pa.Table, bins: np.ndarray) -> "GradientRows":
        """Return the rows of a table of gradients (commit, owner, encoding), weight 1."""
        commit, owner = table["commit"].to_numpy(), table["owner"].to_numpy()
        return cls(commit, owner, encodings_of(table), np.ones(len(bins)), bins)

    def take(self, chosen: np.ndarray | slice) -> "GradientRows":
        """Return some of them; a slice of them without a copy."""
        return GradientRows(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    def by_commit(self) -> Iterator[tuple[int, "GradientRows"]]:
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
    edges = np.searchsorted(codes[order], np.arange(len(names) + 1)).tolist()
    return {name: sorted_rows.slice(edges[n], edges[n + 1] - edges[n]) for n, name in enumerate(names)}


def encodings_of(table: pa.Table) -> np.ndarray:
    """Return the place in `ENCODINGS` of each row's encoding."""
    codes, words = coded(table["encoding"].cast(pa.string()))
    places: np.ndarray = np.array([ENCODINGS.index(word) for word in words], np.int8)[codes]
    return places


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [first, last) of one parameter's matrix."""

    parameter: Parameter
    first: int
    last: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.last - self.first, self.parameter.matrix_shape[1]

    @property
    def span(self) -> tuple[int, int]:
        """Elements [start, stop) of the flat parameter."""
        width = self.parameter.matrix_shape[1]
        return self.first * width, self.last * width


def pieces_of(parameter: Parameter, limit_bytes: int, element_bytes: int) -> Iterator[Piece]:
    """Cut a parameter into pieces of rows, as many in each as the limit holds, one at least."""
    rows, width = parameter.matrix_shape
    fitting = max(1, limit_bytes // max(1, width * element_bytes))
    for first in range(0, rows, fitting):
        yield Piece(parameter, first, min(rows, first + fitting))


def add_gradients(
    reader: SegmentReader,
    rows: GradientRows,
    piece: Piece,
    unit_bytes: int,
    sums: Mapping[int, torch.Tensor] | torch.Tensor,
) -> int:
    """Add gradients of one segment to the sums of their bins, (rows, columns) each, in place; return how many.

    Gradients of one bin and one encoding are added together, in reading order.
    """
    # One number for (bin, encoding), so that one pass finds those that go together.
    kinds = rows.bin.astype(np.int64) * len(ENCODINGS) + rows.encoding
    for kind in np.unique(kinds).tolist():
        number, encoding = divmod(kind, len(ENCODINGS))
        load, role = _LOADERS[ENCODINGS[encoding]]
        mine = rows.take(np.flatnonzero(kinds == kind))
        counts = reader.counts(mine.owner, role)
        # A gradient that is zero has no rows.
        nonzero = counts > 0
        chosen = _Chosen(reader, role, mine.owner[nonzero], mine.weight[nonzero], counts[nonzero])
        for left, right, indices in load(chosen, piece, unit_bytes):
            _add_block(sums[number], left, right, indices)
    return len(rows.owner)


# (left, right, which rows): left.T @ right, or left * right added to these rows. Left holds the weights already.
_Loaded = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]


def _add_block(total: torch.Tensor, left: np.ndarray, right: np.ndarray, indices: np.ndarray | None) -> None:
    one, other = (torch.from_numpy(side).to(total.device, total.dtype) for side in (left, right))
    if indices is not None:
        total.index_add_(0, torch.from_numpy(indices).to(total.device), one * other)
    # A product that is one long row is faster as a matrix times a vector.
    elif one.shape[1] == 1 and other.shape[1] == total.numel():
        total.view(-1).addmv_(other.T, one[:, 0])
    else:
        total.addmm_(one.T, other)


class _Chosen(NamedTuple):
    """Gradients of one encoding in one segment, none of them zero, and how many rows each has in a role."""

    reader: SegmentReader
    role: str
    owners: np.ndarray
    weights: np.ndarray
    counts: np.ndarray

    def batches(self, sizes: np.ndarray, row_bytes: int, unit_bytes: int) -> Iterator[tuple[slice, int, int]]:
        """Yield (which gradients, first, last): those read together, or a range of rows of one that is too large.

        Args:
            sizes: rows that each takes in memory, no less than its counts.
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
            count = int(self.counts[start])
            for first in range(0, count, most):
                yield slice(start, start + 1), first, min(count, first + most)
            start += 1

    def row_weights(self, batch: slice, first: int, last: int, dtype: np.dtype) -> np.ndarray:
        """Return the weight of each row of a batch as a column."""
        rows = np.minimum(self.counts[batch], last) - first
        return np.repeat(self.weights[batch], rows).astype(dtype)[:, None]


def _load_factors(chosen: _Chosen, piece: Piece, unit_bytes: int) -> _Loaded:
    # The weighted sum of D' A over gradients is one product of all their rows: (w D)' A.
    reader, maps = chosen.reader, chosen.reader.row_maps(chosen.owners)
    # Of the inputs, everything between the first and the last row of a map is read.
    spans = [0 if rows is None or not len(rows) else int(rows.max() - rows.min()) + 1 for rows in maps]
    row_bytes = sum(piece.parameter.matrix_shape) * 8
    for batch, first, last in chosen.batches(np.maximum(chosen.counts, spans), row_bytes, unit_bytes):
        outputs = reader.rows(chosen.owners[batch], chosen.role, first, last)[:, piece.first : piece.last]
        if not (chosen.weights[batch] == 1).all():
            outputs *= chosen.row_weights(batch, first, last, outputs.dtype)
        yield outputs, _inputs(reader, chosen.owners[batch], maps[batch], first, last), None


def _inputs(
    reader: SegmentReader, owners: np.ndarray, maps: list[np.ndarray | None], first: int, last: int
) -> np.ndarray:
    """Return the input rows that belong to rows [first, last) of the output gradients, each by its row map."""
    if all(rows is None for rows in maps):
        return reader.rows(owners, "inputs", first, last)
    # Output gradients that are zero are not stored, so that a layer's rows are some of the inputs', which layers share.
    counts = np.minimum(reader.counts(owners, "inputs"), last).tolist()
    wanted = [
        np.arange(first, count) if rows is None else rows[first:last] for rows, count in zip(maps, counts, strict=True)
    ]
    low = np.array([rows.min() for rows in wanted])
    high = np.array([rows.max() + 1 for rows in wanted])
    begins = np.concatenate([[0], np.cumsum(high - low)[:-1]])
    places = np.concatenate([rows + shift for rows, shift in zip(wanted, begins - low, strict=True)])
    inputs: np.ndarray = reader.rows(owners, "inputs", low, high)[places]
    return inputs


def _load_dense(chosen: _Chosen, piece: Piece, unit_bytes: int) -> _Loaded:
    # Each gradient is a row of its own, so that their sum is one product with the row of weights.
    size = piece.shape[0] * piece.shape[1]
    at_once = max(1, unit_bytes // max(1, size * 8))
    for start in range(0, len(chosen.owners), at_once):
        batch = slice(start, start + at_once)
        owners = chosen.owners[batch]
        flat = chosen.reader.rows(owners, chosen.role, piece.first, piece.last).reshape(len(owners), size)
        yield chosen.weights[batch].astype(flat.dtype)[:, None], flat, None


def _load_rows(chosen: _Chosen, piece: Piece, unit_bytes: int) -> _Loaded:
    for batch, first, last in chosen.batches(chosen.counts, piece.shape[1] * 8, unit_bytes):
        indices = chosen.reader.rows(chosen.owners[batch], "indices", first, last)
        values = chosen.reader.rows(chosen.owners[batch], chosen.role, first, last)
        inside = (indices >= piece.first) & (indices < piece.last)
        scale = chosen.row_weights(batch, first, last, values.dtype)
        yield scale[inside], values[inside], indices[inside].astype(np.int64) - piece.first


# By encoding: what loads it, and the role of the rows that every gradient of it has which is not zero.
_LOADERS = {
    "factors": (_load_factors, "output_gradients"),
    "dense": (_load_dense, "values"),
    "rows": (_load_rows, "values"),
    "whole": (_load_dense, "gradient"),
}
