"""Gradients as the older layout writes them."""

import json
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np

_BLOCK = 1 << 18


def json_pieces(gradient: np.ndarray) -> Iterator[bytes]:
    """Yield an array as nested lists, in pieces: every number in the digits of a float64, as `tolist()` gives it."""
    if gradient.ndim < 2 or gradient.size <= _BLOCK:
        yield json.dumps(gradient.tolist()).encode()
        return
    yield b"["
    for number, row in enumerate(gradient):
        if number:
            yield b", "
        yield from json_pieces(row)
    yield b"]"


def pickled(value: Any) -> bytes:
    """Return a value as it stands within a pickle."""
    # Protocol 3 has bytes, and no frames that would have to be whole; what it remembers it says anew in each value.
    return pickle.dumps(value, 3)[2:-1]
