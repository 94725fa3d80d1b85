"""Pickles of what is larger or deeper than the file: they are refused before memory is taken."""

import pickle
import re
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from pickled import (
    BLOB,
    EMPTY,
    array_of,
    assert_same_bits,
    blob_of,
    called,
    items,
    laughs,
    load,
    name,
    number,
    refused,
    tensor_of,
    text,
)

from timstore.legacy.pickles import read_pickle


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def long(value: int) -> bytes:
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def test_an_array_made_by_hand_is_read(path: Path) -> None:
    for data in array_of(items(b"K\x02")).values():
        assert_same_bits(load(path, data), np.zeros(2, np.float32))


@pytest.mark.parametrize(
    "shape",
    [
        (25_000_000_000,),
        (3,),
        (1,),
        (),
        (0,),
        (-2,),
        (-1, -2),
        (2**32, 2**32),
        (2**63,),
        (2**64 + 2,),
        (2**62, 2**62, 2),
        (1,) * 64 + (2,),
        (2**40, 2, 0),
    ],
    ids=str,
)
def test_an_array_has_the_bytes_of_its_shape(path: Path, shape: tuple[int, ...]) -> None:
    axes = items(*map(long, shape))
    with little_memory():
        for data in array_of(axes).values():
            refused(path, data)
        for data in array_of(axes, b"C\x00").values():
            if shape != (0,):
                refused(path, data, "no sizes" if any(not 0 <= axis < 2**63 for axis in shape) else "")


def test_a_shape_of_more_axes_than_numpy_has_is_not_multiplied_out(path: Path) -> None:
    for data in array_of(items(long(2**62) * 100_000)).values():
        refused(path, data, "no sizes")


@pytest.mark.parametrize("axes", [b"N", b"K\x02", b"](K\x02e", items(b"\x88"), items(b"G" + bytes(8)), items(b"N")])
def test_a_shape_is_a_tuple_of_integers(path: Path, axes: bytes) -> None:
    for data in array_of(axes).values():
        refused(path, data)


@pytest.mark.parametrize("frame", [b"", b"\x80\x04", b"\x80\x04\x95" + struct.pack("<Q", 9)])
@pytest.mark.parametrize(
    ("opcode", "width"),
    [(b"T", 4), (b"X", 4), (b"B", 4), (b"\x8b", 4), (b"\x8d", 8), (b"\x8e", 8), (b"\x96", 8), (b"\x95", 8)],
)
def test_announced_lengths_are_not_believed(path: Path, frame: bytes, opcode: bytes, width: int) -> None:
    for length in (2, 100, 2**31 - 1, 2**31, 2**32 - 1, 10**11, 2**62, 2**63 - 1, 2**63, 2**64 - 1):
        if length < 2 ** (8 * width):
            with little_memory():
                refused(path, frame + opcode + length.to_bytes(width, "little") + b".")


def test_a_frame_lies_within_the_file(path: Path) -> None:
    framed = b"\x80\x04\x95" + struct.pack("<Q", 2) + b"N."
    assert load(path, framed) is None
    refused(path, framed.replace(b"\x02", b"\x03"), "before a frame does")


def test_an_index_of_the_memo_takes_no_room(path: Path) -> None:
    path.write_bytes(b"\x80\x02Nr\xff\xff\xff\xff.")
    with little_memory():
        assert read_pickle(path) is None
    path.write_bytes(b"Np%d\n." % 10**300)
    with little_memory():
        assert read_pickle(path) is None
    for data in (
        b"Np-1\n.",
        b"h\x00.",
        b"j\xff\xff\xff\xff.",
        b"g5\n.",
        b"g-1\n.",
        b"gx\n.",
        b"Np" + b"9" * 5000 + b"\n.",
    ):
        refused(path, data)


def binary(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


LARGE = binary(blob_of(torch.zeros(25_000))) + b"q\x00"
STORED = name("torch.storage", "_load_from_bytes") + b"h\x00\x85R"
SEVERAL = {
    "arrays": (binary(bytes(100_000)) + b"q\x00", array_of(items(long(25_000)), b"h\x00")["below 5"][2:-1]),
    "arrays of protocol 5": (
        binary(bytes(100_000)) + b"q\x00",
        array_of(items(long(25_000)), b"h\x00")["protocol 5"][2:-1],
    ),
    "bytes": (text("\0" * 100_000) + b"q\x00", called("_codecs", "encode", b"h\x00", text("latin1"))),
    "storages": (LARGE, STORED),
    "tensors": (
        LARGE + STORED + b"q\x00",
        called("torch._utils", "_rebuild_tensor_v2", b"h\x00K\x00", items(number(25_000)), b"K\x01\x85\x89N"),
    ),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_naming_the_same_bytes_often_does_not_multiply_them(path: Path, kind: str) -> None:
    first, again = SEVERAL[kind]
    once = b"\x80\x05(" + first + again + b"t."
    if kind in ("storages", "tensors"):
        refused(path, once, "a storage for a value")  # which is left where it was made
    else:
        load(path, once)
    with little_memory():
        what = "storages" if kind == "storages" else "bytes" if kind == "bytes" else "arrays"
        refused(path, b"\x80\x05(" + first + again * 1_000 + b"t.", f"its {what} would take more bytes")


@pytest.mark.parametrize("levels", [5, 12, 40])
def test_lists_of_lists_do_not_unfold(path: Path, levels: int) -> None:
    data = b"\x80\x02(" + laughs(levels) + b"l."
    refused(path, data, "more than")
    refused(path, b"\x80\x02(" + laughs(levels, b"(", b"t") + b"l.", "more than")
    # where a value is looked at or shown before the tree is
    bomb = b"(" + laughs(levels) + b"lq\xf0"
    for use in (
        called("numpy", "dtype", b"h\xf0"),
        called("_codecs", "encode", text("x"), b"h\xf0"),
        called("numpy._core.multiarray", "scalar", b"h\xf0", b"h\xf0"),
        called("collections", "defaultdict", b"h\xf0"),
        called("torch.storage", "_load_from_bytes", b"h\xf0"),
        name("numpy._core.numeric", "_frombuffer") + items(b"h\xf0", b"h\xf0", b"h\xf0", b"h\xf0") + b"R",
        array_of(b"h\xf0")["protocol 5"][2:-1],
        array_of(items(b"h\xf0"))["protocol 5"][2:-1],
        array_of(items(b"K\x02"))["protocol 5"][2:-1].replace(text("C"), b"h\xf0"),
        EMPTY + b"h\xf0b",
        EMPTY + items(*[b"h\xf0"] * 5) + b"b",
        called("numpy", "dtype", text("V2")) + items(*[b"h\xf0"] * 8) + b"b",
        called("numpy", "dtype", text("f4")) + items(*[b"h\xf0"] * 8) + b"b",
        b"}h\xf0Ns",
    ):
        refused(path, b"\x80\x02" + bomb + use + b"\x86.")
    key = re.compile(rb"X.\0\0\0\d{6,}q", re.DOTALL)
    refused(path, tensor_of(key.sub(lambda found: bomb[:-2] + b"q", BLOB)), "another format")  # a key to compare
    head = b"\x80\x02" + bomb + b"."
    refused(path, tensor_of(head * 5))
    refused(path, tensor_of(BLOB.replace(b"q\x02X\x03\x00\x00\x00cpu", b"q\x02" + bomb[1:], 1)))


def test_an_array_in_lists_counts_wherever_it_appears(path: Path) -> None:
    array = pickle.dumps(np.zeros(10_000), 2)[2:-1] + b"q\xf0"
    refused(path, b"\x80\x02(" + array + b"h\xf0" * 1_000 + b"l.", "more than")
    rows = load(path, b"\x80\x02(" + array + b"h\xf0" * 10 + b"l.")
    assert len(rows) == 11
    samples = load(
        path,
        b"\x80\x02("
        + b"".join(number(key) + array[:-2] * (not key) + (b"q\xf0", b"h\xf0")[key > 0] for key in range(1_000))
        + b"d.",
    )
    assert len({id(array) for array in samples.values()}) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"(" * 3_000_000,
        b"]" * 300_000 + b"a" * 299_999 + b".",
        b")" + b"\x85" * 300_000 + b".",
        b"})" + b"\x85" * 300_000 + b"Ns.",
        b"(" * 200_000 + b"t" * 200_000 + b".",
        b"(" * 200_000 + b"l" * 200_000 + b".",
        b"(NN" * 200_000 + b"d" * 200_000 + b".",
        b"}" + b"K\x01}" * 200_000 + b"s" * 200_000 + b".",
        called("collections", "OrderedDict") + b"\x85" * 200_000 + b".",
        EMPTY + b")" + b"\x85" * 300_000 + b"b.",
        called("numpy", "dtype", b")" + b"\x85" * 300_000) + b".",
        b"]" * 101 + b"a" * 100 + b".",
    ],
    ids=lambda data: f"{len(data)} bytes of {data[:6]!r}",
)
def test_nesting_deeper_than_arrays_are_is_refused(path: Path, data: bytes) -> None:
    refused(path, data)


def test_nesting_as_deep_as_arrays_are_is_read(path: Path) -> None:
    read = load(path, b"]" * 100 + b"a" * 99 + b".")
    levels = 0
    while read:
        (read,) = read
        levels += 1
    assert levels == 99


def test_depth_counts_however_it_is_come_by(path: Path) -> None:
    """A list that is shown first by its bottom, each time but little deeper."""
    chain = (
        b"](" + b"]q\x00" + b"".join(b"]" * 60 + b"h%c" % n + b"a" * 60 + b"q%c" % (n + 1) for n in range(5)) + b"e."
    )
    refused(path, b"\x80\x02" + chain, "deeper")


@pytest.mark.parametrize(
    "data",
    [
        b"]q\x00h\x00a.",
        b"]q\x00(h\x00h\x00h\x00e.",
        b"}q\x00K\x01h\x00s.",
        b"]q\x00h\x00\x85a.",
        b"]q\x00}K\x01h\x00sa.",
        b"]q\x00(]h\x00a]h\x00ae.",
    ],
)
def test_a_container_within_itself_is_refused(path: Path, data: bytes) -> None:
    assert type(pickle.loads(data)) in (list, dict)
    refused(path, data, "in themselves")
