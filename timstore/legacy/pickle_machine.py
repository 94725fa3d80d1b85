"""A stack machine for pickles that executes and imports nothing.

It knows containers, text and numbers. What a name stands for that a file utters, and what may be called or be given a
state, it is told by whoever runs it.
"""

import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Never

from timstore.errors import CorruptionError, FormatError

# What to do about a pickle of something else, and about one that is damaged.
AGAIN = "load it where you trust it, and write dicts, lists, numbers and numpy arrays alone"
WHOLE = "copy the whole file again"

# What picklers write for such trees. Every other opcode is refused: persistent ids, extension codes, sets, INST, OBJ,
# NEWOBJ and NEWOBJ_EX, buffers out of band, the strings of Python 2, POP and DUP.
_OPCODES = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE "
    "BINUNICODE BINUNICODE8 SHORT_BINUNICODE BINBYTES BINBYTES8 SHORT_BINBYTES BYTEARRAY8 TUPLE EMPTY_TUPLE TUPLE1 "
    "TUPLE2 TUPLE3 LIST EMPTY_LIST APPEND APPENDS DICT EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD "
    "GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE"
)


def shown(text: object) -> str:
    """Return text that fits into a message; of anything else, which may unfold without end, its type."""
    fitting = ascii(text) if type(text) is str else type(text).__name__
    return fitting if len(fitting) <= 100 else f"{fitting[:100]}..."


class Bounded:
    """A file that is asked for no more than it has, so that nobody makes room for more."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.left = file, size

    def read(self, size: int) -> bytes:
        if size > self.left:
            raise CorruptionError(f"it ends {size - self.left} bytes before what it announces: {WHOLE}")
        self.left -= size
        return self._file.read(size)

    def readline(self) -> bytes:
        line = self._file.readline(self.left)
        self.left -= len(line)
        return line


@dataclass(frozen=True, eq=False, slots=True)
class Global:
    """What a name stands for: not a function, so that REDUCE alone can call it, and no opcode change it.

    Attributes:
        call: takes the machine and the arguments; None if it is never called.
    """

    call: Callable[..., Any] | None


class _Opcodes(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Never:
        name = {op.code: op.name for op in pickletools.opcodes}.get(chr(code))
        raise FormatError(f"no gradient needs the opcode {code} ({name}): {AGAIN if name else WHOLE}")


class Machine(pickle._Unpickler):
    """An unpickler of few opcodes, none of which calls, changes or hashes anything but what is made here.

    Args:
        source: the pickle; what comes after its end is left.
        names: all that a file may utter, as (module, name), and what is put on the stack in its place.
        handlers: those of the opcodes, `HANDLERS` or `HANDLERS_WITH_IDS`.
        states: sets the state of a value of that very type; takes the machine, the value and what the state has.
    """

    # Why not the C unpickler, twenty times as fast: its opcodes cannot be taken away; it makes room for the largest
    # memo index that a file names, 64 GB for 6 bytes; and it hashes any key: tuples nested deeply end the process.

    stack: list[Any]
    metastack: list[list[Any]]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def __init__(
        self,
        source: Bounded,
        names: Mapping[tuple[str, str], Any],
        handlers: _Opcodes,
        states: Mapping[type, Callable[..., None]],
    ) -> None:
        super().__init__(source)
        self.source, self._names, self._states = source, names, states
        self.dispatch = handlers  # type: ignore[misc]
        self._size = source.left
        self._made: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise FormatError(f"it names {shown(f'{module}.{name}')}, which is never looked up: {AGAIN}")
        return self._names[module, name]

    def make(self, what: str, size: int) -> None:
        """Count what is made of the file's bytes: naming them often would make much out of little."""
        self._made[what] = self._made.get(what, 0) + size
        if self._made[what] > self._size:
            raise FormatError(f"its {what} would take more bytes than the file has: {AGAIN}")

    def load_frame(self) -> None:
        # A frame is advice to readers on how much to fetch. Without it, positions are those in the file.
        size = int.from_bytes(self.read(8), "little")
        if size > self.source.left:
            raise CorruptionError(f"it ends {size - self.source.left} bytes before a frame does: {WHOLE}")

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
        if type(called) is not Global or called.call is None or type(arguments) is not tuple:
            raise FormatError(f"it calls what no gradient needs to call: {AGAIN}")
        self.stack[-1] = called.call(self, *arguments)

    def load_build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if type(built) not in self._states or type(state) is not tuple:
            raise FormatError(f"it sets the state of what has none: {AGAIN}")
        self._states[type(built)](self, built, *state)


def _set_items(target: Any, items: list[Any]) -> None:
    if type(target) is not dict:
        raise FormatError(f"it sets items of a {type(target).__name__}: {AGAIN}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            raise FormatError(f"it has a key of type {type(key).__name__}; keys are text or integers: {AGAIN}")
        if key in target:
            raise FormatError(f"it has the key {shown(str(key))} twice in one dict: {AGAIN}")
        target[key] = value


_KNOWN = {code: getattr(Machine, handler.__name__) for code, handler in pickle._Unpickler.dispatch.items()}
HANDLERS = _Opcodes((getattr(pickle, name)[0], _KNOWN[getattr(pickle, name)[0]]) for name in _OPCODES.split())
HANDLERS_WITH_IDS = _Opcodes(HANDLERS | {pickle.BINPERSID[0]: lambda machine: None})  # an id stays what it is
