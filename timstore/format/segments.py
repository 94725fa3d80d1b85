"""One immutable segment: the records of one commit as width-bucketed arrays and row tables."""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from timstore.encoding import Encoded, Matrix, restore
from timstore.errors import CorruptionError, TimstoreError
from timstore.format.checksums import read_part, read_verified
from timstore.format.local_files import Objects
from timstore.format.log import Commit, ObjectInfo
from timstore.format.schemas import SCHEMAS, coded, read_rows, write_rows
from timstore.format.zarr_shards import (
    GROUP_JSON,
    ROW_BYTES,
    ArrayLayout,
    Chunk,
    decode_chunk,
    decode_piece,
    encode_shards,
    stored_name,
)
from timstore.records import Factors, Gradient, Record, Rows

if TYPE_CHECKING:
    import zarr

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

# What says which record a row is of, beside its attempt.
_RECORD = ("epoch", "step", "rank", "sample")


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
        tables: further row tables by kind, already in the schema of `format.schemas`.
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
    chunks: list[tuple[Any, ...]] = []
    for name, array in layout.arrays.items():
        plan = ArrayLayout.plan(array.rows, array.width, array.dtype)
        document = plan.to_json()
        yield f"z/{name}/zarr.json", document, "zarr", len(document), 0
        for number, shard in enumerate(encode_shards(plan, array.fill)):
            yield f"z/{name}/{shard.key}", shard.data, "shard", shard.rows * plan.row_bytes, shard.rows
            # A shard of one chunk is read whole in any case.
            if len(shard.chunks) > 1:
                chunks += [(name, number * plan.chunks + place, *chunk) for place, chunk in enumerate(shard.chunks)]
    if chunks:
        table = _table("chunks", chunks)
        yield "chunks.parquet", write_rows(table, "chunks"), "chunks", table.nbytes, table.num_rows


def _lay_out(
    records: Sequence[EncodedRecord], states: Sequence[tuple[str, Matrix]], layout: _Layout
) -> tuple[pa.Table, pa.Table]:
    """Place every matrix, and return the gradients and slices tables that say where it is."""
    order: dict[str, int] = {}
    for record in records:
        for part in record.parts:
            order.setdefault(part.parameter, len(order))
    parts = [(record, part) for record in records for part in record.parts]
    parts.sort(key=lambda entry: (order[entry[1].parameter], entry[1].part))  # stable: records keep their order
    slices: list[tuple[Any, ...]] = []
    for _, group in groupby(enumerate(parts), key=lambda entry: (entry[1][1].parameter, entry[1][1].part)):
        members = [(owner, part) for owner, (_, part) in group]
        for role in ROLES:
            for owner, part in members:
                if role in part.matrices:
                    row_map = part.row_map if role == "output_gradients" else None
                    places = layout.place(part.matrices[role])
                    slices += [(owner, role, *place, row_map, block) for *place, block in places]
    for owner, (role, matrix) in enumerate(states):
        slices += [(owner, role, *place, None, block) for *place, block in layout.place(matrix)]
    return _gradient_rows(parts), _table("slices", slices)


def _gradient_rows(parts: Sequence[tuple[EncodedRecord, Encoded]]) -> pa.Table:
    schema = SCHEMAS["gradients"]
    columns: dict[str, list[Any]] = {
        "attempt": [encoded.attempt for encoded, _ in parts],
        **{name: [getattr(encoded.record, name) for encoded, _ in parts] for name in _RECORD},
    }
    for name in schema.names[len(columns) :]:
        columns[name] = [getattr(part, name) for _, part in parts]
    return pa.Table.from_pydict(columns, schema)


def _record_rows(records: Sequence[EncodedRecord]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "attempt": [encoded.attempt for encoded in records],
        "norm": [encoded.norm for encoded in records],
        "bytes": [encoded.stored_bytes for encoded in records],
    }
    for name in (*_RECORD, "loss", "tokens", "dot"):
        columns[name] = [getattr(encoded.record, name) for encoded in records]
    return pa.Table.from_pydict(columns, SCHEMAS["records"])


def _table(kind: str, rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    columns: Iterable[tuple[Any, ...]] = zip(*rows, strict=True) if rows else [()] * len(SCHEMAS[kind])
    return pa.Table.from_pydict(dict(zip(SCHEMAS[kind].names, columns, strict=True)), SCHEMAS[kind])


class ByteCache:
    """The least recently used entries, up to a number of bytes; the newest one always stays.

    May be used by several threads: one of them makes an entry, others that want the same one wait for it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._making: dict[Hashable, threading.Event] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """Return the entry, made by `make` when it is not here; what `make` raises, one caller gets."""
        while True:
            with self._lock:
                if key in self._entries:
                    self._entries.move_to_end(key)
                    return self._entries[key][0]
                made_by_other = self._making.get(key)
                if made_by_other is None:
                    self._making[key] = threading.Event()
                    break
            made_by_other.wait()
        try:
            entry = make()
            self._keep(key, entry, size(entry))
        finally:
            with self._lock:
                self._making.pop(key).set()
        return entry

    def _keep(self, key: Hashable, entry: Any, size_bytes: int) -> None:
        with self._lock:
            self._entries[key] = entry, size_bytes
            self._bytes += size_bytes
            while self._bytes > self.limit_bytes and len(self._entries) > 1:
                _, (_, oldest_bytes) = self._entries.popitem(last=False)
                self._bytes -= oldest_bytes


# The arrays of one commit as zarr-python opens them, and where each gradient's rows lie in them.
Arrays: TypeAlias = "tuple[zarr.Group, pa.Table]"

_UNREAD = np.zeros(0, np.float32)

# Owners or bounds of rows: one for all, or one for each gradient.
Numbers = Sequence[int] | np.ndarray


class SegmentReader:
    """The arrays of one commit, by gradient (`owner`, its row number in the gradients table) and role.

    May be used by several threads. Memory: the cache, and about 60 bytes for each slice and chunk.

    Args:
        cache: shared by the readers of one task, so that all of them together stay within its limit.
    """

    def __init__(self, commit: Commit, objects: Objects, cache: ByteCache) -> None:
        self._commit = commit
        self._objects = objects
        self._cache = cache
        self._infos = {info.path.split("/", 3)[3]: info for info in commit.objects}
        self._layouts: dict[str, ArrayLayout] = {}
        self._arrays: list[str] = []
        self._load_slices()
        self._load_chunks()

    def _load_slices(self) -> None:
        """Sort the slices by owner and role; those of one matrix keep their order, that of its columns."""
        columns = ["owner", "role", "array", "start", "rows", "row_map"]
        if "slices.parquet" not in self._infos:
            self._keys = np.zeros(0, np.int64)
            return
        table = self._table("slices.parquet", columns)
        owner, start, rows = (table[name].to_numpy() for name in ("owner", "start", "rows"))
        role, roles = coded(table["role"])
        array, self._arrays = coded(table["array"])
        # Roles that are not known are of a later minor version, and not for this one to read.
        codes = np.array([ROLE_CODES.get(word, -1) for word in roles], np.int64)[role]
        keys = owner * len(ROLE_CODES) + codes
        order = np.argsort(keys, kind="stable")
        order = order[codes[order] >= 0]
        self._keys, self._start, self._rows, self._array = keys[order], start[order], rows[order], array[order]
        maps = table["row_map"].combine_chunks()
        ends = maps.offsets.to_numpy()
        self._map_values = maps.values.to_numpy(zero_copy_only=False)
        self._mapped = maps.is_valid().to_numpy(zero_copy_only=False)[order]
        self._map_start, self._map_stop = ends[:-1][order], ends[1:][order]

    def _load_chunks(self) -> None:
        """Keep where chunks lie that can be read by themselves; earlier versions named none."""
        self._chunks: dict[tuple[str, int], Chunk] = {}
        if "chunks.parquet" in self._infos:
            array, number, *place = self._table("chunks.parquet", SCHEMAS["chunks"].names).to_pydict().values()
            self._chunks = dict(zip(zip(array, number, strict=True), map(Chunk, *place), strict=True))

    @property
    def nbytes(self) -> int:
        """The memory that slices and chunks take."""
        slices = len(self._keys) * 60 + (self._map_values.nbytes if len(self._keys) else 0)
        return slices + len(self._chunks) * 300

    def has(self, owner: int, role: str) -> bool:
        """Say whether the gradient has rows of that role; a gradient that is zero has none."""
        return role in ROLE_CODES and self.count(owner, role) > 0

    def count(self, owner: int, role: str) -> int:
        """Return how many rows the gradient has in that role."""
        return int(self.counts([owner], role)[0])

    def counts(self, owners: Numbers, role: str) -> np.ndarray:
        """Return how many rows each gradient has in that role."""
        first, stop = self._slices_of(owners, role)
        counts = np.zeros(len(first), np.int64)
        stored = stop > first
        counts[stored] = self._rows[first[stored]]
        return counts

    def row_maps(self, owners: Numbers) -> list[np.ndarray | None]:
        """Return of each gradient, all of which have output gradients, which rows of the inputs these belong to.

        None: to all of them, in order.
        """
        first, _ = self._slices_of(owners, "output_gradients")
        if not self._mapped[first].any():
            return [None] * len(first)
        spans = zip(self._mapped[first], self._map_start[first].tolist(), self._map_stop[first].tolist(), strict=True)
        return [self._map_values[start:stop] if mapped else None for mapped, start, stop in spans]

    def owners_in(self, path: str) -> np.ndarray:
        """Return the gradients that have rows in a shard, z/ARRAY/c/NUMBER/0, in order; states are none."""
        _, array, _, shard, _ = path.split("/")
        if array not in self._arrays:
            return np.zeros(0, np.int64)
        layout = self._layout(array)
        first = int(shard) * layout.shard_rows
        inside = self._array == self._arrays.index(array)
        inside &= (self._start < first + layout.shard_rows) & (self._start + self._rows > first)
        owner, role = np.divmod(self._keys[inside], len(ROLE_CODES))
        return np.unique(owner[role < len(ROLES)])

    def dtype(self, owner: int, role: str) -> str:
        """Return the name of the dtype that the gradient's rows are stored in."""
        first, _ = self._slices_of([owner], role)
        array: str = self._arrays[self._array[first[0]]]
        return array.rpartition("-")[2]

    def width(self, owner: int, role: str) -> int:
        """Return the number of columns of the gradient's rows in that role."""
        first, stop = self._slices_of([owner], role)
        return sum(self._layout(self._arrays[number]).width for number in self._array[first[0] : stop[0]])

    def rows(self, owners: Numbers, role: str, first: Any = 0, last: Any = None) -> np.ndarray:
        """Return the rows of several gradients in one role, one below the other, in float32 or float64.

        The array is new, and the caller's to change.

        Args:
            first, last: only rows [first, last) of each gradient: a number for all of them, or one for each.

        Cost: one pass over the chunks that hold them, decoded at most once while they are next to each other.
        """
        at, stop = self._slices_of(owners, role)
        if not (stop > at).all():
            raise CorruptionError(f"the slices of {self._where} lack the {role} of a gradient", path=self._where)
        bounds = _each(first, len(at)), _each(np.iinfo(np.int64).max if last is None else last, len(at))
        # One parameter may be stored in several dtypes: a part that was too coarse as int8 is bfloat16.
        owners = np.asarray(owners)
        runs = self._alike(at, stop)
        restored = [self._restored(owners[run], role, bounds[0][run], bounds[1][run]) for run in runs]
        return restored[0] if len(restored) == 1 else np.concatenate(restored)

    def _alike(self, at: np.ndarray, stop: np.ndarray) -> Iterator[slice]:
        """Cut gradients into runs of neighbours whose columns lie in the same arrays."""
        if len(at) == 0:
            return iter(())
        pieces = stop - at
        edge = pieces[1:] != pieces[:-1]
        for piece in range(int(pieces.max(initial=0))):
            array = self._array[at + np.minimum(piece, pieces - 1)]
            edge = edge | (array[1:] != array[:-1])
        edges = [0, *(np.flatnonzero(edge) + 1).tolist(), len(at)]
        return (slice(start, end) for start, end in pairwise(edges))

    def _restored(self, owners: np.ndarray, role: str, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        values = self._stored(owners, role, first, last)
        if role == "indices":
            return values[:, 0]
        scales = f"{role}_scales"
        return restore(values, self._stored(owners, scales, first, last) if self.has(int(owners[0]), scales) else None)

    def _stored(self, owners: np.ndarray, role: str, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        at, stop = self._slices_of(owners, role)
        columns = [self._gather(at + piece, first, last) for piece in range(int(stop[0] - at[0]))]
        return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)

    def parts(self, owners: Numbers, encoding: str, shape: tuple[int, int]) -> list[Gradient]:
        """Return gradient parts of one encoding as they were recorded, numbers widened to float32 or float64.

        Raises:
            CorruptionError: what is stored cannot be such parts, though every checksum may be right.
        """
        try:
            parts = self._parts(np.asarray(owners, np.int64), encoding, shape)
        except (ValueError, IndexError) as error:
            if isinstance(error, TimstoreError):
                raise
            raise self._misfit(str(error)) from error
        if not all(_fits(part, shape) for part in parts):
            raise self._misfit(f"{encoding} of another shape than {shape}")
        return parts

    def _misfit(self, what: str) -> CorruptionError:
        return CorruptionError(
            f"the gradients of {self._where} do not fit their parameters ({what}): `timstore verify` finds which",
            path=self._where,
        )

    def _parts(self, owners: np.ndarray, encoding: str, shape: tuple[int, int]) -> list[Gradient]:
        role = "output_gradients" if encoding == "factors" else "values"
        at, stop = self._slices_of(owners, role)
        stored = np.flatnonzero(stop > at)
        parts: list[Gradient] = [np.zeros(shape, np.float32) if empty else _UNREAD for empty in stop == at]
        for run in self._alike(at[stored], stop[stored]):
            chosen = owners[stored[run]]
            values = self._split(chosen, role)
            if encoding == "dense":
                whole: list[Gradient] = [matrix.reshape(shape) for matrix in values]
            elif encoding == "rows":
                indices = self._split(chosen, "indices")
                whole = [Rows(rows, matrix, shape) for rows, matrix in zip(indices, values, strict=True)]
            else:
                inputs, maps = self._split(chosen, "inputs"), self.row_maps(chosen)
                mapped = (
                    rows if row_map is None else rows[row_map] for rows, row_map in zip(inputs, maps, strict=True)
                )
                whole = [Factors(rows, outputs) for rows, outputs in zip(mapped, values, strict=True)]
            for number, part in zip(stored[run].tolist(), whole, strict=True):
                parts[number] = part
        return parts

    def _split(self, owners: np.ndarray, role: str) -> list[np.ndarray]:
        """Return the rows of each gradient, an array of its own each, so that keeping one of them keeps no other."""
        rows = self.rows(owners, role)
        if len(owners) == 1:
            return [rows]
        return [part.copy() for part in np.split(rows, np.cumsum(self.counts(owners, role))[:-1])]

    def _slices_of(self, owners: Numbers, role: str) -> tuple[np.ndarray, np.ndarray]:
        """Return where each gradient's slices of a role begin and end."""
        wanted = np.asarray(owners, np.int64) * len(ROLE_CODES) + ROLE_CODES[role]
        return np.searchsorted(self._keys, wanted, "left"), np.searchsorted(self._keys, wanted, "right")

    def _gather(self, numbers: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Return rows [first, last) of each of these slices of one array, one below the other."""
        array = self._arrays[self._array[numbers[0]]]
        layout = self._layout(array)
        starts, counts = self._start[numbers] + first, np.minimum(self._rows[numbers], last) - first
        # Before memory is taken for them.
        outside = (starts < 0) | (counts < 0) | (starts > layout.rows) | (counts > layout.rows - starts)
        if outside.any():
            at = int(np.argmax(outside))
            wanted = f"{counts[at]} rows from {starts[at]} on"
            message = f"{array} of {self._where} has {layout.rows} rows, not {wanted}"
            raise CorruptionError(message, path=self._where)
        out = np.empty((int(counts.sum()), layout.width), layout.numpy_dtype)
        done = 0
        for start, count in _ranges(starts, counts):
            while count:
                chunk, offset = divmod(start, layout.chunk_rows)
                taken = min(count, layout.chunk_rows - offset)
                out[done : done + taken] = self._chunk(array, layout, chunk)[offset : offset + taken]
                done, start, count = done + taken, start + taken, count - taken
        return out

    def _chunk(self, array: str, layout: ArrayLayout, chunk: int) -> np.ndarray:
        shard, number = divmod(chunk, layout.chunks)
        path = f"z/{array}/c/{shard}/0"

        def decode() -> np.ndarray:
            alone = self._chunks.get((array, chunk))
            if alone is not None:
                piece: Any = np.frombuffer(read_part(self._objects, self._info(path), self._commit, alone), np.uint8)
                return decode_piece(layout, piece, number, self._infos[path].path)
            data = self._cache.get((self._commit.digest, path), lambda: self._object(path), len)
            # As an array, so that what is cut out of it is not copied.
            shard: Any = np.frombuffer(data, np.uint8)
            return decode_chunk(layout, shard, number, self._infos[path].path)

        entry: np.ndarray = self._cache.get((self._commit.digest, path, number), decode, lambda made: made.nbytes)
        return entry

    def group(self) -> "zarr.Group | None":
        """Return the arrays as zarr-python opens them, each object checked when it is read; None without arrays."""
        import zarr  # which nothing else needs, and takes a while
        from zarr.storage import MemoryStore

        if "z/zarr.json" not in self._infos:
            return None
        store = MemoryStore(_CheckedObjects(self._infos, self._object), read_only=True)  # type: ignore[arg-type]
        return zarr.open_group(store, mode="r")

    def slices(self) -> pa.Table:
        """Return where each gradient's rows lie, in the schema of `slices`; those of states are left out."""
        if "slices.parquet" not in self._infos:
            return _table("slices", ())
        table = self._table("slices.parquet", SCHEMAS["slices"].names)
        return table.filter(pc.is_in(table["role"], pa.array(ROLES)))

    def _layout(self, array: str) -> ArrayLayout:
        if array not in self._layouts:
            path = f"z/{array}/zarr.json"
            self._layouts[array] = ArrayLayout.from_json(self._object(path), self._info(path).path)
        return self._layouts[array]

    def _table(self, path: str, columns: Sequence[str] | None = None) -> pa.Table:
        info = self._info(path)
        kind = path.removesuffix(".parquet")
        return read_rows(self._object(path), info.path, columns, kind=kind, rows=info.rows)

    def _object(self, path: str) -> bytes:
        return read_verified(self._objects, self._info(path), self._commit)

    def _info(self, path: str) -> ObjectInfo:
        info = self._infos.get(path)
        if info is None:
            raise CorruptionError(f"{self._where} does not list its object {path}", path=path)
        return info

    @property
    def _where(self) -> str:
        return f"log/{self._commit.writer}/{self._commit.seq:012d}.json"


class _CheckedObjects(Mapping[str, Any]):
    """The objects of a segment's Zarr group by their keys: zarr would take what is missing or altered for numbers."""

    def __init__(self, infos: Mapping[str, ObjectInfo], read: Callable[[str], bytes]) -> None:
        self._paths = {path.removeprefix("z/"): path for path in infos if path.startswith("z/")}
        self._read = read

    def __getitem__(self, key: str) -> Any:
        from zarr.core.buffer import default_buffer_prototype

        return default_buffer_prototype().buffer.from_bytes(self._read(self._paths[key]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _fits(part: Gradient, shape: tuple[int, int]) -> bool:
    """Say whether a part can be of a parameter of that matrix shape."""
    if isinstance(part, Factors):
        widths = part.output_gradients.shape[1], part.inputs.shape[1]
        return widths == shape and len(part.inputs) == len(part.output_gradients)
    if isinstance(part, Rows):
        inside = bool(((part.indices >= 0) & (part.indices < shape[0])).all())
        return inside and part.values.shape == (len(part.indices), shape[1])
    return part.shape == shape


def _each(bound: Any, count: int) -> np.ndarray:
    return np.broadcast_to(np.asarray(bound, np.int64), (count,))


def _ranges(starts: np.ndarray, counts: np.ndarray) -> list[tuple[int, int]]:
    """Join ranges that follow each other: (start, count) pairs in reading order."""
    heads = np.flatnonzero(np.concatenate([[True], starts[1:] != starts[:-1] + counts[:-1]]))
    return list(zip(starts[heads].tolist(), np.add.reduceat(counts, heads).tolist(), strict=True))
