"""A progress bar on a verification, when a person is looking."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from timstore.progress import shown_if

Report = Callable[[int, int], None]


@contextmanager
def shown(wanted: bool | Report | None, doing: str) -> Iterator[Report]:
    """Yield what is to be called with (bytes done, bytes in all).

    Args:
        wanted: a bar on standard error, or none; by default on a terminal. Or who else is told.
    """
    if callable(wanted):
        yield wanted
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with shown_if(wanted, *columns) as progress:
        task = progress.add_task(doing, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
