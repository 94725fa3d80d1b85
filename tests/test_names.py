"""The public names: these and no others, each there when it is asked for."""

import timstore

NAMES = [
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


def test_the_package_exports_these_names_and_no_others() -> None:
    assert timstore.__all__ == NAMES
    for name in NAMES:
        assert getattr(timstore, name).__module__.startswith("timstore"), name
