"""What a commit says of the chunks that readers read by themselves, against the shards that they are part of."""

from collections.abc import Iterator, Mapping

import pyarrow as pa
from isal.isal_zlib import crc32

from timstore.errors import CorruptionError
from timstore.format.zarr_shards import ArrayLayout, Chunk, chunk_place


class ChunkCheck:
    """The `chunks` table of one commit.

    Attributes:
        path: of the table.
    """

    def __init__(self, table: pa.Table, path: str) -> None:
        self.path = path
        self._said: dict[tuple[str, int], list[Chunk]] = {}
        for row in table.to_pylist():
            chunk = Chunk(*(row[name] for name in Chunk._fields))
            self._said.setdefault((row["array"], row["chunk"]), []).append(chunk)

    def faults(self, array: str, layout: ArrayLayout, shard: int, data: bytes, rows: int) -> Iterator[tuple[int, str]]:
        """Yield (chunk of the shard, what is wrong with its row) for a sound shard."""
        for place in range(min(layout.chunks, -(-rows // layout.chunk_rows))):
            number = shard * layout.chunks + place
            said = self._said.pop((array, number), [])
            try:
                offset, size = chunk_place(layout, data, place, self.path)
            except CorruptionError:
                continue  # told of the shard
            found = Chunk(offset, size, crc32(data[offset : offset + size]))
            if said and said != [found]:
                told = " and ".join(str(tuple(one)) for one in said)
                yield place, f"offset, bytes, crc32 of chunk {number} of {array} are {tuple(found)}, not {told}"

    def unknown(self, layouts: Mapping[str, ArrayLayout | None]) -> Iterator[str]:
        """Yield what is wrong with rows of chunks that the arrays do not have."""
        for array, number in sorted(self._said):
            layout = layouts.get(array)
            if array not in layouts or (layout is not None and not 0 <= number * layout.chunk_rows < layout.rows):
                yield f"it names chunk {number} of {array}, which the commit does not have"
