"""`timstore samples import`: a file's columns beside sample ids."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer

import timstore
from timstore.catalog.tables import quoted
from timstore.cli.asking import confirm
from timstore.cli.options import AsJson, DryRun, StorePath, Yes
from timstore.cli.output import counted, print_json
from timstore.cli.sample_files import blocks
from timstore.cli.stores import reading, writing
from timstore.database.samples import ColumnTypes, as_rows

EXAMPLES = """\b
Examples:
  timstore samples import run.tim owners.csv --dry-run
  timstore samples import run.tim owners.csv --text zip
  timstore sql run.tim "SELECT * FROM samples"
"""


app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def about() -> None:
    """Say what you know about samples, to select by."""


@dataclass(slots=True)
class Import:
    """What a file brings.

    Attributes:
        columns: the user's own, all that the file has.
        new: rows of samples that the store does not know.
        replaced: values that the store holds otherwise.
    """

    rows: int = 0
    columns: list[str] = field(default_factory=list)
    new: int = 0
    replaced: int = 0


@app.command("import", epilog=EXAMPLES)
def import_(
    path: StorePath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV, JSON lines or Parquet.", show_default=False)],
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Read this column of CSV as text, as for 00123. May be repeated."),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Attach the columns of a file to samples, to select by.

    The file (.csv, .tsv, .jsonl, .ndjson, .parquet) has a column `sample` of
    integers. The last value written for a sample and a column counts; an
    empty one changes nothing. The file is read twice: nothing is written
    before all of it was looked at.
    """
    with reading(path) as store:
        found = _look(store, file, text or ())
    if not dry_run:
        if found.replaced:
            confirm(f"{counted(found.replaced, 'stored value')} will be replaced by others", yes)
        with writing(path) as store:
            for block in blocks(file, text or ()):
                store.samples.update(block)
    if as_json:
        print_json({"dry_run": dry_run, **asdict(found)})
        return
    typer.echo(
        f"{'would attach' if dry_run else 'attached'} {', '.join(found.columns) or 'no column'} to "
        f"{counted(found.rows, 'row')}: {counted(found.new, 'new sample')}, "
        f"{counted(found.replaced, 'stored value')} replaced"
    )


def _look(store: timstore.Store, file: Path, text: Collection[str]) -> Import:
    """Read the whole file and say what it brings, writing nothing.

    Raises:
        InvalidInputError: something in it cannot be attached.
    """
    found = Import()
    held = {name.lower() for name in store.sql("SELECT * FROM samples LIMIT 0").columns}
    types = ColumnTypes(lambda question: store.sql(question).to_arrow_table())
    fresh: set[int] = set()
    for block in blocks(file, text):
        rows = types.fitted(as_rows(block))
        names = [name for name in rows.column_names if name != "sample"]
        found.rows += rows.num_rows
        found.columns += [name for name in names if name not in found.columns]
        before = _stored(store, rows["sample"].to_pylist(), [name for name in names if name.lower() in held])
        for row in rows.to_pylist():
            stored = before.get(row["sample"])
            if stored is None:
                fresh.add(row["sample"])
            else:
                found.replaced += sum(
                    row[name] is not None and value is not None and row[name] != value for name, value in stored.items()
                )
    found.new = len(fresh)
    return found


def _stored(store: timstore.Store, ids: list[int], names: list[str]) -> dict[int, dict[str, object]]:
    """Return what the store holds of these samples under these names; a sample that it does not know is left out."""
    columns = ", ".join(["sample", *map(quoted, names)])
    answer = store.sql(f"SELECT {columns} FROM samples WHERE sample IN (SELECT unnest(?::BIGINT[]))", [ids])
    return {row[0]: dict(zip(names, row[1:], strict=True)) for row in answer.fetchall()}
