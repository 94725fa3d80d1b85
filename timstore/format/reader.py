"""Rows out of a segment: everything checked before its first use, memory bounded by one cache."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from timstore.encoding import restore
from timstore.errors import CorruptionError, TimstoreError
from timstore.format.cache import ByteCache
from timstore.format.commits import Commit, ObjectInfo
from timstore.format.objects import Objects
from timstore.format.segment import ROLE_CODES, ROLES
from timstore.format.shard import ArrayLayout, Chunk, decode_chunk, decode_piece
from timstore.format.tables import coded, read_rows
from timstore.format.verified import read_part, read_verified
from timstore.records import Factors, Gradient, Rows

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
        """Sort the chunks that can be read by themselves by array and number; earlier versions named none."""
        self._chunked: list[str] = []
        self._chunks = np.zeros((0, 3), np.int64)
        self._chunk_keys = np.zeros(0, np.int64)
        if "chunks.parquet" not in self._infos:
            return
        table = self._table("chunks.parquet")
        array, self._chunked = coded(table["array"])
        keys = array.astype(np.int64) << 32 | table["chunk"].to_numpy()
        order = np.argsort(keys)
        self._chunk_keys = keys[order]
        self._chunks = np.stack([table[name].to_numpy()[order] for name in Chunk._fields], axis=1, dtype=np.int64)

    def _chunk_of(self, array: str, chunk: int) -> Chunk | None:
        """Return where a chunk lies in its shard; None where only whole shards can be checked."""
        if array not in self._chunked:
            return None
        key = self._chunked.index(array) << 32 | chunk
        at = int(np.searchsorted(self._chunk_keys, key))
        found = at < len(self._chunk_keys) and self._chunk_keys[at] == key
        return Chunk(*self._chunks[at].tolist()) if found else None

    @property
    def nbytes(self) -> int:
        """The memory that slices and chunks take."""
        slices = len(self._keys) * 60 + (self._map_values.nbytes if len(self._keys) else 0)
        return slices + self._chunk_keys.nbytes + self._chunks.nbytes

    def has(self, owner: int, role: str) -> bool:
        """Say whether the gradient has rows of that role; a gradient that is zero has none."""
        return role in ROLE_CODES and bool(self.holds([owner], role)[0])

    def holds(self, owners: Numbers, role: str) -> np.ndarray:
        """Say of each gradient whether it has rows of that role."""
        first, stop = self._found(owners, role)
        return stop > first

    def count(self, owner: int, role: str) -> int:
        """Return how many rows the gradient has in that role."""
        return int(self.counts([owner], role)[0])

    def counts(self, owners: Numbers, role: str) -> np.ndarray:
        """Return how many rows each gradient has in that role."""
        first, stop = self._found(owners, role)
        counts = np.zeros(len(first), np.int64)
        held = stop > first
        counts[held] = self._rows[first[held]]
        return counts

    def row_map(self, owner: int) -> np.ndarray | None:
        """Return which rows of the inputs the output gradients belong to, or None for all of them in order."""
        return next(iter(self.row_maps([owner])))

    def row_maps(self, owners: Numbers) -> list[np.ndarray | None]:
        """Return the `row_map` of each gradient, all of which have output gradients."""
        first, _ = self._found(owners, "output_gradients")
        if not self._mapped[first].any():
            return [None] * len(first)
        spans = zip(self._map_start[first].tolist(), self._map_stop[first].tolist(), strict=True)
        found = [self._map_values[start:stop] for start, stop in spans]
        return [one if mapped else None for one, mapped in zip(found, self._mapped[first].tolist(), strict=True)]

    def owners_in(self, path: str) -> np.ndarray:
        """Return the gradients that have rows in a shard, z/ARRAY/c/NUMBER/0, in order; states are none."""
        _, array, _, shard, _ = path.split("/")
        if array not in self._arrays:
            return np.zeros(0, np.int64)
        layout = self._layout(array)
        first = int(shard) * layout.shard_rows
        held = self._array == self._arrays.index(array)
        held &= (self._start < first + layout.shard_rows) & (self._start + self._rows > first)
        owner, role = np.divmod(self._keys[held], len(ROLE_CODES))
        return np.unique(owner[role < len(ROLES)])

    def dtype(self, owner: int, role: str) -> str:
        """Return the name of the dtype that the gradient's rows are stored in."""
        first, _ = self._found([owner], role)
        array: str = self._arrays[self._array[first[0]]]
        return array.rpartition("-")[2]

    def width(self, owner: int, role: str) -> int:
        """Return the number of columns of the gradient's rows in that role."""
        first, stop = self._found([owner], role)
        return sum(self._layout(self._arrays[number]).width for number in self._array[first[0] : stop[0]])

    def rows(self, owners: Numbers, role: str, first: Any = 0, last: Any = None) -> np.ndarray:
        """Return the rows of several gradients in one role, one below the other, in float32 or float64.

        The array is new, and the caller's to change.

        Args:
            first, last: only rows [first, last) of each gradient: a number for all of them, or one for each.

        Cost: one pass over the chunks that hold them, decoded at most once while they are next to each other.
        """
        at, stop = self._found(owners, role)
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
        at, stop = self._found(owners, role)
        columns = [self._gather(at + piece, first, last) for piece in range(int(stop[0] - at[0]))]
        return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)

    def parts(self, owners: Numbers, encoding: str, shape: tuple[int, int]) -> list[Gradient]:
        """Return gradient parts of one encoding as they were recorded, numbers widened to float32 or float64.

        Raises:
            CorruptionError: what is stored cannot be such parts, though every checksum may be right.
        """
        try:
            found = self._parts(np.asarray(owners, np.int64), encoding, shape)
        except (ValueError, IndexError) as error:
            if isinstance(error, TimstoreError):
                raise
            raise self._misfit(str(error)) from error
        if not all(_fits(part, shape) for part in found):
            raise self._misfit(f"{encoding} of another shape than {shape}")
        return found

    def _misfit(self, what: str) -> CorruptionError:
        return CorruptionError(
            f"the gradients of {self._where} do not fit their parameters ({what}): `timstore verify` finds which",
            path=self._where,
        )

    def _parts(self, owners: np.ndarray, encoding: str, shape: tuple[int, int]) -> list[Gradient]:
        role = "output_gradients" if encoding == "factors" else "values"
        at, stop = self._found(owners, role)
        held = np.flatnonzero(stop > at)
        found: list[Gradient] = [np.zeros(0, np.float32)] * len(owners)
        for run in self._alike(at[held], stop[held]):
            chosen = owners[held[run]]
            values = self._split(chosen, role)
            if encoding == "dense":
                whole: list[Gradient] = [one.reshape(shape) for one in values]
            elif encoding == "rows":
                indices = self._split(chosen, "indices")
                whole = [Rows(which, one, shape) for which, one in zip(indices, values, strict=True)]
            else:
                inputs, maps = self._split(chosen, "inputs"), self.row_maps(chosen)
                mapped = (one if row_map is None else one[row_map] for one, row_map in zip(inputs, maps, strict=True))
                whole = [Factors(one, outputs) for one, outputs in zip(mapped, values, strict=True)]
            for number, one in zip(held[run].tolist(), whole, strict=True):
                found[number] = one
        for number in np.flatnonzero(stop == at).tolist():
            found[number] = np.zeros(shape, np.float32)
        return found

    def _split(self, owners: np.ndarray, role: str) -> list[np.ndarray]:
        """Return the rows of each gradient, an array of its own each: one that is held holds no other."""
        rows = self.rows(owners, role)
        if len(owners) == 1:
            return [rows]
        return [one.copy() for one in np.split(rows, np.cumsum(self.counts(owners, role))[:-1])]

    def _found(self, owners: Numbers, role: str) -> tuple[np.ndarray, np.ndarray]:
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
            alone = self._chunk_of(array, chunk)
            if alone is not None:
                piece: Any = np.frombuffer(read_part(self._objects, self._info(path), self._commit, alone), np.uint8)
                return decode_piece(layout, piece, number, self._infos[path].path)
            data = self._cache.get((self._commit.digest, path), lambda: self._object(path), len)
            # As an array, so that what is cut out of it is not copied.
            shard: Any = np.frombuffer(data, np.uint8)
            return decode_chunk(layout, shard, number, self._infos[path].path)

        entry: np.ndarray = self._cache.get((self._commit.digest, path, number), decode, lambda made: made.nbytes)
        return entry

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
