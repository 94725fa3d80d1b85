"""Row tables in DuckDB, and SQL over them that can read these tables and nothing else.

The tables live in a private catalogue file. It is loaded by one connection, closed, opened again read-only, and
then every door is shut and locked: files, network, extensions, Python variables, settings.
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from timstore.errors import FormatError, InvalidInputError, StateError
from timstore.format.tables import SCHEMAS

_LOADING = {"memory_limit": "1GB", "threads": "2", "preserve_insertion_order": "false"}
_INSERT_ROWS = 1_000_000
_TABLES = ("records", "gradients", "steps", "parameters", "fingerprints", "rollbacks")
_VIEWS = (*_TABLES, "samples", "attempts", "commits")


@dataclass(frozen=True, eq=False, slots=True)
class CommitRows:
    """One commit's row tables, by kind."""

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
        recorded: "all" or "selected", None when only `append` was used.
        samples: the selected ids.
    """

    attempt: int
    from_epoch: int
    from_step: int
    ranks: int
    samples: list[int] | None
    recorded: str | None


class Catalog:
    """The tables of one snapshot. Made by `build`."""

    def __init__(self, folder: Path, samples: list[pa.Table]) -> None:
        self._path = folder / "catalogue.duckdb"
        self._samples = samples
        self._connection: duckdb.DuckDBPyConnection | None = None
        # Also at the interpreter's exit; a relation that is still held keeps reading the deleted file.
        self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    @classmethod
    def build(
        cls, commits: Iterable[CommitRows], attempts: Sequence[AttemptRow], previous: "Catalog | None" = None
    ) -> "Catalog":
        """Load commits into tables; with `previous`, only what is new, beside a copy of its tables.

        Cost: memory of about 1 GB at most, whatever the number of rows.

        Raises:
            FormatError: if the user's sample columns of different commits do not fit together.
        """
        # mkdtemp makes a folder that nobody else may enter.
        folder = Path(tempfile.mkdtemp(prefix="timstore-catalogue-"))
        catalog = cls(folder, list(previous._samples) if previous else [])
        if previous is not None:
            shutil.copyfile(previous._path, catalog._path)
        with duckdb.connect(catalog._path, config={**_LOADING, "temp_directory": str(folder / "spill")}) as connection:
            if previous is None:
                _create_tables(connection)
            _load(connection, commits, catalog._samples)
            _load_attempts(connection, attempts)
            _load_samples(connection, catalog._samples)
            _create_views(connection, len(attempts) > 1)
        catalog._open(folder)
        return catalog

    def sql(self, query: str, params: Sequence[Any] | Mapping[str, Any] | None = None) -> duckdb.DuckDBPyRelation:
        """Ask one question.

        Every call has a connection of its own, so that nothing one relation leaves behind (a temporary view that
        bears a table's name) is seen by the next.

        Raises:
            InvalidInputError: it is not one SELECT, or DuckDB refuses it.
        """
        try:
            statements = duckdb.extract_statements(query)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise InvalidInputError(
                    f"one SELECT at a time, and nothing else; the tables are {', '.join(_VIEWS)}", kind="not-a-select"
                )
            relation = self._cursor().sql(query, params=params)
        except duckdb.Error as error:
            raise InvalidInputError(
                f"DuckDB says: {error}\nThe tables are {', '.join(_VIEWS)}; DESCRIBE names a table's columns",
                kind="sql",
            ) from error
        if relation is None:
            raise InvalidInputError("this statement returns nothing to look at", kind="not-a-select")
        return relation

    def rows(self, query: str, params: Sequence[Any] | None = None) -> pa.Table:
        """Return the answer to one of the library's own questions; the tables of schema `stored` are there too."""
        return self._cursor().sql(query, params=params).to_arrow_table()

    def close(self) -> None:
        """Remove the tables."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._remove()

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        if self._connection is None:
            raise StateError("the store was closed; open it again", kind="closed")
        return self._connection.cursor()

    def _open(self, folder: Path) -> None:
        connection = duckdb.connect(self._path, read_only=True, config={"threads": "2"})
        # Without this DuckDB spills into the working directory.
        connection.execute(f"SET temp_directory = '{str(folder / 'spill').replace(chr(39), chr(39) * 2)}'")
        for setting in (
            "autoinstall_known_extensions",
            "autoload_known_extensions",
            "python_enable_replacements",
            "python_scan_all_frames",
            "enable_external_access",
        ):
            connection.execute(f"SET {setting} = false")
        connection.execute("SET lock_configuration = true")
        self._connection = connection


def _create_tables(connection: duckdb.DuckDBPyConnection) -> None:
    connection.execute("CREATE SCHEMA stored")
    for kind in _TABLES:
        numbered = [pa.field("commit", pa.int64())]
        if kind == "gradients":
            numbered.append(pa.field("owner", pa.int64()))
        _create(connection, f"stored.{kind}", pa.schema([*numbered, *SCHEMAS[kind]]).empty_table())
    # `at` is a word of DuckDB's own, and has to be quoted.
    columns = 'commit BIGINT, writer VARCHAR, seq BIGINT, "at" VARCHAR, records BIGINT, bytes BIGINT'
    connection.execute(f"CREATE TABLE stored.commits ({columns})")


def _create(connection: duckdb.DuckDBPyConnection, name: str, table: pa.Table) -> None:
    connection.register("given", table)
    connection.execute(f"CREATE OR REPLACE TABLE {name} AS SELECT * FROM given")
    connection.unregister("given")


def _load(connection: duckdb.DuckDBPyConnection, commits: Iterable[CommitRows], samples: list[pa.Table]) -> None:
    waiting: dict[str, list[pa.Table]] = {kind: [] for kind in _TABLES}

    def insert(kind: str) -> None:
        if waiting[kind]:
            connection.register("given", pa.concat_tables(waiting[kind]))
            connection.execute(f"INSERT INTO stored.{kind} SELECT * FROM given")
            connection.unregister("given")
            waiting[kind].clear()

    for commit in commits:
        row = [commit.number, commit.writer, commit.seq, commit.at, commit.records, commit.bytes]
        connection.execute("INSERT INTO stored.commits VALUES (?, ?, ?, ?, ?, ?)", row)
        for kind, table in commit.tables.items():
            if kind == "samples":
                samples.append(table)
                continue
            if kind == "gradients":
                table = table.add_column(0, "owner", pa.array(range(table.num_rows), pa.int64()))
            waiting[kind].append(table.add_column(0, "commit", pa.repeat(pa.scalar(commit.number), table.num_rows)))
            if sum(part.num_rows for part in waiting[kind]) >= _INSERT_ROWS:
                insert(kind)
    for kind in _TABLES:
        insert(kind)


def _load_attempts(connection: duckdb.DuckDBPyConnection, attempts: Sequence[AttemptRow]) -> None:
    rows = []
    for attempt in attempts:
        later = [(one.from_epoch, one.from_step) for one in attempts if one.attempt > attempt.attempt]
        epoch, step = min(later, default=(None, None))
        row = {name: getattr(attempt, name) for name in AttemptRow.__dataclass_fields__}
        rows.append({**row, "until_epoch": epoch, "until_step": step})
    numbers = [pa.field(name, pa.int64()) for name in ("attempt", "from_epoch", "from_step", "ranks")]
    schema = [*numbers, ("samples", pa.list_(pa.int64())), ("recorded", pa.string())]
    schema += [("until_epoch", pa.int64()), ("until_step", pa.int64())]
    _create(connection, "stored.attempts", pa.Table.from_pylist(rows, pa.schema(schema)))


def _load_samples(connection: duckdb.DuckDBPyConnection, samples: list[pa.Table]) -> None:
    """Merge the user's columns: of each sample and column the last value written that is not NULL."""
    try:
        table = pa.concat_tables([SCHEMAS["samples"].empty_table(), *samples], promote_options="permissive")
    except pa.ArrowException as error:
        raise FormatError(f"the columns attached to samples do not fit together: {error}") from error
    columns = [name for name in table.column_names if name != "sample"]
    given = table.append_column("written", pa.array(range(table.num_rows), pa.int64()))
    connection.register("given", given)
    merged = "".join(f", arg_max({_quoted(name)}, written) AS {_quoted(name)}" for name in columns)
    connection.execute(f"CREATE OR REPLACE TABLE stored.samples AS SELECT sample{merged} FROM given GROUP BY sample")
    connection.unregister("given")


def _create_views(connection: duckdb.DuckDBPyConnection, several_attempts: bool) -> None:
    """Show live rows: those that no later attempt supersedes."""
    live = (
        " JOIN stored.attempts a USING (attempt) WHERE a.until_epoch IS NULL OR r.epoch < a.until_epoch "
        "OR (r.epoch = a.until_epoch AND r.step < a.until_step)"
        if several_attempts
        else ""
    )
    views = {
        kind: f"SELECT {_columns(kind)} FROM stored.{kind} r{live}" for kind in ("gradients", "steps", "fingerprints")
    }
    views["records"] = f"SELECT {_columns('records')} FROM {_records(connection)} r{live}"
    views["rollbacks"] = f"SELECT {_columns('rollbacks')} FROM stored.rollbacks r ORDER BY r.commit"
    views["parameters"] = (
        "SELECT parameter, shape, dtype, numel, group_id FROM stored.parameters "
        "QUALIFY row_number() OVER (PARTITION BY parameter ORDER BY commit DESC, rowid DESC) = 1"
    )
    views["samples"] = (
        "SELECT * FROM (SELECT sample FROM stored.records UNION SELECT sample FROM stored.samples) "
        "LEFT JOIN stored.samples USING (sample)"
    )
    views["attempts"] = "SELECT * EXCLUDE (until_epoch, until_step) FROM stored.attempts"
    views["commits"] = "SELECT * EXCLUDE (commit) FROM stored.commits"
    for name, query in views.items():
        connection.execute(f"CREATE OR REPLACE VIEW main.{name} AS {query}")


def _records(connection: duckdb.DuckDBPyConnection) -> str:
    """Return where one row per record is read: joined from its parts only if some came in several calls."""
    key = "attempt, epoch, step, rank, sample"
    again = f"SELECT 1 FROM stored.records GROUP BY {key} HAVING count(*) > 1 LIMIT 1"
    if not connection.execute(again).fetchall():
        return "stored.records"
    return (
        f"(SELECT {key}, any_value(loss) AS loss, any_value(tokens) AS tokens, sqrt(sum(norm * norm)) AS norm, "
        f"sum(bytes)::BIGINT AS bytes FROM stored.records GROUP BY {key})"
    )


def _columns(kind: str) -> str:
    return ", ".join(f"r.{_quoted(name)}" for name in SCHEMAS[kind].names)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
