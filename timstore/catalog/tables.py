"""Loading the row tables of commits into DuckDB."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from timstore.encoding import PRECISIONS
from timstore.errors import FormatError
from timstore.format.tables import ADDED, ROLLED, SCHEMAS, alike, numbered

STORED = tuple(kind for kind in ROLLED if kind != "samples")

# Small inserts cost more per row, large ones memory.
_INSERT_ROWS = 1_000_000

_COMMITS = pa.schema(
    [
        ("commit", pa.int64()),
        ("writer", pa.string()),
        ("seq", pa.int64()),
        ("at", pa.string()),
        ("records", pa.int64()),
        ("bytes", pa.int64()),
    ]
)
_ATTEMPTS = pa.schema(
    [
        *((name, pa.int64()) for name in ("attempt", "from_epoch", "from_step", "ranks")),
        ("scope", pa.list_(pa.int64())),
        ("recorded", pa.string()),
    ]
)


@dataclass(frozen=True, eq=False, slots=True)
class CommitRows:
    """One commit's row tables, by kind; kinds that SQL does not show are ignored."""

    number: int
    writer: str
    seq: int
    at: str
    records: int
    bytes: int
    tables: Mapping[str, pa.Table]


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """One attempt.

    Attributes:
        scope: the ids of the recorded samples, if only some were to be recorded.
        recorded: "all" or "selected", None when only `append` was used.
    """

    attempt: int
    from_epoch: int
    from_step: int
    ranks: int
    scope: list[int] | None
    recorded: str | None


def create_tables(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the tables of schema `stored`, empty."""
    connection.execute("CREATE SCHEMA stored")
    for kind in STORED:
        _replace(connection, kind, numbered(SCHEMAS[kind].empty_table(), kind, 0))
    # Few distinct words in millions of rows: grouping by an ENUM takes a quarter of the time that text takes.
    words = {"encoding": ("dense", "factors", "rows"), "precision": PRECISIONS}
    for column, values in words.items():
        connection.execute(f"ALTER TABLE stored.gradients ALTER {column} TYPE ENUM {values}")
    _replace(connection, "commits", _COMMITS.empty_table())
    _replace(connection, "samples", SCHEMAS["samples"].empty_table())


def load_commits(
    connection: duckdb.DuckDBPyConnection,
    commits: Iterable[CommitRows],
    folded: Iterable[tuple[str, pa.Table]] = (),
) -> None:
    """Add the rows of commits.

    Args:
        folded: (kind, rows) of a checkpoint, in its order; those of the commits that it covers are of kind `commits`.

    Raises:
        FormatError: rows that are not those of `format.tables`, or user columns that do not fit together.
    """
    loading = {kind: _Loading(connection, kind) for kind in STORED}
    samples: list[pa.Table] = []
    covered = 0
    for kind, table in folded:
        if kind == "samples":
            samples.append(table)
        elif kind == "commits":
            _insert(connection, kind, _numbered_heads(table, covered))
            covered += table.num_rows
        elif kind in loading:
            loading[kind].add(table, "a checkpoint")
    heads = []
    for commit in commits:
        heads.append({name: getattr(commit, name) for name in _COMMITS.names if name != "commit"})
        heads[-1]["commit"] = commit.number
        where = f"commit {commit.seq} of writer {commit.writer}"
        for kind, table in commit.tables.items():
            if kind == "samples":
                samples.append(table)
            elif kind in loading:
                loading[kind].add(numbered(table, kind, commit.number), where, writer=commit.writer, seq=commit.seq)
    for one in loading.values():
        one.insert()
    _insert(connection, "commits", pa.Table.from_pylist(heads, _COMMITS))
    if samples:
        _merge_samples(connection, samples)


def load_attempts(connection: duckdb.DuckDBPyConnection, attempts: Sequence[AttemptRow]) -> None:
    """Replace the attempts."""
    rows = [{name: getattr(attempt, name) for name in _ATTEMPTS.names} for attempt in attempts]
    _replace(connection, "attempts", pa.Table.from_pylist(rows, _ATTEMPTS))


def quoted(name: str) -> str:
    """Return a column's name as SQL writes it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


class _Loading:
    """Rows of one kind, gathered over commits until there are enough to insert."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, kind: str) -> None:
        self._connection = connection
        self._kind = kind
        self._schema = numbered(SCHEMAS[kind].empty_table(), kind, 0).schema
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table, where: str, **named: Any) -> None:
        """Add rows that say which commit they are of."""
        schema = self._schema
        try:
            for name in ADDED.get(self._kind, ()):
                if name not in table.column_names:
                    table = table.append_column(name, pa.nulls(table.num_rows, schema.field(name).type))
            table = _cast(table.select(schema.names), schema)
        except (KeyError, pa.ArrowException) as error:
            raise FormatError(f"{where}: its {self._kind} are no rows of this version: {error}", **named) from error
        self._waiting.append(table)
        self._rows += table.num_rows
        if self._rows >= _INSERT_ROWS:
            self.insert()

    def insert(self) -> None:
        if self._waiting:
            try:
                _insert(self._connection, self._kind, pa.concat_tables(self._waiting))
            except duckdb.ConversionException as error:
                raise FormatError(f"the {self._kind} hold what this version does not know: {error}") from error
            self._waiting.clear()
            self._rows = 0


def _numbered_heads(table: pa.Table, first: int) -> pa.Table:
    """Return rows of a checkpoint's commits, the first of them number `first`, as those of `_COMMITS`."""
    numbers = pa.array(np.arange(first, first + table.num_rows))
    return table.add_column(0, "commit", numbers).select(_COMMITS.names)


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Cast to a schema, but leave words that are held as a dictionary so: DuckDB takes them as they are, and sooner."""
    for number, (field, column) in enumerate(zip(schema, table.columns, strict=True)):
        words = pa.types.is_dictionary(column.type) and column.type.value_type == field.type
        if column.type != field.type and not words:
            table = table.set_column(number, field, column.cast(field.type))
    return table


def _merge_samples(connection: duckdb.DuckDBPyConnection, tables: Sequence[pa.Table]) -> None:
    """Merge the user's columns: of each sample and column the last value written that is not NULL."""
    before = connection.sql("FROM stored.samples").to_arrow_table()
    try:
        table = pa.concat_tables(alike([before, *tables]), promote_options="permissive")
        names = table.column_names
        # Numbers for names, so that no name of the user's can meet one of ours.
        table = table.rename_columns([str(number) for number in range(len(names))])
        table = table.append_column("written", pa.array(np.arange(table.num_rows)))
        merged = "".join(
            f', arg_max("{number}", written) AS {quoted(name)}' for number, name in enumerate(names) if number
        )
        connection.register("given", table)
        connection.execute(
            f'CREATE OR REPLACE TABLE stored.samples AS SELECT "0" AS sample{merged} FROM given GROUP BY 1'
        )
        connection.unregister("given")
    except (pa.ArrowException, duckdb.Error) as error:
        raise FormatError(f"the columns attached to samples do not fit together: {error}") from error


def _replace(connection: duckdb.DuckDBPyConnection, name: str, table: pa.Table) -> None:
    connection.register("given", table)
    connection.execute(f"CREATE OR REPLACE TABLE stored.{name} AS FROM given")
    connection.unregister("given")


def _insert(connection: duckdb.DuckDBPyConnection, name: str, table: pa.Table) -> None:
    connection.register("given", table)
    connection.execute(f"INSERT INTO stored.{name} BY NAME FROM given")
    connection.unregister("given")
