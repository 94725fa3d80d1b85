"""The arrays of one commit: their metadata, and every chunk of them decoded."""

import numpy as np

from timstore.errors import FormatError
from timstore.format.log import Commit, ObjectInfo
from timstore.format.segments import ROLE_CODES
from timstore.format.zarr_shards import GROUP_JSON, ArrayLayout, decode_chunk
from timstore.verification.chunks import ChunkCheck
from timstore.verification.examiner import Examiner, Fault
from timstore.verification.matrices import Slices
from timstore.verification.rows import Tables, samples_of, steps_of


class ArrayCheck:
    """The arrays of one commit, one object in memory at a time.

    Args:
        chunks: what the commit says of chunks that are read by themselves, None when it says nothing.

    Attributes:
        layouts: of every array that the commit has; None where it cannot be read.
    """

    def __init__(self, examiner: Examiner, commit: Commit, chunks: ChunkCheck | None) -> None:
        self._examiner = examiner
        self._commit = commit
        self._chunks = chunks
        self._prefix = ""
        self._documents: dict[str, ObjectInfo] = {}
        self._shards: dict[str, dict[int, ObjectInfo]] = {}
        self._faults: list[tuple[str, ObjectInfo, Fault]] = []
        self.layouts: dict[str, ArrayLayout | None] = {}
        for info in commit.objects:
            parts = info.path.split("/")
            if len(parts) > 4 and parts[3] == "z":
                self._prefix = "/".join(parts[:4])
                self._place(info, parts[4:])

    def _place(self, info: ObjectInfo, parts: list[str]) -> None:
        if parts == ["zarr.json"]:
            data = self._examiner.read(info)
            if isinstance(data, Fault):
                # Only other readers of Zarr look at it.
                self._examiner.add(data.kind, info.path, data.message, self._commit)
            elif data != GROUP_JSON:
                self._examiner.add("malformed", info.path, "it is not the metadata of a Zarr group", self._commit)
        elif len(parts) == 2 and parts[1] == "zarr.json":
            self._documents[parts[0]] = info
        elif len(parts) == 4 and parts[1] == "c" and parts[3] == "0" and str(int(parts[2])) == parts[2]:
            self._shards.setdefault(parts[0], {})[int(parts[2])] = info
        else:
            self._examiner.add("malformed", info.path, "it is no object of an array", self._commit)

    def read_layouts(self) -> None:
        """Read what every array is; what is wrong with one is told by `run`, which knows the samples."""
        for name in sorted({*self._documents, *self._shards}):
            self.layouts[name] = None
            info = self._documents.get(name)
            if info is None:
                continue
            data = self._examiner.read(info)
            if not isinstance(data, Fault):
                try:
                    layout = ArrayLayout.from_json(data, info.path)
                except FormatError as error:
                    data = Fault("malformed", str(error))
                else:
                    if name == f"w{layout.width}-{layout.dtype}":
                        self.layouts[name] = layout
                        continue
                    data = Fault("malformed", f"it is that of an array w{layout.width}-{layout.dtype}")
            self._faults.append((name, info, data))

    def run(self, slices: Slices | None, tables: Tables, bounds: np.ndarray | None) -> None:
        """Read every shard, and decode its chunks.

        Args:
            slices: of the commit, None when they cannot be read.
            bounds: below what the row indices of each gradient must be, None when that is not known.
        """
        for name, info, fault in self._faults:
            self._add(fault, info.path, name, (0, 2**62), slices, tables)
        for name, shards in sorted(self._shards.items()):
            layout = self.layouts[name]
            if name not in self._documents:
                path = f"{self._prefix}/{name}/zarr.json"
                fault = Fault("malformed", "the record names shards of this array, and not its metadata")
                self._add(fault, path, name, (0, 2**62), slices, tables)
            for number, info in sorted(shards.items()):
                self._shard(name, layout, number, info, slices, tables, bounds)
        for name, layout in self.layouts.items():
            if layout is None:
                continue
            for number in sorted(set(range(layout.shards)) - set(self._shards.get(name, ()))):
                fault = Fault("malformed", "the array needs this shard, and its record does not name it")
                path = f"{self._prefix}/{name}/c/{number}/0"
                self._add(fault, path, name, _span(layout, number), slices, tables)
        if self._chunks is not None:
            for message in self._chunks.unknown(self.layouts):
                self._examiner.add("malformed", self._chunks.path, message, self._commit)

    def _shard(
        self,
        name: str,
        layout: ArrayLayout | None,
        number: int,
        info: ObjectInfo,
        slices: Slices | None,
        tables: Tables,
        bounds: np.ndarray | None,
    ) -> None:
        data = self._examiner.read(info)
        span = (0, 2**62) if layout is None else _span(layout, number)
        if isinstance(data, Fault):
            self._add(data, info.path, name, span, slices, tables)
            return
        if layout is None:
            return
        count = span[1] - span[0]
        if count != info.rows:
            fault = Fault("count", f"its record says {info.rows} rows, and its place in the array {max(0, count)}")
            self._add(fault, info.path, name, span, slices, tables)
        if self._chunks is not None:
            for place, message in self._chunks.faults(name, layout, number, data, count):
                span_of = (span[0] + place * layout.chunk_rows, span[0] + (place + 1) * layout.chunk_rows)
                self._add(Fault("chunk", message), self._chunks.path, name, span_of, slices, tables)
        for chunk in range(min(layout.chunks, -(-count // layout.chunk_rows)) if count > 0 else 0):
            first = span[0] + chunk * layout.chunk_rows
            last = min(first + layout.chunk_rows, layout.rows)
            try:
                values = decode_chunk(layout, data, chunk, info.path)
            except Exception as error:  # whatever a decoder makes of bytes that no encoder of ours wrote
                fault = Fault("chunk", f"chunk {chunk} (rows {first} to {last}) does not decode: {error}")
                self._add(fault, info.path, name, (first, last), slices, tables)
                continue
            if values[last - first :].view("u1").any():
                fault = Fault("chunk", f"chunk {chunk} holds something after the array's end")
                self._add(fault, info.path, name, (first, last), slices, tables)
            if slices is not None and bounds is not None and layout.dtype in ("int32", "int64"):
                self._indices(name, info, first, values[: last - first, 0], slices, tables, bounds)

    def _indices(
        self,
        name: str,
        info: ObjectInfo,
        first: int,
        values: np.ndarray,
        slices: Slices,
        tables: Tables,
        bounds: np.ndarray,
    ) -> None:
        """Hold row indices to the number of rows that their parameter has."""
        found = slices.within(name, first, first + len(values)) & (slices.role == ROLE_CODES["indices"])
        found &= (slices.owner >= 0) & (slices.owner < len(bounds))
        wrong = [
            number
            for number in np.flatnonzero(found)
            if _beyond(values, slices.start[number] - first, slices.rows[number], bounds[slices.owner[number]])
        ]
        if wrong:
            owners = slices.owner[wrong]
            message = f"{len(owners)} gradients have indices of rows that their parameter does not have"
            steps, samples = steps_of(tables, owners), samples_of(tables, owners)
            self._examiner.add("slices", info.path, message, self._commit, steps=steps, samples=samples)

    def _add(
        self, fault: Fault, path: str, name: str, span: tuple[int, int], slices: Slices | None, tables: Tables
    ) -> None:
        if slices is None:
            samples, steps = samples_of(tables), None
        else:
            owners = slices.of_gradients(slices.within(name, *span))
            samples, steps = samples_of(tables, owners) if len(owners) else (), steps_of(tables, owners)
        self._examiner.add(fault.kind, path, fault.message, self._commit, steps=steps, samples=samples)


def _span(layout: ArrayLayout, shard: int) -> tuple[int, int]:
    """Return the first row of a shard, and the one after its last."""
    first = shard * layout.shard_rows
    return first, min(first + layout.shard_rows, layout.rows)


def _beyond(values: np.ndarray, start: int, count: int, bound: int) -> bool:
    part = values[max(0, start) : max(0, start + count)]
    return bool(len(part) and (part.min() < 0 or part.max() >= bound))
