"""Tables about samples in CSV, JSON lines or Parquet files, read a block at a time."""

import csv as csv_rows
import io
import re
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as compute

from timstore.cli.json_lines import objects
from timstore.errors import InvalidInputError

# What is one commit of a store, and in memory at once.
_ROWS = 50_000
_BLOCK_BYTES = 16 * 2**20
_WHOLE = re.compile(r"\s*[+-]?[0-9]+\s*")


def blocks(path: Path, text: Collection[str] = ()) -> Iterator[pa.Table]:
    """Yield a file's rows, some tens of thousands at a time.

    Args:
        text: columns of CSV that are read as text whatever they look like.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidInputError: it does not hold what its name says, or that says nothing.
    """
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise InvalidInputError(f"{path}: a file of samples is named {', '.join(_READERS)}", path=str(path))
    try:
        row = 1
        for table in read(path, text):
            _check_ids(path, table, row)
            row += table.num_rows
            for start in range(0, table.num_rows, _ROWS):
                yield table.slice(start, _ROWS)
    except pa.ArrowException as error:
        raise InvalidInputError(f"{path}: {_readable(error)}", path=str(path)) from error


def _check_ids(path: Path, table: pa.Table, row: int) -> None:
    """Refuse a table with an id that is none, naming its row; one without ids is refused by who attaches it."""
    if table.column_names.count("sample") != 1:
        return
    ids = table["sample"]
    if pa.types.is_integer(ids.type) and not ids.null_count:
        return
    at, value = 0, None
    for at, value in enumerate(ids.to_pylist()):  # noqa: B007
        if not (type(value) is int or (isinstance(value, str) and _WHOLE.fullmatch(value))):
            break
        if not -(2**63) <= int(value) < 2**63:
            break
    said = "missing" if value is None else str(value)
    raise InvalidInputError(
        f"{path}, row {row + at}: sample is {said}; the column sample holds integers without gaps, of 63 bits at most",
        path=str(path),
    )


def _csv(path: Path, text: Collection[str]) -> Iterator[pa.Table]:
    from pyarrow import csv

    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    _check_csv(path, delimiter)
    # An empty cell is no value, and says nothing about one that is stored already; "" is an empty text.
    converting = csv.ConvertOptions(
        column_types=dict.fromkeys(text, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    reading = csv.ReadOptions(block_size=_BLOCK_BYTES)
    parsing = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with path.open("rb") as file, csv.open_csv(file, reading, parsing, converting) as reader:
        floats = [column.name for column in reader.schema if pa.types.is_floating(column.type)]
    # Digits that a float does not hold are seen in the text alone.
    as_text = dict.fromkeys([*text, *floats], pa.string())
    converting.column_types = as_text
    row = 1
    with path.open("rb") as file, csv.open_csv(file, reading, parsing, converting) as reader:
        for batch in reader:
            for number, column in enumerate(batch.schema):
                if pa.types.is_binary(column.type):
                    raise InvalidInputError(f"{path}: column {column.name} is no UTF-8 text", path=str(path))
                if column.name in floats and column.name not in (*text, "sample"):
                    values = _floats(path, column.name, batch.column(number), row)
                    batch = batch.set_column(number, column.name, values)
            row += batch.num_rows
            yield pa.Table.from_batches([batch])


def _floats(path: Path, name: str, cells: pa.Array, row: int) -> pa.Array:
    """Return cells as floats.

    Raises:
        InvalidInputError: a whole number among them would lose digits, or one is no number.
    """
    # Whole numbers of 16 digits and more alone can lose some.
    wide = compute.match_substring_regex(cells, r"^\s*[+-]?[0-9]{16,}\s*$")
    for at in compute.indices_nonzero(wide.fill_null(False)).to_pylist():
        cell = cells[at].as_py()
        if int(float(cell)) != int(cell):
            raise InvalidInputError(
                f"{path}, row {row + at}: column {name} holds {cell.strip()}, which a float would round: "
                f"pass --text {name} to keep its digits",
                path=str(path),
            )
    try:
        return compute.utf8_trim_whitespace(cells).cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise InvalidInputError(
            f"{path}: column {name} begins with numbers, and holds other things from row {row} on: {_readable(error)}; "
            f"pass --text {name} to keep it as text",
            path=str(path),
        ) from error


def _check_csv(path: Path, delimiter: str) -> None:
    """Refuse what would be dropped or swallowed.

    Raises:
        InvalidInputError: a column without a name, or a quote that nothing ends.
    """
    with path.open("rb") as file:
        text = io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="")
        for number, name in enumerate(next(csv_rows.reader(text, delimiter=delimiter), []), 1):
            if not name.strip():
                raise InvalidInputError(
                    f"{path}, line 1: column {number} has no name: give it one, or leave it out", path=str(path)
                )
    begun, quoted = 0, False
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            quoted, opened = _open_quote(line, delimiter.encode(), quoted)
            begun = number if opened else begun
    if quoted:
        raise InvalidInputError(
            f"{path}, line {begun}: a quote begins here and never ends: end it, or leave it out", path=str(path)
        )


def _open_quote(line: bytes, delimiter: bytes, quoted: bool) -> tuple[bool, bool]:
    """Say whether a line ends inside quotes, and whether it began them."""
    if b'"' not in line:
        return quoted, False
    opened = False
    # A quote counts where a cell begins with it; inside, two stand for one.
    at = 0
    while True:
        if quoted:
            at = line.find(b'"', at)
            if at < 0:
                return True, opened
            if line[at + 1 : at + 2] == b'"':
                at += 2
                continue
            quoted, at = False, at + 1
        else:
            begins = 0 if line.startswith(b'"') and at == 0 else line.find(delimiter + b'"', at) + 1
            if begins == 0 and not (line.startswith(b'"') and at == 0):
                return False, opened
            quoted, opened, at = True, True, begins + 1


def _json_lines(path: Path, text: Collection[str]) -> Iterator[pa.Table]:
    found = objects(path)
    row = 1
    while rows := list(islice(found, _ROWS)):
        names = dict.fromkeys(name for one in rows for name in one)
        yield pa.table({name: _json_column(path, name, [one.get(name) for one in rows], row) for name in names})
        row += len(rows)


def _json_column(path: Path, name: str, values: list[Any], row: int) -> pa.Array:
    """Return what a block of rows says under one name.

    Raises:
        InvalidInputError: naming the first row that does not go with those before it.
    """
    try:
        column = pa.array(values)
    except (pa.ArrowException, OverflowError):
        pass
    else:
        if not pa.types.is_floating(column.type):
            return column
        wide = [at for at, value in enumerate(values) if type(value) is int and int(float(value)) != value]
        if not wide:
            return column
        raise _unlike(path, name, values[wide[0]], row + wide[0])
    good, bad = 0, len(values)
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            pa.array(values[:middle])
            good = middle
        except (pa.ArrowException, OverflowError):
            bad = middle
    raise _unlike(path, name, values[bad - 1], row + bad - 1)


def _unlike(path: Path, name: str, value: Any, row: int) -> InvalidInputError:
    if name == "sample":
        return InvalidInputError(
            f"{path}, row {row}: sample is {value!r}, and the column sample holds integers of 63 bits", path=str(path)
        )
    if type(value) is int and abs(value) >= 2**53:
        why = f"{name} is {value}, an integer that is too large for a column of numbers beside others"
    else:
        why = f"{name} is {value!r}, of another type than in the rows before"
    return InvalidInputError(f"{path}, row {row}: {why}: write the whole column as text, in quotes", path=str(path))


def _parquet(path: Path, text: Collection[str]) -> Iterator[pa.Table]:
    from pyarrow import parquet

    with path.open("rb") as file, parquet.ParquetFile(file) as rows:
        for batch in rows.iter_batches(_ROWS):
            yield pa.Table.from_batches([batch])


def _readable(error: Exception) -> str:
    """Return the first line of what arrow says: the rest is for its own developers."""
    return str(error).strip().partition("\n")[0]


_READERS = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".pq": _parquet,
}
