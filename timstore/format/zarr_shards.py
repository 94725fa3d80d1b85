"""Rows to the bytes of a Zarr v3 array and back: one array per width, inner chunks in sharded objects.

Written by hand because zarr-python's writer costs a training loop twice as much; the bytes are the same,
to the letter, and tests hold this file to that.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import google_crc32c
import numpy as np
from isal.isal_zlib import crc32

from timstore.errors import CorruptionError, FormatError
from timstore.records import BFLOAT16

if TYPE_CHECKING:
    from numcodecs.blosc import Blosc

CHUNK_BYTES = 512 * 1024
# Zstd codes every 128 KB with symbol statistics of their own. Blosc blocks in which a plane of the byte shuffle is at
# least that long keep the bytes that hold sign and exponent apart from the mantissa's, which are noise.
PLANE_BYTES = 128 * 1024
SHARD_BYTES = 8 * 1024 * 1024
# Widest row in bytes; a wider matrix is split by columns (`block` in slices), so that a chunk stays small.
ROW_BYTES = 1024 * 1024

GROUP_JSON = json.dumps({"attributes": {}, "zarr_format": 3, "node_type": "group"}, indent=2).encode()

_STORED: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": BFLOAT16,
    "int8": np.dtype("i1"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
}
_MISSING = 2**64 - 1
# Compression lets go of the interpreter lock, and shares the cores with the training.
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_ENCODERS = min(8, max(2, _CORES // 2))
# What is written, and what format 1.1 wrote and is read for ever.
WRITTEN, EARLIER = "zstd", "lz4"


def stored_name(dtype: np.dtype[Any]) -> str:
    """Return the name under which a dtype is stored, as in `w512-float32`."""
    return next(name for name, known in _STORED.items() if known == dtype)


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """Shape and chunking of one array: (rows, width), `chunk_rows` to a chunk, `chunks` to a shard.

    Attributes:
        compressor: Blosc's, `zstd`; `lz4` in arrays of format 1.1.
    """

    rows: int
    width: int
    dtype: str
    chunk_rows: int
    chunks: int
    compressor: str = WRITTEN

    @classmethod
    def plan(cls, rows: int, width: int, dtype: np.dtype[Any]) -> "ArrayLayout":
        """Choose chunks of a block, or little more, in shards of at most 8 MB, no larger than the rows at hand."""
        row_bytes = width * dtype.itemsize
        block = _block_bytes(dtype)
        fitting, missing = divmod(block, row_bytes)
        # In a block that is not full, planes straddle what Zstd codes with one table; likewise in a second, short one.
        another = missing and (row_bytes - missing <= block // 8 or missing > block // 8)
        chunk_rows = min(rows, fitting + 1 if another else fitting)
        needed = -(-rows // chunk_rows)
        most = max(1, SHARD_BYTES // (chunk_rows * row_bytes))
        # Shards of even size: the last one is then nearly full too.
        chunks = -(-needed // -(-needed // most))
        return cls(rows, width, stored_name(dtype), chunk_rows, chunks)

    @classmethod
    def from_json(cls, document: bytes, where: str) -> "ArrayLayout":
        """Read back what `to_json` wrote, in this version or in format 1.1.

        Raises:
            FormatError: if the array is anything else, or absurdly large.
        """
        try:
            meta = json.loads(document)
            rows, width = meta["shape"]
            inner = meta["codecs"][0]["configuration"]["chunk_shape"][0]
            outer = meta["chunk_grid"]["configuration"]["chunk_shape"][0]
            dtype = meta["attributes"].get("dtype", meta["data_type"])
            compressor = meta["codecs"][0]["configuration"]["codecs"][1]["configuration"]["cname"]
            layout = cls(rows, width, dtype, inner, outer // inner, compressor)
            sound = (
                compressor in (WRITTEN, EARLIER)
                and layout.to_json() == document
                and layout.chunk_bytes <= 2 * ROW_BYTES
                and rows >= 1
            )
        except (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError, AttributeError):
            sound = False
        if not sound:
            raise FormatError(f"{where} is not the metadata of an array that timstore writes", path=where)
        return layout

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return _STORED[self.dtype]

    @property
    def row_bytes(self) -> int:
        return self.width * self.numpy_dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_rows * self.row_bytes

    @property
    def shard_rows(self) -> int:
        return self.chunk_rows * self.chunks

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def to_json(self) -> bytes:
        """Return `zarr.json`, byte for byte as zarr-python writes it; bfloat16 is uint16 with an attribute."""
        bits = self.dtype == "bfloat16"
        floating = self.dtype.startswith("float")
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        flat = {"name": "bytes"} if self.dtype == "int8" else little
        crc32c = {"name": "crc32c"}
        sharding = {
            "chunk_shape": [self.chunk_rows, self.width],
            "codecs": [flat, {"name": "blosc", "configuration": self._blosc}, crc32c],
            "index_codecs": [little, crc32c],
            "index_location": "end",
        }
        document = {
            "shape": [self.rows, self.width],
            "data_type": "uint16" if bits else self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.shard_rows, self.width]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0.0 if floating else 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {"dtype": "bfloat16"} if bits else {},
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }
        return json.dumps(document, indent=2).encode()

    def encoder(self) -> "Blosc":
        """Return the compressor of chunks."""
        from numcodecs.blosc import Blosc  # which SQL alone does not need

        options = self._blosc
        shuffle = getattr(Blosc, options["shuffle"].upper())
        return Blosc(options["cname"], options["clevel"], shuffle, options["blocksize"])

    @property
    def _blosc(self) -> dict[str, Any]:
        itemsize = self.numpy_dtype.itemsize
        if self.compressor == EARLIER:
            level, shuffle, block = 5, "bitshuffle", 0
        else:
            level, shuffle, block = 1, "noshuffle" if itemsize == 1 else "shuffle", _block_bytes(self.numpy_dtype)
        return {"typesize": itemsize, "cname": self.compressor, "clevel": level, "shuffle": shuffle, "blocksize": block}


class Chunk(NamedTuple):
    """Where a chunk lies in its shard, its crc32c included, and the crc32 of these bytes."""

    offset: int
    bytes: int
    crc32: int


class Shard(NamedTuple):
    """One object of an array, below its folder, and where its chunks lie."""

    key: str
    data: bytes
    rows: int
    chunks: list[Chunk]


def encode_shards(layout: ArrayLayout, fill: Callable[[int, np.ndarray], None]) -> Iterator[Shard]:
    """Yield each shard in order; a few are made while one is written.

    Args:
        fill: called as fill(first_row, out), by several threads, to copy rows from first_row on into out, and fill it.
    """

    def make(shard: int) -> Shard:
        first = shard * layout.shard_rows
        data, chunks = _encode_shard(layout, fill, first)
        return Shard(f"c/{shard}/0", data, min(layout.shard_rows, layout.rows - first), chunks)

    if layout.shards == 1:
        yield make(0)
        return
    pool = _pool(os.getpid())
    made: deque[Future[Shard]] = deque()
    for shard in range(layout.shards):
        try:
            made.append(pool.submit(make, shard))
        except RuntimeError:  # the interpreter ends, and takes no more work into threads
            yield from (shard_made.result() for shard_made in made)
            made.clear()
            yield make(shard)
        if len(made) > _ENCODERS:
            yield made.popleft().result()
    while made:
        yield made.popleft().result()


@cache
def _pool(pid: int) -> ThreadPoolExecutor:
    """Return the process's threads: a forked child has none of its parent's; new ones each time hold on to memory."""
    return ThreadPoolExecutor(_ENCODERS, "timstore-encode")


def _encode_shard(
    layout: ArrayLayout, fill: Callable[[int, np.ndarray], None], first: int
) -> tuple[bytes, list[Chunk]]:
    # Chunks are always whole: the rows past the end are zeros, as the Zarr specification has it.
    chunk = np.zeros((layout.chunk_rows, layout.width), layout.numpy_dtype)
    blosc = layout.encoder()
    index = np.full((layout.chunks, 2), _MISSING, "<u8")
    pieces: list[bytes] = []
    chunks: list[Chunk] = []
    offset = 0
    for number in range(layout.chunks):
        start = first + number * layout.chunk_rows
        count = min(layout.chunk_rows, layout.rows - start)
        if count <= 0:
            break
        if count < layout.chunk_rows:
            chunk.view("u1")[:] = 0
        fill(start, chunk[:count])
        encoded = blosc.encode(_plain(chunk))
        checksum = _checksum(encoded)
        pieces += [encoded, checksum]
        chunks.append(Chunk(offset, len(encoded) + 4, crc32(checksum, crc32(encoded))))
        index[number] = chunks[-1][:2]
        offset += len(encoded) + 4
    table = index.tobytes()
    return b"".join([*pieces, table, _checksum(table)]), chunks


def decode_chunk(layout: ArrayLayout, shard: bytes, number: int, where: str) -> np.ndarray:
    """Return one inner chunk of a shard, (chunk_rows, width), checked before it is decoded.

    Raises:
        CorruptionError: if a checksum, an offset or the declared size is not right.
    """
    offset, size = chunk_place(layout, shard, number, where)
    return decode_piece(layout, shard[offset : offset + size], number, where)


def chunk_place(layout: ArrayLayout, shard: bytes, number: int, where: str) -> tuple[int, int]:
    """Return (offset, bytes) of an inner chunk as the shard's own index has it; raises as `decode_chunk`."""
    index_bytes = layout.chunks * 16 + 4
    index = np.frombuffer(_checked(shard[-index_bytes:], where), "<u8").reshape(layout.chunks, 2)
    offset, size = (int(value) for value in index[number])
    if offset == _MISSING or offset + size > len(shard) - index_bytes:
        raise CorruptionError(f"{where}: chunk {number} is not in its shard", path=where)
    return offset, size


def decode_piece(layout: ArrayLayout, piece: bytes, number: int, where: str) -> np.ndarray:
    """Return the chunk that a shard's bytes at its place are; as `decode_chunk`."""
    encoded = _checked(piece, where)
    # Blosc's header declares the decoded size; a bomb is refused before it is unpacked.
    if len(encoded) < 16 or int.from_bytes(encoded[4:8], "little") != layout.chunk_bytes:
        raise CorruptionError(f"{where}: chunk {number} does not hold {layout.chunk_bytes} bytes", path=where)
    decoded = np.frombuffer(layout.encoder().decode(encoded), layout.numpy_dtype)
    return decoded.reshape(layout.chunk_rows, layout.width)


def _block_bytes(dtype: np.dtype[Any]) -> int:
    return max(CHUNK_BYTES, PLANE_BYTES * dtype.itemsize)


def _plain(chunk: np.ndarray) -> np.ndarray:
    return chunk.view("<u2") if chunk.dtype == BFLOAT16 else chunk


def _checksum(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def _checked(data: bytes, where: str) -> bytes:
    body = data[:-4]
    if len(data) < 4 or int(google_crc32c.value(body)) != int.from_bytes(data[-4:], "little"):
        raise CorruptionError(f"{where}: an inner checksum does not match", path=where)
    return body
