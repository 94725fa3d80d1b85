"""`timstore sql`: one question, its answer as a table, CSV or JSON."""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from typing import Annotated, Any

import typer

from timstore.cli.options import AsJson, StorePath
from timstore.cli.output import plain, print_json
from timstore.cli.stores import reading
from timstore.errors import InvalidInputError

EXAMPLES = """\b
Examples:
  timstore sql run.tim "SELECT count(*) FROM records"
  timstore sql run.tim "DESCRIBE gradients"
  timstore sql run.tim "FROM steps LIMIT 3" --json
  timstore sql run.tim < question.sql > answer.csv
"""

# A person does not read more, and a table is drawn when its last row is known.
_SHOWN = 1000


def run(
    path: StorePath,
    query: Annotated[
        str,
        typer.Argument(
            metavar="QUERY", help="One SELECT; - or nothing: read it from standard input.", show_default=False
        ),
    ] = "-",
    as_json: AsJson = False,
) -> None:
    """Ask a store one question in DuckDB's SQL.

    The answer is a table on a terminal and CSV elsewhere. Tables: records,
    gradients, steps, parameters, samples, attempts, fingerprints,
    rollbacks, commits. The query can read these and nothing else.
    """
    with reading(path) as store:
        question = _read_query() if query == "-" else query
        if not question.strip():
            raise InvalidInputError("the question is empty: give one SELECT, as an argument or on standard input")
        answer = store.sql(question)
        names = _told_apart(answer.columns)
        rows = answer.iter_rows()
        rows = chain(list(islice(rows, 1)), rows)  # what fails on its way prints nothing
        if as_json:
            for row in rows:
                print_json(dict(zip(names, row, strict=True)))
        elif sys.stdout.isatty():
            _show(names, rows)
        else:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(names)
            writer.writerows([_cell(value) for value in row] for row in rows)


def _read_query() -> str:
    if sys.stdin.isatty():
        typer.echo("type a query; Ctrl-D ends it", err=True)
    return sys.stdin.read()


def _told_apart(columns: Sequence[str]) -> list[str]:
    """Number columns of one name, since an object of JSON holds each name once."""
    names: list[str] = []
    for name in columns:
        numbered = (f"{name}_{number}" for number in count(2))
        names.append(next(one for one in chain([name], numbered) if one not in names))
    return names


def _cell(value: Any) -> Any:
    """Return a value as CSV holds it: NULL as nothing, what has parts as JSON."""
    if value is None or isinstance(value, str | float) or type(value) is int:
        return value
    found = plain(value)
    return found if isinstance(found, str | float) else json.dumps(found)


def _show(names: Sequence[str], rows: Iterator[tuple[Any, ...]]) -> None:
    """Draw a table, or, where it is wider than the terminal, one column below the other for each row."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    shown = list(islice(rows, _SHOWN))
    numbers = [all(isinstance(row[at], int | float | None) for row in shown) for at in range(len(names))]
    table = Table(box=None, pad_edge=False)
    for name, is_number in zip(names, numbers, strict=True):
        table.add_column(Text(name), justify="right" if is_number else "left", no_wrap=True)
    texts = [["" if value is None else str(_cell(value)) for value in row] for row in shown]
    for row in texts:
        table.add_row(*map(Text, row))
    if Measurement.get(console, console.options.update(width=100_000), table).maximum <= console.width:
        console.print(table)
    else:
        width = max(map(len, names))
        for number, row in enumerate(texts, 1):
            console.print(Text(f"row {number}", style="dim"))
            for name, text in zip(names, row, strict=True):
                console.print(Text(f"{name:<{width}}  {text}"), soft_wrap=True)
    if next(rows, None) is not None:
        typer.echo(f"only the first {_SHOWN:,} rows: add a LIMIT, or write all of them to a file or pipe", err=True)
