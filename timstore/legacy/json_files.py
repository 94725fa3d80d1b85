"""An epoch's file as JSON, read in a stream: one gradient in memory, whatever the size of the file."""

import json
import math
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import numpy as np

from timstore.errors import FormatError
from timstore.legacy.layout import GRADIENTS
from timstore.legacy.tokens import NOT_FINITE, Tokens
from timstore.legacy.visits import Visit, narrowed
from timstore.os_errors import reporting

# Read at once: what comes of it stays in the processor's cache. Beyond the other size, gradients wait on disk for step
# markers of their sample.
_READ_BYTES = 16 * 1024
_SPOOL_BYTES = 32 * 1024 * 1024
# No gradient has as many axes.
_DEEPEST = 32

Events = Iterator[tuple[str, Any]]


def read_json(path: Path, advance: Callable[[int], None]) -> Iterator[Visit]:
    """Yield every sample's key of an epoch's file, as often as it comes.

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
        yield from _Reader(path, file, spool, advance).visits()


class _Reader:
    def __init__(self, path: Path, file: BinaryIO, spool: Any, advance: Callable[[int], None]) -> None:
        self._path = path
        self._tokens = Tokens(file, str(path))
        self._spool = spool
        self._advance = advance
        self._told = 0
        self._where = ""

    def visits(self) -> Iterator[Visit]:
        try:
            yield from self._visits()
        except (ijson.JSONError, UnicodeError) as error:
            what = str(error).partition("\n")[0]
            raise self._wrong(
                f"it is no JSON, or broken off, within its first {self._tokens.bytes_read:,} bytes ({what})"
            ) from None

    def _visits(self) -> Iterator[Visit]:
        events: Events = ijson.basic_parse(self._tokens, use_float=True, buf_size=_READ_BYTES)
        self._expect(events, "start_map", "an object")
        found = False
        for key in self._keys(events):
            if key != GRADIENTS:
                self._skip(events)
                continue
            found = True
            self._expect(events, "start_map", f"an object under {GRADIENTS}")
            for sample in self._keys(events):
                self._where = f"sample {sample!r:.80}"
                self._expect(events, "start_map", "an object of parameters")
                self._spool.seek(0)
                self._spool.truncate()
                yield self._visit(events, sample)
                self._tell()
            self._where = ""
        if not found:
            raise self._wrong(f"it has no {GRADIENTS}: it is of another layout")
        for event, _ in events:
            raise self._wrong(f"{event} behind its end")

    def _visit(self, events: Events, sample: str) -> Visit:
        places: list[tuple[int, tuple[int, ...], np.dtype]] = []

        def load(number: int) -> np.ndarray:
            start, shape, dtype = places[number]
            self._spool.seek(start)
            data = bytearray(self._spool.read(math.prod(shape) * dtype.itemsize))
            return np.frombuffer(data, dtype).reshape(shape)

        visit = Visit(sample, load)
        for name in self._keys(events):
            self._where = f"sample {sample!r:.80}, parameter {name!r:.80}"
            event, value = next(events)
            if event == "start_array":
                gradient = narrowed(self._array(events))
                places.append((self._spool.tell(), gradient.shape, gradient.dtype))
                visit.names.append(name)
                self._spool.write(gradient.tobytes())
            elif event == "number":
                visit.scalars.setdefault(name, []).append(value)
            elif event == "string" and value in NOT_FINITE:
                visit.scalars.setdefault(name, []).append(NOT_FINITE[value])
            else:
                raise self._wrong(f"a gradient is numbers in lists, not {_said(event, value)}")
            self._tell()
        return visit

    def _array(self, events: Events) -> np.ndarray:
        """Return the numbers of nested lists, from the first bracket on, as float64."""
        values = array("d")
        # Numbers of the list at hand: a list's own append is what the interpreter does fastest.
        row: list[float] = []
        children, lengths, deepest = [0], [-1], 0
        for event, value in events:
            if event == "number":
                row.append(value)
            elif event == "start_array":
                if row:
                    raise self._ragged()
                if len(children) == _DEEPEST:
                    raise self._wrong(f"lists are nested more than {_DEEPEST} deep")
                children[-1] += 1
                children.append(0)
                if len(lengths) < len(children):
                    lengths.append(-1)
            elif event == "end_array":
                lists, level = children.pop(), len(children)
                length = lists or len(row)
                deepest = deepest or level + 1  # the first that ends holds no lists
                # Lists hold lists, or numbers, and either is what all of that depth hold.
                if (lists and row) or bool(lists) == (level + 1 == deepest) or lengths[level] not in (-1, length):
                    raise self._ragged()
                lengths[level] = length
                try:
                    values.fromlist(row)
                except OverflowError:
                    raise self._wrong("an integer is beyond any float") from None
                row.clear()
                if not children:
                    break
            elif event == "string" and value in NOT_FINITE:
                row.append(NOT_FINITE[value])
            else:
                raise self._wrong(f"a gradient is numbers in lists, not {_said(event, value)}")
        return np.frombuffer(values, np.float64).reshape(lengths)

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
            if depth > _DEEPEST:
                raise self._wrong(f"it is nested more than {_DEEPEST} deep")
            if depth == 0:
                return

    def _expect(self, events: Events, wanted: str, what: str) -> None:
        event, value = next(events)
        if event != wanted:
            raise self._wrong(f"expected {what}, not {_said(event, value)}")

    def _tell(self) -> None:
        self._advance(self._tokens.bytes_read - self._told)
        self._told = self._tokens.bytes_read

    def _ragged(self) -> FormatError:
        return self._wrong("its lists are ragged: each axis needs one length")

    def _wrong(self, what: str) -> FormatError:
        where = f", {self._where}" if self._where else ""
        return FormatError(f"{self._path}{where}: {what}", path=str(self._path))


def _said(event: str, value: Any) -> str:
    if event in ("start_map", "map_key", "end_map"):
        return "an object"
    return "a list" if event == "start_array" else json.dumps(value, default=str)[:80]
