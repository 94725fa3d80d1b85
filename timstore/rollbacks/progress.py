"""What a rollback says of its progress: gradients added, products of the curvature taken, and how long that takes."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from timstore.progress import Shown, shown, span

_log = logging.getLogger(__name__)


class Bar:
    """Two lines of progress: gradients added, products taken.

    Args:
        products: how many there will be, at most.
    """

    def __init__(self, progress: Shown, gradients: int, products: int) -> None:
        self._progress = progress
        self._products = products
        self._began: float | None = None
        self._added = progress.add_task("adding gradients", total=gradients)
        self._taken = progress.add_task("curvature", total=products, visible=products > 0)

    def added(self, gradients: int) -> None:
        """Say that some more gradients were added."""
        self._progress.advance(self._added, gradients)

    def curved(self, sequences: int) -> None:
        """Say that products with the probe's curvature begin."""
        self._began = time.perf_counter()
        self._say(
            f"curvature: up to {self._products} products over one or the other half of the probe's {sequences} "
            "sequences, each about two of their gradients"
        )

    def taken(self) -> None:
        """Say that one more product was taken."""
        if self._began is not None:
            seconds, self._began = time.perf_counter() - self._began, None
            whole = span(seconds * self._products)
            self._say(f"curvature: the first product took {span(seconds)}; all of them take about {whole}")
        self._progress.advance(self._taken, 1)

    def _say(self, text: str) -> None:
        self._progress.say(text)
        _log.info(text)


@contextmanager
def rollback_shown(wanted: bool | None, gradients: int, products: int = 0) -> Iterator[Bar]:
    """Show how far a rollback is, as `timstore.progress.shown` does."""
    with shown(wanted) as progress:
        yield Bar(progress, gradients, products)
