"""A progress bar on long work, when a person is looking."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from timstore.progress import shown_if


class Bar:
    """Two lines of progress: gradients added, products taken."""

    def __init__(self, progress: Progress, gradients: int, products: int) -> None:
        self._progress = progress
        self._added = progress.add_task("adding gradients", total=gradients)
        self._taken = progress.add_task("curvature", total=products, visible=products > 0)

    def added(self, gradients: int) -> None:
        """Say that some more gradients were added."""
        self._progress.advance(self._added, gradients)

    def taken(self) -> None:
        """Say that one more product was taken."""
        self._progress.advance(self._taken)


@contextmanager
def shown(wanted: bool | None, gradients: int, products: int) -> Iterator[Bar]:
    """Show a bar on standard error while the block runs: if wanted, or by default on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    with shown_if(wanted, *columns) as progress:
        yield Bar(progress, gradients, products)
