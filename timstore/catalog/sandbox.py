"""A connection that can read one catalogue file and do nothing else, within a limit of memory."""

from pathlib import Path
from typing import Any

import duckdb

from timstore.errors import InvalidInputError

VIEWS = ("records", "gradients", "steps", "parameters", "samples", "attempts", "fingerprints", "rollbacks", "commits")

# In this order: what is locked cannot be set. GLOBAL, because some of these are otherwise the connection's alone, and
# every question has a connection of its own.
_LOCKS = (
    # Spilling would need a file system. A question too big for memory fails; the default would spill into the
    # working directory.
    "SET GLOBAL temp_directory = ''",
    "SET GLOBAL autoinstall_known_extensions = false",
    "SET GLOBAL autoload_known_extensions = false",
    "SET GLOBAL python_enable_replacements = false",
    "SET GLOBAL enable_external_access = false",
    # Without external access DuckDB still admits the attached file, its log and the temporary directory, by name:
    # COPY could overwrite the catalogue, ATTACH could make a writable one. What is open stays readable.
    "SET GLOBAL disabled_filesystems = 'LocalFileSystem'",
    "SET GLOBAL lock_configuration = true",
)


def open_locked(path: Path, memory: int) -> duckdb.DuckDBPyConnection:
    """Open a catalogue file read-only, shut every door (files, network, extensions, Python variables) and lock.

    Args:
        memory: in bytes, what all questions together may take.
    """
    connection = duckdb.connect(path, read_only=True, config={"threads": "2", "memory_limit": f"{memory}B"})
    for lock in _LOCKS:
        connection.execute(lock)
    return connection


def ask(cursor: duckdb.DuckDBPyConnection, query: str, params: object) -> duckdb.DuckDBPyRelation:
    """Return the answer to one SELECT.

    Raises:
        InvalidInputError: it is something else, or DuckDB refuses it.
    """
    try:
        if _is_one_select(cursor.extract_statements(query)):
            return cursor.sql(query, params=params)
    # TypeError: the query is no text.
    except (duckdb.Error, TypeError) as error:
        raise InvalidInputError(
            f"DuckDB says: {error}\nThe tables are {', '.join(VIEWS)}; DESCRIBE names a table's columns", kind="sql"
        ) from error
    raise InvalidInputError(
        f"one SELECT at a time, and nothing else; the tables are {', '.join(VIEWS)}", kind="not-a-select"
    )


def fetch(cursor: duckdb.DuckDBPyConnection, query: str, params: object) -> list[tuple[Any, ...]]:
    """Return all rows of the answer to one SELECT.

    Raises:
        InvalidInputError: as `ask`; or a value that DuckDB meets on the way does not suit the question.
    """
    answer = ask(cursor, query, params)
    try:
        return answer.fetchall()
    except duckdb.Error as error:
        raise InvalidInputError(f"DuckDB says: {error}", kind="sql") from error


def _is_one_select(statements: list[duckdb.Statement]) -> bool:
    try:
        return len(statements) == 1 and statements[0].type == duckdb.StatementType.SELECT
    except ValueError:
        # DuckDB's Python has no name for the type of UPDATE EXTENSIONS.
        return False
