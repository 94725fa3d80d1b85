"""`timstore compact`: few row files instead of many."""

from dataclasses import asdict

import typer

from timstore.cli.options import AsJson, DryRun, StorePath
from timstore.cli.output import counted, print_json, size
from timstore.cli.stores import reading, writing

EXAMPLES = """\b
Examples:
  timstore compact run.tim --dry-run
  timstore compact run.tim
"""


def run(path: StorePath, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Fold small row files into few, so that the store opens fast.

    Readers and writers go on meanwhile. Tensors are not touched. A writer
    does this by itself every 1,000 commits.
    """
    if dry_run:
        with reading(path) as store:
            waiting = len(store.snapshot().view.since_compaction)
        if as_json:
            print_json({"dry_run": True, "commits": waiting})
        else:
            typer.echo(f"would fold {counted(waiting, 'commit')}" if waiting else "nothing to fold")
        return
    with writing(path) as store:
        done = store.compact()
    if as_json:
        print_json({"dry_run": False, **asdict(done)})
    elif done.compaction is None:
        typer.echo("nothing to fold")
    else:
        typer.echo(
            f"folded {counted(done.commits, 'commit')}, {counted(done.rows, 'row')}, into compaction "
            f"{done.compaction}: {size(done.bytes_before)} of row files became {size(done.bytes_after)}, "
            f"{counted(done.deleted, 'file')} deleted"
        )
        if done.undeleted is not None:
            typer.echo(f"some files that nothing needs any more are left to a later compact: {done.undeleted}")
