"""A rollback of a checkpoint on disk: understand it, hold it against the store, and go the way of any rollback."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from timstore.arguments import byte_count, flags
from timstore.checkpoints.cut_off import take_back
from timstore.checkpoints.folder import Checkpoint, opened
from timstore.checkpoints.names import Naming, understood
from timstore.checkpoints.others import left_of, warnings_of
from timstore.checkpoints.outputs import Output
from timstore.checkpoints.target import TORCH_NAMES, CheckpointTarget
from timstore.database.store import Store
from timstore.errors import InvalidInputError, ModelMismatchError, StateError
from timstore.interrupts import CriticalSection
from timstore.os_errors import user_path
from timstore.records import Parameter
from timstore.rollbacks.difference import recorded_digests
from timstore.rollbacks.report import RollbackReport
from timstore.rollbacks.rollback import rollback as roll_back

# Read, a header takes several times its length.
_HEADER_SHARE = 16


def rollback(
    store: Store,
    path: str | os.PathLike[str],
    ids: Iterable[int] | None,
    *,
    section: CriticalSection,
    output: str | os.PathLike[str] | None = None,
    in_place: bool = False,
    model: nn.Module | None = None,
    optimizer: Any = None,
    keep_delta: bool = False,
    dry_run: bool = False,
    memory_limit: int | str = "512MB",
    **options: Any,
) -> RollbackReport:
    """Remove the contribution of samples from a checkpoint; see `timstore.Store.rollback`."""
    path = user_path(path)
    _check(path, output, in_place, optimizer, keep_delta, dry_run)
    header_bytes = byte_count(memory_limit, "memory_limit") // _HEADER_SHARE
    said = take_back(path, in_place=in_place and not dry_run) if os.path.isdir(path) else []
    with opened(path, header_bytes) as checkpoint:
        chosen = None
        if output is not None or in_place:
            chosen = Output.choose(checkpoint, None if output is None else user_path(output))
        snapshot = store.snapshot()
        trained = snapshot.parameters()
        moments = recorded_digests(snapshot)
        naming = understood(checkpoint, {*moments, *trained}, trained, is_checked=bool(moments))
        absent = {name: _unchanged(name, moments, checkpoint) for name in naming.absent}
        # Looked for now: when the checkpoint is changed, nothing may fail any more.
        said += warnings_of(checkpoint)
        target = CheckpointTarget(checkpoint, naming, absent, None if dry_run else chosen, model)
        try:
            report = roll_back(
                store, target, ids, section=section, dry_run=dry_run, memory_limit=memory_limit, **options
            )
        except StateError as error:
            left = left_of(checkpoint) if error.kind == "removed-before" else None
            if left is None:
                raise
            raise StateError(f"{error}. {left}", kind=error.kind, **error.fields) from error
        except ModelMismatchError as error:
            hint = _hint(checkpoint, naming, trained) if error.kind == "unknown-model" else None
            if hint is None:
                raise
            raise ModelMismatchError(f"{error}. {hint}", kind=error.kind, **error.fields) from error
        said += [f"{one} holds weights from before and could not be deleted: delete it" for one in target.left]
        report = replace(report, warnings=(*report.warnings, *said))
        return report if dry_run else section.finish(report)


def _check(path: Any, output: Any, in_place: bool, optimizer: Any, keep_delta: bool, dry_run: bool) -> None:
    flags(in_place=in_place, keep_delta=keep_delta, dry_run=dry_run)
    if output is not None and in_place:
        raise InvalidInputError("say where the checkpoint goes: output=, or in_place=True, and not both")
    if output is None and not in_place and not dry_run:
        raise InvalidInputError(f"say where the checkpoint goes: output=, or in_place=True to replace {path}")
    if optimizer is not None:
        raise InvalidInputError(
            "optimizer= goes along with a model in memory; a checkpoint is rolled back without it: load the model and "
            "its optimizer, and roll back the model"
        )
    if keep_delta:
        raise InvalidInputError(
            "keep_delta= keeps the parameters of a model in memory for undo; of a checkpoint keep the input, which "
            "output= leaves as it is"
        )


def _unchanged(name: str, moments: Mapping[str, set[str]], checkpoint: Checkpoint) -> str:
    """Return the digest of a parameter that an adapter does not hold."""
    if len(moments[name]) != 1:
        raise ModelMismatchError(
            f"parameter {name} changed in training, and the adapter {checkpoint.path} does not hold it: roll back the "
            "whole model",
            parameter=name,
        )
    return next(iter(moments[name]))


def _hint(checkpoint: Checkpoint, naming: Naming, trained: Mapping[str, Parameter]) -> str | None:
    """Return what may have made a checkpoint unlike what was recorded."""
    for name, parameter in sorted(trained.items()):
        dtype = checkpoint.tensor(naming.tensors[name]).dtype
        if TORCH_NAMES.get(dtype, dtype) != parameter.dtype:
            return (
                f"Tensor {naming.tensors[name]} has dtype {dtype}, and {parameter.dtype} was recorded: roll back the "
                "checkpoint in the precision of the training, and convert it then"
            )
    return None
