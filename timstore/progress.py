"""Progress on long work, shown when a person is looking."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, ProgressColumn


@contextmanager
def shown_if(wanted: bool | None, *columns: str | ProgressColumn) -> Iterator[Progress]:
    """Show bars on standard error while the block runs: if wanted, or by default on a terminal."""
    visible = sys.stderr.isatty() if wanted is None else wanted
    with Progress(*columns, console=Console(stderr=True), disable=not visible, transient=True) as progress:
        yield progress
