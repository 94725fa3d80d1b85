"""`timstore verify`: every defect of a store."""

import typer

import timstore
from timstore.cli.failures import DAMAGED
from timstore.cli.options import AsJson, StorePath
from timstore.cli.output import print_json

EXAMPLES = """\b
Examples:
  timstore verify run.tim
  timstore verify run.tim --json | jq -r '.findings[].path'
"""


def run(path: StorePath, as_json: AsJson = False) -> None:
    """Find every defect of a store; exit with 3 if it is damaged.

    Reads the whole store once and changes nothing. It may be written
    meanwhile, and need not be one that can be opened.
    """
    report = timstore.verify(path)
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(str(report))
    if not report.sound:
        raise typer.Exit(DAMAGED)
