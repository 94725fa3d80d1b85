"""An epoch's file as JSON, in and out: one gradient in memory, whatever the size of the file.

Python writes NaN and Infinity among the numbers, which no parser of JSON takes: they are handed to ijson as text.
"""

import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import numpy as np

from timstore.errors import FormatError
from timstore.legacy.layout import DEEPEST, GRADIENTS, MARKER, Entry, Samples, is_scalar, nested, said
from timstore.os_errors import reporting

# Read at once: what comes of it stays in the processor's cache. Beyond the other size, gradients wait on disk for step
# markers of their sample.
_READ_BYTES = 16 * 1024
_SPOOL_BYTES = 32 * 1024 * 1024
_NO_COMMA_BYTES = 64 * 1024 * 1024
_WRITE_NUMBERS = 1 << 18

# What stands for them in what is handed on: text with a character that a file would have to mean.
_NOT_FINITE = {"\x00NaN": math.nan, "\x00Infinity": math.inf, "\x00-Infinity": -math.inf}
_OUTSIDE = re.compile(rb'"|-?Infinity|NaN')
# The parser makes one character of any two escapes that begin as a surrogate pair does, and `?` of half a pair, so that
# two names can become one.
_PAIR = rb"\\u[dD][89abAB]..\\u[dD][c-fC-F].."
_INSIDE = re.compile(_PAIR + rb'|(?P<half>\\u[dD][89a-fA-F]..)|\\.|"', re.DOTALL)

Events = Iterator[tuple[str, Any]]


def read_json(path: Path, advance: Callable[[int], None]) -> Iterator[tuple[str, list[tuple[str, Entry]]]]:
    """Yield every sample's key of an epoch's file, as often as it comes, and its parameters.

    Args:
        advance: told of the bytes that were read.

    Raises:
        FormatError: it is no JSON, broken off, or not of the layout; with the sample and the parameter.
        StorageError: it cannot be read.
    """
    with (
        reporting("read", path),
        open(path, "rb") as file,
        tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as spool,
    ):
        reader = _Reader(path, file, spool, advance)
        try:
            yield from reader.samples()
        except (ijson.JSONError, UnicodeError) as error:
            what = str(error).partition("\n")[0]
            raise reader.wrong(
                f"it is no JSON, or broken off, within its first {reader.bytes_read:,} bytes ({what})"
            ) from None


class _Reader:
    """What is read of one file, and where in it that is.

    Args:
        spool: where the gradients of one sample wait.
    """

    def __init__(self, path: Path, file: BinaryIO, spool: Any, advance: Callable[[int], None]) -> None:
        self._path = path
        self._spool = spool
        self._advance = advance
        self._where = ""
        self._tokens = _Tokens(file, self.wrong)
        self._told = 0

    @property
    def bytes_read(self) -> int:
        return self._tokens.bytes_read

    def wrong(self, what: str) -> FormatError:
        return FormatError(f"{self._path}{self._where}: {what}", path=str(self._path))

    def samples(self) -> Iterator[tuple[str, list[tuple[str, Entry]]]]:
        events: Events = ijson.basic_parse(self._tokens, use_float=True, buf_size=_READ_BYTES)
        self._expect(events, "start_map", "an object")
        is_layout = False
        for key in self._keys(events):
            if key != GRADIENTS:
                self._skip(events)
                continue
            is_layout = True
            self._expect(events, "start_map", f"an object under {GRADIENTS}")
            for sample in self._keys(events):
                self._where = f", sample {sample!r:.80}"
                self._expect(events, "start_map", "an object of parameters")
                self._spool.seek(0)
                self._spool.truncate()
                yield sample, list(self._parameters(events, self._where))
            self._where = ""
        if not is_layout:
            raise self.wrong(f"it has no {GRADIENTS}: it is of another layout")
        for event, _ in events:
            raise self.wrong(f"{event} behind its end")

    def _parameters(self, events: Events, sample: str) -> Iterator[tuple[str, Entry]]:
        for name in self._keys(events):
            self._where = f"{sample}, parameter {name!r:.80}"
            event, value = next(events)
            if event == "start_array":
                gradient = nested(chain([(event, value)], events), _NOT_FINITE, self.wrong)
                load = partial(self._load, self._spool.tell(), gradient.shape, gradient.dtype)
                self._spool.write(gradient.tobytes())
                yield name, load
            elif event == "number" and is_scalar(value):
                yield name, value
            elif event == "string" and value in _NOT_FINITE:
                yield name, _NOT_FINITE[value]
            else:
                raise self.wrong(f"a gradient is numbers in lists, not {said(event, value)}")
            self._advance(self.bytes_read - self._told)
            self._told = self.bytes_read

    def _load(self, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        self._spool.seek(start)
        return np.frombuffer(bytearray(self._spool.read(math.prod(shape) * dtype.itemsize)), dtype).reshape(shape)

    def _keys(self, events: Events) -> Iterator[str]:
        for event, value in events:
            if event == "end_map":
                return
            yield value

    def _skip(self, events: Events) -> None:
        depth = 0
        for event, _ in events:
            depth += event.startswith("start_")
            depth -= event.startswith("end_")
            if depth > DEEPEST:
                raise self.wrong(f"it is nested more than {DEEPEST} deep")
            if depth == 0:
                return

    def _expect(self, events: Events, wanted: str, what: str) -> None:
        event, value = next(events)
        if event != wanted:
            raise self.wrong(f"expected {what}, not {said(event, value)}")


class _Tokens:
    """A file of JSON, read with NaN and Infinity as text. Memory: of what is asked for.

    Attributes:
        bytes_read: of the file.
    """

    def __init__(self, file: BinaryIO, wrong: Callable[[str], FormatError]) -> None:
        self._file = file
        self._wrong = wrong
        self._rest = b""
        self._in_text = False
        self.bytes_read = 0

    def read(self, size: int = -1) -> bytes:
        """Return about so many bytes, or more; none at the end."""
        if size == 0:
            return b""
        while more := self._file.read(size):
            self.bytes_read += len(more)
            data = self._rest + more
            # No token goes on beyond a comma.
            end = data.rfind(b",") + 1
            self._rest = data[end:]
            if end:
                return self._replaced(data[:end])
            if len(data) > _NO_COMMA_BYTES:
                raise self._wrong(f"{len(data):,} bytes without a comma are no gradients")
        data, self._rest = self._rest, b""
        return self._replaced(data)

    def _replaced(self, data: bytes) -> bytes:
        # One character is looked for much faster than several, and numbers have none of these.
        if (
            (b"N" not in data or b"NaN" not in data)
            and (b"I" not in data or b"Infinity" not in data)
            and b"\\" not in data
        ):
            self._in_text ^= bool(data.count(b'"') % 2)
            return data
        pieces: list[bytes] = []
        place = 0
        while match := (_INSIDE if self._in_text else _OUTSIDE).search(data, place):
            token, in_text = match[0], self._in_text
            if in_text and match["half"]:
                raise self._wrong(
                    f"{token.decode('latin-1')} is half of a surrogate pair, which is no character: write what is "
                    "meant, in UTF-8 or as a pair"
                )
            pieces.append(data[place : match.start()])
            pieces.append(token if in_text or token == b'"' else b'"\\u0000' + token + b'"')
            self._in_text = in_text != (token == b'"')
            place = match.end()
        return b"".join([*pieces, data[place:]])


def json_pieces(samples: Samples) -> Iterator[bytes]:
    """Yield an epoch's file: every number in the digits of a float64, as `tolist()` gives it."""
    yield b'{"%s": {' % GRADIENTS.encode()
    for place, (key, step, gradients) in enumerate(samples):
        yield (b", " if place else b"") + json.dumps(str(key)).encode() + b": {"
        for number, (name, gradient) in enumerate(gradients):
            yield (b", " if number else b"") + json.dumps(name).encode() + b": "
            yield from _lists(gradient)
            if step is not None:
                yield b", " + json.dumps(name + MARKER).encode() + b": %d" % step
        yield b"}"
    yield b"}}"


def _lists(numbers: np.ndarray) -> Iterator[bytes]:
    if numbers.ndim < 2 or numbers.size <= _WRITE_NUMBERS:
        yield json.dumps(numbers.tolist()).encode()
        return
    yield b"["
    for place, row in enumerate(numbers):
        yield b", " if place else b""
        yield from _lists(row)
    yield b"]"
