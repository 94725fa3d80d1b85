"""Rollback: from records to a model without them, in bounded memory."""

import warnings
from typing import Any

from timstore.errors import TimstoreWarning
from timstore.rollbacks.report import ProbeReport, RollbackReport
from timstore.rollbacks.rollback import rollback as _rollback
from timstore.rollbacks.together import changed_together
from timstore.rollbacks.undo import undo as _undo
from timstore.store import Store

__all__ = ["ProbeReport", "RollbackReport", "rollback", "undo"]


def rollback(store: Store, model: Any, ids: Any, *, optimizer: Any = None, **options: Any) -> RollbackReport:
    """Remove the contribution of samples from the model; see `timstore.Store.rollback`."""
    report = changed_together(
        store, model, optimizer, lambda inner, steps: _rollback(store, inner, ids, optimizer=steps, **options)
    )
    for warning in report.warnings:
        warnings.warn(warning, TimstoreWarning, stacklevel=3)
    return report


def undo(store: Store, model: Any, rollback_id: str) -> None:
    """Give a model back what `rollback(keep_delta=True)` changed; see `timstore.Store.undo`."""
    changed_together(store, model, None, lambda inner, _: _undo(store, inner, rollback_id))
