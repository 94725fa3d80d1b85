"""`timstore export`: a store's records as JSON or pickle files."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from timstore.cli.options import AsJson, StorePath
from timstore.cli.output import print_json
from timstore.cli.stores import reading

EXAMPLES = """\b
Examples:
  timstore export run.tim trajectories
  timstore export run.tim trajectories --where "sample = 17" --format pickle
"""


class Layout(StrEnum):
    """How trajectories lie in files."""

    json = "json"
    pickle = "pickle"


def run(
    path: StorePath,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where the files go.", show_default=False)],
    layout: Annotated[Layout, typer.Option("--format", help="How they are written.")] = Layout.json,
    where: Annotated[str | None, typer.Option(metavar="SQL", help="A condition on the table records.")] = None,
    as_json: AsJson = False,
) -> None:
    """Export gradients as JSON or pickle files that other tools read.

    They are dense there, and many times as large as in the store. What
    `timstore import` reads again is the same to the last bit.
    """
    from timstore.legacy import export_trajectories

    with reading(path) as store:
        report = export_trajectories(store, directory, format=layout.value, where=where)
    if as_json:
        print_json(asdict(report))
    else:
        typer.echo(str(report))
