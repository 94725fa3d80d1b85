"""timstore: a storage-efficient database of training trajectories, and rollback of samples from a model."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from timstore.database.store import Store, open, rollback
from timstore.errors import (
    AlreadyExistsError,
    CorruptionError,
    CoverageError,
    FormatError,
    InvalidInputError,
    ModelMismatchError,
    NotFoundError,
    ReadOnlyError,
    StateError,
    StorageError,
    TimstoreError,
    TimstoreWarning,
)
from timstore.options import RecordOptions, RollbackOptions
from timstore.records import Factors, Rows

if TYPE_CHECKING:
    from timstore.legacy import (
        Exported,
        Imported,
        export_trajectories,
        import_trajectories,
        save_gradient_trajectory,
    )
    from timstore.recording import Forecast, Recorder
    from timstore.rollbacks import RollbackReport
    from timstore.verification import Finding, Verification, verify

__version__ = "0.1.0"

# What happens behind, for who listens: silent until a program sets its logging up.
logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "AlreadyExistsError",
    "CorruptionError",
    "CoverageError",
    "Exported",
    "Factors",
    "Finding",
    "Forecast",
    "FormatError",
    "Imported",
    "InvalidInputError",
    "ModelMismatchError",
    "NotFoundError",
    "ReadOnlyError",
    "RecordOptions",
    "Recorder",
    "RollbackOptions",
    "RollbackReport",
    "Rows",
    "StateError",
    "StorageError",
    "Store",
    "TimstoreError",
    "TimstoreWarning",
    "Verification",
    "export_trajectories",
    "import_trajectories",
    "open",
    "rollback",
    "save_gradient_trajectory",
    "verify",
]


_LAZY = {
    "Exported": "legacy",
    "Finding": "verification",
    "Forecast": "recording",
    "Imported": "legacy",
    "Recorder": "recording",
    "RollbackReport": "rollbacks",
    "Verification": "verification",
    "export_trajectories": "legacy",
    "import_trajectories": "legacy",
    "save_gradient_trajectory": "legacy",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"timstore.{_LAZY[name]}"), name)
