"""Row tables in DuckDB, and SQL over them that can read these tables and nothing else.

The tables live in a private catalogue file. It is loaded by one connection, closed, opened again read-only, and
then every door is shut and locked. The file then loses its name: what is open can be read until it is closed, and
whatever ends the process, nothing is left of it.

In this room annotations are text: as types they would keep DuckDB's alive in whatever is not freed when the interpreter
ends (a hook that torch holds, say), and DuckDB prints pages about that.
"""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from timstore.catalog.answers import in_our_words, interruptible
from timstore.catalog.folders import in_temporary_space, private_folder, remove_leftovers
from timstore.catalog.sandbox import ask, open_locked
from timstore.catalog.tables import AttemptRow, CommitRows, create_tables, create_views, load_attempts, load_commits
from timstore.errors import StateError

__all__ = ["AttemptRow", "Catalog", "CommitRows", "remove_leftovers"]

_COPY_BYTES = 16 * 1024 * 1024
_LOADING = {
    "memory_limit": "256MB",
    "max_temp_directory_size": "10GB",
    "threads": "2",
    "preserve_insertion_order": "false",
}


class Catalog:
    """The tables of one snapshot. Made by `build`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, descriptor: int) -> None:
        self._connection: duckdb.DuckDBPyConnection | None = connection
        # The next catalogue begins as a copy of this file, which has no name.
        self._descriptor = descriptor
        self._close_file = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def build(
        cls,
        commits: Iterable[CommitRows],
        attempts: Sequence[AttemptRow],
        previous: Catalog | None = None,
        folded: Iterable[tuple[str, pa.Table]] = (),
        memory: int = 10**9,
    ) -> Catalog:
        """Load commits into tables; with `previous`, only what is new, beside a copy of its tables.

        `folded` are the (kind, rows) of a compaction that covers the commits before them; `memory` is in bytes, for
        all questions together.

        The previous catalogue, and relations made from it, stay as they are.

        Cost: about 0.5 GB of memory, whatever the number of rows; 14 bytes of temporary disk per gradient row.

        Raises:
            FormatError: rows that this version does not know.
            StateError: if `previous` is closed.
            StorageError: no room for them.
        """
        with in_temporary_space(), private_folder() as folder:
            path = folder / "catalogue.duckdb"
            if previous is not None:
                previous._copy_to(path)
            with duckdb.connect(path, config={**_LOADING, "temp_directory": str(folder / "spill")}) as connection:
                if previous is None:
                    create_tables(connection)
                load_commits(connection, commits, folded)
                load_attempts(connection, attempts)
                create_views(connection, attempts)
            return cls(open_locked(path, memory), os.open(path, os.O_RDONLY))

    def sql(self, query: str, params: Sequence[Any] | Mapping[str, Any] | None = None) -> duckdb.DuckDBPyRelation:
        """Ask one question; the relation can be read as long as it is held.

        Every call has a connection of its own, so that nothing one relation leaves behind (a temporary view that
        bears a table's name) is seen by the next.

        Raises:
            InvalidInputError: it is not one SELECT, or DuckDB refuses it.
            StateError: after `close`.
        """
        return ask(self._cursor(), query, params)

    def fetch(self, query: str, params: Sequence[Any] | Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Return the rows that answer one question with a user's words in it.

        Raises:
            InvalidInputError: it is not one SELECT, or DuckDB refuses it, be it on the way.
            StateError: after `close`.
        """
        return self.sql(query, params).fetchall()

    def rows(self, query: str, params: Sequence[Any] | Mapping[str, Any] | None = None) -> pa.Table:
        """Return the answer to one of the library's own questions; schema `stored` holds the rows of all attempts."""
        cursor = self._cursor()
        with in_our_words():
            return interruptible(cursor, lambda: cursor.sql(query, params=params).to_arrow_table())

    def close(self) -> None:
        """Remove the tables."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._close_file()

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        if self._connection is None:
            raise StateError("the store was closed; open it again", kind="closed")
        return self._connection.cursor()

    def _copy_to(self, path: Path) -> None:
        self._cursor().close()
        with open(self._descriptor, "rb", closefd=False) as tables, open(path, "xb") as copy:
            tables.seek(0)
            shutil.copyfileobj(tables, copy, _COPY_BYTES)
