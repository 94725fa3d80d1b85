"""Plan, stream, filter, audit, apply: the way of a rollback, in this order and no other."""

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch

from timstore.errors import InvalidInputError, ModelMismatchError, ReadOnlyError, StateError, TimstoreWarning
from timstore.fingerprints import digest_of_blocks, digests
from timstore.format.reader import ByteCache
from timstore.records import Parameter
from timstore.rollbacks.apply import apply, foresee, new_values
from timstore.rollbacks.coordinates import decayed, into_steps, read_coordinates
from timstore.rollbacks.curvature import probe_filter, probe_losses
from timstore.rollbacks.engine import Budget, stream
from timstore.rollbacks.identity import Identity, combined_digest, recognise
from timstore.rollbacks.plan import Plan, make_plan
from timstore.rollbacks.probe import Probe
from timstore.rollbacks.progress import Bar, shown
from timstore.rollbacks.report import ProbeReport, RollbackReport
from timstore.rollbacks.request import Request, parse_bytes
from timstore.rollbacks.vectors import Vector, Workspace
from timstore.states import State
from timstore.store import Store

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
# A rise of the probe's own loss by more than this share says that the model was damaged.
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
    keep_delta: bool = False,
    dry_run: bool = False,
    force: bool = False,
    progress: bool | None = None,
) -> RollbackReport:
    """Remove the contribution of samples from the model; see `timstore.Store.rollback`."""
    started = time.perf_counter()
    request = Request.check(ids, where, epochs, parameters, strength, missing)
    limit_bytes = parse_bytes(memory_limit)
    if not isinstance(model, torch.nn.Module):
        raise InvalidInputError(f"model is a torch.nn.Module, not {type(model).__name__}")
    if accumulate not in _DTYPES:
        raise InvalidInputError(f"accumulate is {' or '.join(_DTYPES)}, not {accumulate!r}")
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise InvalidInputError(f"bins is a number of time bins, 1 or more, not {bins!r}")
    if store.mode == "r" and not dry_run:
        raise ReadOnlyError(f"{store.path} was opened to read, and a rollback is written down: open it with mode 'a'")
    asked = _probe(store, model, probe, outputs, loss)
    snapshot = store.snapshot()
    before = digests(model)
    identity = recognise(snapshot, before)
    plan = make_plan(snapshot, request, identity.moment, bins if asked else 1)
    _check_not_removed(identity, plan, force)
    changed = _match(model, plan.parameters)
    budget = Budget.divide(limit_bytes, snapshot)
    sizes = {name: parameter.numel for name, parameter in plan.parameters.items()}
    device, dtype = next(iter(changed.values())).device, _DTYPES[accumulate]
    # Eight are as good as twenty in each of several bins (docs/design/rollback.md); a single bin takes more.
    steps = 8 if len(plan.lengths) > 1 else 16
    products = len(plan.lengths) * (steps + 1) - 1 if asked else 0
    with (
        Workspace(sizes, dtype=dtype, memory_limit_bytes=budget.deltas_bytes, device=device) as workspace,
        shown(progress, sum(len(rows.owner) for rows in plan.rows.values()), products) as bar,
    ):
        increments = [workspace.new() for _ in plan.lengths]
        stream(plan, snapshot, increments, budget, device=device, dtype=dtype, advance=bar.added)
        moments = State.find(snapshot, ByteCache(budget.cache_bytes), "exp_avg_sq", moment=identity.moment)
        coordinates = read_coordinates(plan, moments, workspace)
        largest = dict.fromkeys(sizes, 1.0) if coordinates is None else into_steps(increments, coordinates)
        delta, probed = _filtered(model, plan, increments, coordinates, asked, steps, workspace, bar)
        change = foresee(changed, delta, workspace)
        if not change.finite:
            raise StateError(
                "the change holds NaN or Inf, as records kept with allow_nonfinite do; leave them out by where=",
                kind="not-finite",
            )
        after = dict(before)
        for name, parameter in changed.items():
            blocks = new_values(parameter, delta, name, workspace.block_numel)
            after[name] = digest_of_blocks(parameter.dtype, tuple(parameter.shape), blocks)
        report = RollbackReport(
            samples=plan.samples,
            skipped=plan.skipped,
            records=plan.records,
            parameters=sum(sizes.values()),
            method="first order" + " (final second moment)" * bool(plan.divisions) + " + probe" * bool(probed),
            strength=request.strength,
            dry_run=dry_run,
            model=str(identity),
            delta_norm=change.norm,
            relative_change=change.norm / change.before_norm if change.before_norm else 0.0,
            error_bound=sum((bound * largest[name]) ** 2 for name, bound in plan.error_bounds.items()) ** 0.5,
            rounding=change.lost_norm / change.norm if change.norm else 0.0,
            read_bytes=plan.dense_bytes,
            seconds=0.0,
            rollback_id=combined_digest({name: after[name] for name in identity.names}),
            probe=probed,
            warnings=tuple(_warnings(probed)),
        )
        if not dry_run:
            # The row comes first: digests decide what a model is, so a row whose change never came is harmless.
            store.append_rollback(_row(report, identity.digest), dict(changed) if keep_delta else None)
            apply(changed, delta, workspace)
    report = replace(report, seconds=time.perf_counter() - started)
    for warning in report.warnings:
        warnings.warn(warning, TimstoreWarning, stacklevel=3)
    return report


def _probe(
    store: Store,
    model: torch.nn.Module,
    batches: Iterable[Any] | None,
    outputs: Callable[[Any], Any] | None,
    loss: str | None,
) -> Probe | None:
    """Return the probe that was given, or the one that the store keeps."""
    kept = store.probe() if batches is None else None
    if kept is not None:
        batches, loss = kept[0], loss or kept[1]
    return None if batches is None else Probe(model, batches, outputs=outputs, loss=loss or "cross_entropy")


def _check_not_removed(identity: Identity, plan: Plan, force: bool) -> None:
    again = sorted(identity.removed & set(plan.samples))
    if again and not force:
        raise StateError(
            f"{len(again)} of these samples were removed from this model before (the first is {again[0]}): removing "
            "them twice is a wrong update; force=True does so all the same",
            kind="removed-before",
            samples=again,
        )


def _match(model: torch.nn.Module, wanted: dict[str, Parameter]) -> dict[str, torch.nn.Parameter]:
    """Return the model's parameters that change, in the plan's order."""
    held = dict(model.named_parameters())
    for name, parameter in wanted.items():
        if name not in held:
            raise ModelMismatchError(f"the model has no parameter {name}, which was recorded", parameter=name)
        if tuple(held[name].shape) != parameter.shape:
            raise ModelMismatchError(
                f"parameter {name} has shape {tuple(held[name].shape)}; {parameter.shape} was recorded", parameter=name
            )
    return {name: held[name] for name in wanted}


def _filtered(
    model: torch.nn.Module,
    plan: Plan,
    increments: Sequence[Vector],
    coordinates: Vector | None,
    probe: Probe | None,
    steps: int,
    workspace: Workspace,
    bar: Bar,
) -> tuple[Vector, ProbeReport | None]:
    if probe is None:
        if coordinates is not None:
            decayed(increments[0], coordinates, plan)
        return increments[0], None
    decays = {name: division.decay for name, division in plan.divisions.items() if division.decay}
    found = probe_filter(
        model,
        increments,
        plan.lengths,
        probe,
        workspace,
        steps=steps,
        coordinates=coordinates,
        decays=decays,
        advance=bar.taken,
    )
    losses = probe_losses(model, probe, found.delta, list(workspace.sizes))
    return found.delta, ProbeReport(probe.sequences, found.products, found.moved, *losses)


def _warnings(probed: ProbeReport | None) -> list[str]:
    if probed is None:
        return [
            "first order only: the other samples' gradients are taken as recorded, which over-forgets and can damage "
            "the model; pass probe= (64 examples of any data like the training data)"
        ]
    if probed.loss_before and probed.loss_after > probed.loss_before * (1 + _DAMAGE):
        return [
            f"the probe's own loss rose from {probed.loss_before:.4f} to {probed.loss_after:.4f}: the change is larger "
            "than one linearisation can carry, and the model is damaged; do not use it without a closer look"
        ]
    return []


def _row(report: RollbackReport, digest_before: str) -> dict[str, Any]:
    return {
        "at": datetime.now(UTC).isoformat(),
        "samples": list(report.samples),
        "strength": report.strength,
        "method": report.method,
        "records": report.records,
        "delta_norm": report.delta_norm,
        "digest_before": digest_before,
        "digest_after": report.rollback_id,
    }
