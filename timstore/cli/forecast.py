"""`timstore forecast`: what a recording will write, from a model's configuration."""

import tempfile
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import timstore
from timstore.cli.options import AsJson
from timstore.cli.output import print_json

EXAMPLES = """\b
Examples:
  timstore forecast models/llama --samples 500 --steps 2000 --tokens 512
  timstore forecast . --samples 8 --steps 9 --tokens 64 --precision int8
"""


class Precision(StrEnum):
    """How numbers are stored."""

    exact = "exact"
    bfloat16 = "bfloat16"
    int8 = "int8"


class History(StrEnum):
    """What is kept of the optimizer's own history."""

    final = "final"
    gradients = "gradients"


def run(
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
        Precision, typer.Option(metavar="NAME", help="How numbers are stored: exact, bfloat16 or int8.")
    ] = Precision.exact,
    optimizer_history: Annotated[
        History,
        typer.Option(
            "--optimizer-history", metavar="NAME", help="final, or gradients: also each step's whole gradient."
        ),
    ] = History.final,
    waypoints: Annotated[
        bool, typer.Option(help="Keep the parameters at some moments on the way, for rollbacks.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Forecast how many bytes recording a language model will write.

    Builds the model of transformers that config.json describes, without
    trained weights, and records a few random sequences into a temporary
    store. Takes the memory of the model and its gradients.
    """
    from timstore.integrations.untrained import untrained

    network = untrained(model)
    with (
        tempfile.TemporaryDirectory(prefix="timstore-") as folder,
        timstore.open(Path(folder, "s"), precision=precision.value, durability="os") as store,
    ):
        found = store.forecast(
            network,
            samples=samples,
            steps=steps,
            tokens=tokens,
            epochs=epochs,
            optimizer_history="gradients" if optimizer_history is History.gradients else "final",
            waypoints=waypoints,
        )
    if as_json:
        print_json({**asdict(found), "total_bytes": found.total_bytes})
    else:
        typer.echo(str(found))
