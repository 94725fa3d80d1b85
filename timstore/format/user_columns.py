"""Columns that users attach to samples: one table of many, whatever types they came with, and no value changed."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from timstore.format.schemas import alike

# DuckDB and Arrow agree on these; what a compaction or another type of the same column makes of them is itself.
_TIME, _SPAN = pa.time64("us"), pa.duration("us")
_DIGITS = {pa.int8(): 3, pa.uint8(): 3, pa.int16(): 5, pa.uint16(): 5, pa.int32(): 10, pa.uint32(): 10}
_INTEGER_DIGITS, _DECIMAL_DIGITS = 20, 38


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Return the rows of all tables, one below the other.

    A column has the type that holds all of its values exactly, and is text where there is none: reading what is
    stored never fails for its types. Values that a later row of the same sample replaces do not count.
    """
    tables = [plain(table) for table in alike(tables)]
    for name in dict.fromkeys(name for table in tables for name in table.column_names):
        having = [table for table in tables if name in table.column_names]
        if name == "sample" or len(_types(having, name)) < 2:
            continue
        columns = iter(_together(_counting(having, name)))
        tables = [
            table.set_column(table.column_names.index(name), name, next(columns))
            if name in table.column_names
            else table
            for table in tables
        ]
    return pa.concat_tables(tables, promote_options="default")


def fit(held: pa.Table, given: pa.Table, name: str) -> bool:
    """Say whether a column's values and what is attached after them have a type that holds them exactly."""
    # As the stored column is spelled, which comes first.
    tables = [plain(table.select(["sample", name])) for table in alike([held, given])]
    columns = _counting(tables, name)
    return len(_types(tables, name)) < 2 or _exactly(columns) is not None


def plain(table: pa.Table) -> pa.Table:
    """Hold every column in a type that DuckDB takes and gives back, as text what it does not know."""
    for number, name in enumerate(table.column_names):
        column = table.column(number)
        found = _plain(column)
        if found is not column:
            table = table.set_column(number, name, found)
    return table


def _types(tables: Sequence[pa.Table], name: str) -> set[pa.DataType]:
    return {table.schema.field(name).type for table in tables} - {pa.null()}


def _counting(tables: Sequence[pa.Table], name: str) -> list[pa.ChunkedArray]:
    """Return one column of each table, without the values that later rows replace."""
    columns = [table[name] for table in tables]
    ids = np.concatenate([table["sample"].to_numpy() for table in tables])
    valid = np.flatnonzero(np.concatenate([column.is_valid().to_numpy() for column in columns]))
    last = np.zeros(len(ids), bool)
    _, at = np.unique(ids[valid[::-1]], return_index=True)
    last[valid[::-1][at]] = True
    stops = np.cumsum([len(column) for column in columns])
    masks = np.split(last, stops[:-1])
    return [
        pa.chunked_array([column.combine_chunks().take(pa.array(np.where(mask, np.arange(len(mask)), -1), mask=~mask))])
        for column, mask in zip(columns, masks, strict=True)
    ]


def _together(columns: Sequence[pa.ChunkedArray]) -> list[pa.ChunkedArray]:
    exact = _exactly(columns)
    return [_text(column) for column in columns] if exact is None else exact


def _exactly(columns: Sequence[pa.ChunkedArray]) -> list[pa.ChunkedArray] | None:
    """Return columns in the one type that holds the values of all, None if there is none."""
    try:
        wanted = _common([column.type for column in columns if column.type != pa.null()])
        if wanted is None:
            return None
        cast = [column.cast(wanted) for column in columns]
        for column, one in zip(columns, cast, strict=True):
            # A float has no other value in a wider one, and NaN is not equal to itself.
            if not pa.types.is_floating(column.type) and not one.cast(column.type).equals(column):
                return None
    except pa.ArrowException:
        return None
    return cast


def _common(types: Sequence[pa.DataType]) -> pa.DataType | None:
    """Return the type that may hold values of all types; whether it holds these is for casting to tell."""
    if any(map(_is_text, types)) and not all(map(_is_text, types)):
        return None
    decimals = [one for one in types if pa.types.is_decimal(one)]
    if decimals and all(pa.types.is_integer(one) or pa.types.is_decimal(one) for one in types):
        scale = max(one.scale for one in decimals)
        # Of what integers need, since Arrow asks for it whatever their values are.
        whole = max(
            one.precision - one.scale if pa.types.is_decimal(one) else _DIGITS.get(one, _INTEGER_DIGITS)
            for one in types
        )
        return pa.decimal128(min(whole + scale, _DECIMAL_DIGITS), scale)
    schemas = [pa.schema([("x", one)]) for one in types]
    wanted = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    if pa.types.is_floating(wanted):
        return pa.float64()
    if wanted == pa.int64() and pa.uint64() in types:
        # Digits that either alone would lose.
        return pa.decimal128(_INTEGER_DIGITS, 0)
    return wanted if _is_plain(wanted) else None


def _is_text(one: pa.DataType) -> bool:
    return bool(pa.types.is_string(one))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    one = column.type
    wanted = _plain_type(one)
    if wanted == one:
        return column
    try:
        if one == pa.month_day_nano_interval():
            return pa.chunked_array([pa.array([_microseconds(span) for span in column.to_pylist()], _SPAN)])
        if wanted is not None:
            return column.cast(wanted)
    except (pa.ArrowException, ValueError):
        pass
    return _text(column)


def _plain_type(one: pa.DataType) -> pa.DataType | None:
    """Return the type that DuckDB gives back for a column of this one, None if it is to be text."""
    types = pa.types
    if types.is_timestamp(one) and one.tz is not None:
        # The same moments; DuckDB calls the zone by the machine's name.
        return pa.timestamp(one.unit, "UTC")
    if types.is_float16(one):
        return pa.float32()
    if types.is_large_string(one) or types.is_string_view(one):
        return pa.string()
    if types.is_large_binary(one) or types.is_fixed_size_binary(one) or types.is_binary_view(one):
        return pa.binary()
    if types.is_date64(one):
        return pa.date32()
    if types.is_time(one):
        return _TIME
    if types.is_duration(one) or one == pa.month_day_nano_interval():
        return _SPAN
    if types.is_decimal(one) and not types.is_decimal128(one):
        return pa.decimal128(_DECIMAL_DIGITS, one.scale) if 0 <= one.scale <= _DECIMAL_DIGITS else None
    return one if _is_plain(one) else None


def _is_plain(one: pa.DataType) -> bool:
    types = pa.types
    if types.is_list(one) or types.is_large_list(one) or types.is_fixed_size_list(one):
        return _is_plain(one.value_type)
    if types.is_struct(one):
        return one.num_fields > 0 and all(_is_plain(part.type) for part in one)
    if types.is_map(one):
        return _is_plain(one.key_type) and _is_plain(one.item_type)
    if types.is_decimal128(one):
        return bool(0 <= one.scale <= one.precision)
    simple = (types.is_null, types.is_boolean, types.is_integer, types.is_float32, types.is_float64)
    others = (types.is_string, types.is_binary, types.is_date32, types.is_time64, types.is_timestamp, types.is_duration)
    return any(is_one(one) for is_one in (*simple, *others))


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
    types, one = pa.types, column.type
    direct = (types.is_null, types.is_string, types.is_boolean, types.is_integer, types.is_date, types.is_time)
    if any(is_one(one) for is_one in direct) or types.is_timestamp(one) or types.is_decimal(one):
        return column.cast(pa.string())
    values = column.to_pylist()
    return pa.chunked_array([pa.array([None if value is None else _said(value, one) for value in values], pa.string())])


def _said(value: Any, one: pa.DataType) -> str:
    if pa.types.is_float32(one):
        return str(np.float32(value))
    if isinstance(value, bytes):
        return value.hex()
    return json.dumps(value, default=str) if isinstance(value, list | dict) else str(value)
