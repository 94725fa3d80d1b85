"""Pickles that nobody came up with: ten thousand mutations."""

import pickle
import random
import re
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pickled import EMPTY, PROTOCOLS, blob_of, forms, laughs, text, watched

from timstore.errors import FormatError
from timstore.legacy.pickles import read_pickle
from timstore.records import BFLOAT16


class Reduced:
    """Pickles as a call of what it is told to."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._reduced = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


def same_tensor(tensor: torch.Tensor) -> Reduced:
    """A tensor whose pickle is the same in every run: torch's has an address in it."""
    blob = re.sub(rb"X.\0\0\0\d{6,}q", b"X\1\0\0\0000q", blob_of(tensor), flags=re.DOTALL)
    storage = Reduced(torch.storage._load_from_bytes, blob)
    place = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    return Reduced(torch._utils._rebuild_tensor_v2, storage, *place, False, OrderedDict())


def seeds() -> list[bytes]:
    small = {
        3: {"w": np.ones((2, 2), np.float32), "w_step": 4},
        "7": OrderedDict(b=[[0.5, 1.5], [1, 2]], s=np.float32(2)),
    }
    lawful = [
        {"sample_gradients": small},
        {"t": same_tensor(torch.ones(2, 9).T), "h": same_tensor(torch.ones(3, dtype=torch.bfloat16))},
    ]
    lawful += [
        np.arange(30, dtype=">i4").reshape(5, 6).T,
        np.zeros(50, BFLOAT16),
        [(1, "x", None, True, 2**40, b"y")],
        defaultdict(dict, a={1: {}}),
    ]
    made = [pickle.dumps(value, protocol) for value in lawful for protocol in PROTOCOLS] * 3
    pairs = [("os", "system"), ("builtins", "eval"), ("builtins", "__import__"), ("torch", "load"), ("os", "mkdir")]
    made += [data for pair in pairs for data in forms(*pair, text("/nowhere/x")).values()]
    return [*made, laughs(3) + b".", b"\x80\x02" + EMPTY + b"}b."]


def mutated(rng: random.Random, made: list[bytes]) -> bytes:
    data = bytearray(rng.choice(made))
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        place = rng.randrange(len(data) + 1)
        how = rng.choice([0, 0, 0, 0, 1, 2, 3, 4])
        if how == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif how == 1 and place < len(data):
            data[place] = rng.choice(b"().0RbsuetldicqhrjpgQoP\x80\x81\x82\x85\x92\x93\x94\x95\x96\xff\x00")
        elif how == 2:
            del data[place : place + rng.choice([1, 2, 8, 40])]
        elif how == 3:
            data[place:place] = rng.randbytes(rng.choice([1, 2, 4]))
        else:
            other = rng.choice(made)
            start = rng.randrange(len(other))
            data[place : place + rng.choice([0, 10])] = other[start : start + rng.choice([4, 20, 100])]
    return bytes(data)


def is_plain(value: Any) -> bool:
    kind = type(value)
    if kind is dict:
        return all(type(key) in (str, int) and is_plain(held) for key, held in value.items())
    if kind in (list, tuple):
        return all(map(is_plain, value))
    if kind is np.ndarray:
        return value.flags.owndata and (value.dtype.kind in "fiub" or value.dtype == BFLOAT16)
    return kind in (str, bytes, int, float, bool, type(None))


def test_ten_thousand_mutations_end_in_plain_values_or_our_error_and_run_nothing(path: Path) -> None:
    rng, made = random.Random(0), seeds()
    read = refusals = 0
    modules = set(sys.modules)
    for trial in range(10_000):
        data = mutated(rng, made)
        path.write_bytes(data)
        with watched(path) as seen:
            try:
                value = read_pickle(path)
            except FormatError as error:
                value = None
                refusals += 1
                assert len(str(error)) < 3_000
            else:
                read += 1
        assert seen == [], (trial, data)
        assert is_plain(value), (trial, data)
    assert set(sys.modules) == modules
    assert read > 500
    assert refusals > 5_000
