"""Plan, stream, filter, audit, apply: the way of a rollback, in this order and no other."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from timstore.errors import InvalidInputError, ModelMismatchError, ReadOnlyError, StateError, TimstoreWarning
from timstore.fingerprints import digest_of_blocks, digests
from timstore.records import Parameter
from timstore.rollback.apply import apply, foresee, new_values
from timstore.rollback.curvature import probe_filter
from timstore.rollback.engine import Budget, stream
from timstore.rollback.identity import Identity, combined_digest, recognise
from timstore.rollback.plan import Plan, Request, make_plan
from timstore.rollback.probe import Probe
from timstore.rollback.report import ProbeReport, RollbackReport
from timstore.rollback.vectors import Vector, Workspace
from timstore.store import Store

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_DAMAGE = 0.01


def rollback(
    store: Store,
    model: torch.nn.Module,
    ids: Iterable[int] | None = None,
    *,
    where: str | None = None,
    strength: float = 1.0,
    epochs: Iterable[int] | None = None,
    parameters: Iterable[str] | None = None,
    probe: Iterable[Any] | None = None,
    bins: int = 4,
    outputs: Callable[[Any], Any] | None = None,
    loss: str | None = None,
    memory_limit: int | str = "512MB",
    accumulate: str = "float32",
    missing: str = "error",
    dry_run: bool = False,
    force: bool = False,
    progress: bool | None = None,
) -> RollbackReport:
    """Remove the contribution of samples from the model; see `timstore.Store.rollback`."""
    started = time.perf_counter()
    request = Request.check(ids, where, epochs, parameters, strength, missing)
    limit_bytes, dtype = parse_bytes(memory_limit), _dtype(accumulate)
    if store.mode == "r" and not dry_run:
        raise ReadOnlyError(f"{store.path} was opened to read: a rollback is written down; open it with mode 'a'")
    snapshot = store.snapshot()
    kept = store.probe() if probe is None else None
    batches = kept[0] if kept else probe
    filter_with = None
    if batches is not None:
        filter_with = Probe(model, batches, outputs=outputs, loss=loss or (kept[1] if kept else "cross_entropy"))
        if not (isinstance(bins, int) and bins >= 1):
            raise InvalidInputError(f"bins is a number of time bins, 1 or more, not {bins!r}")
    before = digests(model)
    identity = recognise(snapshot, before)
    plan = make_plan(snapshot, request, identity.moment, bins if filter_with else 1)
    _check_not_removed(identity, plan, force)
    changed = _match(model, plan.parameters)
    budget = Budget.divide(limit_bytes, snapshot)
    sizes = {name: parameter.numel for name, parameter in plan.parameters.items()}
    device = next(iter(changed.values())).device
    with (
        Workspace(sizes, dtype=dtype, memory_limit_bytes=budget.deltas_bytes, device=device) as workspace,
        _bar(progress, sum(len(rows.owner) for rows in plan.rows.values())) as advance,
    ):
        increments = [workspace.new() for _ in plan.lengths]
        stream(plan, snapshot, increments, budget, device=device, dtype=dtype, advance=advance)
        delta, probe_report = _filtered(model, plan, increments, filter_with, workspace)
        change = foresee(changed, delta, workspace)
        if not change.finite:
            raise StateError(
                "the change holds NaN or Inf: records that were kept with allow_nonfinite cannot be removed",
                kind="not-finite",
            )
        after = {**before}
        for name, parameter in changed.items():
            blocks = new_values(parameter, delta, name, workspace.block_numel)
            after[name] = digest_of_blocks(parameter.dtype, tuple(parameter.shape), blocks)
        names = snapshot_names(identity, before, snapshot)
        report = RollbackReport(
            samples=plan.samples,
            skipped=plan.skipped,
            records=plan.records,
            parameters=sum(sizes.values()),
            method="first order + probe" if probe_report else "first order",
            strength=request.strength,
            dry_run=dry_run,
            model=_recognised(identity),
            delta_norm=change.norm,
            relative_change=change.norm / change.before_norm if change.before_norm else 0.0,
            error_bound=plan.error_bound,
            rounding=change.lost_norm / change.norm if change.norm else 0.0,
            read_bytes=plan.dense_bytes,
            seconds=0.0,
            rollback_id=combined_digest({name: after[name] for name in names}),
            probe=probe_report,
            warnings=tuple(_warnings(probe_report)),
        )
        if not dry_run:
            # The row comes first: digests decide what a model is, so a row whose change never came is harmless.
            store.append_rollback(_row(report, identity.digest))
            apply(changed, delta, workspace)
    report = replace(report, seconds=time.perf_counter() - started)
    for warning in report.warnings:
        _warn(warning)
    return report
