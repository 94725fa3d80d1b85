"""What the names in a pickle stand for, numpy's and torch's above all: functions of this module.

Arrays stay wrapped until the end, so that no opcode ever holds an object with methods of its own.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from timstore.errors import FormatError
from timstore.legacy.pickle_machine import AGAIN, HANDLERS_WITH_IDS, WHOLE, Bounded, Global, Machine, shown
from timstore.records import BFLOAT16

_EMPTY = 2**24  # of an array without elements, the product of its other axes


@dataclass(eq=False, slots=True)
class _Dtype:
    value: np.dtype[Any] | None


@dataclass(eq=False, slots=True)
class Array:
    """An array in its wrapper.

    Attributes:
        value: None until its state is set.
    """

    value: np.ndarray | None


@dataclass(frozen=True, eq=False, slots=True)
class _Storage:
    dtype: np.dtype[Any]
    count: int
    blob: bytes


def _sizes(values: Any) -> tuple[int, ...]:
    is_short = type(values) is tuple and len(values) <= 64  # the axes that numpy has; a longer product would never end
    if not is_short or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise FormatError(f"it has an array whose shape, strides or place are no sizes: {WHOLE}")
    return tuple(values)


def _owned(machine: Machine, data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], **layout: Any) -> Array:
    """Return a copy of an array that lies in data, in native byte order; numpy checks that it does."""
    machine.make("arrays", math.prod(shape) * dtype.itemsize)
    if 0 in shape and math.prod(size for size in shape if size) > _EMPTY:
        raise FormatError(f"it has an array of shape {shape}, empty and yet huge: {WHOLE}")
    native = dtype if dtype == BFLOAT16 else dtype.newbyteorder("=")
    array = np.array(np.ndarray(shape, dtype, data, **layout), native, order="C", copy=True)
    if dtype.kind == "b" and (array.view(np.uint8) > 1).any():
        raise FormatError(f"it has booleans that are neither 0 nor 1: {WHOLE}")
    return Array(array)


def _encode(machine: Machine, text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise FormatError(f"it encodes what are no bytes, which no gradient needs: {AGAIN}")
    machine.make("bytes", len(text))
    return text.encode("latin1")


def _default_dict(machine: Machine, factory: Any = None) -> dict[Any, Any]:
    if factory is not None and type(factory) is not Global:
        raise FormatError(f"it has a defaultdict of a {type(factory).__name__}: {AGAIN}")
    return {}


def _dtype(machine: Machine, name: Any, align: Any = False, copy: Any = False) -> _Dtype:
    if type(name) is not str or name not in _NUMPY_DTYPES:
        raise FormatError(f"it has an array of dtype {shown(name)}; gradients are floats, integers or bool: {AGAIN}")
    return _Dtype(None if name == "V2" else np.dtype(name))


def _set_dtype(
    machine: Machine, dtype: _Dtype, version: Any, order: Any, base: Any, names: Any, fields: Any, *rest: Any
) -> None:
    if dtype.value is None and names == ("bfloat16",) and type(fields) is dict:
        part, offset = fields["bfloat16"]
        if type(part) is _Dtype and part.value == BFLOAT16["bfloat16"] and offset == 0:
            dtype.value = BFLOAT16
            return
    if dtype.value is None or (version, base, names, fields) != (3, None, None, None) or order not in ("<", ">", "|"):
        raise FormatError(f"it has an array of a structured dtype; gradients are floats, integers or bool: {AGAIN}")
    dtype.value = dtype.value.newbyteorder(order)


def _set_array(machine: Machine, array: Array, *state: Any) -> None:
    if array.value is not None or state[:1] != (1,):
        raise FormatError(f"it sets the state of what has none: {AGAIN}")
    _, shape, dtype, is_fortran, data = state
    array.value = _filled(machine, data, dtype, shape, "F" if is_fortran is True else "C").value


def _filled(machine: Machine, data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    if type(dtype) is not _Dtype or dtype.value is None or type(data) not in (bytes, bytearray):
        raise FormatError(f"it has an array without dtype or bytes: {AGAIN}")
    if order not in ("C", "F") or math.prod(_sizes(shape)) * dtype.value.itemsize != len(data):
        raise FormatError(f"it has an array of shape {shape} and {dtype.value.str} in {len(data)} bytes: {WHOLE}")
    return _owned(machine, data, dtype.value, shape, order=order)


def _scalar(machine: Machine, dtype: Any, data: Any) -> Any:
    array = _filled(machine, data, dtype, (), "C")
    return array if dtype.value == BFLOAT16 else array.value.item()  # type: ignore[union-attr]


def _load_storage(machine: Machine, blob: Any) -> _Storage:
    """Return a storage, of which torch's own loader would take the size on trust, and import torch."""
    if type(blob) is not bytes:
        raise FormatError(f"it has a torch storage without bytes: {AGAIN}")
    machine.make("storages", len(blob))
    source = Bounded(io.BytesIO(blob), len(blob))
    loaded = [Machine(source, _STORAGES, HANDLERS_WITH_IDS, {}).load() for _ in range(5)]
    magic, version, system, (kind, dtype, key, _, count, view), keys = loaded
    head = (magic, version, system["little_endian"], kind, view)
    if head != (_MAGIC, 1001, True, "storage", None) or type(key) is not str or keys != [key]:
        raise FormatError(f"it has a torch storage of another format: {AGAIN}")
    (count,) = _sizes((count,))
    if int.from_bytes(source.read(8), "little") != count or source.left != count * dtype.itemsize:
        raise FormatError(f"it has a torch storage of {count} values in {source.left} bytes: {WHOLE}")
    return _Storage(dtype, count, blob)


def _tensor(machine: Machine, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Array:
    if type(storage) is not _Storage or any(rest[2:]) or len(_sizes(size)) != len(_sizes(stride)):
        raise FormatError(f"it has a torch tensor of an unknown kind: {AGAIN}")
    count = math.prod(size)
    if not count:
        return _filled(machine, b"", _Dtype(storage.dtype), size, "C")
    (start,) = _sizes((offset,))
    end = start + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if count > storage.count or end >= storage.count:
        raise FormatError(f"it has a torch tensor that is expanded, or beyond its storage: .clone() it; {AGAIN}")
    item = storage.dtype.itemsize
    layout = {"offset": len(storage.blob) + (start - storage.count) * item, "strides": [step * item for step in stride]}
    return _owned(machine, storage.blob, storage.dtype, size, **layout)


# Every name that a file may utter, and what happens in its place. What writers of numpy 1 and 2 and torch 2 utter:
# at protocols 0-2, bytes as `_codecs.encode` or `__builtin__.bytes`; numpy arrays as `_reconstruct`, at protocol 5, if
# contiguous, as `_frombuffer`; torch tensors, at every protocol, as `_rebuild_tensor_v2` of a `_load_from_bytes`, with
# an empty OrderedDict of hooks. The bytes of that have one of `_STORAGES`. None: a name that is never called.
_MAGIC = 0x1950A86A20F9469CFC6C
_NUMPY_DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1", "V2"}
_KINDS = "Double=<f8 Float=<f4 Half=<f2 BFloat16=<u2 Long=<i8 Int=<i4 Short=<i2 Char=i1 Byte=u1 Bool=?"
_STORAGES = {
    ("torch", f"{name}Storage"): BFLOAT16 if name == "BFloat16" else np.dtype(kind)
    for name, kind in (pair.split("=") for pair in _KINDS.split())
}
_CALLS: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": lambda machine: {},
    "collections.defaultdict": _default_dict,
    "_codecs.encode": _encode,
    "builtins.bytes": lambda machine: b"",
    **dict.fromkeys(["builtins.dict", "builtins.list", "builtins.int", "builtins.float", "numpy.ndarray"]),
    "numpy.dtype": _dtype,
    "numpy._core.multiarray._reconstruct": lambda machine, kind, shape, code: Array(None),
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _filled,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda machine, data, grad, hooks: data,
    "torch.storage._load_from_bytes": _load_storage,
}
NAMES = {
    (alias, full.rpartition(".")[2]): Global(call)
    for full, call in _CALLS.items()
    for module in [full.rpartition(".")[0]]
    for alias in {module, module.replace("numpy._core", "numpy.core"), module.replace("builtins", "__builtin__")}
}
STATES: dict[type, Callable[..., None]] = {_Dtype: _set_dtype, Array: _set_array}
