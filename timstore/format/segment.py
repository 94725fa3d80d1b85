"""One immutable segment: the records of one commit as width-bucketed arrays and row tables."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import pyarrow as pa

from timstore.encoding import Encoded, Matrix
from timstore.format.shard import GROUP_JSON, ROW_BYTES, ArrayLayout, encode_shards, stored_name
from timstore.format.tables import SCHEMAS, write_rows
from timstore.records import Record

# The order in which a parameter's rows are laid down: all records' inputs, then all their output gradients, ...
ROLES = (
    "inputs",
    "inputs_scales",
    "output_gradients",
    "output_gradients_scales",
    "values",
    "values_scales",
    "indices",
)

# What whole parameters' worth of numbers can be: the optimizer's second moment after a step; the gradient that a step
# consumed; parameters and optimizer state before the first recorded step; parameters before a rollback.
STATE_ROLES = ("exp_avg_sq", "theta", "gradient", "start_theta", "start_state")

# Roles as numbers, those of gradients first.
ROLE_CODES = {role: code for code, role in enumerate((*ROLES, *STATE_ROLES))}


@dataclass(frozen=True, eq=False, slots=True)
class EncodedRecord:
    """A record whose gradients are ready to be written."""

    record: Record
    attempt: int
    parts: Sequence[Encoded]
    norm: float

    @property
    def stored_bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


@dataclass(slots=True)
class _Array:
    """An array being laid out: its matrices one below the other."""

    width: int
    dtype: np.dtype
    pieces: list[np.ndarray] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    rows: int = 0

    def append(self, piece: np.ndarray) -> int:
        start = self.rows
        self.pieces.append(piece)
        self.starts.append(start)
        self.rows += len(piece)
        return start

    def fill(self, first: int, out: np.ndarray) -> None:
        """Copy rows [first, first + len(out)) into out."""
        number = bisect_right(self.starts, first) - 1
        done = 0
        while done < len(out):
            piece = self.pieces[number][first + done - self.starts[number] :][: len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            number += 1


# (array, start, rows, block) of one column piece of a matrix.
_Place = tuple[str, int, int, list[int] | None]


class _Layout:
    """Where every matrix of a segment goes. A matrix that several gradients share is placed once."""

    def __init__(self) -> None:
        self.arrays: dict[str, _Array] = {}
        self._placed: dict[int, list[_Place]] = {}

    def place(self, matrix: Matrix) -> list[_Place]:
        """Return (array, start, rows, block) of each column piece of the matrix."""
        if id(matrix) not in self._placed:
            values = matrix.values
            rows, width = values.shape
            widest = max(1, ROW_BYTES // values.itemsize)
            self._placed[id(matrix)] = [
                self._append(
                    values[:, left : left + widest],
                    None if width <= widest else [0, rows, left, min(left + widest, width)],
                )
                for left in range(0, width, widest)
            ]
        return self._placed[id(matrix)]

    def _append(self, piece: np.ndarray, block: list[int] | None) -> _Place:
        rows, width = piece.shape
        name = f"w{width}-{stored_name(piece.dtype)}"
        array = self.arrays.setdefault(name, _Array(width, piece.dtype))
        return name, array.append(piece), rows, block


def build_segment(
    records: Sequence[EncodedRecord],
    tables: Mapping[str, pa.Table],
    blobs: Mapping[str, bytes],
    states: Sequence[tuple[str, Matrix]] = (),
) -> Iterator[tuple[str, bytes, str, int, int]]:
    """Yield (relative path, bytes, kind, logical bytes, rows) of every object of one commit, one at a time.

    Rows are ordered parameter first, record second, so that the sum over records of one parameter reads
    one contiguous range.

    Args:
        tables: further row tables by kind, already in the schema of `format.tables`.
        blobs: other objects by file name, written as they are (the probe).
        states: (role, numbers) of each row of the `states` table, in its order.
    """
    layout = _Layout()
    gradients, slices = _lay_out(records, states, layout)
    rows = {"records": _record_rows(records), "gradients": gradients, "slices": slices, **tables}
    for kind, table in rows.items():
        if table.num_rows:
            yield f"{kind}.parquet", write_rows(table, kind), kind, table.nbytes, table.num_rows
    for name, data in blobs.items():
        yield name, data, "probe", len(data), 0
    if layout.arrays:
        yield "z/zarr.json", GROUP_JSON, "zarr", len(GROUP_JSON), 0
    chunks: dict[str, list] = {name: [] for name in SCHEMAS["chunks"].names}
    for name, array in layout.arrays.items():
        plan = ArrayLayout.plan(array.rows, array.width, array.dtype)
        document = plan.to_json()
        yield f"z/{name}/zarr.json", document, "zarr", len(document), 0
        for number, shard in enumerate(encode_shards(plan, array.fill)):
            yield f"z/{name}/{shard.key}", shard.data, "shard", shard.rows * plan.row_bytes, shard.rows
            # A shard of one chunk is read whole in any case.
            for place, chunk in enumerate(shard.chunks if len(shard.chunks) > 1 else ()):
                row = (name, number * plan.chunks + place, *chunk)
                for column, value in zip(chunks.values(), row, strict=True):
                    column.append(value)
    if chunks["array"]:
        table = pa.Table.from_pydict(chunks, SCHEMAS["chunks"])
        yield "chunks.parquet", write_rows(table, "chunks"), "chunks", table.nbytes, table.num_rows


def _lay_out(
    records: Sequence[EncodedRecord], states: Sequence[tuple[str, Matrix]], layout: _Layout
) -> tuple[pa.Table, pa.Table]:
    """Place every matrix, and return the gradients and slices tables that say where it is."""
    order: dict[str, int] = {}
    for record in records:
        for part in record.parts:
            order.setdefault(part.parameter, len(order))
    sequence = sorted(
        (
            (order[part.parameter], part.part, number, part)
            for number, record in enumerate(records)
            for part in record.parts
        ),
        key=lambda entry: entry[:3],
    )
    gradients: dict[str, list] = {name: [] for name in SCHEMAS["gradients"].names}
    slices: dict[str, list] = {name: [] for name in SCHEMAS["slices"].names}
    for _, group in groupby(enumerate(sequence), key=lambda entry: entry[1][:2]):
        members = [(owner, records[number], part) for owner, (_, _, number, part) in group]
        for _, record, part in members:
            _add_gradient(gradients, record, part)
        for role in ROLES:
            for owner, _, part in members:
                if role in part.matrices:
                    row_map = part.row_map if role == "output_gradients" else None
                    _add_slices(slices, owner, role, row_map, layout.place(part.matrices[role]))
    for owner, (role, matrix) in enumerate(states):
        _add_slices(slices, owner, role, None, layout.place(matrix))
    return (
        pa.Table.from_pydict(gradients, SCHEMAS["gradients"]),
        pa.Table.from_pydict(slices, SCHEMAS["slices"]),
    )


def _add_slices(
    columns: dict[str, list], owner: int, role: str, row_map: np.ndarray | None, placed: Sequence[_Place]
) -> None:
    for name, start, count, block in placed:
        for column, value in zip(columns, (owner, role, name, start, count, row_map, block), strict=True):
            columns[column].append(value)


def _add_gradient(columns: dict[str, list], encoded: EncodedRecord, part: Encoded) -> None:
    record = encoded.record
    row = {
        "attempt": encoded.attempt,
        "epoch": record.epoch,
        "step": record.step,
        "rank": record.rank,
        "sample": record.sample,
        "parameter": part.parameter,
        "part": part.part,
        "encoding": part.encoding,
        "precision": part.precision,
        "norm": part.norm,
        "rel_error": part.rel_error,
        "bytes": part.bytes,
        "dense_bytes": part.dense_bytes,
    }
    for name, values in columns.items():
        values.append(row[name])


def _record_rows(records: Sequence[EncodedRecord]) -> pa.Table:
    rows = [
        {
            "attempt": encoded.attempt,
            "epoch": encoded.record.epoch,
            "step": encoded.record.step,
            "rank": encoded.record.rank,
            "sample": encoded.record.sample,
            "loss": encoded.record.loss,
            "tokens": encoded.record.tokens,
            "norm": encoded.norm,
            "bytes": encoded.stored_bytes,
            "dot": encoded.record.dot,
        }
        for encoded in records
    ]
    return pa.Table.from_pylist(rows, SCHEMAS["records"])


BuildSegment = Callable[[], Iterator[tuple[str, bytes, str, int, int]]]
