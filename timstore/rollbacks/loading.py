"""Chosen gradients as numbers to multiply: rows out of segments, a bounded number at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import pyarrow as pa
import torch

from timstore.format.reader import SegmentReader
from timstore.records import Parameter

# How a gradient is stored; `whole` is that of a whole step, kept beside the records.
ENCODINGS = ("factors", "dense", "rows", "whole")


@dataclass(frozen=True, eq=False, slots=True)
class ParameterRows:
    """Chosen gradients of one parameter, in reading order; arrays of one length.

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

    def take(self, chosen: np.ndarray) -> "ParameterRows":
        """Return some of them."""
        return ParameterRows(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def by_parameter(table: pa.Table) -> dict[str, pa.Table]:
    """Return the rows of each parameter, in the order that they have in a table."""
    words = table["parameter"].combine_chunks().dictionary_encode()
    codes = words.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    sorted_rows = table.take(order)
    edges = np.searchsorted(codes[order], np.arange(len(words.dictionary) + 1))
    return {
        name: sorted_rows.slice(start, stop - start)
        for name, start, stop in zip(words.dictionary.to_pylist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    }


def encodings_of(table: pa.Table) -> np.ndarray:
    """Return the place in `ENCODINGS` of each row's encoding."""
    return np.array([ENCODINGS.index(one) for one in table["encoding"].to_pylist()], np.int8)


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
        for left, right, indices, done in load(
            reader, rows.owner[chosen].tolist(), rows.weight[chosen], piece, unit_bytes
        ):
            yield number, Addition(left, right, indices, done)


Loaded = tuple[np.ndarray, np.ndarray, np.ndarray | None, int]


def _load_factors(
    reader: SegmentReader, owners: list[int], weights: np.ndarray, piece: Piece, unit_bytes: int
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
    reader: SegmentReader,
    owners: list[int],
    weights: np.ndarray,
    piece: Piece,
    unit_bytes: int,
    role: str = "values",
) -> Iterator[Loaded]:
    height = piece.last - piece.first
    at_once = max(1, unit_bytes // max(1, height * piece.width * 8))
    held = [number for number, owner in enumerate(owners) if reader.has(owner, role)]
    for start in range(0, len(held), at_once):
        batch = held[start : start + at_once]
        values = reader.rows([owners[number] for number in batch], role, piece.first, piece.last)
        flat = values.reshape(len(batch), height * piece.width)
        yield weights[batch].astype(flat.dtype)[:, None], flat, None, len(batch)


def _load_rows(
    reader: SegmentReader, owners: list[int], weights: np.ndarray, piece: Piece, unit_bytes: int
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
    "whole": partial(_load_dense, role="gradient"),
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
