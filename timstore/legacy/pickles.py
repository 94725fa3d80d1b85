"""Pickles of the older layout, read without executing or importing anything that they name.

A pickle is a program for a stack machine. That of `pickle_machine` knows containers and numbers, and each name that a
file may utter stands for a function of `pickled_arrays`. What they leave is unwrapped here.
"""

import os
from pathlib import Path
from typing import Any, BinaryIO

from timstore.errors import CorruptionError, FormatError, InvalidInputError
from timstore.legacy.pickle_machine import AGAIN, HANDLERS, WHOLE, Bounded, Machine, shown
from timstore.legacy.pickled_arrays import NAMES, STATES, Array
from timstore.os_errors import reporting

_DEPTH = 100  # levels of containers; an array as lists has one for each of its at most 64 axes
_UNFOLDS = 16  # values per byte of the file, each counted wherever it appears: a few bytes can be a million lists
_OTHER_FILES = {
    b"PK\x03\x04": "this is a zip, perhaps of torch.save: load it with torch.load and write it with pickle.dump",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9": "this is a file of torch.save: load it with torch.load, write it with pickle.dump",
    b"{": "this seems to be JSON: give it a name that ends in .json",
}


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
    with reporting("read", Path(name)):
        size = os.path.getsize(name)
        if not os.path.isfile(name):  # to open a pipe is to wait for its writer
            raise InvalidInputError(f"{name} is not a file: name the pickle itself", path=name)
        if max_bytes is not None and size > max_bytes:
            raise FormatError(f"{name} has {size} bytes: raise max_bytes from {max_bytes}", path=name, offset=0)
        with open(name, "rb") as file:
            return _read(name, file, size)


def _read(name: str, file: BinaryIO, size: int) -> Any:
    machine = Machine(Bounded(file, size), NAMES, HANDLERS, STATES)
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
            raise FormatError(f"it ends within a value, or goes on after its end: {WHOLE}")
        return _plain(tree, 0, _UNFOLDS * size, {})[0]
    except FormatError as refusal:
        kind, what = type(refusal), str(refusal)
    except OSError:
        raise
    except Exception as error:  # a program that is wrong fails anywhere, in ways without end
        kind, what = (
            FormatError,
            f"it is no pickle, or damaged ({type(error).__name__}: {shown(str(error))}): {WHOLE}",
        )
    at = size - machine.source.left
    message = f"{name}, byte {at} of {size}: {what}. Nothing that the file names was imported or executed."
    raise kind(message, path=name, offset=at)


def _plain(value: Any, depth: int, limit: int, done: dict[int, Any]) -> tuple[Any, int, int]:
    """Return the value without wrappers, how many values it holds, each wherever it appears, and in how many levels."""
    kind = type(value)
    if kind is str:
        value.encode()  # raises for halves of surrogate pairs, which no message could show
    if kind in (float, bool, str, bytes, type(None)) or (kind is int and value.bit_length() <= 64):
        return value, 1, 0
    if kind is Array and value.value is not None:
        return value.value, max(1, value.value.nbytes), 0
    if kind not in (dict, list, tuple):
        raise FormatError(f"it has a {kind.__name__.strip('_').lower()} for a value, or a huge one: {AGAIN}")
    if depth < _DEPTH and id(value) not in done:
        done[id(value)] = *_held(value, depth + 1, limit, done), value  # kept, so that no other takes its id
    if depth == _DEPTH or depth + done[id(value)][2] > _DEPTH:
        raise FormatError(f"it nests values deeper than {_DEPTH} levels, or in themselves: {AGAIN}")
    return done[id(value)][:3]  # type: ignore[no-any-return]


def _held(value: Any, depth: int, limit: int, done: dict[int, Any]) -> tuple[Any, int, int]:
    is_dict, total, levels = type(value) is dict, 1, 0
    held: Any = list(value) if type(value) is tuple else value  # a list or dict is changed in place
    for place, item in held.items() if is_dict else enumerate(held):
        if is_dict:
            _plain(place, depth, limit, done)
        held[place], count, below = (item, 1, 0) if type(item) is float else _plain(item, depth, limit, done)
        # An array in a list counts by its size: whoever makes one array of the list copies it.
        total += 1 if is_dict and type(item) is Array else count
        levels = max(levels, below)
    if total > limit:
        raise FormatError(f"its values, each wherever it appears, are more than {limit}: {AGAIN}")
    return (tuple(held) if type(value) is tuple else held), total, levels + 1
