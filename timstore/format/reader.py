"""Rows out of a segment: every object checked whole before its first use, memory bounded by one cache."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from timstore.encoding import restore
from timstore.errors import CorruptionError
from timstore.format.commits import Commit, ObjectInfo
from timstore.format.segment import ROLES, STATE_ROLES
from timstore.format.shard import ArrayLayout, decode_chunk
from timstore.records import Factors, Gradient, Rows

_CODES = {role: code for code, role in enumerate((*ROLES, *STATE_ROLES))}


class ByteCache:
    """The least recently used objects and chunks, up to a number of bytes; the newest one always stays."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable, make: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """Return the entry, made by `make` when it is not here."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        entry = make()
        self._entries[key] = entry
        self._bytes += size(entry)
        while self._bytes > self.limit_bytes and len(self._entries) > 1:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= size(oldest)
        return entry


def _size(entry: Any) -> int:
    return entry.nbytes if isinstance(entry, np.ndarray) else len(entry)


class SegmentReader:
    """The arrays of one commit, by gradient (`owner`, its row number in the gradients table) and role.

    Args:
        read: returns an object's bytes after checking its size and checksum.
        cache: shared by the readers of one task, so that all of them together stay within its limit.
    """

    def __init__(self, commit: Commit, read: Callable[[ObjectInfo, Commit], bytes], cache: ByteCache) -> None:
        self._commit = commit
        self._read = read
        self._cache = cache
        self._infos = {info.path.split("/", 3)[3]: info for info in commit.objects}
        self._layouts: dict[str, ArrayLayout] = {}
        self._load_slices()

    def _load_slices(self) -> None:
        info = self._infos.get("slices.parquet")
        if info is None:
            self._index: dict[tuple[int, int], list[int]] = {}
            return
        table = pq.read_table(pa.BufferReader(self._read(info, self._commit)))
        self._start = table["start"].to_numpy()
        self._rows = table["rows"].to_numpy()
        self._array = table["array"].to_pylist()
        self._row_map = table["row_map"]
        self._index = {}
        for number, (owner, role) in enumerate(zip(table["owner"].to_pylist(), table["role"].to_pylist(), strict=True)):
            if role in _CODES:  # others are of a later minor version, and not for this one to read
                self._index.setdefault((owner, _CODES[role]), []).append(number)

    def has(self, owner: int, role: str) -> bool:
        """Say whether the gradient has rows of that role; a gradient that is zero has none."""
        return role in _CODES and (owner, _CODES[role]) in self._index

    def count(self, owner: int, role: str) -> int:
        """Return how many rows the gradient has in that role."""
        found = self._index.get((owner, _CODES[role]))
        return int(self._rows[found[0]]) if found else 0

    def row_map(self, owner: int) -> np.ndarray | None:
        """Return which rows of the inputs the output gradients belong to, or None for all of them in order."""
        value = self._row_map[self._index[owner, _CODES["output_gradients"]][0]]
        return value.values.to_numpy(zero_copy_only=False) if value.is_valid else None

    def dtype(self, owner: int, role: str) -> str:
        """Return the name of the dtype that the gradient's rows are stored in."""
        array: str = self._array[self._index[owner, _CODES[role]][0]]
        return array.rpartition("-")[2]

    def width(self, owner: int, role: str) -> int:
        """Return the number of columns of the gradient's rows in that role."""
        return sum(self._layout(self._array[number]).width for number in self._index[owner, _CODES[role]])

    def rows(self, owners: list[int], role: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Return the rows of several gradients in one role, one below the other, in float32 or float64.

        Args:
            first, last: only rows [first, last) of each gradient.

        Cost: one pass over the chunks that hold them, decoded at most once while they are next to each other.
        """
        code = _CODES[role]
        # One parameter may be stored in several dtypes: a part that was too coarse as int8 is bfloat16.
        runs = groupby(owners, key=lambda owner: [self._array[number] for number in self._index[owner, code]])
        span = first, last
        restored = [self._restored(list(run), role, span) for _, run in runs]
        return restored[0] if len(restored) == 1 else np.concatenate(restored)

    def _restored(self, owners: list[int], role: str, span: tuple[int, int | None]) -> np.ndarray:
        values = self._stored(owners, role, span)
        if role == "indices":
            return values[:, 0]
        scaled = self.has(owners[0], f"{role}_scales")
        return restore(values, self._stored(owners, f"{role}_scales", span) if scaled else None)

    def part(self, owner: int, encoding: str, shape: tuple[int, int]) -> Gradient:
        """Return one gradient part as it was recorded, numbers widened to float32 or float64."""
        if encoding == "factors":
            if not self.has(owner, "output_gradients"):
                return np.zeros(shape, np.float32)
            inputs, row_map = self.rows([owner], "inputs"), self.row_map(owner)
            return Factors(inputs if row_map is None else inputs[row_map], self.rows([owner], "output_gradients"))
        if not self.has(owner, "values"):
            return np.zeros(shape, np.float32)
        values = self.rows([owner], "values")
        return Rows(self.rows([owner], "indices"), values, shape) if encoding == "rows" else values.reshape(shape)

    def _stored(self, owners: list[int], role: str, span: tuple[int, int | None]) -> np.ndarray:
        code = _CODES[role]
        found = [self._index[owner, code] for owner in owners]
        columns = [self._gather([numbers[piece] for numbers in found], span) for piece in range(len(found[0]))]
        return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)

    def _gather(self, numbers: list[int], span: tuple[int, int | None]) -> np.ndarray:
        array = self._array[numbers[0]]
        layout = self._layout(array)
        first, last = span
        counts = np.minimum(self._rows[numbers], np.inf if last is None else last).astype(np.int64) - first
        out = np.empty((int(counts.sum()), layout.width), layout.numpy_dtype)
        done = 0
        for start, count in _ranges(self._start[numbers] + first, counts):
            if start < 0 or start + count > layout.rows:
                where = f"{array} of {self._where}"
                raise CorruptionError(f"{where} has {layout.rows} rows, not rows {start}-{start + count}", path=where)
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
            data = self._cache.get((self._where, path), lambda: self._object(path), _size)
            return decode_chunk(layout, data, number, self._infos[path].path)

        entry: np.ndarray = self._cache.get((self._where, path, number), decode, _size)
        return entry

    def _layout(self, array: str) -> ArrayLayout:
        if array not in self._layouts:
            path = f"z/{array}/zarr.json"
            self._layouts[array] = ArrayLayout.from_json(self._object(path), path)
        return self._layouts[array]

    def _object(self, path: str) -> bytes:
        info = self._infos.get(path)
        if info is None:
            raise CorruptionError(f"{self._where} does not list its object {path}", path=path)
        return self._read(info, self._commit)

    @property
    def _where(self) -> str:
        return f"log/{self._commit.writer}/{self._commit.seq:012d}.json"


def _ranges(starts: np.ndarray, counts: np.ndarray) -> list[tuple[int, int]]:
    """Join ranges that follow each other: (start, count) pairs in reading order."""
    joined: list[tuple[int, int]] = []
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        if joined and joined[-1][0] + joined[-1][1] == start:
            joined[-1] = joined[-1][0], joined[-1][1] + count
        else:
            joined.append((start, count))
    return joined
