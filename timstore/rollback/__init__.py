"""Rollback: from records to a model without them, in bounded memory."""

from timstore.rollback.report import ProbeReport, RollbackReport
from timstore.rollback.rollback import rollback

__all__ = ["ProbeReport", "RollbackReport", "rollback"]
