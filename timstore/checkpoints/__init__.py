"""Checkpoints on disk: rolled back tensor by tensor, in bounded memory, without loading the model."""

import os
import warnings
from collections.abc import Iterable

from timstore.checkpoints.rollback import rollback as _rollback
from timstore.database.store import Store
from timstore.errors import TimstoreWarning
from timstore.interrupts import CriticalSection
from timstore.options import RollbackOptions
from timstore.rollbacks.report import RollbackReport

__all__ = ["rollback"]


def rollback(
    store: Store, path: str | os.PathLike[str], ids: Iterable[int] | None, options: RollbackOptions
) -> RollbackReport:
    """Remove the contribution of samples from a checkpoint; see `timstore.Store.rollback`."""
    with CriticalSection("the checkpoint was rolled back and the rollback is on record") as section:
        report = _rollback(store, path, ids, options, section=section)
        for warning in report.warnings:
            warnings.warn(warning, TimstoreWarning, stacklevel=3)
    return report
