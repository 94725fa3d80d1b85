"""Our shards are the bytes that zarr-python writes, and zarr-python reads them."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec

from timstore.errors import CorruptionError, FormatError
from timstore.format.zarr_shards import GROUP_JSON, ArrayLayout, decode_chunk, encode_shards
from timstore.records import BFLOAT16, narrow

DTYPES = ["float64", "float32", "float16", "int8", "int32", "int64"]


def encode(rows: np.ndarray, layout: ArrayLayout) -> dict[str, bytes]:
    def fill(first: int, out: np.ndarray) -> None:
        out[:] = rows[first : first + len(out)]

    return {shard.key: shard.data for shard in encode_shards(layout, fill)}


def write(folder: Path, rows: np.ndarray, layout: ArrayLayout) -> dict[str, bytes]:
    files = {"zarr.json": GROUP_JSON, "a/zarr.json": layout.to_json()}
    files |= {f"a/{key}": data for key, data in encode(rows, layout).items()}
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return files


def written_by_zarr(folder: Path, rows: np.ndarray, layout: ArrayLayout) -> dict[str, bytes]:
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    bits = rows.dtype == BFLOAT16
    plain = rows.view("<u2") if bits else rows
    if layout.compressor == "lz4":
        blosc = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=rows.itemsize)
    else:
        shuffle, block = "noshuffle" if rows.itemsize == 1 else "shuffle", max(512 * 1024, rows.itemsize * 128 * 1024)
        blosc = BloscCodec(cname="zstd", clevel=1, shuffle=shuffle, typesize=rows.itemsize, blocksize=block)
    array = group.create_array(
        "a",
        shape=plain.shape,
        dtype=plain.dtype,
        chunks=(layout.chunk_rows, layout.width),
        shards=(layout.shard_rows, layout.width),
        compressors=[blosc, Crc32cCodec()],
        attributes={"dtype": "bfloat16"} if bits else {},
        config={"write_empty_chunks": True},
        fill_value=0,
    )
    array[:] = plain
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 12, 37])
@pytest.mark.parametrize("compressor", ["zstd", "lz4"])
def test_every_byte_is_the_one_that_zarr_python_writes(tmp_path: Path, dtype: str, rows: int, compressor: str) -> None:
    random = np.random.default_rng(rows)
    values = (random.standard_normal((rows, 7)) * 50).astype(dtype)
    values[rows // 2 :] = 0
    layout = ArrayLayout(rows, 7, dtype, min(4, rows), 3, compressor)
    assert write(tmp_path / "ours", values, layout) == written_by_zarr(tmp_path / "theirs", values, layout)


def test_bfloat16_is_stored_as_uint16_with_an_attribute(tmp_path: Path) -> None:
    values = narrow(np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32))
    layout = ArrayLayout.plan(9, 5, BFLOAT16)
    assert write(tmp_path / "ours", values, layout) == written_by_zarr(tmp_path / "theirs", values, layout)
    array = zarr.open_group(tmp_path / "ours", mode="r")["a"]
    assert array.attrs["dtype"] == "bfloat16"
    assert np.array_equal(array[:], values.view("<u2"))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int8"])
def test_chunks_of_full_size_are_the_bytes_that_zarr_python_writes(tmp_path: Path, dtype: str) -> None:
    values = np.random.default_rng(4).standard_normal((3000, 512)).astype(np.float32)
    rows = narrow(values) if dtype == "bfloat16" else (values * 40).astype(dtype)
    layout = ArrayLayout.plan(*rows.shape, rows.dtype)
    assert layout.chunk_bytes >= 512 * 1024
    assert write(tmp_path / "ours", rows, layout) == written_by_zarr(tmp_path / "theirs", rows, layout)


def test_floats_take_little_more_than_the_entropy_of_sign_and_exponent() -> None:
    values = np.random.default_rng(5).standard_normal((1024, 512)).astype(np.float32)
    layout = ArrayLayout.plan(*values.shape, values.dtype)
    stored = sum(len(data) for data in encode(values, layout).values())
    counts = np.bincount((values.view(np.uint32) >> 23).ravel())
    chances = counts[counts > 0] / values.size
    bits = 23 - float((chances * np.log2(chances)).sum())
    assert values.size * bits / 8 <= stored <= values.size * bits / 8 * 1.02


def test_planned_arrays_of_several_shards_read_back_with_plain_zarr(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((20_000, 300)).astype(np.float32)
    layout = ArrayLayout.plan(*values.shape, values.dtype)
    files = write(tmp_path, values, layout)
    assert layout.shards > 1
    assert max(len(data) for data in files.values()) <= 8 * 1024 * 1024 + 4096
    assert np.array_equal(zarr.open_group(tmp_path, mode="r")["a"][:], values)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    width=st.integers(1, 40),
    chunk_rows=st.integers(1, 50),
    chunks=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    compressor=st.sampled_from(["zstd", "lz4"]),
)
def test_chunks_decode_to_the_bits_that_were_encoded(
    rows: int, width: int, chunk_rows: int, chunks: int, dtype: str, compressor: str
) -> None:
    raw = np.random.default_rng(rows * width).integers(0, 256, rows * width * np.dtype(dtype).itemsize, np.uint8)
    values = raw.view(dtype).reshape(rows, width)
    layout = ArrayLayout(rows, width, dtype, min(chunk_rows, rows), chunks, compressor)
    shards = encode(values, layout)
    decoded = [
        decode_chunk(layout, shards[f"c/{chunk // chunks}/0"], chunk % chunks, "here")
        for chunk in range(-(-rows // layout.chunk_rows))
    ]
    assert np.concatenate(decoded)[:rows].tobytes() == values.tobytes()
    assert ArrayLayout.from_json(layout.to_json(), "here") == layout


def test_every_flipped_bit_of_a_shard_is_an_error_or_harmless() -> None:
    values = np.random.default_rng(2).standard_normal((64, 8)).astype(np.float32)
    layout = ArrayLayout(64, 8, "float32", 16, 4)
    shard = encode(values, layout)["c/0/0"]
    random = np.random.default_rng(3)
    caught = 0
    for position in random.integers(0, len(shard) * 8, 300):
        broken = bytearray(shard)
        broken[position // 8] ^= 1 << (position % 8)
        try:
            decoded = np.concatenate([decode_chunk(layout, bytes(broken), chunk, "here") for chunk in range(4)])
        except CorruptionError:
            caught += 1
        else:
            assert np.array_equal(decoded, values)
    assert caught == 300


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    small, large = ArrayLayout(4, 8, "float32", 4, 1), ArrayLayout(400_000, 8, "float32", 400_000, 1)
    bomb = encode(np.zeros((400_000, 8), np.float32), large)["c/0/0"]
    with pytest.raises(CorruptionError, match="does not hold 128 bytes"):
        decode_chunk(small, bomb, 0, "here")


def test_metadata_of_another_kind_of_array_is_refused() -> None:
    document = ArrayLayout(10, 4, "float32", 5, 2).to_json()
    of_1_1 = ArrayLayout(10, 4, "float32", 5, 2, "lz4").to_json()
    others = [document.replace(b'"zstd"', name) for name in (b'"lz4"', b'"blosclz"', b'"zlib"', b'["zstd"]', b"1")]
    others += [of_1_1.replace(b'"lz4"', b'"zstd"'), of_1_1.replace(b'"bitshuffle"', b'"shuffle"')]
    for broken in (*others, document.replace(b"10,", b"1e9,"), b"{}", b"[]", b"nonsense"):
        with pytest.raises(FormatError):
            ArrayLayout.from_json(broken, "here")
