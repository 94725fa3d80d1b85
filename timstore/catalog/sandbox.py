"""A connection that can read one catalogue file and do nothing else, within a limit of memory."""

from __future__ import annotations

from pathlib import Path

import duckdb

from timstore.catalog.answers import Answer, as_answer, in_our_words
from timstore.errors import InvalidInputError, shown

VIEWS = ("records", "gradients", "steps", "parameters", "samples", "attempts", "fingerprints", "rollbacks", "commits")
_TABLES = f"The tables are {', '.join(VIEWS)}"

# In this order: what is locked cannot be set. GLOBAL, because some of these are otherwise the connection's alone, and
# every question has a connection of its own.
_LOCKS = (
    # Spilling would need a file system. A question too big for memory fails; the default would spill into the
    # working directory.
    "SET GLOBAL temp_directory = ''",
    "SET GLOBAL autoinstall_known_extensions = false",
    "SET GLOBAL autoload_known_extensions = false",
    "SET GLOBAL python_enable_replacements = false",
    # What is stored is in UTC; the machine's own zone would make other answers of one store on another machine.
    "SET GLOBAL TimeZone = 'UTC'",
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


def ask(cursor: duckdb.DuckDBPyConnection, query: str, params: object) -> Answer:
    """Return the answer to one SELECT.

    Raises:
        InvalidInputError: it is something else, or DuckDB refuses it.
    """
    try:
        with in_our_words():
            if _is_one_select(cursor.extract_statements(query)):
                answer: Answer = as_answer(cursor.sql(query, params=params), cursor)
                return answer
    except InvalidInputError as error:
        raise InvalidInputError(f"{error}\n{_TABLES}; DESCRIBE names a table's columns", kind=error.kind) from error
    except (TypeError, ValueError, RuntimeError) as error:  # whatever a parameter of the query raises
        what = "params is a list or a mapping" if isinstance(query, str) else f"a question is text, not {shown(query)}"
        raise InvalidInputError(f"{what}: {error}", kind="sql") from error
    raise InvalidInputError(f"one SELECT at a time, and nothing else. {_TABLES}", kind="not-a-select")


def _is_one_select(statements: list[duckdb.Statement]) -> bool:
    try:
        return len(statements) == 1 and statements[0].type == duckdb.StatementType.SELECT
    except ValueError:
        # DuckDB's Python has no name for the type of UPDATE EXTENSIONS.
        return False
