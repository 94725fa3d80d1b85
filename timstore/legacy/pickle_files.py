"""An epoch's file as a pickle, in and out. Nothing that a pickle names is imported, executed or given a state.

A pickle is a program for a stack machine. The standard library's runs it here, with the opcodes alone that writers of
such trees use: a name becomes text (`_Name`), what is called under it is a function of this file (`_CALLS`), and an
array is a view of the file's bytes, in a wrapper that no opcode can look into.
"""

import io
import math
import pickle
import pickletools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Never

import numpy as np

from timstore.errors import CorruptionError, FormatError
from timstore.legacy.layout import GRADIENTS, MARKER, Entry, Samples, is_scalar, narrowed, nested
from timstore.os_errors import reporting
from timstore.records import BFLOAT16, widen

# What to do about a pickle of something else, and about one that is damaged.
_AGAIN = "load it where you trust it, and write dicts, lists, numbers and numpy arrays alone"
_WHOLE = "copy the whole file again"
_OTHER_FILES = {
    b"PK\x03\x04": "this is a zip, perhaps of torch.save: load it with torch.load and write it with pickle.dump",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9": "this is a file of torch.save: load it with torch.load, write it with pickle.dump",
    b"{": "this seems to be JSON: give it a name that ends in .json",
}
_UNFOLDS = 16  # values in lists per byte of the file
_EMPTY = 2**24  # of an array without elements, the product of its other axes
_UNFILLED = np.empty(0, "V1")
_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
# Every other opcode is refused: extension codes, sets, INST, OBJ, NEWOBJ and NEWOBJ_EX, buffers out of band, the
# strings of Python 2, POP and DUP.
_OPCODES = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE "
    "BINUNICODE BINUNICODE8 SHORT_BINUNICODE BINBYTES BINBYTES8 SHORT_BINBYTES BYTEARRAY8 TUPLE EMPTY_TUPLE TUPLE1 "
    "TUPLE2 TUPLE3 LIST EMPTY_LIST APPEND APPENDS DICT EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD "
    "GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE BINPERSID"
)


def read_pickle(path: Path) -> Iterator[tuple[int | str, list[tuple[str, Entry]]]]:
    """Yield every sample's key of an epoch's file, and its parameters.

    Memory: twice the file; no length, shape or count that it announces is believed.

    Raises:
        FormatError: it is no pickle of the layout, or names something that is not plain data. Its fields: path, offset.
        CorruptionError: it ends before its values do.
    """
    with reporting("read", path):
        data = path.read_bytes()
    tree, room = _tree(path, data), [_UNFOLDS * len(data)]
    del data  # arrays hold their own bytes
    samples = tree.get(GRADIENTS) if type(tree) is _Items else None
    if type(samples) is not _Items:
        raise FormatError(f"{path}: it has no {GRADIENTS}: it is of another layout", path=str(path))
    for key, parameters in samples.items():
        where = f"{path}, sample {key!r:.80}"
        if type(parameters) is not _Items or not all(type(name) is str for name in parameters):
            raise FormatError(f"{where}: it is no mapping of parameters, named by text", path=str(path))
        entries: list[tuple[str, Entry]] = []
        for name, value in parameters.items():
            load = partial(_gradient, value, room, f"{where}, parameter {name!r:.80}", path)
            entries.append((name, value if is_scalar(value) else load))
        yield key, entries


def _gradient(value: Any, room: list[int], where: str, path: Path) -> np.ndarray:
    """Return a value as a gradient: in the order of C and of the machine's bytes, integers as floats."""

    def wrong(what: str) -> FormatError:
        return FormatError(f"{where}: {what}", path=str(path))

    if type(value) in (list, tuple):
        return nested(_events(value, room, wrong), {}, wrong)
    if type(value) is not _Array or value.numbers is _UNFILLED:
        raise wrong(f"a gradient is an array, or numbers in lists, not a {type(value).__name__}")
    if value.numbers.dtype.kind in "iu":
        return narrowed(value.numbers.astype(np.float64))
    return np.asarray(value.numbers, value.numbers.dtype.newbyteorder("="), order="C")


def _events(value: Any, room: list[int], wrong: Callable[[str], FormatError]) -> Iterator[tuple[str, Any]]:
    """Yield lists, and the numbers and arrays in them, as a parser of JSON would.

    Args:
        room: for how many values in lists, wherever they appear, taken from: a few bytes can be a million lists.
    """
    if type(value) in (list, tuple):
        room[0] -= len(value)
        if room[0] < 0:
            raise wrong(f"the lists so far have more than {_UNFOLDS} values for each byte of the file: {_AGAIN}")
        yield "start_array", None
        for item in value:
            if type(item) is float:
                yield "number", item
            else:
                yield from _events(item, room, wrong)
        yield "end_array", None
    elif type(value) is _Array:
        yield from _events(widen(value.numbers).tolist(), room, wrong)
    elif type(value) in (int, float):
        yield "number", value
    else:
        yield "string", f"a {type(value).__name__}"


def _tree(path: Path, data: bytes) -> Any:
    """Return what a pickle holds: `_Items`, lists, tuples, text, bytes, numbers, None and `_Array`s."""
    machine = _Unpickler(data, _CALLS)
    kind: type[FormatError] = FormatError
    try:
        for magic, advice in _OTHER_FILES.items():
            if data[:16].lstrip().startswith(magic):
                raise FormatError(advice)
        tree = machine.load()
        if machine.stack or machine.metastack or machine.source.tell() < len(data):
            raise FormatError(f"it ends within a value, or goes on after its end: {_WHOLE}")
        return tree
    except FormatError as refusal:
        what = str(refusal)
    except MemoryError:
        raise
    except Exception as error:  # a program that is wrong fails anywhere, in ways without end
        if machine.source.tell() == len(data):
            kind, what = CorruptionError, f"it is empty, or ends before what it announces: {_WHOLE}"
        else:
            what = f"it is no pickle, or damaged ({type(error).__name__}: {ascii(str(error))[:100]}): {_WHOLE}"
    at = machine.source.tell()
    message = f"{path}, byte {at} of {len(data)}: {what}. Nothing that the file names was imported or executed."
    raise kind(message, path=str(path), offset=at)


# --- the machine, and what can lie on its stack ------------------------------------------------------------------


class _Name(str):
    """A name that the file utters."""

    __slots__ = ()


@dataclass(eq=False, slots=True)
class _Dtype:
    """A dtype of numbers; BUILD sets its byte order."""

    dtype: np.dtype[Any]


@dataclass(eq=False, slots=True)
class _Array:
    """An array; below protocol 5, BUILD fills it."""

    numbers: np.ndarray = field(default_factory=lambda: _UNFILLED)


@dataclass(frozen=True, eq=False, slots=True)
class _Storage:
    """What the values of torch's tensors lie in: the last `count` of a dtype in what `torch.save` wrote."""

    dtype: np.dtype[Any]
    count: int
    saved: bytes


class _Items(dict[Any, Any]):
    """A dict. Its keys are text or integers, each once; to hash tuples within tuples can end the process."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is str:
            key.encode()  # raises for half of a surrogate pair, which no message could show
        elif type(key) is not int or key.bit_length() > 64:
            raise FormatError(f"it has a key of type {type(key).__name__}; keys are text or integers: {_AGAIN}")
        if key in self:
            raise FormatError(f"it has the key {ascii(key)[:100]} twice in one dict: {_AGAIN}")
        super().__setitem__(key, value)


class _Unpickler(pickle._Unpickler):
    """The standard library's unpickler, that in Python.

    The one in C makes room for the largest memo index and length that a file names, 64 GB for six bytes, and hashes
    whatever is a key, so that each opcode had to be looked at in Python before it may run.
    """

    stack: list[Any]
    metastack: list[list[Any]]
    read: Callable[[int], bytes]

    def __init__(self, data: bytes, calls: Mapping[str, Callable[..., Any] | None]) -> None:
        self.source, self.calls = io.BytesIO(data), calls
        super().__init__(self.source)
        self.dispatch = _HANDLERS  # type: ignore[misc]
        self._room = 2 * len(data)  # below protocol 3, storages are text first

    def spend(self, size: int) -> None:
        """Count bytes that are made of the file's: to name those often would make much out of little."""
        self._room -= size
        if self._room < 0:
            raise FormatError(f"its bytes and storages would take more than the file has: {_AGAIN}")

    def find_class(self, module: str, name: str) -> _Name:
        plain = module.replace("numpy.core.", "numpy._core.").replace("__builtin__", "builtins")
        if "." in name or f"{plain}.{name}" not in self.calls:
            raise FormatError(f"it names {ascii(f'{module}.{name}')[:100]}, which is never looked up: {_AGAIN}")
        return _Name(f"{plain}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid  # says which storage it is, in what torch writes for one


def _dict(machine: Any) -> None:
    pairs, items = machine.pop_mark(), _Items()
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        items[key] = value
    machine.append(items)


def _reduce(machine: Any) -> None:
    arguments, name = machine.stack.pop(), machine.stack[-1]
    call = machine.calls[name] if type(name) is _Name and type(arguments) is tuple else None
    if call is None:
        raise FormatError(f"it calls what no gradient needs to call: {_AGAIN}")
    machine.stack[-1] = call(machine, *arguments)


def _build(machine: Any) -> None:
    state, built = machine.stack.pop(), machine.stack[-1]
    if type(built) is _Dtype and type(state) is tuple:
        _, order, base, names, fields, *_ = state
        if (base, names, fields) != (None, None, None) or order not in ("<", ">", "|"):
            raise FormatError(f"it has an array of a structured dtype; gradients are numbers: {_AGAIN}")
        built.dtype = built.dtype.newbyteorder(order)
    elif type(built) is _Array and built.numbers is _UNFILLED and type(state) is tuple:
        _, shape, dtype, is_fortran, data = state
        built.numbers = _view(data, dtype, shape, "F" if is_fortran is True else "C")
    else:
        raise FormatError(f"it sets the state of what has none: {_AGAIN}")


class _Handlers(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Never:
        name = next((opcode.name for opcode in pickletools.opcodes if opcode.code == chr(code)), "which is none")
        raise FormatError(f"no gradient needs the opcode {code}, {name}: {_AGAIN}")


_HANDLERS = _Handlers(
    {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES.split()}
    | {
        pickle.FRAME[0]: lambda machine: machine.read(8),  # how much to fetch; without, places are those in the file
        pickle.BYTEARRAY8[0]: lambda machine: machine.append(machine.read(int.from_bytes(machine.read(8), "little"))),
        pickle.EMPTY_DICT[0]: lambda machine: machine.append(_Items()),
        pickle.DICT[0]: _dict,
        pickle.REDUCE[0]: _reduce,
        pickle.BUILD[0]: _build,
    }
)


# --- what is called in the place of a name -----------------------------------------------------------------------


def _sizes(values: Any) -> tuple[int, ...]:
    is_short = type(values) is tuple and len(values) <= 64  # the axes that numpy has; a longer product would never end
    if not is_short or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise FormatError(f"it has an array whose shape, strides or place are no sizes: {_WHOLE}")
    return tuple(values)


def _view(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """Return bytes of the file as an array."""
    if type(dtype) is not _Dtype or type(data) is not bytes:
        raise FormatError(f"it has an array without dtype or bytes: {_AGAIN}")
    if order not in ("C", "F") or math.prod(_sizes(shape)) * dtype.dtype.itemsize != len(data):
        raise FormatError(f"it has an array of shape {shape} and {dtype.dtype.str} in {len(data)} bytes: {_WHOLE}")
    if 0 in shape and math.prod(size for size in shape if size) > _EMPTY:
        raise FormatError(f"it has an array of shape {shape}, empty and yet huge: {_WHOLE}")
    return np.ndarray(shape, dtype.dtype, data, order=order)


def _dtype(machine: _Unpickler, name: Any, align: Any = False, copy: Any = False) -> _Dtype:
    if type(name) is not str or name not in _DTYPES:
        what = ascii(name)[:100] if type(name) is str else type(name).__name__
        raise FormatError(f"it has an array of dtype {what}; gradients are numbers: {_AGAIN}")
    return _Dtype(np.dtype("u1" if name == "b1" else name))


def _encode(machine: _Unpickler, text: Any, encoding: Any) -> bytes:
    """Return bytes, which protocols below 3 have as text."""
    if type(text) is not str or encoding != "latin1":
        raise FormatError(f"it encodes what are no bytes, which no gradient needs: {_AGAIN}")
    machine.spend(len(text))
    return text.encode("latin1")


def _storage(machine: _Unpickler, saved: Any) -> _Storage:
    """Return a storage of torch's, read here: `torch.load(weights_only=True)` takes 2 GB for 181 bytes made for it.

    What is saved is five pickles, the fourth of them a persistent id that says all; then the count again, and values.
    """
    if type(saved) is not bytes:
        raise FormatError(f"it has a torch storage without bytes: {_AGAIN}")
    machine.spend(len(saved))
    inner = _Unpickler(saved, dict.fromkeys(_STORAGES))
    magic, version, system, (kind, name, key, _, count, view), keys = (inner.load() for _ in range(5))
    head = magic, version, system["little_endian"], kind, view
    is_known = head == (0x1950A86A20F9469CFC6C, 1001, True, "storage", None) and type(name) is _Name
    if not is_known or type(key) is not str or keys != [key]:
        raise FormatError(f"it has a torch storage of another format: {_AGAIN}")
    (count, again), dtype = _sizes((count, int.from_bytes(inner.read(8), "little"))), _STORAGES[name]
    size = len(saved) - inner.source.tell()
    if again != count or size != count * dtype.itemsize:
        raise FormatError(f"it has a torch storage of {count} values in {size} bytes: {_WHOLE}")
    return _Storage(dtype, count, saved)


def _tensor(machine: _Unpickler, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _Array:
    if type(storage) is not _Storage or any(rest[2:]) or len(_sizes(size)) != len(_sizes(stride)):
        raise FormatError(f"it has a torch tensor of an unknown kind: {_AGAIN}")
    if 0 in size:
        return _Array(_view(b"", _Dtype(storage.dtype), size, "C"))
    (start,), item = _sizes((offset,)), storage.dtype.itemsize
    last = start + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if math.prod(size) > storage.count or last >= storage.count:
        raise FormatError(f"it has a torch tensor that is expanded, or beyond its storage: .clone() it; {_AGAIN}")
    place = len(storage.saved) + (start - storage.count) * item
    return _Array(np.ndarray(size, storage.dtype, storage.saved, place, [step * item for step in stride]))


_KINDS = "Double=<f8 Float=<f4 Half=<f2 BFloat16=<u2 Long=<i8 Int=<i4 Short=<i2 Char=i1 Byte=u1 Bool=u1"
_STORAGES = {
    f"torch.{kind}Storage": BFLOAT16 if kind == "BFloat16" else np.dtype(dtype)
    for kind, dtype in (pair.split("=") for pair in _KINDS.split())
}
# Every name that a file may utter, and what is called in its place; None: a name that is never called. Protocols 0-2
# have bytes as `_codecs.encode` or `bytes()`; numpy has arrays as `_reconstruct`, or `_frombuffer` at protocol 5 if
# they are contiguous; torch has tensors as `_rebuild_tensor_v2` of a `_load_from_bytes`, with an OrderedDict of hooks.
_CALLS: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": lambda machine: _Items(),
    "collections.defaultdict": lambda machine, factory=None: _Items(),
    "_codecs.encode": _encode,
    "builtins.bytes": lambda machine: b"",
    "numpy.dtype": _dtype,
    "numpy._core.multiarray._reconstruct": lambda machine, kind, shape, code: _Array(),
    "numpy._core.multiarray.scalar": lambda machine, dtype, data: _view(data, dtype, (), "C").item(),
    "numpy._core.numeric._frombuffer": lambda machine, data, dtype, shape, order: _Array(
        _view(data, dtype, shape, order)
    ),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda machine, data, requires_grad, hooks: data,
    "torch.storage._load_from_bytes": _storage,
    **dict.fromkeys(["builtins.dict", "builtins.list", "builtins.int", "builtins.float", "numpy.ndarray"]),
}


# --- out ---------------------------------------------------------------------------------------------------------


def pickle_pieces(samples: Samples) -> Iterator[bytes]:
    """Yield an epoch's file as the pickle of a dict would be, one gradient at a time."""
    yield b"\x80\x03}" + _pickled(GRADIENTS) + b"}"
    for key, step, gradients in samples:
        yield _pickled(key) + b"}"
        for name, gradient in gradients:
            yield _pickled(name) + _pickled(gradient) + b"s"
            if step is not None:
                yield _pickled(name + MARKER) + _pickled(step) + b"s"
        yield b"s"
    yield b"s."


def _pickled(value: Any) -> bytes:
    # Protocol 3 has bytes, and no frames that would have to be whole; what it remembers it says anew in each value.
    return pickle.dumps(value, 3)[2:-1]
