"""Passes of our own through a model that is recorded, beside those of its training."""

from collections.abc import Iterator
from contextlib import contextmanager


class OwnPass:
    """Whether we run the model, or differentiate it, ourselves: no hook of ours takes anything meanwhile."""

    def __init__(self) -> None:
        self._depth = 0

    @property
    def runs(self) -> bool:
        """Whether one runs."""
        return self._depth > 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run one; they may be within each other."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
