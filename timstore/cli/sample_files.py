"""Tables about samples in CSV, JSON lines or Parquet files, read a block at a time."""

from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa

from timstore.cli.json_lines import objects
from timstore.errors import InvalidInputError

# What is one commit of a store, and in memory at once.
_ROWS = 50_000
_BLOCK_BYTES = 16 * 2**20


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
        for table in read(path, text):
            for start in range(0, table.num_rows, _ROWS):
                yield table.slice(start, _ROWS)
    except pa.ArrowException as error:
        raise InvalidInputError(f"{path}: {_readable(error)}", path=str(path)) from error


def _csv(path: Path, text: Collection[str]) -> Iterator[pa.Table]:
    from pyarrow import csv

    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
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
        for batch in reader:
            for column in batch.schema:
                if pa.types.is_binary(column.type):
                    raise InvalidInputError(f"{path}: column {column.name} is no UTF-8 text", path=str(path))
            yield pa.Table.from_batches([batch])


def _json_lines(path: Path, text: Collection[str]) -> Iterator[pa.Table]:
    found = objects(path)
    while rows := list(islice(found, _ROWS)):
        names = dict.fromkeys(name for row in rows for name in row)
        yield pa.Table.from_pydict({name: [row.get(name) for row in rows] for name in names})


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
