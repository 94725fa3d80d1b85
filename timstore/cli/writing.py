"""Verbs that change a checkpoint or a store: rollback, compact, import, samples import."""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import typer

import timstore
from timstore.catalog.tables import quoted
from timstore.cli.terminal import (
    AsJson,
    DryRun,
    Records,
    StorePath,
    Yes,
    confirm,
    counted,
    open_to_read,
    open_to_write,
    show,
    size,
    spelled,
)
from timstore.database.samples import ColumnTypes, as_rows
from timstore.errors import InvalidInputError, NotFoundError, TimstoreWarning
from timstore.interrupts import CriticalSection

verbs = typer.Typer()
samples = typer.Typer(no_args_is_help=True, help="Say what you know about samples, to select by.")


@verbs.command()
def rollback(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A safetensors file or a directory.", show_default=False)
    ],
    store: Annotated[Path, typer.Option(metavar="STORE", help="The store of its training.", show_default=False)],
    ids: Annotated[str | None, typer.Option(metavar="1,2,3", help="The samples to remove.")] = None,
    ids_file: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with their ids.")] = None,
    where: Records = None,
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
    loss: Annotated[
        str | None, typer.Option(metavar="NAME", help="The training loss, for the probe: cross_entropy or mse.")
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

    \b
    Examples:
      timstore rollback out/checkpoint-90 --store run.tim --ids 17,42 --dry-run
      timstore rollback out/checkpoint-90 --store run.tim --ids 17,42 -o clean
      timstore rollback model.safetensors --store run.tim --in-place --yes \\
        --where "sample IN (SELECT sample FROM samples WHERE owner = 'u-7')"
    """
    if [ids, ids_file, where].count(None) != 2:
        raise typer.BadParameter("say which samples by one of --ids, --ids-file and --where")
    if output is not None and in_place:
        raise typer.BadParameter("--output and --in-place exclude each other")
    if output is None and not in_place and not dry_run:
        raise typer.BadParameter("say where the result goes: --output PATH or --in-place; or --dry-run")
    if loss is not None and probe is None:
        raise typer.BadParameter("--loss says what a probe is asked with: pass --probe as well")
    chosen = None if where is not None else _ids(ids if ids_file is None else ids_file.read_text(errors="replace"))
    open_to_read(store).close()
    if in_place and not dry_run:
        confirm(f"{checkpoint} will be changed in place", yes)
    options: dict[str, Any] = {}
    if probe is not None:
        options["probe"] = _probe(probe, store)
    if loss is not None:
        options["loss"] = loss
    if skip_missing:
        options["missing"] = "skip"
    with CriticalSection("the rollback was made and is on record") as section, _said_once() as said:
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
        said += report.warnings
        show(report.to_dict(), spelled(str(report)), as_json)


def _ids(text: str | None) -> list[int]:
    """Return the integers of a text, between which are spaces, commas or semicolons.

    Raises:
        typer.BadParameter: there are none, or something else is among them.
    """
    words = re.split(r"[\s,;]+", (text or "").strip(" \t\r\n,;"))
    try:
        return [int(word) for word in words]
    except ValueError:
        wrong = next((word for word in words if not re.fullmatch(r"[+-]?\d+", word)), "")
        raise typer.BadParameter(f"samples are integers, separated by commas, not {wrong[:80]!r}") from None


# Rows of one length that the model is asked about at once.
_PROBE_ROWS = 8


def _probe(source: str, store: Path) -> list[dict[str, np.ndarray]] | str:
    """Return the probe of a rollback: rows of tokens in a file, or `auto` for the one that the store keeps.

    Raises:
        NotFoundError: the store keeps none.
        InvalidInputError: the file holds no rows of tokens.
    """
    if source != "kept":
        return list(_batches(Path(source)))
    with open_to_read(store) as opened:
        if opened.probe() is None:
            raise NotFoundError(f"{store} keeps no probe, which record(probe=) would have given it: pass a file")
    return "auto"


def _batches(path: Path) -> Iterator[dict[str, np.ndarray]]:
    from timstore.cli.sample_files import json_rows

    for shape, run in groupby(json_rows(path), lambda row: _shape(path, row)):
        while rows := list(islice(run, _PROBE_ROWS)):
            yield {name: np.array([row[name] for row in rows], np.int64) for name, _ in shape}


def _shape(path: Path, row: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """Return the names of a row's lists and their lengths."""
    for name, values in row.items():
        if not isinstance(values, list) or not all(type(value) is int and abs(value) < 2**63 for value in values):
            raise InvalidInputError(f"{path}: {name} of a row is a list of integers", path=str(path))
    if "input_ids" not in row:
        raise InvalidInputError(f'{path}: a row is {{"input_ids": [...]}}, and labels if you like', path=str(path))
    return tuple(sorted((name, len(values)) for name, values in row.items()))


@contextmanager
def _said_once() -> Iterator[list[str]]:
    """Show warnings, when the block is over, but for those that it adds to the list: the report says them."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TimstoreWarning)
        yield said
    for warning in caught:
        if str(warning.message) not in said:
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)


@verbs.command()
def compact(path: StorePath, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Fold small row files into few, so that the store opens fast.

    Readers and writers go on meanwhile. Tensors are not touched. A writer
    does this by itself every 1,000 commits.

    \b
    Examples:
      timstore compact run.tim --dry-run
      timstore compact run.tim
    """
    if dry_run:
        with open_to_read(path) as store:
            waiting = len(store.snapshot().view.since_compaction)
        text = f"would fold {counted(waiting, 'commit')}" if waiting else "nothing to fold"
        show({"dry_run": True, "commits": waiting}, text, as_json)
        return
    with open_to_write(path) as store:
        done = store.compact()
    text = "nothing to fold"
    if done.compaction is not None:
        text = (
            f"folded {counted(done.commits, 'commit')}, {counted(done.rows, 'row')}, into compaction "
            f"{done.compaction}: {size(done.bytes_before)} of row files became {size(done.bytes_after)}, "
            f"{counted(done.deleted, 'file')} deleted"
        )
        if done.undeleted is not None:
            text += f"\nsome files that nothing needs any more are left to a later compact: {done.undeleted}"
    show({"dry_run": False, **asdict(done)}, text, as_json)


@verbs.command("import")
def import_(
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="Where the trajectories are.", show_default=False)
    ],
    path: Annotated[Path, typer.Argument(metavar="STORE", help="Is made if it is not there.", show_default=False)],
    layout: Annotated[Literal["auto", "json", "pickle"], typer.Option("--format", help="What to read.")] = "auto",
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

    \b
    Examples:
      timstore import trajectories run.tim --lr 1e-4
      timstore import trajectories run.tim --format pickle --allow-pickle
    """
    from timstore.legacy import import_trajectories

    commits = 0 if dry_run else _commits(path)
    if commits:
        confirm(f"{path}, a store of {counted(commits, 'commit')}, will be added to", yes)
    report = import_trajectories(
        directory, path, format=layout, lr=lr, scale=scale, allow_pickle=allow_pickle, dry_run=dry_run
    )
    show(asdict(report), f"{'would import' if dry_run else 'imported'} {report}", as_json)


def _commits(path: Path) -> int:
    """Return how many commits a store has, 0 where there is none."""
    try:
        with timstore.open(path, "r") as store:
            return len(store.snapshot().view.commits)
    except NotFoundError:
        return 0


@samples.command("import")
def import_samples(
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

    \b
    Examples:
      timstore samples import run.tim owners.csv --dry-run
      timstore samples import run.tim owners.csv --text zip
      timstore sql run.tim "SELECT * FROM samples"
    """
    from timstore.cli.sample_files import blocks

    with open_to_read(path) as store:
        news = _news(store, blocks(file, text or ()))
    if not dry_run:
        if news.replaced:
            confirm(f"{counted(news.replaced, 'stored value')} will be replaced by others", yes)
        with open_to_write(path) as store:
            for block in blocks(file, text or ()):
                store.samples.update(block)
    sentence = (
        f"{'would attach' if dry_run else 'attached'} {', '.join(news.columns) or 'no column'} to "
        f"{counted(news.rows, 'row')}: {counted(news.new, 'new sample')}, "
        f"{counted(news.replaced, 'stored value')} replaced"
    )
    show({"dry_run": dry_run, **asdict(news)}, sentence, as_json)


@dataclass(slots=True)
class News:
    """What a file about samples brings.

    Attributes:
        columns: the user's own, all that the file has.
        new: rows of samples that the store does not know.
        replaced: values that the store holds otherwise.
    """

    rows: int = 0
    columns: list[str] = field(default_factory=list)
    new: int = 0
    replaced: int = 0


def _news(store: timstore.Store, blocks: Iterator[pa.Table]) -> News:
    """Read a whole file and say what it brings, writing nothing.

    Raises:
        InvalidInputError: something in it cannot be attached.
    """
    news = News()
    known = {name.lower() for name in store.sql("SELECT * FROM samples LIMIT 0").columns}
    types = ColumnTypes(lambda question: store.sql(question).to_arrow_table())
    new: set[int] = set()
    for block in blocks:
        rows = types.fitted(as_rows(block))
        news.columns = [name for name in rows.column_names if name != "sample"]
        news.rows += rows.num_rows
        stored = _stored(store, rows["sample"].to_pylist(), [name for name in news.columns if name.lower() in known])
        for row in rows.to_pylist():
            before = stored.get(row["sample"])
            if before is None:
                new.add(row["sample"])
            else:
                news.replaced += sum(
                    row[name] is not None and value is not None and row[name] != value for name, value in before.items()
                )
    news.new = len(new)
    return news


def _stored(store: timstore.Store, ids: Sequence[int], names: Collection[str]) -> dict[int, dict[str, object]]:
    """Return what the store holds of these samples under these names; a sample that it does not know is left out."""
    columns = ", ".join(["sample", *map(quoted, names)])
    answer = store.sql(f"SELECT {columns} FROM samples WHERE sample IN (SELECT unnest(?::BIGINT[]))", [list(ids)])
    return {row[0]: dict(zip(names, row[1:], strict=True)) for row in answer.fetchall()}
