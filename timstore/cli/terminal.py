"""What verbs share: arguments, opening a store, asking before a change, and printing."""

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer

import timstore
from timstore.errors import InvalidInputError, NotFoundError

DAMAGED = 3

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="Directory of the store.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]
Records = Annotated[str | None, typer.Option(metavar="SQL", help="A condition on the table records.")]

# The library's messages name arguments as Python spells them; a command line has options.
_SPELLED = {
    "missing='skip'": "--skip-missing",
    'probe="auto"': "--probe kept",
    "names its class: pass model=, an nn.Module of the recorded class; its parameters are then read from the "
    "checkpoint": "names its class: pass the model's folder, with a config.json that does",
    "pass model=": "roll back in Python, and pass model=",
    "open the store with more, timstore.open(path, sql_memory='4GB')": "pass more, --sql-memory 4GB",
    "dry_run=True": "--dry-run",
    "in_place=True": "--in-place",
    "force=True": "--force",
    "allow_pickle=True": "--allow-pickle",
    **{f"{name}=": f"--{name}" for name in ("probe", "output", "where", "strength", "method", "loss", "lr", "scale")},
    **{name: f"--{name.replace('_', '-')}" for name in ("memory_limit", "sql_memory")},
}
# `name=` alone, or `name=value` where that is an option of its own; not the `name=` of an example in Python.
_ARGUMENT = re.compile("(?<![a-z_])(" + "|".join(map(re.escape, _SPELLED)) + r")(?=[\s,.:;)]|$)")


def spelled(message: str) -> str:
    """Return a message of the library with the options in the place of the arguments."""
    return _ARGUMENT.sub(lambda argument: _SPELLED[argument[1]], message)


def open_to_read(path: Path, **options: Any) -> timstore.Store:
    """Open a store that exists, to read.

    Raises:
        NotFoundError: there is none.
        InvalidInputError: the path is a file.
    """
    if path.exists() and not path.is_dir():
        raise InvalidInputError(f"{path} is a file, and a store is a folder: name the folder", path=str(path))
    try:
        return timstore.open(path, "r", **options)
    except NotFoundError:
        why = "the directory has no timstore.json" if path.is_dir() else "the path does not exist"
        raise NotFoundError(f"there is no store at {path}: {why}", path=str(path)) from None


def open_to_write(path: Path) -> timstore.Store:
    """Open a store that exists, to write: no verb but `import` makes one, by a mistyped path least of all."""
    open_to_read(path).close()
    return timstore.open(path)


def confirm(what: str, yes: bool) -> None:
    """Return if the person says yes to what is about to be done, or said so before.

    Raises:
        typer.BadParameter: nobody is there to be asked.
        typer.Abort: the person says no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"{what}, and nobody can be asked whether that is right: pass --yes")
    typer.confirm(f"{what}. Go on?", abort=True, err=True)


def show(value: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print one object on one line, or the text that says the same to a person."""
    typer.echo(json.dumps(plain(value), allow_nan=False) if as_json else text)


def plain(value: Any) -> Any:
    """Return what JSON can hold: times as ISO 8601, bytes as hex, NaN and infinities as null."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return [plain(part) for part in value] if isinstance(value, Iterable) else str(value)


def size(value: float) -> str:
    """Return a number of bytes in words."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} B"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table as text.

    Args:
        left: how many columns, from the first on, are words; the others are numbers.
    """
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
