"""Pickles of arrays and values of other kinds than gradients have."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pickled import PROTOCOLS, array_of, assert_same_bits, called, items, load, number, refused, text

from timstore.errors import FormatError
from timstore.records import BFLOAT16


@pytest.mark.parametrize(
    "kind", ["O", "O8", "V8", "V2", "S4", "U1", "M8", "m8", "c8", "f16", "g", "float32", "", "(2,)f4", "f4,f4"]
)
def test_a_dtype_that_is_no_number_is_refused(path: Path, kind: str) -> None:
    for data in array_of(items(b"K\x02"), kind=kind).values():
        refused(path, data)


@pytest.mark.parametrize(
    "array",
    [
        np.array([None, os.system], object),
        np.zeros(2, [("a", "f4"), ("b", "i4")]),
        np.zeros(2, [("bfloat16", "<f2")]),
        np.zeros(2, [("other", "<u2")]),
        np.zeros(2, "V2"),
        np.array(["a"]),
        np.array([b"a"]),
        np.zeros(2, "M8[s]"),
        np.zeros(2, complex),
        np.zeros(2, np.longdouble),
        np.zeros((2, 2)).view(np.matrix),
        np.ma.array([1.0]),
        np.zeros(2, [("a", "f4")])[0],
        np.datetime64("2020"),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2).to(torch.float8_e4m3fn),
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
        torch.ones(1).expand(3),
        torch.nn.Linear(1, 1),
        torch.Size([1]),
        torch.float32,
        np.dtype("f4"),
        np.float32,
        {1, 2},
        frozenset([1]),
        bytearray(b"a"),
        2**65,
        -(2**65),
        10**4000,
        1j,
        "\ud800",
        {"\udfff": 1},
        {1.5: 1},
        {None: 1},
        {True: 1},
        {(1, 2): 1},
        {b"a": 1},
        range(3),
        Path("a"),
        FormatError,
    ],
    ids=lambda value: f"{type(value).__name__}",
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_the_layout_never_has_is_refused(path: Path, array: Any, protocol: int) -> None:
    refused(path, pickle.dumps(array, protocol))


def dtype_of(kind: str, *state: bytes) -> bytes:
    return array_of(items(b"K\x02"), b"C\x04" + bytes(4), "f2")["protocol 5"].replace(
        called("numpy", "dtype", text("f2"), b"\x89", b"\x88")
        + items(b"K\x03", text("<"), b"NNN", number(-1), number(-1), b"K\x00"),
        called("numpy", "dtype", text(kind), b"\x89", b"\x88") + items(*state),
    )


def test_a_dtype_has_the_state_that_numpy_gives_it(path: Path) -> None:
    three, sizes = b"K\x03", number(-1) + number(-1) + b"K\x00"
    assert_same_bits(load(path, dtype_of("f2", three, text(">"), b"NNN", sizes)), np.zeros(2, "f2"))
    for state in (
        (b"K\x04", text("<"), b"NNN", sizes),
        (three, text("="), b"NNN", sizes),
        (three, b"N", b"NNN", sizes),
        (three, text("<"), b"K\x01NN", sizes),
        (three, text("<"), b"N" + items(text("a")) + b"N", sizes),
        (three, text("<"), b"NN}", sizes),
    ):
        refused(path, dtype_of("f2", *state), "structured")
    part = called("numpy", "dtype", text("u2")) + b"K\x00\x86"
    named = b"}" + text("bfloat16") + part + b"s"
    lawful = (three, text("|"), b"N", items(text("bfloat16")), named, b"K\x02K\x01K\x10")
    assert_same_bits(load(path, dtype_of("V2", *lawful)), np.zeros(2, BFLOAT16))
    for place, other in (
        (3, items(text("float16"))),
        (3, b"N"),
        (4, b"N"),
        (4, named.replace(b"K\x00\x86", b"K\x01\x86")),
    ):
        refused(path, dtype_of("V2", *lawful[:place], other, *lawful[place + 1 :]), "structured")


def test_an_array_is_in_an_order_that_numpy_writes(path: Path) -> None:
    data = array_of(items(b"K\x01K\x02"))["protocol 5"]
    for order in ("C", "F"):
        assert_same_bits(load(path, data.replace(text("C"), text(order))), np.zeros((1, 2), np.float32))
    for order in (text("A"), text("K"), text("c"), b"N", b"K\x01", b"]"):
        refused(path, data.replace(text("C"), order), "it has an array of shape (1, 2)")


def test_booleans_are_0_or_1(path: Path) -> None:
    for data in array_of(items(b"K\x02"), b"C\x02\x00\x02", "b1").values():
        refused(path, data, "booleans")
