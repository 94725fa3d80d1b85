"""JSON as Python writes it, with NaN and Infinity among the numbers, which no parser of JSON takes."""

import re
from typing import BinaryIO

from timstore.errors import FormatError

# What stands for them in what is handed on: text with a character that a file would have to mean.
NOT_FINITE = {"\x00NaN": float("nan"), "\x00Infinity": float("inf"), "\x00-Infinity": float("-inf")}

_OUTSIDE = re.compile(rb'"|-?Infinity|NaN')
# The parser makes one character of any two escapes that begin as a surrogate pair does, and `?` of half a pair, so that
# two names can become one.
_PAIR = rb"\\u[dD][89abAB]..\\u[dD][c-fC-F].."
_INSIDE = re.compile(_PAIR + rb'|(?P<half>\\u[dD][89a-fA-F]..)|\\.|"', re.DOTALL)
_LONGEST = 64 * 1024 * 1024


class Tokens:
    """A file of JSON, read with NaN and Infinity as text. Memory: of what is asked for.

    Attributes:
        bytes_read: of the file.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
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
            if len(data) > _LONGEST:
                raise FormatError(
                    f"{self._name}: {len(data):,} bytes without a comma are no gradients", path=self._name
                )
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
            found, in_text = match[0], self._in_text
            if in_text and match["half"]:
                raise FormatError(
                    f"{self._name}: {found.decode('latin-1')} is half of a surrogate pair, which is no character: "
                    "write what is meant, in UTF-8 or as a pair",
                    path=self._name,
                )
            pieces.append(data[place : match.start()])
            pieces.append(found if in_text or found == b'"' else b'"\\u0000' + found + b'"')
            self._in_text = in_text != (found == b'"')
            place = match.end()
        return b"".join([*pieces, data[place:]])
