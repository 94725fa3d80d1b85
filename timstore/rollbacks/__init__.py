"""Rollback: from records to a model without them, in bounded memory."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from timstore.database.store import Store
from timstore.errors import InvalidInputError, TimstoreWarning
from timstore.interrupts import CriticalSection
from timstore.options import RollbackOptions
from timstore.rollbacks.difference import explained
from timstore.rollbacks.report import ProbeReport, RollbackReport
from timstore.rollbacks.rollback import rollback as _rollback
from timstore.rollbacks.targets import ModelInMemory, changed_in_every_process
from timstore.rollbacks.undo import undo as _undo

__all__ = ["ProbeReport", "RollbackReport", "rollback", "undo"]


def rollback(store: Store, target: Any, ids: Iterable[int] | None, options: RollbackOptions) -> RollbackReport:
    """Remove the contribution of samples from a model; see `timstore.Store.rollback`."""
    if options.output is not None or options.in_place or options.model is not None:
        raise InvalidInputError("output=, in_place= and model= are for checkpoints; a model in memory is changed there")
    with CriticalSection("the model was rolled back and the rollback is on record") as section:

        def change(inner: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> RollbackReport:
            with explained(store, inner):
                return _rollback(store, ModelInMemory(inner), ids, options, optimizers=optimizers, section=section)

        report = changed_in_every_process(store, target, options.optimizer, section, change)
        for warning in report.warnings:
            warnings.warn(warning, TimstoreWarning, stacklevel=3)
    return report


def undo(store: Store, model: Any, rollback_id: str) -> None:
    """Give a model back what `rollback(keep_delta=True)` changed; see `timstore.Store.undo`."""
    with CriticalSection("the rollback was undone and that is on record") as section:

        def change(inner: nn.Module, _: Any) -> str:
            with explained(store, inner):
                return _undo(store, inner, rollback_id, section)

        changed_in_every_process(store, model, None, section, change)
