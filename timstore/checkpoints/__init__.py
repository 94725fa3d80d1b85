"""Checkpoints on disk: rolled back tensor by tensor, in bounded memory, without loading the model."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from timstore.checkpoints.discover import Checkpoint, opened
from timstore.checkpoints.files import TORCH_NAMES
from timstore.checkpoints.names import Naming, understood
from timstore.checkpoints.patch import CheckpointTarget
from timstore.checkpoints.publish import Output, left_of, restored
from timstore.database.store import Store
from timstore.errors import InvalidInputError, ModelMismatchError, StateError, TimstoreWarning
from timstore.interrupts import CriticalSection
from timstore.options import RollbackOptions
from timstore.os_errors import user_path
from timstore.records import Parameter
from timstore.rollbacks.difference import recorded_digests
from timstore.rollbacks.report import RollbackReport
from timstore.rollbacks.rollback import rollback as roll_back

__all__ = ["rollback"]

# Read, a header takes several times its length.
_HEADER_SHARE = 16


def rollback(
    store: Store, path: str | os.PathLike[str], ids: Iterable[int] | None, options: RollbackOptions
) -> RollbackReport:
    """Remove the contribution of samples from a checkpoint; see `timstore.Store.rollback`."""
    path = user_path(path)
    _check(path, options)
    output, in_place, dry_run = options.output, options.in_place, options.dry_run
    header_bytes = options.memory_limit_bytes // _HEADER_SHARE
    with CriticalSection("the checkpoint was rolled back and the rollback is on record") as section:
        said = restored(path, in_place=in_place and not dry_run) if os.path.isdir(path) else []
        with opened(path, header_bytes) as checkpoint:
            goal = None
            if output is not None or in_place:
                goal = Output(checkpoint, None if output is None else user_path(output))
            snapshot = store.snapshot()
            trained, recorded = snapshot.parameters(), recorded_digests(snapshot)
            naming = understood(checkpoint, {*recorded, *trained}, trained, is_checked=bool(recorded))
            absent = {name: _unchanged(name, recorded, checkpoint) for name in naming.absent}
            # Looked for now: when the checkpoint is changed, nothing may fail any more.
            said += filter(None, (checkpoint.other_weights(), left_of(checkpoint)))
            target = CheckpointTarget(checkpoint, naming, absent, None if dry_run else goal, options.model)
            with _explained(checkpoint, naming, trained):
                report = roll_back(store, target, ids, options, section=section)
        said += [f"{left} holds weights from before and could not be deleted: delete it" for left in target.left]
        report = replace(report, warnings=(*report.warnings, *said))
        if not dry_run:
            section.finish(report)
        for warning in report.warnings:
            warnings.warn(warning, TimstoreWarning, stacklevel=3)
    return report


def _check(path: str | os.PathLike[str], options: RollbackOptions) -> None:
    if options.output is not None and options.in_place:
        raise InvalidInputError("say where the checkpoint goes: output=, or in_place=True, and not both")
    if options.output is None and not options.in_place and not options.dry_run:
        raise InvalidInputError(f"say where the checkpoint goes: output=, or in_place=True to replace {path}")
    if options.optimizer is not None:
        raise InvalidInputError(
            "optimizer= goes along with a model in memory; a checkpoint is rolled back without it: load the model and "
            "its optimizer, and roll back the model"
        )
    if options.keep_delta:
        raise InvalidInputError(
            "keep_delta= keeps the parameters of a model in memory for undo; of a checkpoint keep the input, which "
            "output= leaves as it is"
        )


def _unchanged(name: str, recorded: Mapping[str, set[str]], checkpoint: Checkpoint) -> str:
    """Return the digest of a parameter that an adapter does not hold."""
    if len(recorded[name]) != 1:
        raise ModelMismatchError(
            f"parameter {name} changed in training, and the adapter {checkpoint.path} does not hold it: roll back the "
            "whole model",
            parameter=name,
        )
    return next(iter(recorded[name]))


@contextmanager
def _explained(checkpoint: Checkpoint, naming: Naming, trained: Mapping[str, Parameter]) -> Iterator[None]:
    """Have a refusal of the checkpoint say what else its files show."""
    try:
        yield
    except (StateError, ModelMismatchError) as error:
        hint = None
        if error.kind == "removed-before":
            hint = left_of(checkpoint)
        elif error.kind == "unknown-model":
            hint = _other_dtype(naming, trained)
        if hint is None:
            raise
        raise type(error)(f"{error}. {hint}", kind=error.kind, **error.fields) from error


def _other_dtype(naming: Naming, trained: Mapping[str, Parameter]) -> str | None:
    """Return a sentence on a parameter that has another dtype in the checkpoint than it was recorded with."""
    for name, parameter in sorted(trained.items()):
        tensor = naming.tensors[name]
        if TORCH_NAMES.get(tensor.dtype, tensor.dtype) != parameter.dtype:
            return (
                f"Tensor {tensor.name} has dtype {tensor.dtype}, and {parameter.dtype} was recorded: roll back the "
                "checkpoint in the precision of the training, and convert it then"
            )
    return None
