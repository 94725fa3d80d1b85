"""Progress on long work: bars on a terminal, lines where somebody asked and there is none, otherwise nothing."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from timstore import errors

LINE_SECONDS = 10.0
"""How far lines are apart."""

Report = Callable[[int, int], None]
"""Is told (done, in all)."""


class Shown(Progress):
    """The progress of some work, as `shown` makes it."""

    def __init__(self, wanted: bool | None, columns: list[ProgressColumn]) -> None:
        if not (wanted is None or isinstance(wanted, bool)):
            raise errors.InvalidInputError(f"progress is True, False or None, not {errors.shown(wanted)}")
        terminal = sys.stderr.isatty()
        self._in_lines = wanted is True and not terminal
        super().__init__(
            *columns, console=Console(stderr=True), transient=True, disable=not terminal or wanted is False
        )
        self._said_at = self.get_time()
        self._done: set[TaskID] = set()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Say that some more of a task is done."""
        super().advance(task_id, advance)
        self._line(task_id)

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """Say how much of a task is done."""
        super().update(task_id, **fields)
        self._line(task_id)

    def say(self, text: str) -> None:
        """Show a sentence."""
        if self._in_lines:
            print(text, file=sys.stderr, flush=True)
            self._said_at = self.get_time()
        elif not self.disable:
            self.console.print(text, highlight=False, markup=False)

    def _line(self, task_id: TaskID) -> None:
        if not self._in_lines or task_id in self._done:
            return
        task = self._tasks[task_id]
        if task.finished:
            self._done.add(task_id)
            self.say(f"{task.description}: done in {span(task.finished_time or 0.0)}")
        elif self.get_time() - self._said_at >= LINE_SECONDS:
            left = task.time_remaining
            about = "" if left is None else f", about {span(left)} left"
            self.say(f"{task.description}: {task.percentage:.0f} % in {span(task.elapsed or 0.0)}{about}")


@contextmanager
def shown(wanted: bool | None, unit: str = "") -> Iterator[Shown]:
    """Show progress on standard error while the block runs.

    Args:
        wanted: False for nothing, True for bars, or lines where there is no terminal (a notebook, a log); by default
            bars on a terminal and nothing elsewhere.
        unit: of what is counted: bytes, pieces, or none that a person would know.
    """
    counted: dict[str, list[ProgressColumn]] = {
        "bytes": [DownloadColumn(), TransferSpeedColumn()],
        "pieces": [MofNCompleteColumn()],
    }
    what = counted.get(unit, [TaskProgressColumn()])
    with Shown(wanted, [TextColumn("{task.description}"), BarColumn(), *what, TimeRemainingColumn()]) as progress:
        yield progress


@contextmanager
def told(wanted: bool | Report | None, doing: str, unit: str) -> Iterator[Report]:
    """Yield what is to be called with (done, in all), while the block runs.

    Args:
        wanted: as `shown` takes it, or who else is told.
    """
    if callable(wanted):
        yield wanted
        return
    with shown(wanted, unit) as progress:
        task = progress.add_task(doing, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def span(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
