"""The user's own columns beside sample ids."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from timstore.arguments import mapped, plain_name, sample_id
from timstore.catalog.tables import quoted
from timstore.errors import InvalidInputError
from timstore.format.columns import fit, joined, plain


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


def check_columns(table: pa.Table, ask: Callable[[str], pa.Table], earlier: Sequence[pa.Table] = ()) -> None:
    """Refuse a column that no type holds exactly together with what is stored under its name.

    Args:
        ask: answers SQL about the store.
        earlier: rows that will be stored before these.

    Raises:
        InvalidInputError: naming the column and both types.
    """
    stored = ask("SELECT * FROM samples LIMIT 0")
    known = joined([stored, *(rows.slice(0, 0) for rows in earlier)])
    given = plain(table)
    # SQL does not tell Owner from owner.
    fields = {field.name.lower(): field for field in known.schema}
    differ = {}
    for name in sorted(given.column_names):
        field = fields.get(name.lower())
        if field is not None and len({field.type, given.schema.field(name).type} - {pa.null()}) == 2:
            differ[name] = field
    if not differ:
        return
    names = [field.name for field in differ.values() if field.name in stored.column_names]
    columns = ", ".join(map(quoted, ["sample", *names]))
    rows = joined([ask(f"SELECT {columns} FROM samples"), *earlier])
    for name, field in differ.items():
        if not fit(rows, given, field.name):
            raise InvalidInputError(
                f"the samples column {name} holds {field.type}, not {given.schema.field(name).type}, and no type holds "
                f"the values of both exactly: give it as {field.type}, or under another name",
                column=name,
            )


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
