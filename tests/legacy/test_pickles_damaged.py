"""Pickles that are damaged, and files that are no pickles: the error says what they are."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from pickled import PROTOCOLS, load, name, refused, saved

from timstore.errors import CorruptionError, FormatError, InvalidInputError, NotFoundError
from timstore.legacy.pickles import read_pickle


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNd.", "twice"),
        (b"}(K\x01NK\x01Nu.", "twice"),
        (b"}K\x01NsK\x01Ns.", "twice"),
        (b"}(K\x01NK\x02u.", ""),
        (b"(K\x01d.", ""),
        (b"}]Ns.", "list"),
        (b"}}Ns.", "dict"),
        (b"}" + pickle.dumps(np.ones(2), 2)[2:-1] + b"Ns.", ""),
        (b"}" + name("collections", "OrderedDict") + b"Ns.", ""),
        (b"](K\x00Nu.", ""),
        (b"](NeK\x01Ns.", "sets items of a list"),
        (b"}Na.", ""),
        (b"NNa.", ""),
        (pickle.dumps(np.ones(2), 2)[2:-1] + b"Na.", ""),
        (name("numpy", "dtype") + b"(Ne.", ""),
        (b"", "empty"),
        (b".", ""),
        (b"N", "ends"),
        (b"a.", ""),
        (b"e.", ""),
        (b"t.", ""),
        (b"R.", ""),
        (b"b.", ""),
        (b"s.", ""),
        (b"u.", ""),
        (b"\x94.", ""),
        (b"\x93.", ""),
        (b"NN\x93.", ""),
        (b"NNR.", "calls"),
        (b"N)R.", "calls"),
        (name("collections", "OrderedDict") + b"]R.", "calls"),
        (name("collections", "OrderedDict") + b"NR.", "calls"),
        (b"NN.", "ends within"),
        (b"(N.", "ends within"),
        (b"\x80\x06N.", "protocol"),
        (b"\x80\xffN.", "protocol"),
        (b"Ix\n.", ""),
        (b"I" + b"9" * 10_000 + b"\n.", ""),
        (b"I0x" + b"f" * 10_000 + b"\n.", ""),
        (b"L\n.", ""),
        (b"Fx\n.", ""),
        (b"V\\u12\n.", ""),
        (b"X\x01\x00\x00\x00\xff.", ""),
        (b"c\xff\n\xff\n.", ""),
        (b"\x8b\xff\xff\xff\xff.", ""),
        (json.dumps({"sample_gradients": {"1": {"w": [1.0]}}}).encode(), ".json"),
        (b"\n {}", ".json"),
        (saved({"a": 1}, as_zip=True), "torch.load"),
        (saved({"a": 1}, as_zip=False), "torch.load"),
        (b"\x93NUMPY\x01\x00", ""),
        (b"\x1f\x8b\x08\x00", ""),
        (bytes(1_000), ""),
    ],
    ids=repr,
)
def test_what_is_damaged_or_no_pickle_is_refused_with_what_it_is(path: Path, data: bytes, words: str) -> None:
    refused(path, data, words)


def test_a_file_that_is_cut_off_or_goes_on_is_refused_at_every_byte(path: Path) -> None:
    small = {
        3: {"w": np.ones(3, np.float32), "b": torch.ones(2, dtype=torch.bfloat16), "l": [0.5, 1], "s": np.float64(2)}
    }
    for protocol in PROTOCOLS:
        data = pickle.dumps(small, protocol)
        load(path, data)
        for end in range(len(data)):
            path.write_bytes(data[:end])
            with pytest.raises(FormatError):
                read_pickle(path)
        path.write_bytes(data[:-1])
        with pytest.raises(CorruptionError, match="copy the whole file again"):
            read_pickle(path)
        for rest in (b"\n", b".", b"N", b"N.", data):
            refused(path, data + rest, "goes on")


def test_errors_name_the_byte(path: Path) -> None:
    for data in (
        b"](NNe" + name("os", "system") + b".",
        b"\x80\x04\x95\x20" + bytes(7) + b"](NNe" + name("os", "system") + b"N" * 22,
    ):
        error = refused(path, data)
        assert data[: error.fields["offset"]].endswith(b"os\nsystem\n")
        assert f"byte {error.fields['offset']} of {len(data)}" in str(error)


def test_a_larger_file_than_is_wanted_is_refused(path: Path) -> None:
    data = pickle.dumps([1.0] * 100)
    path.write_bytes(data)
    assert read_pickle(str(path), max_bytes=len(data)) == [1.0] * 100
    with pytest.raises(FormatError, match="max_bytes"):
        read_pickle(path, max_bytes=len(data) - 1)


def test_a_file_that_is_none_is_an_error_of_ours(path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"epoch_9\.pkl"):
        read_pickle(path.with_name("epoch_9.pkl"))
    with pytest.raises(InvalidInputError, match="is not a file"):
        read_pickle(path.parent)
    os.mkfifo(path.with_name("pipe"))
    with pytest.raises(InvalidInputError, match="is not a file"):
        read_pickle(path.with_name("pipe"))
