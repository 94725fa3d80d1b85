"""Pickles made by hand, and a watch over what reading them does."""

import builtins
import gc
import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from timstore.errors import FormatError
from timstore.legacy.pickles import read_pickle
from timstore.records import BFLOAT16

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)

# An audit hook cannot be taken away again: this one does nothing outside of `watched`.
EVENTS: list[tuple[str, str]] | None = None


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if EVENTS is not None and event != "builtins.id":
        EVENTS.append((event, str(arguments[0]) if event == "open" else ""))


sys.addaudithook(note)  # once a process, as this module is imported


@contextmanager
def watched(allowed: Path | None = None) -> Iterator[list[tuple[str, str]]]:
    """Collect every audit event, and every call of an importing, executing or opening builtin, but that one file's.

    What other tests left is not collected as garbage meanwhile: that may remove files.
    """
    global EVENTS
    seen: list[tuple[str, str]] = []
    kept = {
        (place, name): getattr(place, name)
        for place, name in [
            *((builtins, name) for name in ("eval", "exec", "compile", "__import__")),
            (os, "system"),
            (os, "popen"),
            (subprocess, "Popen"),
            (torch, "load"),
        ]
    }

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.append((f"call of {name}", ""))
            return original(*arguments, **options)

        return call

    for (place, name), original in kept.items():
        setattr(place, name, counted(name, original))
    gc.disable()
    EVENTS = seen
    try:
        yield seen
    finally:
        EVENTS = None
        gc.enable()
        for (place, name), original in kept.items():
            setattr(place, name, original)
        seen[:] = [one for one in seen if one != ("open", str(allowed))]


def load(path: Path, data: bytes) -> Any:
    path.write_bytes(data)
    return read_pickle(path)


def refused(path: Path, data: bytes, words: str = "") -> FormatError:
    """Read what must not be read, and prove that nothing was imported, executed or opened meanwhile."""
    path.write_bytes(data)
    modules = set(sys.modules)
    with watched(path) as seen, pytest.raises(FormatError) as caught:
        read_pickle(path)
    assert seen == []
    assert set(sys.modules) == modules
    message = str(caught.value)
    assert message.startswith(str(path))
    assert words in message
    assert len(message) < 1_000
    assert caught.value.fields["path"] == str(path)
    return caught.value


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def name(module: str, attribute: str) -> bytes:
    """The opcodes that put a global on the stack."""
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def number(value: int) -> bytes:
    return b"I%d\n" % value


def items(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def called(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + items(*arguments) + b"R"


def stacked(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def forms(module: str, attribute: str, argument: bytes) -> dict[str, bytes]:
    """The ways in which a pickle can have a global called, made, changed or handed on."""
    plain = name(module, attribute)
    return {
        "GLOBAL REDUCE": plain + items(argument) + b"R.",
        "GLOBAL alone": b"\x80\x02" + plain + b".",
        "STACK_GLOBAL REDUCE": b"\x80\x04" + stacked(module, attribute) + items(argument) + b"R.",
        "INST": b"(" + argument + b"i" + plain[1:] + b".",
        "OBJ": b"(" + plain + argument + b"o.",
        "NEWOBJ": b"\x80\x02" + plain + items(argument) + b"\x81.",
        "NEWOBJ_EX": b"\x80\x04" + stacked(module, attribute) + items(argument) + b"}\x92.",
        "BUILD": plain + b"}" + text("x") + argument + b"sb.",
        "in a frame": b"\x80\x04\x95" + struct.pack("<Q", len(plain) + 4) + plain + b")R0.",
        "as a factory": name("collections", "defaultdict") + plain + b"\x85R" + b".",
        "as an element": b"](" + plain + argument + b"\x85Re.",
    }


def assert_same_bits(read: Any, expected: np.ndarray) -> None:
    assert type(read) is np.ndarray
    assert read.shape == expected.shape
    assert read.dtype == (expected.dtype if expected.dtype == BFLOAT16 else expected.dtype.newbyteorder("="))
    assert read.dtype.isnative
    assert read.flags.owndata
    assert read.flags.writeable
    assert read.tobytes() == expected.astype(read.dtype).tobytes()


EMPTY = name("numpy._core.multiarray", "_reconstruct") + items(name("numpy", "ndarray"), b"K\x00\x85", b"C\x01b") + b"R"


def array_of(shape: bytes, data: bytes = b"C\x08" + bytes(8), kind: str = "f4") -> dict[str, bytes]:
    """An array's pickle, as protocols below 5 have it, and as protocol 5 has it."""
    dtype = called("numpy", "dtype", text(kind), b"\x89", b"\x88")
    dtype += items(b"K\x03", text("<"), b"NNN", number(-1), number(-1), b"K\x00") + b"b"
    buffer = name("numpy._core.numeric", "_frombuffer") + items(data, dtype, shape, text("C")) + b"R."
    return {
        "below 5": b"\x80\x03" + EMPTY + items(b"K\x01", shape, dtype, b"\x89", data) + b"b.",
        "protocol 5": b"\x80\x05" + buffer,
    }


def laughs(levels: int, opener: bytes = b"](", closer: bytes = b"e") -> bytes:
    """Lists of ten times the list before: 10 ** levels values in 30 bytes for each level."""
    first = b"](K\x01eq\x00"
    return first + b"".join(
        opener + (b"h" + bytes([level])) * 10 + closer + b"q" + bytes([level + 1]) for level in range(levels)
    )


def blob_of(tensor: torch.Tensor) -> bytes:
    (blob,) = [argument for _, argument, _ in pickletools.genops(pickle.dumps(tensor, 3)) if type(argument) is bytes]
    return blob


def tensor_of(
    blob: bytes, *, offset: int = 0, size: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,), rest: bytes = b""
) -> bytes:
    """The pickle of a float32 tensor, by hand."""
    storage = name("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(blob)) + blob + b"\x85R"
    place = b"".join(items(*map(number, axes)) for axes in (size, stride))
    hooks = called("collections", "OrderedDict")
    arguments = items(storage, number(offset), place, b"\x89", hooks, rest)
    return b"\x80\x03" + name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R."


BLOB = blob_of(torch.arange(4.0))


def saved(value: Any, *, as_zip: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=as_zip)
    return stream.getvalue()
