"""Check one argument: a whole number, a name, a list, a number of bytes, a flag, one of some words, a moment."""

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from timstore.errors import InvalidInputError, shown

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NO_LIMIT_BYTES = 2**62  # what is counted from more no longer fits into 64 bits
_NAME_BYTES = 4096
_TEXT_BYTES = 16 * 1024 * 1024


def whole_number(value: Any, what: str) -> int:
    """Return a Python int from any integer of 64 bits, numpy's and 0-d tensors' too; never from a bool or a float.

    Raises:
        InvalidInputError: naming `what`.
    """
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    try:
        if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
            value = value.item()
        number = operator.index(value)
        is_integer = not isinstance(value, bool)
    except Exception:  # whatever such an object raises
        is_integer = False
    if not is_integer:
        raise InvalidInputError(f"{what} must be an integer, not {shown(value)}", value=value)
    if not -(2**63) <= number < 2**63:
        raise InvalidInputError(f"{what} must fit into 64 bits; got {shown(number)}", value=number)
    return number


def counting_number(value: Any, what: str) -> int:
    """Return an integer from 0 on, of 63 bits: an epoch, a rank, a sample's id."""
    checked = whole_number(value, what)
    if checked < 0:
        raise InvalidInputError(f"{what} starts at 0; got {checked}", value=checked)
    return checked


def positive_number(value: Any, what: str) -> int:
    """Return an integer from 1 on, of 63 bits: how many there are of something."""
    checked = whole_number(value, what)
    if checked < 1:
        raise InvalidInputError(f"{what} is at least 1; got {checked}", value=checked)
    return checked


def sample_id(value: Any, what: str = "sample") -> int:
    """Return a sample's id: an integer from 0 on, of 63 bits."""
    return counting_number(value, what)


def number(value: Any, what: str) -> float:
    """Return a float from any number.

    Raises:
        InvalidInputError: naming `what`.
    """
    try:
        return float(value)
    except Exception:  # whatever such an object raises
        raise InvalidInputError(f"{what} must be a number, not {shown(value)}") from None


def text(value: Any, what: str, most: int = _TEXT_BYTES) -> str:
    """Return text that a file can hold.

    Raises:
        InvalidInputError: it is none, is too long, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise InvalidInputError(f"{what} is text, not {shown(value)}")
    try:
        size = len(value) if value.isascii() else len(value.encode())
    except UnicodeEncodeError:
        raise InvalidInputError(
            f"{what} holds half of a surrogate pair, which is no character: {shown(value)}"
        ) from None
    if size > most:
        raise InvalidInputError(f"{what} has {size:,} bytes, more than {most:,}: {shown(value)}")
    return str(value)


def plain_name(value: Any, what: str) -> str:
    """Return a name: text, not empty, without NUL, of at most 4,096 bytes."""
    checked = text(value, what, _NAME_BYTES)
    if not checked or "\0" in checked:
        raise InvalidInputError(f"{what} is text that is not empty and holds no NUL, not {shown(value)}")
    return checked


def listed(values: Any, what: str, kind: str = "a list") -> list[Any]:
    """Return what can be iterated as a list; text is no list of characters. `kind` says what it should be."""
    try:
        if not isinstance(values, str | bytes):
            return list(values)
    except Exception:  # whatever such an object raises
        pass
    raise InvalidInputError(f"{what} is {kind}, not {shown(values)}")


def mapped(values: Any, what: str) -> dict[Any, Any]:
    """Return a mapping as a dictionary."""
    if not isinstance(values, Mapping):
        raise InvalidInputError(f"{what}, not {shown(values)}")
    return dict(values)


def byte_count(size: Any, what: str) -> int:
    """Return a number of bytes from an integer or from text such as "512MB" or "2 GiB".

    Raises:
        InvalidInputError: if it is neither, or not positive.
    """
    given = size
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([KMG]?I?B?)\s*", size.upper())
        if match and match[2] in _UNITS:
            size = int(float(match[1]) * _UNITS[match[2]])
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise InvalidInputError(f'{what} is a number of bytes or text like "512MB", not {shown(given)}')
    return min(size, _NO_LIMIT_BYTES)


def flag(value: Any, what: str) -> bool:
    """Return a bool."""
    if not isinstance(value, bool | np.bool_):
        raise InvalidInputError(f"{what} is True or False, not {shown(value)}")
    return bool(value)


def flags(**given: Any) -> None:
    """Check that arguments are bools: any text is true, "no" as well.

    Raises:
        InvalidInputError: naming the argument.
    """
    for name, value in given.items():
        flag(value, name)


def choice(value: Any, words: Sequence[str], what: str) -> str:
    """Return one of some words."""
    if not isinstance(value, str) or value not in words:
        raise InvalidInputError(f"{what} is {' or '.join(map(repr, words))}, not {shown(value)}")
    return value


def moment(epoch: Any, step: Any) -> tuple[int, int]:
    """Return (epoch, step) as non-negative integers."""
    checked = whole_number(epoch, "epoch"), whole_number(step, "step")
    if min(checked) < 0:
        raise InvalidInputError(f"epoch and step start at 0; got epoch {checked[0]}, step {checked[1]}")
    return checked


def rank_number(rank: Any) -> int:
    """Return a process's rank as a non-negative integer."""
    return counting_number(rank, "rank")
