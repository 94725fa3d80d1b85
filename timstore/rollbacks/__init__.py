"""Rollback: from records to a model without them, in bounded memory."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from timstore.arguments import flags
from timstore.database.store import Store
from timstore.errors import InvalidInputError, TimstoreWarning
from timstore.interrupts import CriticalSection
from timstore.rollbacks.difference import explained
from timstore.rollbacks.report import ProbeReport, RollbackReport
from timstore.rollbacks.rollback import rollback as _rollback
from timstore.rollbacks.targets import ModelInMemory
from timstore.rollbacks.together import changed_together
from timstore.rollbacks.undo import undo as _undo

__all__ = ["ProbeReport", "RollbackReport", "rollback", "undo"]


def rollback(
    store: Store,
    target: Any,
    ids: Any,
    *,
    optimizer: Any = None,
    output: Any = None,
    in_place: bool = False,
    model: Any = None,
    **options: Any,
) -> RollbackReport:
    """Remove the contribution of samples from a model; see `timstore.Store.rollback`."""
    flags(in_place=in_place)
    if output is not None or in_place or model is not None:
        raise InvalidInputError("output=, in_place= and model= are for checkpoints; a model in memory is changed there")
    with CriticalSection("the model was rolled back and the rollback is on record") as section:

        def change(inner: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> RollbackReport:
            with explained(store, inner):
                return _rollback(store, ModelInMemory(inner), ids, optimizers=optimizers, section=section, **options)

        report = changed_together(store, target, optimizer, section, change)
        for warning in report.warnings:
            warnings.warn(warning, TimstoreWarning, stacklevel=3)
    return report


def undo(store: Store, model: Any, rollback_id: str) -> None:
    """Give a model back what `rollback(keep_delta=True)` changed; see `timstore.Store.undo`."""
    with CriticalSection("the rollback was undone and that is on record") as section:

        def change(inner: nn.Module, _: Any) -> str:
            with explained(store, inner):
                return _undo(store, inner, rollback_id, section)

        changed_together(store, model, None, section, change)
