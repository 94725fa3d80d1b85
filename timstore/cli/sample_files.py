"""Tables about samples in CSV, JSON lines or Parquet files: every value as the file has it, or refused."""

import csv
import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from pyarrow import parquet

from timstore.errors import InvalidInputError

# What is one commit of a store, and in memory at once.
_ROWS = 50_000
_LINE_BYTES = 16 * 2**20
_ID = re.compile(r"\s*[+-]?[0-9]+\s*")

# Kinds of numbers: BIGINT; DIGITS, a BIGINT that a double, with its 53 bits, would round; DOUBLE; WIDE, too large for
# both.
_WHOLE, _NUMBER = r"\s*[+-]?\d+\s*", r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*"
_NUMBER_KIND = f"""CASE
    WHEN regexp_full_match(value, '{_WHOLE}') THEN CASE
        WHEN TRY_CAST(value AS BIGINT) IS NULL THEN 'WIDE'
        WHEN CAST(CAST(value AS DOUBLE) AS HUGEINT) <> CAST(value AS BIGINT) THEN 'DIGITS'
        ELSE 'BIGINT' END
    WHEN regexp_full_match(value, '{_NUMBER}') THEN IF(isinf(TRY_CAST(value AS DOUBLE)), 'WIDE', 'DOUBLE')
    WHEN regexp_full_match(value, '[+-]?(nan|NaN|inf|Inf|Infinity)') THEN 'DOUBLE'
END"""
# The kind of another cell of CSV is the first whose pattern it has and that holds it. DuckDB's own detection would turn
# `yes` into true, `12_34` into 1234 and 02-01-2026 into a date.
_DAY, _CLOCK = r"\d{4}-\d\d-\d\d", r"([01]\d|2[0-3]):\d\d(:\d\d(\.\d{1,6})?)?"
_PATTERNS = {
    "BOOLEAN": "true|TRUE|True|false|FALSE|False",
    "DATE": _DAY,
    "TIME": _CLOCK,
    "TIMESTAMP": f"{_DAY}[ T]{_CLOCK}",
    "TIMESTAMPTZ": rf"{_DAY}[ T]{_CLOCK}(Z|[+-]\d\d(:?\d\d)?)",
}
_CELL_KIND = " ".join(
    f"WHEN regexp_full_match(value, '{pattern}') AND TRY_CAST(value AS {kind}) IS NOT NULL THEN '{kind}'"
    for kind, pattern in _PATTERNS.items()
)
_CELLS = f"""CREATE VIEW leaves AS
SELECT row, place, value, coalesce({_NUMBER_KIND}, CASE {_CELL_KIND} ELSE 'VARCHAR' END) AS kind
FROM (UNPIVOT cells ON COLUMNS(* EXCLUDE row) INTO NAME place VALUE value)
"""
# `tags[]` is the place of what is in the lists under `tags`.
_LEAVES = rf"""CREATE VIEW leaves AS
SELECT row, place, value, CASE WHEN kind LIKE '%BIGINT' OR kind = 'DOUBLE' THEN {_NUMBER_KIND} ELSE kind END AS kind
FROM (
    SELECT row, regexp_replace(fullkey[3:], '\[[0-9]+\]', '[]', 'g') AS place, type AS kind,
        coalesce(CAST(atom AS VARCHAR), lower(type)) AS value
    FROM objects, json_tree(json) WHERE fullkey <> '$' AND type <> 'NULL'
)
"""
_KINDS = "SELECT place, kind, min(row) AS row, arg_min(value, row) FROM leaves GROUP BY ALL ORDER BY row"
_REJECTS = "SELECT line, column_idx, error_type, error_message FROM reject_errors ORDER BY line, column_idx LIMIT 1"
_REJECTED = {
    "UNQUOTED VALUE": "a cell begins with a quote and does not end with one: end it, or leave the quote out",
    "TOO MANY COLUMNS": "it has more cells than line 1, which names the columns",
    "MISSING COLUMNS": "it has fewer cells than line 1, which names the columns",
    "INVALID ENCODING": "column {name} is no UTF-8 text",
}
_BAD_ROWS = """
SELECT row, CASE
    WHEN json IS NULL THEN 'no JSON'
    WHEN json_type(json) <> 'OBJECT' THEN 'a line holds one object'
    WHEN len(json_keys(json)) > len(list_distinct(json_keys(json))) THEN 'a name is there twice'
END AS why
FROM objects WHERE why IS NOT NULL ORDER BY row LIMIT 1
"""


def blocks(path: Path, text: Collection[str] = ()) -> Iterator[pa.Table]:
    """Yield a file's rows, some tens of thousands at a time, all with the same columns.

    Args:
        text: columns of CSV that are read as text whatever they look like.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidInputError: it does not hold what its name says, or a value would not come over as it is.
    """
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise InvalidInputError(f"{path}: a file of samples is named {', '.join(_READERS)}", path=str(path))
    row = 1
    with _connected(path) as connection:
        for table in read(connection, path, text):
            _check_ids(path, table, row)
            row += table.num_rows
            for start in range(0, table.num_rows, _ROWS):
                yield table.slice(start, _ROWS)


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines, without the names that have no value.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidInputError: a row, named, is none, or a value of it would not come over as it is.
    """
    with _connected(path) as connection:
        for table in _json_lines(connection, path):
            for row in table.to_pylist():
                yield {name: value for name, value in row.items() if value is not None}


@contextmanager
def _connected(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a DuckDB of its own to read a file with; what it says becomes errors of ours that name the file."""
    path.open("rb").close()
    # One thread keeps the rows in their order.
    with duckdb.connect(config={"threads": "1"}) as connection:
        connection.execute("SET temp_directory = ''; SET TimeZone = 'UTC'")
        try:
            yield connection
        except (duckdb.Error, pa.ArrowException) as error:
            # The rest of what they say is for their own developers.
            raise InvalidInputError(f"{path}: {str(error).strip().splitlines()[0]}", path=str(path)) from error
        except RuntimeError as error:
            # What DuckDB makes of Ctrl-C.
            if str(error) != "Query interrupted":
                raise
            raise KeyboardInterrupt from error


def _check_ids(path: Path, table: pa.Table, row: int) -> None:
    """Refuse a table with an id that is none, naming its row; one without ids is refused by who attaches it."""
    if table.column_names.count("sample") != 1:
        return
    ids = table["sample"]
    if ids.type == pa.int64() and not ids.null_count:
        return
    for at, value in enumerate(ids.to_pylist(), row):
        if not _ID.fullmatch(str(value)) or not -(2**63) <= int(value) < 2**63:
            raise InvalidInputError(
                f"{path}, row {at}: sample is {'missing' if value is None else value}; the column sample holds "
                "integers without gaps, of 63 bits at most",
                path=str(path),
            )


def _csv(connection: duckdb.DuckDBPyConnection, path: Path, text: Collection[str]) -> Iterator[pa.Table]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    names = _header(path, delimiter)
    cells = [f'"{number}"' for number in range(len(names))]
    # An empty cell is no value, and says nothing about one that is stored already; "" is an empty text.
    connection.execute(
        f"""CREATE VIEW cells AS SELECT row_number() OVER () AS row, * FROM read_csv({_file(path)}, header=true,
        auto_detect=false, delim='{delimiter}', quote='"', escape='"', nullstr='', allow_quoted_nulls=false,
        max_line_size={_LINE_BYTES}, buffer_size={2 * _LINE_BYTES}, store_rejects=true,
        columns={{{", ".join(f"{cell}: 'VARCHAR'" for cell in cells)}}})"""
    )
    connection.execute(_CELLS)
    found = connection.sql(_KINDS).fetchall()
    for line, column, kind, message in connection.sql(_REJECTS).fetchall():
        why = _REJECTED.get(kind, message).format(name=names[min(column, len(names)) - 1])
        raise InvalidInputError(f"{path}, line {line}: {why}", path=str(path))
    columns = []
    for number, name in enumerate(names):
        kinds = {kind: (row, value) for place, kind, row, value in found if place == str(number)}
        wanted = "VARCHAR" if name in text else _type_of(set(kinds))
        if name == "sample" and wanted != "BIGINT":
            wanted = "VARCHAR"  # as the file has it, to be refused
        if wanted == "DOUBLE" and (lost := kinds.get("DIGITS") or kinds.get("WIDE")):
            raise InvalidInputError(
                f"{path}, row {lost[0]}: column {name} holds {lost[1].strip()}, which a float would round: pass "
                f"--text {name} to keep its digits",
                path=str(path),
            )
        columns.append(f'CAST({cells[number]} AS "{wanted}") AS {cells[number]}')
    yield from _tables(connection, f"SELECT {', '.join(columns)} FROM cells", names)


def _header(path: Path, delimiter: str) -> list[str]:
    """Return the names of the columns, as they are spelled.

    Raises:
        InvalidInputError: there are none, or one is missing.
    """
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        names = next(csv.reader(file, delimiter=delimiter), [])
    if not names:
        raise InvalidInputError(f"{path}, line 1: it names no columns, as sample,owner does", path=str(path))
    for number, name in enumerate(names, 1):
        if not name.strip():
            raise InvalidInputError(
                f"{path}, line 1: column {number} has no name: give it one, or leave it out", path=str(path)
            )
    return names


def _type_of(kinds: set[str]) -> str:
    """Return the type that holds cells of these kinds, text if there is no other."""
    if kinds <= {"BIGINT", "DIGITS"}:
        return "BIGINT" if kinds else "NULL"
    if kinds <= {"BIGINT", "DIGITS", "DOUBLE", "WIDE"}:
        return "DOUBLE"
    if kinds == {"DATE", "TIMESTAMP"}:
        return "TIMESTAMP"
    return kinds.pop() if len(kinds) == 1 else "VARCHAR"


def _json_lines(connection: duckdb.DuckDBPyConnection, path: Path, text: Collection[str] = ()) -> Iterator[pa.Table]:
    connection.execute(
        f"""CREATE VIEW objects AS SELECT row_number() OVER () AS row, json
        FROM read_ndjson_objects({_file(path)}, ignore_errors=true)"""
    )
    for row, why in connection.sql(_BAD_ROWS).fetchall():
        raise InvalidInputError(f"{path}, row {row}: {why}", path=str(path))
    connection.execute(_LEAVES)
    _check_places(path, connection.sql(_KINDS).fetchall())
    ((found,),) = connection.sql("SELECT json_group_structure(json) FROM objects").fetchall()
    structure = _signed(json.loads(found or "{}"))
    if structure.get("sample", "BIGINT") != "BIGINT":
        structure["sample"] = "JSON"  # as the file has it, to be refused
    columns = (
        # By a JSON pointer, in which two characters are spelled otherwise.
        f"json_transform(json->{_text('/' + name.replace('~', '~0').replace('/', '~1'))}, {_text(json.dumps(kind))})"
        for name, kind in structure.items()
    )
    if structure:
        named = ", ".join(f'{column} AS "{number}"' for number, column in enumerate(columns))
        yield from _tables(connection, f"SELECT {named} FROM objects", list(structure))


def _check_places(path: Path, found: Sequence[tuple[str, str, int, str]]) -> None:
    """Refuse values of several types at one place, and numbers that would not come over as they are.

    Args:
        found: (place, kind, first row of this kind, its value) in order of rows.
    """
    floats = {place for place, kind, *_ in found if kind == "DOUBLE"}
    first: dict[str, str] = {}
    for place, kind, row, value in found:
        if kind == "WIDE":
            why = "a number of more than 63 bits"
        elif kind == "DIGITS" and place in floats:
            why = "an integer that a float would round"
        elif first.setdefault(place, _NUMERIC.get(kind, kind)) != _NUMERIC.get(kind, kind):
            why = "of another type than before"
        else:
            continue
        message = f"{path}, row {row}: {place} is {value}, {why}: write the whole column as text, in quotes"
        raise InvalidInputError(message, path=str(path))


_NUMERIC = dict.fromkeys(("BIGINT", "DIGITS", "DOUBLE"), "number")


def _signed(structure: Any) -> Any:
    """Return what DuckDB found in JSON with one type for integers, all of which are of 63 bits by now."""
    if isinstance(structure, dict):
        return {name: _signed(part) for name, part in structure.items()}
    if isinstance(structure, list):
        return [_signed(part) for part in structure]
    return "BIGINT" if structure in ("UBIGINT", "HUGEINT") else structure


def _parquet(connection: duckdb.DuckDBPyConnection, path: Path, text: Collection[str]) -> Iterator[pa.Table]:
    # By arrow, which knows all types of the format; DuckDB would round decimals of more than 38 digits.
    with path.open("rb") as file, parquet.ParquetFile(file) as rows:
        for batch in rows.iter_batches(_ROWS):
            yield pa.Table.from_batches([batch])


def _tables(connection: duckdb.DuckDBPyConnection, query: str, names: Sequence[str]) -> Iterator[pa.Table]:
    """Yield what a query returns, under names of which DuckDB would tell some apart by a number."""
    for batch in connection.sql(query).to_arrow_reader(_ROWS):
        yield pa.Table.from_batches([batch]).rename_columns(names)


def _file(path: Path) -> str:
    """Return a path as SQL, the characters that stand for many files as themselves."""
    return _text(re.sub(r"([*?\[])", r"[\1]", str(path.absolute())))


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


_READERS = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".pq": _parquet,
}
