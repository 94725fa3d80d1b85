"""Pickles of the older layout, read without executing or importing anything that they name.

A pickle is a program for a stack machine. This one knows containers, numbers, numpy arrays and torch tensors, and each
name that a file may utter stands for a function of this module. Arrays stay wrapped until the end, so that no opcode
ever holds an object with methods of its own.
"""

import io
import math
import os
import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Never

import numpy as np

from timstore.errors import CorruptionError, FormatError, InvalidInputError, NotFoundError, StorageError
from timstore.records import BFLOAT16

_DEPTH = 100  # levels of containers; an array as lists has one for each of its at most 64 axes
_UNFOLDS = 16  # values per byte of the file, each counted wherever it appears: a few bytes can be a million lists
_EMPTY = 2**24  # of an array without elements, the product of its other axes

_AGAIN = "load it where you trust it, and write dicts, lists, numbers and numpy arrays alone"
_WHOLE = "copy the whole file again"
_OTHER_FILES = {
    b"PK\x03\x04": "this is a zip, perhaps of torch.save: load it with torch.load and write it with pickle.dump",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9": "this is a file of torch.save: load it with torch.load, write it with pickle.dump",
    b"{": "this seems to be JSON: give it a name that ends in .json",
}

# What picklers write for such trees. Every other opcode is refused: persistent ids, extension codes, sets, INST, OBJ,
# NEWOBJ and NEWOBJ_EX, buffers out of band, the strings of Python 2, POP and DUP.
_OPCODES = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE "
    "BINUNICODE BINUNICODE8 SHORT_BINUNICODE BINBYTES BINBYTES8 SHORT_BINBYTES BYTEARRAY8 TUPLE EMPTY_TUPLE TUPLE1 "
    "TUPLE2 TUPLE3 LIST EMPTY_LIST APPEND APPENDS DICT EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD "
    "GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE"
)


def read_pickle(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> Any:
    """Return what a pickle holds: dicts, lists, tuples, strings, bytes, numbers, None and numpy arrays.

    Nothing that the file names is imported or executed, torch included. Ordered and default dicts become dicts, torch
    tensors and parameters become arrays, numpy scalars become numbers. Arrays own their memory, in native byte order;
    bfloat16 has the dtype `timstore.records.BFLOAT16`. What the file holds once and names in several places is one
    object in the result too.

    Cost: one pass over the file, about a million values a second where they stand in lists. Memory: two to three times
    the file for arrays, five times for lists. A length that a file announces is not believed; a file made to take
    memory gets some 250 bytes for each of its own, and none if it has more than `max_bytes`.

    Raises:
        FormatError: if the file is larger, is no pickle, or holds anything else. Its fields: path, offset.
        CorruptionError: if it ends before what it announces.
        NotFoundError, InvalidInputError, StorageError: if there is no such file, it is a directory, pipe or device,
            or the system does not let it be read.
    """
    name = os.fsdecode(path)
    try:
        size = os.path.getsize(name)
        if not os.path.isfile(name):  # to open a pipe is to wait for its writer
            raise InvalidInputError(f"{name} is not a file: name the pickle itself", path=name)
        if max_bytes is not None and size > max_bytes:
            raise FormatError(f"{name} has {size} bytes: raise max_bytes from {max_bytes}", path=name, offset=0)
        with open(name, "rb") as file:
            return _read(name, file, size)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {name}: see which epochs the directory holds", path=name) from error
    except OSError as error:
        raise StorageError(f"{name} cannot be read: {error.strerror}", path=name) from error


def _read(name: str, file: BinaryIO, size: int) -> Any:
    machine = _Machine(_Bounded(file, size), _NAMES, _HANDLERS)
    try:
        if not size:
            raise CorruptionError("it is empty: write it again")
        start = file.read(16).lstrip()
        file.seek(0)
        for magic, what in _OTHER_FILES.items():
            if start.startswith(magic):
                raise FormatError(what)
        tree = machine.load()
        if machine.stack or machine.metastack or machine.source.left:
            raise FormatError(f"it ends within a value, or goes on after its end: {_WHOLE}")
        return _plain(tree, 0, _UNFOLDS * size, {})[0]
    except FormatError as refusal:
        kind, what = type(refusal), str(refusal)
    except OSError:
        raise
    except Exception as error:  # a program that is wrong fails anywhere, in ways without end
        kind, what = (
            FormatError,
            f"it is no pickle, or damaged ({type(error).__name__}: {_shown(str(error))}): {_WHOLE}",
        )
    at = size - machine.source.left
    message = f"{name}, byte {at} of {size}: {what}. Nothing that the file names was imported or executed."
    raise kind(message, path=name, offset=at)


def _shown(text: object) -> str:
    """Return text that fits into a message; of anything else, which may unfold without end, its type."""
    shown = ascii(text) if type(text) is str else type(text).__name__
    return shown if len(shown) <= 100 else f"{shown[:100]}..."


class _Bounded:
    """A file that is asked for no more than it has, so that nobody makes room for more."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.left = file, size

    def read(self, size: int) -> bytes:
        if size > self.left:
            raise CorruptionError(f"it ends {size - self.left} bytes before what it announces: {_WHOLE}")
        self.left -= size
        return self._file.read(size)

    def readline(self) -> bytes:
        line = self._file.readline(self.left)
        self.left -= len(line)
        return line


@dataclass(frozen=True, eq=False, slots=True)
class _Global:
    """What a name stands for: not a function, so that REDUCE alone can call it, and no opcode change it."""

    call: Callable[..., Any] | None


@dataclass(eq=False, slots=True)
class _Dtype:
    value: np.dtype[Any] | None


@dataclass(eq=False, slots=True)
class _Array:
    value: np.ndarray | None


@dataclass(frozen=True, eq=False, slots=True)
class _Storage:
    dtype: np.dtype[Any]
    count: int
    blob: bytes


class _Opcodes(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Never:
        name = {op.code: op.name for op in pickletools.opcodes}.get(chr(code))
        raise FormatError(f"no gradient needs the opcode {code} ({name}): {_AGAIN if name else _WHOLE}")


class _Machine(pickle._Unpickler):
    """An unpickler of few opcodes, none of which calls, changes or hashes anything but what is made here."""

    # Why not the C unpickler, twenty times as fast: its opcodes cannot be taken away; it makes room for the largest
    # memo index that a file names, 64 GB for 6 bytes; and it hashes any key: tuples nested deeply end the process.

    stack: list[Any]
    metastack: list[list[Any]]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def __init__(self, source: _Bounded, names: Mapping[tuple[str, str], Any], handlers: _Opcodes) -> None:
        super().__init__(source)
        self.source, self._names, self.dispatch = source, names, handlers  # type: ignore[misc]
        self._size = source.left
        self._made: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise FormatError(f"it names {_shown(f'{module}.{name}')}, which is never looked up: {_AGAIN}")
        return self._names[module, name]

    def make(self, what: str, size: int) -> None:
        """Count what is made of the file's bytes: naming them often would make much out of little."""
        self._made[what] = self._made.get(what, 0) + size
        if self._made[what] > self._size:
            raise FormatError(f"its {what} would take more bytes than the file has: {_AGAIN}")

    def load_frame(self) -> None:
        # A frame is advice to readers on how much to fetch. Without it, positions are those in the file.
        size = int.from_bytes(self.read(8), "little")
        if size > self.source.left:
            raise CorruptionError(f"it ends {size - self.source.left} bytes before a frame does: {_WHOLE}")

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        _set_items(self.stack[-1], items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _set_items(self.stack[-1], items)

    def load_reduce(self) -> None:
        arguments, called = self.stack.pop(), self.stack[-1]
        if type(called) is not _Global or called.call is None or type(arguments) is not tuple:
            raise FormatError(f"it calls what no gradient needs to call: {_AGAIN}")
        self.stack[-1] = called.call(self, *arguments)

    def load_build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if type(built) is _Dtype and type(state) is tuple:
            _set_dtype(built, *state)
        elif type(built) is _Array and built.value is None and type(state) is tuple and state[:1] == (1,):
            _, shape, dtype, is_fortran, data = state
            built.value = _filled(self, data, dtype, shape, "F" if is_fortran is True else "C").value
        else:
            raise FormatError(f"it sets the state of what has none: {_AGAIN}")


def _set_items(target: Any, items: list[Any]) -> None:
    if type(target) is not dict:
        raise FormatError(f"it sets items of a {type(target).__name__}: {_AGAIN}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            raise FormatError(f"it has a key of type {type(key).__name__}; keys are text or integers: {_AGAIN}")
        if key in target:
            raise FormatError(f"it has the key {_shown(str(key))} twice in one dict: {_AGAIN}")
        target[key] = value


_KNOWN = {code: getattr(_Machine, handler.__name__) for code, handler in pickle._Unpickler.dispatch.items()}
_HANDLERS = _Opcodes((getattr(pickle, name)[0], _KNOWN[getattr(pickle, name)[0]]) for name in _OPCODES.split())
_TORCH_HANDLERS = _Opcodes(_HANDLERS | {pickle.BINPERSID[0]: lambda machine: None})  # an id stays what it is


def _sizes(values: Any) -> tuple[int, ...]:
    is_short = type(values) is tuple and len(values) <= 64  # the axes that numpy has; a longer product would never end
    if not is_short or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise FormatError(f"it has an array whose shape, strides or place are no sizes: {_WHOLE}")
    return tuple(values)


def _owned(machine: _Machine, data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], **layout: Any) -> _Array:
    """Return a copy of an array that lies in data, in native byte order; numpy checks that it does."""
    machine.make("arrays", math.prod(shape) * dtype.itemsize)
    if 0 in shape and math.prod(size for size in shape if size) > _EMPTY:
        raise FormatError(f"it has an array of shape {shape}, empty and yet huge: {_WHOLE}")
    native = dtype if dtype == BFLOAT16 else dtype.newbyteorder("=")
    array = np.array(np.ndarray(shape, dtype, data, **layout), native, order="C", copy=True)
    if dtype.kind == "b" and (array.view(np.uint8) > 1).any():
        raise FormatError(f"it has booleans that are neither 0 nor 1: {_WHOLE}")
    return _Array(array)


def _encode(machine: _Machine, text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise FormatError(f"it encodes what are no bytes, which no gradient needs: {_AGAIN}")
    machine.make("bytes", len(text))
    return text.encode("latin1")


def _default_dict(machine: _Machine, factory: Any = None) -> dict[Any, Any]:
    if factory is not None and type(factory) is not _Global:
        raise FormatError(f"it has a defaultdict of a {type(factory).__name__}: {_AGAIN}")
    return {}


def _dtype(machine: _Machine, name: Any, align: Any = False, copy: Any = False) -> _Dtype:
    if type(name) is not str or name not in _NUMPY_DTYPES:
        raise FormatError(f"it has an array of dtype {_shown(name)}; gradients are floats, integers or bool: {_AGAIN}")
    return _Dtype(None if name == "V2" else np.dtype(name))


def _set_dtype(dtype: _Dtype, version: Any, order: Any, base: Any, names: Any, fields: Any, *rest: Any) -> None:
    if dtype.value is None and names == ("bfloat16",) and type(fields) is dict:
        part, offset = fields["bfloat16"]
        if type(part) is _Dtype and part.value == BFLOAT16["bfloat16"] and offset == 0:
            dtype.value = BFLOAT16
            return
    if dtype.value is None or (version, base, names, fields) != (3, None, None, None) or order not in ("<", ">", "|"):
        raise FormatError(f"it has an array of a structured dtype; gradients are floats, integers or bool: {_AGAIN}")
    dtype.value = dtype.value.newbyteorder(order)


def _filled(machine: _Machine, data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    if type(dtype) is not _Dtype or dtype.value is None or type(data) not in (bytes, bytearray):
        raise FormatError(f"it has an array without dtype or bytes: {_AGAIN}")
    if order not in ("C", "F") or math.prod(_sizes(shape)) * dtype.value.itemsize != len(data):
        raise FormatError(f"it has an array of shape {shape} and {dtype.value.str} in {len(data)} bytes: {_WHOLE}")
    return _owned(machine, data, dtype.value, shape, order=order)


def _scalar(machine: _Machine, dtype: Any, data: Any) -> Any:
    array = _filled(machine, data, dtype, (), "C")
    return array if dtype.value == BFLOAT16 else array.value.item()  # type: ignore[union-attr]


def _load_storage(machine: _Machine, blob: Any) -> _Storage:
    """Return a storage, of which torch's own loader would take the size on trust, and import torch."""
    if type(blob) is not bytes:
        raise FormatError(f"it has a torch storage without bytes: {_AGAIN}")
    machine.make("storages", len(blob))
    source = _Bounded(io.BytesIO(blob), len(blob))
    loaded = [_Machine(source, _STORAGES, _TORCH_HANDLERS).load() for _ in range(5)]
    magic, version, system, (kind, dtype, key, _, count, view), keys = loaded
    head = (magic, version, system["little_endian"], kind, view)
    if head != (_MAGIC, 1001, True, "storage", None) or type(key) is not str or keys != [key]:
        raise FormatError(f"it has a torch storage of another format: {_AGAIN}")
    (count,) = _sizes((count,))
    if int.from_bytes(source.read(8), "little") != count or source.left != count * dtype.itemsize:
        raise FormatError(f"it has a torch storage of {count} values in {source.left} bytes: {_WHOLE}")
    return _Storage(dtype, count, blob)


def _tensor(machine: _Machine, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _Array:
    if type(storage) is not _Storage or any(rest[2:]) or len(_sizes(size)) != len(_sizes(stride)):
        raise FormatError(f"it has a torch tensor of an unknown kind: {_AGAIN}")
    count = math.prod(size)
    if not count:
        return _filled(machine, b"", _Dtype(storage.dtype), size, "C")
    (start,) = _sizes((offset,))
    end = start + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if count > storage.count or end >= storage.count:
        raise FormatError(f"it has a torch tensor that is expanded, or beyond its storage: .clone() it; {_AGAIN}")
    item = storage.dtype.itemsize
    layout = {"offset": len(storage.blob) + (start - storage.count) * item, "strides": [step * item for step in stride]}
    return _owned(machine, storage.blob, storage.dtype, size, **layout)


def _plain(value: Any, depth: int, limit: int, done: dict[int, Any]) -> tuple[Any, int, int]:
    """Return the value without wrappers, how many values it holds, each wherever it appears, and in how many levels."""
    kind = type(value)
    if kind is str:
        value.encode()  # raises for halves of surrogate pairs, which no message could show
    if kind in (float, bool, str, bytes, type(None)) or (kind is int and value.bit_length() <= 64):
        return value, 1, 0
    if kind is _Array and value.value is not None:
        return value.value, max(1, value.value.nbytes), 0
    if kind not in (dict, list, tuple):
        raise FormatError(f"it has a {kind.__name__.strip('_').lower()} for a value, or a huge one: {_AGAIN}")
    if depth < _DEPTH and id(value) not in done:
        done[id(value)] = *_held(value, depth + 1, limit, done), value  # kept, so that no other takes its id
    if depth == _DEPTH or depth + done[id(value)][2] > _DEPTH:
        raise FormatError(f"it nests values deeper than {_DEPTH} levels, or in themselves: {_AGAIN}")
    return done[id(value)][:3]  # type: ignore[no-any-return]


def _held(value: Any, depth: int, limit: int, done: dict[int, Any]) -> tuple[Any, int, int]:
    is_dict, total, levels = type(value) is dict, 1, 0
    held: Any = list(value) if type(value) is tuple else value  # a list or dict is changed in place
    for place, item in held.items() if is_dict else enumerate(held):
        if is_dict:
            _plain(place, depth, limit, done)
        held[place], count, below = (item, 1, 0) if type(item) is float else _plain(item, depth, limit, done)
        # An array in a list counts by its size: whoever makes one array of the list copies it.
        total += 1 if is_dict and type(item) is _Array else count
        levels = max(levels, below)
    if total > limit:
        raise FormatError(f"its values, each wherever it appears, are more than {limit}: {_AGAIN}")
    return (tuple(held) if type(value) is tuple else held), total, levels + 1


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
    "numpy._core.multiarray._reconstruct": lambda machine, kind, shape, code: _Array(None),
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _filled,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda machine, data, grad, hooks: data,
    "torch.storage._load_from_bytes": _load_storage,
}
_NAMES = {
    (alias, full.rpartition(".")[2]): _Global(call)
    for full, call in _CALLS.items()
    for module in [full.rpartition(".")[0]]
    for alias in {module, module.replace("numpy._core", "numpy.core"), module.replace("builtins", "__builtin__")}
}
