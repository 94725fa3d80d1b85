"""`timstore import`: trajectories in JSON or pickle files, into a store."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import timstore
from timstore.cli.asking import confirm
from timstore.cli.options import AsJson, DryRun, Yes
from timstore.cli.output import counted, print_json
from timstore.errors import NotFoundError

EXAMPLES = """\b
Examples:
  timstore import trajectories run.tim --lr 1e-4
  timstore import trajectories run.tim --format pickle --allow-pickle
"""


class Layout(StrEnum):
    """How trajectories lie in files."""

    auto = "auto"
    json = "json"
    pickle = "pickle"


def run(
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="Where the trajectories are.", show_default=False)
    ],
    path: Annotated[Path, typer.Argument(metavar="STORE", help="Is made if it is not there.", show_default=False)],
    layout: Annotated[Layout, typer.Option("--format", help="What to read.")] = Layout.auto,
    lr: Annotated[float | None, typer.Option(metavar="RATE", help="Learning rate, if the files name none.")] = None,
    scale: Annotated[float | None, typer.Option(metavar="FACTOR", help="What to multiply gradients by.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickles, by an unpickler that runs nothing.")
    ] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Import gradient trajectories from JSON or pickle files.

    The directory holds global_info.json and epoch_0.json or epoch_0.pkl and
    so on, as older tools write them. JSON is streamed. An import that was
    cut off goes on when it is called again.
    """
    from timstore.legacy import import_trajectories

    held = 0 if dry_run else _commits(path)
    if held:
        confirm(f"{path}, a store of {counted(held, 'commit')}, will be added to", yes)
    report = import_trajectories(
        directory, path, format=layout.value, lr=lr, scale=scale, allow_pickle=allow_pickle, dry_run=dry_run
    )
    if as_json:
        print_json(asdict(report))
    else:
        typer.echo(f"would import {report}" if dry_run else f"imported {report}")


def _commits(path: Path) -> int:
    try:
        with timstore.open(path, "r") as store:
            return len(store.snapshot().view.commits)
    except NotFoundError:
        return 0
