"""`timstore rollback`: from a checkpoint to one without some samples."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

import timstore
from timstore.cli.asking import confirm
from timstore.cli.options import AsJson, DryRun, Yes
from timstore.cli.output import print_json
from timstore.cli.probes import probe_options
from timstore.cli.spelling import spelled
from timstore.cli.stores import reading
from timstore.errors import TimstoreWarning
from timstore.interrupts import CriticalSection

EXAMPLES = """\b
Examples:
  timstore rollback out/checkpoint-90 --store run.tim --ids 17,42 --dry-run
  timstore rollback out/checkpoint-90 --store run.tim --ids 17,42 -o clean
  timstore rollback model.safetensors --store run.tim --in-place --yes \\
    --where "sample IN (SELECT sample FROM samples WHERE owner = 'u-7')"
"""


def run(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A safetensors file or a directory.", show_default=False)
    ],
    store: Annotated[Path, typer.Option(metavar="STORE", help="The store of its training.", show_default=False)],
    ids: Annotated[str | None, typer.Option(metavar="1,2,3", help="The samples to remove.")] = None,
    ids_file: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with their ids.")] = None,
    where: Annotated[str | None, typer.Option(metavar="SQL", help="A condition on the table records.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="Where the new checkpoint goes.")
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Change the checkpoint itself.")] = False,
    strength: Annotated[
        float, typer.Option(metavar="SHARE", min=0.0, max=1.0, help="The share that is removed.")
    ] = 1.0,
    method: Annotated[
        str, typer.Option(metavar="METHOD", help="auto, closed form, final moment or exact replay.")
    ] = "auto",
    probe: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows of tokens as JSON lines, or kept: the store's own.")
    ] = None,
    memory_limit: Annotated[str, typer.Option(metavar="SIZE", help="For everything, as 512MB or 2GB.")] = "512MB",
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Go on without what has no records.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also what was removed before.")] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Remove the contribution of samples from a checkpoint.

    Say which by --ids, --ids-file or --where, and where the result goes by
    --output or --in-place. The records are streamed, and the checkpoint
    is written tensor by tensor: both may be larger than memory. Without a
    --probe the result is first order, which can damage a fine-tuned
    transformer: with 64 rows like {"input_ids": [5, 17]}, of any data like
    the training data, the model is loaded and asked.
    """
    if sum(one is not None for one in (ids, ids_file, where)) != 1:
        raise typer.BadParameter("say which samples by one of --ids, --ids-file and --where")
    if output is not None and in_place:
        raise typer.BadParameter("--output and --in-place exclude each other")
    if output is None and not in_place and not dry_run:
        raise typer.BadParameter("say where the result goes: --output PATH or --in-place; or --dry-run")
    chosen = None if where is not None else _ids(ids if ids_file is None else ids_file.read_text(errors="replace"))
    reading(store).close()
    if in_place and not dry_run:
        confirm(f"{checkpoint} will be changed in place", yes)
    options = {} if probe is None else probe_options(probe, store)
    if skip_missing:
        options["missing"] = "skip"
    with CriticalSection("the rollback was made and is on record") as section, _said_once() as shown:
        report = timstore.rollback(
            checkpoint,
            chosen,
            store,
            output=output,
            in_place=in_place,
            where=where,
            strength=strength,
            method=method,
            memory_limit=memory_limit,
            dry_run=dry_run,
            force=force,
            **options,
        )
        if not dry_run:
            section.finish(report)
        shown += report.warnings
        if as_json:
            print_json(report.to_dict())
        else:
            typer.echo(spelled(str(report)))


def _ids(text: str | None) -> list[int]:
    """Return the integers of a text, which anything but digits and signs may separate.

    Raises:
        typer.BadParameter: there are none, or something else is among them.
    """
    words = re.split(r"[\s,;]+", (text or "").strip(" \t\r\n,;"))
    try:
        return [int(word) for word in words]
    except ValueError:
        wrong = next((word for word in words if not re.fullmatch(r"[+-]?\d+", word)), "")
        raise typer.BadParameter(f"samples are integers, separated by commas, not {wrong[:80]!r}") from None


@contextmanager
def _said_once() -> Iterator[list[str]]:
    """Show warnings, when the block is over, but for those that it adds to the list: the report says them."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TimstoreWarning)
        yield said
    for one in caught:
        if str(one.message) not in said:
            warnings.showwarning(one.message, one.category, one.filename, one.lineno)
