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
        halves, wholes: products with half of the probe, which come first, and with all of it.
    """

    def __init__(self, progress: Shown, gradients: int, halves: int, wholes: int) -> None:
        self._progress = progress
        self._units = halves + 2 * wholes
        self._halves_left = halves
        self._products = halves + wholes
        self._began: float | None = None
        self._added = progress.add_task("adding gradients", total=gradients)
        self._taken = progress.add_task("curvature", total=self._units, visible=self._units > 0)

    def added(self, gradients: int) -> None:
        """Say that some more gradients were added."""
        self._progress.advance(self._added, gradients)

    def curved(self, sequences: int) -> None:
        """Say that products with the probe's curvature begin."""
        self._began = time.perf_counter()
        self._say(
            f"curvature: up to {self._products} products over the probe of {sequences} sequences, each about two of "
            "its gradients (those of half the probe first)"
        )

    def taken(self) -> None:
        """Say that one more product was taken."""
        units = 1 if self._halves_left > 0 else 2
        self._halves_left -= 1
        if self._began is not None:
            seconds, self._began = time.perf_counter() - self._began, None
            whole = span(seconds / units * self._units)
            self._say(f"curvature: the first product took {span(seconds)}; all of them take about {whole}")
        self._progress.advance(self._taken, units)

    def _say(self, text: str) -> None:
        self._progress.say(text)
        _log.info(text)


@contextmanager
def rollback_shown(wanted: bool | None, gradients: int, halves: int = 0, wholes: int = 0) -> Iterator[Bar]:
    """Show how far a rollback is, as `timstore.progress.shown` does."""
    with shown(wanted) as progress:
        yield Bar(progress, gradients, halves, wholes)
