"""Columns that users attach to samples: each keeps its first type, and no value is ever changed."""

import json
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import types

from timstore.format.schemas import as_text

_DECIMAL_DIGITS = 38
_INTERVAL = pa.month_day_nano_interval()
_LISTS = (types.is_list, types.is_large_list, types.is_fixed_size_list)
# What DuckDB takes and gives back as it is.
_SIMPLE = (
    *(types.is_null, types.is_boolean, types.is_integer, types.is_float32, types.is_float64, types.is_string),
    *(types.is_binary, types.is_date32, types.is_time64, types.is_timestamp, types.is_duration),
)
# What it gives back in another type, of the same values.
_PLAIN_TYPES = (
    (types.is_float16, pa.float32()),
    *((is_text, pa.string()) for is_text in (types.is_large_string, types.is_string_view)),
    *(
        (is_bytes, pa.binary())
        for is_bytes in (types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    ),
    (types.is_date64, pa.date32()),
    (types.is_time, pa.time64("us")),
    (types.is_duration, pa.duration("us")),
)
# What Arrow casts to text without loss.
_DIRECT = (
    *(types.is_null, types.is_string, types.is_boolean, types.is_integer, types.is_date, types.is_time),
    *(types.is_timestamp, types.is_decimal),
)


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Return the rows of all tables, one below the other.

    A column has one type, since what is attached is cast to it; two writers at once, and earlier versions, may have
    left several. Then it is the first of them that holds every value exactly, or text: reading never fails for types.
    """
    tables = [plain(table) for table in alike(tables)]
    for name in dict.fromkeys(name for table in tables for name in table.column_names):
        having = [number for number, table in enumerate(tables) if name in table.column_names]
        columns = [tables[number][name] for number in having]
        if len({column.type for column in columns}) < 2:
            continue
        for number, column in zip(having, _in_one_type(columns), strict=True):
            place = tables[number].column_names.index(name)
            tables[number] = tables[number].set_column(place, name, column)
    return pa.concat_tables(tables, promote_options="default")


def alike(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """Spell columns as they were spelled first, since SQL does not tell Owner from owner; hold words as plain text."""
    spelled: dict[str, str] = {}
    return [
        as_text(table).rename_columns([spelled.setdefault(name.lower(), name) for name in table.column_names])
        for table in tables
    ]


def cast_exactly(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray | None:
    """Return the values in another type of the same kind, None if one of them would be another value there."""
    if column.type == wanted:
        return column
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column), wanted)])
    if _kind(column.type) != _kind(wanted):
        return None
    try:
        cast = column.cast(wanted)
        back = cast.cast(column.type)
    except pa.ArrowException:
        return None
    if types.is_floating(column.type):  # NaN is not equal to itself
        return cast if np.array_equal(back.to_numpy(), column.to_numpy(), equal_nan=True) else None
    return cast if back.equals(column) else None


def first_misfit(column: pa.ChunkedArray, wanted: pa.DataType) -> int:
    """Return the number of the first value that `cast_exactly` does not take, of a column that it does not."""
    lengths = range(1, len(column) + 1)
    return bisect_left(lengths, True, key=lambda length: cast_exactly(column.slice(0, length), wanted) is None)


def plain(table: pa.Table) -> pa.Table:
    """Hold every column in a type that DuckDB takes and gives back, as text what it does not know."""
    for number, name in enumerate(table.column_names):
        column = _plain(table.column(number))
        if column is not table.column(number):
            table = table.set_column(number, name, column)
    return table


def _in_one_type(columns: Sequence[pa.ChunkedArray]) -> list[pa.ChunkedArray]:
    saying = [column for column in columns if column.null_count < len(column)]
    for wanted in dict.fromkeys(column.type for column in saying or columns):
        cast = [cast_exactly(column, wanted) for column in columns]
        exact = [column for column in cast if column is not None]
        if len(exact) == len(columns):
            return exact
    return [_text(column) for column in columns]


def _kind(column_type: pa.DataType) -> Any:
    """Return what a type's values are: only those of one kind are the same value in another type of theirs."""
    if types.is_integer(column_type) or types.is_floating(column_type) or types.is_decimal(column_type):
        return "number"
    if types.is_date(column_type) or types.is_timestamp(column_type):
        return "moment", types.is_timestamp(column_type) and column_type.tz is not None
    if any(is_list(column_type) for is_list in _LISTS):
        return "list", _kind(column_type.value_type)
    return column_type


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    wanted = _plain_type(column.type)
    if wanted == column.type:
        return column
    try:
        if column.type == _INTERVAL:
            return pa.chunked_array([pa.array([_microseconds(span) for span in column.to_pylist()], pa.duration("us"))])
        if wanted is not None:
            return column.cast(wanted)
    except (pa.ArrowException, ValueError):
        pass
    return _text(column)


def _plain_type(column_type: pa.DataType) -> pa.DataType | None:
    """Return the type that DuckDB gives back for a column of this one, None if it is to be text."""
    if column_type == _INTERVAL:
        return pa.duration("us")
    if types.is_timestamp(column_type) and column_type.tz is not None:
        # The same moments; DuckDB calls the zone by the machine's name.
        return pa.timestamp(column_type.unit, "UTC")
    if types.is_decimal(column_type) and not types.is_decimal128(column_type):
        scale = column_type.scale
        return pa.decimal128(_DECIMAL_DIGITS, scale) if 0 <= scale <= _DECIMAL_DIGITS else None
    plain_types = (wanted for is_such, wanted in _PLAIN_TYPES if is_such(column_type))
    return next(plain_types, column_type if _is_plain(column_type) else None)


def _is_plain(column_type: pa.DataType) -> bool:
    if any(is_list(column_type) for is_list in _LISTS):
        return _is_plain(column_type.value_type)
    if types.is_struct(column_type):
        return column_type.num_fields > 0 and all(_is_plain(field.type) for field in column_type)
    if types.is_map(column_type):
        return _is_plain(column_type.key_type) and _is_plain(column_type.item_type)
    if types.is_decimal128(column_type):
        return bool(0 <= column_type.scale <= column_type.precision)
    return any(is_simple(column_type) for is_simple in _SIMPLE)


def _microseconds(span: Any) -> int | None:
    """Return an interval of DuckDB as microseconds.

    Raises:
        ValueError: it has months, which are no number of them.
    """
    if span is None:
        return None
    if span.months or span.nanoseconds % 1000:
        raise ValueError(span)
    return int(span.days * 86_400_000_000 + span.nanoseconds // 1000)


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return values as text: every digit of an integer, a float as Python writes it, what has parts as JSON."""
    if any(is_direct(column.type) for is_direct in _DIRECT):
        return column.cast(pa.string())
    values = [None if value is None else _said(value, column.type) for value in column.to_pylist()]
    return pa.chunked_array([pa.array(values, pa.string())])


def _said(value: Any, column_type: pa.DataType) -> str:
    if types.is_float32(column_type):
        return str(np.float32(value))
    if isinstance(value, bytes):
        return value.hex()
    return json.dumps(value, default=str) if isinstance(value, list | dict) else str(value)
