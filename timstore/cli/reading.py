"""Verbs that change no store: info, sql, verify, forecast, export."""

import csv
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain, count, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import timstore
from timstore.cli.overview import lines, overview
from timstore.cli.terminal import DAMAGED, AsJson, Records, StorePath, open_to_read, plain, show
from timstore.errors import InvalidInputError

verbs = typer.Typer()


@verbs.command()
def info(
    path: StorePath,
    every: Annotated[bool, typer.Option("--all", help="List every parameter, not only the ten largest.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what is in a store, how large it is, and what it covers.

    Sizes of gradients are those of their encodings, before lossless
    compression; what lies on disk is compressed. Rows that a later
    attempt superseded are left out.

    \b
    Examples:
      timstore info run.tim
      timstore info run.tim --json | jq .ratio
    """
    with open_to_read(path) as store:
        contents = overview(store)
    show(contents, "\n".join(lines(contents, every)), as_json)


# A person does not read more, and a table is drawn when its last row is known.
_SHOWN = 1000


@verbs.command()
def sql(
    path: StorePath,
    query: Annotated[
        str,
        typer.Argument(
            metavar="QUERY", help="One SELECT; - or nothing: read it from standard input.", show_default=False
        ),
    ] = "-",
    sql_memory: Annotated[str, typer.Option(metavar="SIZE", help="For the answer, as 512MB or 4GB.")] = "1GB",
    as_json: AsJson = False,
) -> None:
    """Ask a store one question in DuckDB's SQL.

    The answer is a table on a terminal and CSV elsewhere. Tables: records,
    gradients, steps, parameters, samples, attempts, fingerprints,
    rollbacks, commits. The query can read these and nothing else.

    \b
    Examples:
      timstore sql run.tim "SELECT count(*) FROM records"
      timstore sql run.tim "DESCRIBE gradients"
      timstore sql run.tim "FROM steps LIMIT 3" --json
      timstore sql run.tim < question.sql > answer.csv
    """
    with open_to_read(path, sql_memory=sql_memory) as store:
        question = _read_query() if query == "-" else query
        if not question.strip():
            raise InvalidInputError("the question is empty: give one SELECT, as an argument or on standard input")
        answer = store.sql(question)
        names = _told_apart(answer.columns)
        rows = answer.iter_rows()
        rows = chain(list(islice(rows, 1)), rows)  # what fails on its way prints nothing
        if as_json:
            for row in rows:
                show(dict(zip(names, row, strict=True)), "", as_json)
        elif sys.stdout.isatty():
            _draw(names, rows)
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
        names.append(next(spelling for spelling in chain([name], numbered) if spelling not in names))
    return names


def _cell(value: Any) -> Any:
    """Return a value as CSV holds it: NULL as nothing, what has parts as JSON."""
    if value is None or isinstance(value, str | float) or type(value) is int:
        return value
    simple = plain(value)
    return simple if isinstance(simple, str | float) else json.dumps(simple)


def _draw(names: Sequence[str], rows: Iterator[tuple[Any, ...]]) -> None:
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


@verbs.command()
def verify(path: StorePath, as_json: AsJson = False) -> None:
    """Find every defect of a store; exit with 3 if it is damaged.

    Reads the whole store once and changes nothing. It may be written
    meanwhile, and need not be one that can be opened.

    \b
    Examples:
      timstore verify run.tim
      timstore verify run.tim --json | jq -r '.findings[].path'
    """
    report = timstore.verify(path)
    show(report.to_dict(), str(report), as_json)
    if not report.sound:
        raise typer.Exit(DAMAGED)


@verbs.command()
def forecast(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Directory with a model's config.json.", show_default=False)
    ],
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many samples are recorded.", show_default=False)
    ],
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Optimizer steps in all.", show_default=False)],
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Length of a sequence.", show_default=False)],
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="How often each sample is drawn.")] = 1,
    precision: Annotated[
        Literal["exact", "bfloat16", "int8"],
        typer.Option(metavar="NAME", help="How numbers are stored: exact, bfloat16 or int8."),
    ] = "exact",
    optimizer_history: Annotated[
        Literal["final", "gradients"],
        typer.Option(metavar="NAME", help="final, or gradients: also each step's whole gradient."),
    ] = "final",
    waypoints: Annotated[
        bool, typer.Option(help="Keep the parameters at some moments on the way, for rollbacks.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Forecast how many bytes recording a language model will write.

    Builds the model of transformers that config.json describes, without
    trained weights, and records a few random sequences into a temporary
    store. Takes the memory of the model and its gradients.

    \b
    Examples:
      timstore forecast models/llama --samples 500 --steps 2000 --tokens 512
      timstore forecast . --samples 8 --steps 9 --tokens 64 --precision int8
    """
    from timstore.cli.untrained import untrained

    network = untrained(model)
    with (
        tempfile.TemporaryDirectory(prefix="timstore-") as folder,
        timstore.open(Path(folder, "s"), precision=precision, durability="os") as store,
    ):
        bill = store.forecast(
            network,
            samples=samples,
            steps=steps,
            tokens=tokens,
            epochs=epochs,
            optimizer_history=optimizer_history,
            waypoints=waypoints,
        )
    show({**asdict(bill), "total_bytes": bill.total_bytes}, str(bill), as_json)


@verbs.command()
def export(
    path: StorePath,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where the files go.", show_default=False)],
    layout: Annotated[Literal["json", "pickle"], typer.Option("--format", help="How they are written.")] = "json",
    where: Records = None,
    as_json: AsJson = False,
) -> None:
    """Export gradients as JSON or pickle files that other tools read.

    They are dense there, and many times as large as in the store. What
    `timstore import` reads again is the same to the last bit.

    \b
    Examples:
      timstore export run.tim trajectories
      timstore export run.tim trajectories --where "sample = 17" --format pickle
    """
    from timstore.legacy import export_trajectories

    with open_to_read(path) as store:
        report = export_trajectories(store, directory, format=layout, where=where)
    show(asdict(report), str(report), as_json)
