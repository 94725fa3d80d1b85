"""The rows of commits as tables in DuckDB, and the views that SQL shows: live rows, under the data model's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from timstore.encoding import PRECISIONS
from timstore.errors import FormatError
from timstore.format.schemas import ADDED, FOLDED, SCHEMAS, integers, numbered
from timstore.format.user_columns import joined

STORED = tuple(kind for kind in FOLDED if kind != "samples")

# Small inserts cost more per row, large ones memory.
_INSERT_ROWS = 1_000_000

_SQL_TYPES = {
    pa.int64(): "BIGINT",
    pa.int32(): "INTEGER",
    pa.float64(): "DOUBLE",
    pa.string(): "VARCHAR",
    pa.bool_(): "BOOLEAN",
}
_COMMITS = {
    "commit": "BIGINT",
    "writer": "VARCHAR",
    "seq": "BIGINT",
    "at": "VARCHAR",
    "records": "BIGINT",
    "bytes": "BIGINT",
}
_ATTEMPTS = {
    "attempt": "BIGINT",
    "from_epoch": "BIGINT",
    "from_step": "BIGINT",
    "ranks": "BIGINT",
    "scope": "BIGINT[]",
    "recorded": "VARCHAR",
    "digest_before": "VARCHAR",
}

_RECORD = "attempt, epoch, step, rank, sample"


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
        digest_before: of all parameters before its first step.
    """

    attempt: int
    from_epoch: int
    from_step: int
    ranks: int
    scope: list[int] | None
    recorded: str | None
    digest_before: str | None = None


def create_tables(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the tables of schema `stored`, empty."""
    tables = {kind: numbered(_empty(kind), kind, 0).schema for kind in STORED}
    columns = {kind: {field.name: _sql_type(field.type) for field in schema} for kind, schema in tables.items()}
    # Few distinct words in millions of rows: grouping by an ENUM takes a quarter of the time that text takes.
    columns["gradients"] |= {"encoding": "ENUM ('dense', 'factors', 'rows')", "precision": f"ENUM {PRECISIONS}"}
    columns |= {"commits": _COMMITS, "samples": {"sample": "BIGINT"}}
    connection.execute("CREATE SCHEMA stored")
    for kind, types in columns.items():
        named = ", ".join(f"{quoted(name)} {sql_type}" for name, sql_type in types.items())
        connection.execute(f"CREATE TABLE stored.{kind} ({named})")


def load_commits(
    connection: duckdb.DuckDBPyConnection,
    commits: Iterable[CommitRows],
    folded: Iterable[tuple[str, pa.Table]] = (),
) -> None:
    """Add the rows of commits.

    Args:
        folded: (kind, rows) of a compaction, in its order; those of the commits that it covers are of kind `commits`.

    Raises:
        FormatError: rows that are not those of `format.schemas`.
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
            loading[kind].add(table, "a compaction")
    heads: dict[str, list[Any]] = {name: [] for name in _COMMITS}
    for commit in commits:
        for name, column in heads.items():
            column.append(commit.number if name == "commit" else getattr(commit, name))
        where = f"commit {commit.seq} of writer {commit.writer}"
        for kind, table in commit.tables.items():
            if kind == "samples":
                samples.append(table)
            elif kind in loading:
                loading[kind].add(numbered(table, kind, commit.number), where, writer=commit.writer, seq=commit.seq)
    for rows in loading.values():
        rows.insert()
    connection.execute(f"INSERT INTO stored.commits BY NAME {_unnested(_COMMITS)}", list(heads.values()))
    if samples:
        _merge_samples(connection, samples)


def load_attempts(connection: duckdb.DuckDBPyConnection, attempts: Sequence[AttemptRow]) -> None:
    """Replace the attempts."""
    columns = [[getattr(attempt, name) for attempt in attempts] for name in _ATTEMPTS]
    connection.execute(f"CREATE OR REPLACE TABLE stored.attempts AS {_unnested(_ATTEMPTS)}", columns)


def _sql_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"{_sql_type(kind.value_type)}[]"
    return _SQL_TYPES[kind]


def quoted(name: str) -> str:
    """Return a column's name as SQL writes it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


class _Loading:
    """Rows of one kind, gathered over commits until there are enough to insert."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, kind: str) -> None:
        self._connection = connection
        self._kind = kind
        self._schema = numbered(_empty(kind), kind, 0).schema
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
    """Return rows of a compaction's commits, the first of them number `first`, as those of `_COMMITS`."""
    numbers = integers(np.arange(first, first + table.num_rows))
    return table.add_column(0, "commit", numbers).select(list(_COMMITS))


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
        # A column without a name, which earlier versions took, cannot be asked for.
        named = [rows.select([name for name in rows.column_names if name]) for rows in tables]
        table = joined([before, *named])
        names = table.column_names
        # Numbers for names, so that no name of the user's can meet one of ours.
        table = table.rename_columns([str(number) for number in range(len(names))])
        table = table.append_column("written", integers(np.arange(table.num_rows)))
        merged = "".join(
            f', arg_max("{number}", written) AS {quoted(name)}' for number, name in enumerate(names) if number
        )
        connection.register("given", table)
        connection.execute(
            f'CREATE OR REPLACE TABLE stored.samples AS SELECT "0" AS sample{merged} FROM given GROUP BY 1'
        )
        connection.unregister("given")
    except (pa.ArrowException, duckdb.Error) as error:
        raise FormatError(f"the samples are no rows of this version: {error}") from error


def _empty(kind: str) -> pa.Table:
    """Return a row table without rows. Its schema's own `empty_table` would import pandas."""
    return pa.Table.from_batches([], schema=SCHEMAS[kind])


def _unnested(columns: Mapping[str, str]) -> str:
    """Return a query of rows from one list per column; `pa.Table.from_pylist` would import pandas."""
    return "SELECT " + ", ".join(f"unnest(?::{kind}[]) AS {quoted(name)}" for name, kind in columns.items())


def _insert(connection: duckdb.DuckDBPyConnection, name: str, table: pa.Table) -> None:
    connection.register("given", table)
    connection.execute(f"INSERT INTO stored.{name} BY NAME FROM given")
    connection.unregister("given")


def create_views(connection: duckdb.DuckDBPyConnection, attempts: Sequence[AttemptRow]) -> None:
    """Make the views, in the place of older ones: rows that no later attempt supersedes."""
    live = _live(attempts)
    records = f"{_records(connection)} r{live}"
    # ENUMs would reach the user as categories.
    text = "REPLACE (encoding::VARCHAR AS encoding, precision::VARCHAR AS precision)"
    views = {
        "records": f"SELECT {_columns('records')} FROM {records}",
        "gradients": f"SELECT * EXCLUDE (commit, owner) {text} FROM stored.gradients r{live}",
        "steps": f"SELECT {_columns('steps')} FROM stored.steps r{live}",
        "fingerprints": f"SELECT {_columns('fingerprints')} FROM stored.fingerprints r{live}",
        "states": f"SELECT {_columns('states')} FROM stored.states r{live}",
        "parameters": (
            "SELECT parameter, shape, dtype, numel, group_id FROM stored.parameters "
            "QUALIFY row_number() OVER (PARTITION BY parameter ORDER BY commit DESC, rowid DESC) = 1"
        ),
        "samples": (
            f"SELECT * FROM (SELECT r.sample FROM {records} UNION SELECT sample FROM stored.samples) "
            "LEFT JOIN stored.samples USING (sample)"
        ),
        "rollbacks": f"SELECT {_columns('rollbacks')} FROM stored.rollbacks r ORDER BY r.commit, r.rowid",
        "attempts": "FROM stored.attempts",
        "commits": "SELECT * EXCLUDE (commit) FROM stored.commits",
    }
    for name, query in views.items():
        connection.execute(f"CREATE OR REPLACE VIEW main.{name} AS {query}")


def _live(attempts: Sequence[AttemptRow]) -> str:
    """Return the condition that a row is live, nothing if all are.

    A row of an attempt is live until the first moment that a later attempt starts from. Written out as constants,
    this takes half the time of a join with the attempts.
    """
    cases = []
    until: tuple[int, int] | None = None
    for attempt in sorted(attempts, key=lambda attempt: attempt.attempt, reverse=True):
        if until is not None:
            epoch, step = until
            cases.append(f"WHEN {attempt.attempt} THEN r.epoch < {epoch} OR (r.epoch = {epoch} AND r.step < {step})")
        start = attempt.from_epoch, attempt.from_step
        until = start if until is None else min(until, start)
    return f" WHERE CASE r.attempt {' '.join(cases)} ELSE true END" if cases else ""


def _records(connection: duckdb.DuckDBPyConnection) -> str:
    """Return where one row per record is read: put together from its parts only if some came in several calls."""
    again = f"SELECT 1 FROM stored.records GROUP BY {_RECORD} HAVING count(*) > 1 LIMIT 1"
    if not connection.execute(again).fetchall():
        return "stored.records"
    return (
        f"(SELECT {_RECORD}, any_value(loss) AS loss, any_value(tokens) AS tokens, sqrt(sum(norm * norm)) AS norm, "
        f"sum(bytes)::BIGINT AS bytes, sum(dot) AS dot FROM stored.records GROUP BY {_RECORD})"
    )


def _columns(kind: str) -> str:
    return ", ".join(f"r.{quoted(name)}" for name in SCHEMAS[kind].names)
