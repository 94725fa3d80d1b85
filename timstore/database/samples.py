"""The user's own columns beside sample ids."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa

from timstore.arguments import mapped, plain_name, sample_id
from timstore.catalog.tables import quoted
from timstore.errors import InvalidInputError, shown
from timstore.format.user_columns import alike, cast_exactly, first_misfit, plain


class Samples:
    """`store.samples`: what the user knows about samples (owner, document, hash), to select by."""

    def __init__(self, write: Callable[[pa.Table], None]) -> None:
        self._write = write

    def update(self, rows: Any) -> None:
        """Attach columns to sample ids; the last value written for a sample and column wins.

        Durability: on disk when this returns.

        Args:
            rows: a pandas or polars frame, an arrow table, a list of mappings, or a mapping of columns,
                with an integer column `sample`.

        Raises:
            InvalidInputError: no `sample` column, ids that are no integers, missing ids, or columns named alike.
        """
        table = as_rows(rows)
        if table.num_rows:
            self._write(table)


def as_rows(rows: Any) -> pa.Table:
    """Return what `Samples.update` takes as a table, its ids as int64.

    Raises:
        InvalidInputError: no `sample` column, ids that are no integers, missing ids, or columns named alike.
    """
    table = _as_table(rows)
    if "sample" not in table.column_names:
        raise InvalidInputError(f"samples need an integer column `sample`; got {table.column_names}")
    spelled = [plain_name(name, "a samples column").lower() for name in table.column_names]
    twice = sorted(name for name in table.column_names if spelled.count(name.lower()) > 1)
    if twice:
        raise InvalidInputError(f"SQL does not tell the columns {', '.join(twice)} apart: keep one of them")
    ids = table["sample"]
    if not pa.types.is_integer(ids.type) or ids.null_count:
        raise InvalidInputError(f"the column `sample` holds integers without gaps, not {ids.type}")
    try:
        ids = ids.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise InvalidInputError(f"the column `sample` holds integers of 63 bits: {error}") from error
    if len(ids) and (least := int(ids.to_numpy().min())) < 0:
        raise InvalidInputError(f"a sample id starts at 0; got {least}", value=least)
    return table.set_column(table.column_names.index("sample"), "sample", ids)


def hash_rows(hashes: Any) -> pa.Table:
    """Return sample ids and hashes of what samples consist of as rows of `samples`."""
    pairs = mapped(hashes, "hashes maps sample ids to text")
    ids = [sample_id(one) for one in pairs]
    digests = [plain_name(digest, "a sample's hash") for digest in pairs.values()]
    return pa.table({"sample": pa.array(ids, pa.int64()), "content_hash": pa.array(digests, pa.string())})


class ColumnTypes:
    """The types that the samples columns of a store have: the first that each was given with.

    Args:
        ask: answers SQL about the store.
    """

    def __init__(self, ask: Callable[[str], pa.Table]) -> None:
        self._ask = ask
        # SQL does not tell Owner from owner.
        self._fields = {field.name.lower(): field for field in ask("SELECT * FROM samples LIMIT 0").schema}
        self._stored = set(self._fields)

    def fitted(self, table: pa.Table) -> pa.Table:
        """Return rows with each column in its type; a column that is new has it from these rows on.

        Raises:
            InvalidInputError: naming the column, its type, and the first value that would not be the same in it.
        """
        table = plain(alike([table])[0])
        for number, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
            if column.null_count == len(column) and name.lower() in self._fields:
                continue
            field = self._fields.get(name.lower())
            if field is None or (field.type != column.type and not self._has_values(field)):
                self._fields[name.lower()] = table.schema.field(name)
                self._stored.discard(name.lower())
                continue
            cast = cast_exactly(column, field.type)
            if cast is None:
                at = first_misfit(column, field.type)
                value, sample, kept = column[at], table["sample"][at].as_py(), field.type
                with suppress(ValueError, OverflowError, pa.ArrowException):  # a moment that Python has no number for
                    value = value.as_py()
                raise InvalidInputError(
                    f"the samples column {name} holds {kept}, not {column.type}: {shown(value)} of sample {sample} "
                    f"cannot become {kept} unchanged. Give it as {kept}, or under another name",
                    column=name,
                    value=value,
                    sample=sample,
                )
            table = table.set_column(number, name, cast)
        return table

    def _has_values(self, field: pa.Field) -> bool:
        """Say whether a column has a type: as long as it is empty, DuckDB gives it some integer's."""
        if pa.types.is_null(field.type):
            return False
        if field.name.lower() not in self._stored:
            return True
        count = self._ask(f"SELECT count({quoted(field.name)}) AS count FROM samples")
        return bool(count["count"][0].as_py())


def names_of_samples(rows: pa.Table, column: str) -> dict[str, int] | None:
    """Return what a column of the samples table calls each sample, None where there is no such column.

    Raises:
        InvalidInputError: a name is two samples'.
    """
    if column not in rows.column_names:
        return None
    names: dict[str, int] = {}
    for sample, name in zip(rows["sample"].to_pylist(), rows[column].to_pylist(), strict=True):
        if name is not None and names.setdefault(str(name), sample) != sample:
            raise InvalidInputError(f"store.samples: {column} {name!r} names samples {names[str(name)]} and {sample}")
    return names


def sample_named(name: str, names: Mapping[str, int] | None, column: str | None = None) -> int:
    """Return the sample that goes by a name.

    Args:
        names: what samples are called, None where no column says so.

    Raises:
        InvalidInputError: with how to name samples.
    """
    if names is None:
        column = column or "key"
        raise InvalidInputError(
            f"sample id {name!r} is text, and samples are integers: give each its number with store.samples.update("
            f"[{{'sample': 0, {column!r}: {name!r}}}, ...]) and pass id_column={column!r}",
            kind="wrong-ids",
        )
    if name not in names:
        raise InvalidInputError(
            f"no row of store.samples has the sample id {name!r}: add it with store.samples.update", kind="wrong-ids"
        )
    return names[name]


def _as_table(rows: Any) -> pa.Table:
    if isinstance(rows, pa.Table):
        return rows
    try:
        if hasattr(rows, "to_arrow"):
            return rows.to_arrow()
        if isinstance(rows, Mapping):
            columns = {name: one if isinstance(one, np.ndarray) else list(one) for name, one in rows.items()}
            return pa.Table.from_pydict(columns)
        if isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows):
            # Of every row, not of the first alone as arrow would take them.
            names = dict.fromkeys(name for row in rows for name in row)
            return pa.Table.from_pydict({name: [row.get(name) for row in rows] for name in names})
        if hasattr(rows, "columns"):
            return pa.Table.from_pandas(rows, preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError(f"these samples are no table: {error}") from error
    raise InvalidInputError(
        f"samples are a frame, a list of mappings or a mapping of columns, not {type(rows).__name__}"
    )
