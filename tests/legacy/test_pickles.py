"""Pickles of what is legitimate: they come back bit for bit."""

import io
import math
import pickle
import pickletools
import struct
import subprocess
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pickled import PROTOCOLS, assert_same_bits, load

from timstore.records import BFLOAT16

BITS = np.random.default_rng(0).integers(0, 256, 480, np.uint8).tobytes()  # with NaNs of every payload
KINDS = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]
FLAT = {kind: np.frombuffer(BITS, kind).copy() for kind in KINDS}
FLAT["b1"] = np.frombuffer(BITS, "u1") > 127
FLAT["bfloat16"] = np.frombuffer(BITS, "<u2").view(BFLOAT16).copy()


def shapes_of(flat: np.ndarray) -> dict[str, np.ndarray]:
    matrix = flat[:60].reshape(6, 10)
    return {
        "flat": flat,
        "matrix": matrix,
        "zero axes": flat[:1].reshape(()),
        "three axes": flat[:60].reshape(3, 4, 5),
        "empty": flat[:0].reshape(0, 7),
        "fortran": np.asfortranarray(matrix),
        "transposed": matrix.T,
        "strided": matrix[::2, 1::3],
        "backwards": matrix[::-1],
    }


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_come_back_bit_for_bit(path: Path, kind: str, protocol: int) -> None:
    for array in shapes_of(FLAT[kind]).values():
        assert_same_bits(load(path, pickle.dumps(array, protocol)), array)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[1] != "1"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_big_endian_arrays_become_native_and_keep_their_values(path: Path, kind: str, protocol: int) -> None:
    array = FLAT[kind].astype(f">{kind}").reshape(2, -1)
    read = load(path, pickle.dumps(array, protocol))
    assert_same_bits(read, FLAT[kind].reshape(2, -1))
    assert read.tobytes() == array.byteswap().tobytes()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scalars_become_numbers_of_the_same_value(path: Path, protocol: int) -> None:
    for kind, flat in FLAT.items():
        for scalar in flat[:20]:
            read = load(path, pickle.dumps(scalar, protocol))
            if kind == "bfloat16":
                assert_same_bits(read, np.array(scalar))
            else:
                assert type(read) is {"f": float, "i": int, "u": int, "b": bool}[kind[0]]
                assert np.array(read, kind).tobytes() == scalar.tobytes() or (math.isnan(read) and np.isnan(scalar))


TORCH = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's own memory, by way of single bytes, which every dtype has."""
    whole = tensor.detach().clone(memory_format=torch.contiguous_format)
    data = whole.flatten().view(torch.uint8).numpy().tobytes()
    dtype = BFLOAT16 if tensor.dtype == torch.bfloat16 else np.dtype(str(tensor.dtype).removeprefix("torch."))
    return np.frombuffer(data, dtype).reshape(tuple(tensor.shape))


@pytest.mark.parametrize("kind", TORCH)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tensors_come_back_as_arrays_bit_for_bit(path: Path, kind: str, protocol: int) -> None:
    data = bytearray(byte & 1 for byte in BITS) if kind == "bool" else bytearray(BITS)
    flat = torch.frombuffer(data, dtype=getattr(torch, kind))
    matrix = flat[:60].reshape(6, 10)
    tensors = [flat, matrix, matrix.T, matrix[::2, 1::3], matrix[3], flat[7].reshape(()), flat[:0].reshape(0, 7)]
    tensors += [matrix[:, None, 2:4], flat.as_strided((5, 3), (2, 1))]  # windows that overlap have their values twice
    tensors += [torch.nn.Parameter(matrix, requires_grad=flat.is_floating_point())]
    for tensor in tensors:
        assert_same_bits(load(path, pickle.dumps(tensor, protocol)), bits_of(tensor))


def epoch() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    by_sample: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    by_sample[3]["layer.weight"] = rng.standard_normal((4, 3)).astype(np.float32)
    by_sample[3]["layer.weight_step"] = 17
    by_sample["7"] = OrderedDict(bias=torch.arange(5.0), scale=torch.tensor(2.5, dtype=torch.bfloat16))
    by_sample["ü"]["nested"] = [[0.1, -0.0, math.inf], [1e-310, 2.0, -3]]
    by_sample[np.int64(9)]["rows"] = [np.ones(3), (1, 2.5)]
    by_sample[-(2**40)] = {"number": np.float32(0.1), "flag": True, "none": None, "raw": b"\x00\xff", "big": 2**63}
    return {"sample_gradients": by_sample}


def epoch_read(value: Any) -> None:
    assert type(value) is dict
    assert list(value) == ["sample_gradients"]
    samples = value["sample_gradients"]
    assert type(samples) is dict
    assert [(type(key), key) for key in samples] == [(int, 3), (str, "7"), (str, "ü"), (int, 9), (int, -(2**40))]
    assert all(type(held) is dict for held in samples.values())
    assert samples[3]["layer.weight_step"] == 17
    expected = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    assert_same_bits(samples[3]["layer.weight"], expected)
    assert_same_bits(samples["7"]["bias"], np.arange(5, dtype=np.float32))
    assert_same_bits(samples["7"]["scale"], np.array(0x4020, "<u2").view(BFLOAT16))
    assert repr(samples["ü"]) == "{'nested': [[0.1, -0.0, inf], [1e-310, 2.0, -3]]}"
    assert_same_bits(samples[9]["rows"][0], np.ones(3))
    assert repr(samples[9]["rows"][1]) == "(1, 2.5)"
    last = {"number": float(np.float32(0.1)), "flag": True, "none": None, "raw": b"\x00\xff", "big": 2**63}
    assert repr(samples[-(2**40)]) == repr(last)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_epoch_of_every_kind_of_value_comes_back_in_plain_containers(path: Path, protocol: int) -> None:
    data = pickle.dumps(epoch(), protocol)
    epoch_read(load(path, data))
    epoch_read(load(path, pickletools.optimize(data)))
    slow = io.BytesIO()
    pickle._Pickler(slow, protocol).dump(epoch())
    epoch_read(load(path, slow.getvalue()))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3])
def test_what_numpy_1_wrote_is_read(path: Path, protocol: int) -> None:
    data = pickle.dumps(epoch(), protocol)
    assert b"numpy._core" in data
    epoch_read(load(path, data.replace(b"numpy._core", b"numpy.core")))


def test_a_pickle_of_every_length_of_text_and_integer_comes_back(path: Path) -> None:
    value = ["x" * 300, "é" * 70_000, b"y" * 300, b"z" * 70_000, "line\nbreak\\u0041", 0.1, math.nan, -math.inf, 5e-324]
    value += [sign * 2**power for power in range(64) for sign in (1, -1)]
    value += [{}, [], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    for protocol in PROTOCOLS:
        assert repr(load(path, pickle.dumps(value, protocol))) == repr(value)
    assert load(path, b"\x80\x04\x8d" + struct.pack("<Q", 4) + b"text.") == "text"
    assert load(path, b"\x80\x04\x8e" + struct.pack("<Q", 4) + b"data.") == b"data"


def test_what_the_file_has_once_is_one_object(path: Path) -> None:
    array, row = np.arange(4.0), [1.0, 2.0]
    read = load(path, pickle.dumps({"a": array, "b": array, "c": row, "d": [row, (row,)]}))
    assert read["a"] is read["b"]
    assert read["c"] is read["d"][0] is read["d"][1][0]


def test_tensors_are_read_without_torch(path: Path) -> None:
    path.write_bytes(pickle.dumps(torch.arange(3.0)))
    script = f"""
import sys
from timstore.legacy.pickles import read_pickle
assert read_pickle({str(path)!r}).tolist() == [0, 1, 2]
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
