"""Rollback: from records to a model without them, in bounded memory."""

from timstore.rollbacks.report import ProbeReport, RollbackReport
from timstore.rollbacks.rollback import rollback
from timstore.rollbacks.undo import undo

__all__ = ["ProbeReport", "RollbackReport", "rollback", "undo"]
