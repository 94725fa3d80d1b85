"""One recording inside a training that a framework runs: its store, its recorder, and where it goes on."""

import os
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from timstore import Store
from timstore import open as open_store
from timstore.database.samples import names_of_samples, sample_named
from timstore.errors import StateError, TimstoreWarning
from timstore.options import RecordOptions
from timstore.recording import Recorder


class Session:
    """Between a framework's hooks and a store; begun and ended once for each training.

    Args:
        store: an open store, or the path of one, which is opened for the training and closed after it.
        samples: ids to record, or names of samples; all when None.
        column: of the training set, and of `store.samples` where ids are text.
        options: of `Store.record`, those that are given.

    Attributes:
        recorder: None while nothing is recorded.
        keys: what `store.samples` calls the samples, where it has a column of that name.
    """

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        samples: Iterable[int | str] | None,
        column: Any,
        options: dict[str, Any],
    ) -> None:
        self._given = store
        self._samples = None if samples is None else list(samples)
        self.column = column
        checked = RecordOptions(**options)
        self.options = {name: getattr(checked, name) for name in options}
        self._store: Store | None = None
        self.recorder: Recorder | None = None
        self.keys: dict[str, int] | None = None

    def begin(self, model: nn.Module, optimizer: Any, *, epoch: int, steps: int, **options: Any) -> Recorder:
        """Record from here on.

        Args:
            epoch: that training is about to begin or go on in.
            steps: that it has had.

        Raises:
            StateError: steps before that are not in the store.
        """
        store = self._store = self._given if isinstance(self._given, Store) else open_store(self._given)
        try:
            if isinstance(self.column, str):
                self.keys = names_of_samples(store.snapshot().catalog.rows("SELECT * FROM samples"), self.column)
            recorder = store.record(
                model,
                optimizer,
                samples=None if self._samples is None else [self.named(sample) for sample in self._samples],
                resume_from=_resumed(store, epoch, steps) if steps else None,
                **{**options, **self.options},
            )
            self.recorder = recorder.__enter__()
        except BaseException:
            self._close()
            raise
        return recorder

    def end(self, error: BaseException | None = None, *, known: bool = True) -> None:
        """Commit what was recorded and take the hooks off, if anything is being recorded.

        Args:
            error: that training ended in.
            known: the parameters are those that the last step left.
        """
        recorder, self.recorder = self.recorder, None
        if recorder is None:
            return
        try:
            if known:
                recorder.__exit__(None if error is None else type(error), error, None)
            else:
                recorder.stop()
        finally:
            self._close()

    def named(self, sample: Any) -> Any:
        """Return a sample's id, which may be given by its name.

        Raises:
            InvalidInputError: no sample has it.
        """
        return sample_named(sample, self.keys, self.column) if isinstance(sample, str) else sample

    def _close(self) -> None:
        store, self._store = self._store, None
        if store is not None and store is not self._given:
            store.close()


def _resumed(store: Store, epoch: int, steps: int) -> tuple[int, int]:
    frontier = store.frontier
    if frontier is None:
        warnings.warn(
            f"training goes on from step {steps}, and this store has nothing of the steps before it: what samples "
            "did in them cannot be rolled back",
            TimstoreWarning,
            stacklevel=4,
        )
    elif frontier[1] < steps - 1:
        raise StateError(
            f"training goes on from step {steps}, and {store.path} ends at step {frontier[1]}: what lies between "
            "was never recorded. Go on from a checkpoint no later than that, or record into a new store",
            kind="hole",
        )
    return epoch, steps
