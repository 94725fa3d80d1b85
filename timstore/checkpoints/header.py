"""The header of a safetensors file: which tensor lies where, checked before anything of it is believed.

A file is 8 bytes, the length of the header (little-endian); the header, JSON that gives each tensor's dtype, shape and
place in the data; the data, without holes. A file may come from anywhere, so every number is held against the others.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from timstore.errors import FormatError, InvalidInputError

LENGTH_BYTES = 8
# What the format's own library reads at most.
_MOST_BYTES = 100_000_000
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        dtype: as the format spells it, such as BF16; it may be one that we do not know.
        start, stop: its bytes, counted from the beginning of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file holds.

    Attributes:
        tensors: by name.
        metadata: what the writer noted, text by text.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def header_length(first: bytes, path: Path, size: int, most_bytes: int) -> int:
    """Return the length of the header, from a file's first 8 bytes.

    Args:
        size: of the file.
        most_bytes: that a header may take; many tensors have a long one.

    Raises:
        FormatError: it cannot be that.
        InvalidInputError: it is longer than memory allows.
    """
    length = int.from_bytes(first, "little")
    if len(first) < LENGTH_BYTES or length < 2 or length > size - LENGTH_BYTES or length > _MOST_BYTES:
        raise _broken(path, f"its header is said to have {length:,} bytes, and the file has {size:,}")
    if length > most_bytes:
        raise InvalidInputError(
            f"{path}: the header has {length:,} bytes, more than memory_limit leaves for it ({most_bytes:,}): raise "
            "memory_limit",
            kind="memory-limit",
            path=str(path),
        )
    return length


def parse_header(text: bytes, path: Path, size: int) -> Header:
    """Return what a header says, held against the size of the file.

    Raises:
        FormatError: naming the tensor that cannot be where the header says.
    """
    try:
        said = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON as the format wants it ({error})") from error
    if not isinstance(said, dict):
        raise _broken(path, "its header is no JSON object")
    metadata = said.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(one, str) for one in metadata.values()):
        raise _broken(path, "its __metadata__ holds something else than text")
    begin = LENGTH_BYTES + len(text)
    tensors = {name: _tensor(name, entry, path, begin) for name, entry in said.items()}
    _check_places(tensors, path, begin, size)
    return Header(tensors, metadata)


def spans_between(spans: list[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Yield the stretches of a file that lie outside these spans, in order."""
    for (_, before), (start, _) in pairwise([(0, 0), *sorted(spans), (size, size)]):
        if before < start:
            yield before, start


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that is given twice: readers differ in which of the two they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _tensor(name: str, entry: Any, path: Path, begin: int) -> StoredTensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
    except (TypeError, KeyError, ValueError):
        numbers = [None]
    if not all(type(one) is int and 0 <= one < 2**63 for one in numbers) or not isinstance(dtype, str):
        raise _broken(path, f"tensor {name} is not described as dtype, shape and data_offsets", name)
    if stop < start:
        raise _broken(path, f"tensor {name} ends before it begins", name)
    bits = _BITS.get(dtype)
    if bits is not None and math.prod(shape) * bits != (stop - start) * 8:
        raise _broken(
            path, f"tensor {name} of dtype {dtype} and shape {tuple(shape)} cannot take {stop - start:,} bytes", name
        )
    return StoredTensor(name, dtype, tuple(shape), begin + start, begin + stop)


def _check_places(tensors: dict[str, StoredTensor], path: Path, begin: int, size: int) -> None:
    """Hold every tensor to begin where another ends, and the last one to end with the file."""
    end = begin
    for tensor in sorted(tensors.values(), key=lambda one: (one.start, one.stop)):
        if tensor.stop > size:
            raise _broken(
                path, f"tensor {tensor.name} lies at bytes {tensor.start:,} to {tensor.stop:,} of {size:,}", tensor.name
            )
        if tensor.start != end:
            what = "overlaps another one" if tensor.start < end else "leaves a hole before it"
            raise _broken(path, f"tensor {tensor.name} {what}", tensor.name)
        end = tensor.stop
    if end != size:
        raise _broken(path, f"its tensors end at byte {end:,}, and the file has {size:,}")


def _broken(path: Path, why: str, tensor: str | None = None) -> FormatError:
    fields = {} if tensor is None else {"tensor": tensor}
    return FormatError(
        f"{path} is no whole safetensors file: {why}. Restore it from a copy, or save the model again",
        path=str(path),
        **fields,
    )
