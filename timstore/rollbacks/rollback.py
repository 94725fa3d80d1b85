"""Plan, stream, filter, audit, apply: the way of a rollback, in this order and no other."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

import torch

from timstore.arguments import byte_count, choice, flags, positive_number
from timstore.database.identity import combined_digest, recognise
from timstore.database.kept_rows import asks_kept
from timstore.database.states import State
from timstore.database.store import Store
from timstore.errors import InvalidInputError, ReadOnlyError, StateError
from timstore.format.cache import ByteCache
from timstore.interrupts import CriticalSection
from timstore.rollbacks.apply import Writes, foresee, moves
from timstore.rollbacks.asking import Asked, Given, probe_to_ask
from timstore.rollbacks.coordinates import decayed, into_steps, read_coordinates
from timstore.rollbacks.earlier import warnings_of_earlier
from timstore.rollbacks.engine import Budget
from timstore.rollbacks.expectation import expected_kl, faded, order_noise
from timstore.rollbacks.filtering import Stretch, probe_filter
from timstore.rollbacks.optimizer_state import Correction, check_optimizers
from timstore.rollbacks.outcome import Outcome
from timstore.rollbacks.places import Place
from timstore.rollbacks.plan import Plan, longest
from timstore.rollbacks.progress import Bar, rollback_shown
from timstore.rollbacks.replay import Replayed
from timstore.rollbacks.report import ExpectedKL, ProbeReport, RollbackReport
from timstore.rollbacks.request import Request
from timstore.rollbacks.room import Room
from timstore.rollbacks.run import Run
from timstore.rollbacks.selection import select
from timstore.rollbacks.targets import Target
from timstore.rollbacks.vectors import Vector, Workspace
from timstore.rollbacks.waypoints import read_path

_log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
# A rise of the probe's own loss by more than this share says that the model was damaged.
_DAMAGE = 0.01
# Probes like the training were at 0.8 to 1.0, unlike ones at 3 to 8 (docs/design/curvature.md).
_MISFIT = 2.0
# Of fewer rows, one row decides.
_FEW = 16
# How far a replay may end from the model, in lengths of the run: rounding is thousands of times less.
_OFF = 0.02


def rollback(
    store: Store,
    target: Target,
    ids: Iterable[int] | None = None,
    *,
    section: CriticalSection,
    where: str | None = None,
    strength: float = 1.0,
    epochs: Iterable[int] | None = None,
    parameters: Iterable[str] | None = None,
    method: str = "auto",
    denominator: str = "kept",
    optimizers: Sequence[torch.optim.Optimizer] = (),
    probe: Given = None,
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
    """Remove the contribution of samples from the target; see `timstore.Store.rollback`."""
    started = time.perf_counter()
    flags(keep_delta=keep_delta, dry_run=dry_run, force=force)
    request = Request.check(ids, where, epochs, parameters, strength, missing, method, denominator)
    limit_bytes = byte_count(memory_limit, "memory_limit")
    dtype = _DTYPES[choice(accumulate, tuple(_DTYPES), "accumulate")]
    bins = positive_number(bins, "bins")
    if store.mode == "r" and not dry_run:
        raise ReadOnlyError(f"{store.path} was opened to read, and a rollback is written down: open it with mode 'a'")
    snapshot = store.snapshot()
    before = target.digests()
    recognised = recognise(snapshot, before)
    identity = recognised.taken_for_whole() if force else recognised
    selection = select(snapshot, request, identity)
    asked = probe_to_ask(snapshot, target, probe, outputs, loss, {*selection.samples, *recognised.removed})
    budget = Budget.divide(limit_bytes, snapshot)
    run = Run.read(snapshot, request, identity, selection, budget, dtype, optimizers)
    if asked.probe is not None and not run.has_coordinates:
        if probe is not None and not asks_kept(probe):
            raise InvalidInputError(
                f"the probe filter knows the steps of SGD and Adam, not of {run.optimizers}: leave probe out",
                kind="no-coordinates",
            )
        asked = Asked(None)
    plan = run.plan(bins if asked.probe else 1)
    if not plan.parameters:
        raise InvalidInputError("parameters names none that these records changed: nothing to remove")
    changed = target.places(plan.parameters)
    sizes = {name: parameter.numel for name, parameter in plan.parameters.items()}
    live = _live(target, changed) if optimizers or keep_delta else {}
    if optimizers:
        check_optimizers(optimizers, live, selection.known, run.timelines)
    # Five are as good as eight for each of several bins (docs/design/curvature.md); a single bin takes more.
    depth = 5 if len(plan.lengths) > 1 else 16
    products = 2 * depth * (len(plan.lengths) + 1) if asked.probe else 0
    device = next(iter(changed.values())).device
    with Workspace(sizes, dtype=run.dtype, memory_limit_bytes=budget.deltas_bytes, device=device) as workspace:
        with rollback_shown(progress, run.work(plan), products) as bar:
            increments = [workspace.new() for _ in plan.lengths]
            replayed = run.sum_up(plan, changed, increments, workspace, bool(optimizers), bar.added)
            if replayed is not None and not identity.is_rolled_back:
                _check_replayed(replayed, changed)
            correction, optimizer_text = run.correction(optimizers, replayed, workspace)
            cache, path = ByteCache(budget.cache_bytes), []
            moments = State.find(snapshot, cache, "exp_avg_sq", moment=identity.moment)
            coordinates = read_coordinates(plan, moments, workspace) if asked.probe or run.divides else None
            largest = dict.fromkeys(sizes, 1.0)
            if coordinates is not None and run.divides:
                largest = into_steps(increments, coordinates)
            decays = {name: one.decay for name, one in plan.divisions.items() if one.decay} if run.divides else {}
            if asked.probe is not None:
                path = read_path(snapshot, cache, identity.moment, plan, run.timelines, workspace)
            delta, probed = _filtered(
                target, run, plan, increments, path, coordinates, decays, asked, depth, limit_bytes, workspace, bar
            )
            expected = None
            if request.is_whole and asked.knows_training and probed is not None and probed.noise is not None:
                expected = expected_kl(run.rise(plan, delta), faded(selection), probed.seen, probed.noise)
        change = foresee(changed, delta, workspace, budget.workers)
        if not change.finite:
            raise StateError(
                "the change holds NaN or Inf, as records kept with allow_nonfinite do; leave them out by where=",
                kind="not-finite",
            )
        after = before | change.digests
        report = RollbackReport(
            samples=selection.samples,
            skipped=selection.skipped,
            records=selection.records,
            left_out=selection.before[0],
            parameters=sum(sizes.values()),
            method=run.method.name + " + probe" * bool(probed),
            approximates=run.approximates(None if probed is None else probed.sequences),
            denominator=denominator,
            clipping=run.clipping,
            strength=request.strength,
            dry_run=dry_run,
            model=str(recognised),
            delta_norm=change.norm,
            relative_change=change.norm / change.before_norm if change.before_norm else 0.0,
            error_bound=sum((bound * largest[name]) ** 2 for name, bound in plan.error_bounds.items()) ** 0.5,
            rounding=change.lost_norm / change.norm if change.norm else 0.0,
            read_bytes=plan.dense_bytes,
            seconds=0.0,
            rollback_id=combined_digest({name: after[name] for name in identity.names}),
            replay_off=None if replayed is None else replayed.relative_off,
            optimizer=optimizer_text,
            probe=probed,
            expected_kl=expected,
            checkpoint=target.text,
            warnings=tuple(
                [
                    *warnings_of_earlier(snapshot, identity, selection),
                    *run.warnings(recognised),
                    *_warnings(
                        asked, probed, expected, nothing=not change.norm and not selection.leaving.largest.any()
                    ),
                ]
            ),
        )
        if dry_run:
            return replace(report, seconds=time.perf_counter() - started)
        for one in (*increments, *(stretch.parameters for stretch in path), coordinates):
            if one is not None and one is not delta:
                one.free()
        writes = [*moves(changed, delta), *correction.writes(optimizers, live)]
        row = _row(report, identity.digest, selection.removed, request.parameters, correction)
        target.change(
            Writes(writes, workspace, budget.workers),
            record=lambda: store.append_rollback(row, live if keep_delta else None),
            section=section,
        )
        _log.info(
            "%s: %d samples removed, %s, change %.4g", store.path, len(report.samples), report.method, change.norm
        )
        return section.finish(replace(report, seconds=time.perf_counter() - started))


def _live(target: Target, changed: Iterable[str]) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that change, as an optimizer knows them."""
    held = dict(target.model().named_parameters())
    return {name: held[name] for name in changed}


def _check_replayed(replayed: Replayed, places: Mapping[str, Place]) -> None:
    """Refuse a replay that does not end where the model is: something else than the optimizer changed it."""
    halves = any(one.dtype in (torch.float16, torch.bfloat16) for one in places.values())
    if replayed.relative_off > _OFF and not halves:
        raise StateError(
            f"run again over the recorded gradients, the optimizer ends {replayed.relative_off:.1%} of the run's "
            "length away from the model: something else changed the parameters (weights averaged or copied in the "
            "loop, or an optimizer with a memory of its own), so that the replay would be wrong",
            kind="replay-off",
        )


def _filtered(
    target: Target,
    run: Run,
    plan: Plan,
    increments: Sequence[Vector],
    path: Sequence[Stretch],
    coordinates: Vector | None,
    decays: dict[str, float],
    asked: Asked,
    depth: int,
    keep_bytes: int,
    workspace: Workspace,
    bar: Bar,
) -> tuple[Vector, ProbeReport | None]:
    probe = asked.probe
    if probe is None:
        if coordinates is not None:
            decayed(increments[0], coordinates, plan)
        return increments[0], None
    model = target.model()
    bar.curved(probe.sequences)
    try:
        found = probe_filter(
            model,
            increments,
            plan.lengths,
            probe,
            workspace,
            depth=depth,
            path=path,
            coordinates=coordinates,
            decays=decays,
            judge=asked.training,
            keep_bytes=keep_bytes,
            advance=bar.taken,
        )
        outcome = Outcome(model, probe, room=Room(keep_bytes))
        losses = outcome.losses(found.delta)
        compares = asked.training is not None and min(asked.training.sequences, probe.sequences) >= _FEW
        own = outcome.divergence(found.delta) if compares else 0.0
    except Exception as error:
        if asked.kept is not None:
            error.add_note("timstore: these rows were kept of the training by themselves; probe=False asks nothing")
        raise
    ways = found.ways
    return found.delta, ProbeReport(
        sequences=probe.sequences,
        products=sum(way.products for way in ways),
        damping=fmean(way.damping for way in ways),
        expected=fmean(way.expected for way in ways),
        seen=fmean(way.seen for way in ways),
        moved=found.moved,
        apart=found.apart,
        loss_before=losses[0],
        loss_after=losses[1],
        noise=order_noise(ways, longest(run.timelines)) if probe.loss == "cross_entropy" else None,
        misfit=ways[0].seen / own if own else None,
        waypoints=len(path) - 1,
        kept=asked.kept,
        left_out=asked.left_out,
    )


def _warnings(asked: Asked, probed: ProbeReport | None, expected: ExpectedKL | None, nothing: bool) -> list[str]:
    told = []
    if asked.overlap:
        told.append(
            f"the probe holds {len(asked.overlap)} of the samples to be forgotten (the first is {asked.overlap[0]}): "
            "leave them out of it"
        )
    if nothing:
        return [*told, "every gradient of these records is zero: the model is as it was"]
    if probed is None:
        return [
            "first order only: the other samples' gradients are taken as recorded, which over-forgets and can damage "
            f"the model; pass probe= (64 examples of any data like the training data){asked.advice}"
        ]
    if probed.misfit is not None and not probed.misfit <= _MISFIT:
        told.append(
            f"the change moves the model's answers on rows of the training {probed.misfit:.1f} times as much as on the "
            "probe: it is unlike what was trained on, and its curvature says little of it. Leave probe= out, and the "
            "rows of the training that the store keeps are asked"
        )
    # So that NaN counts as damage.
    if probed.loss_before and not probed.loss_after <= probed.loss_before * (1 + _DAMAGE):
        told.append(
            f"the probe's own loss rose from {probed.loss_before:.4f} to {probed.loss_after:.4f}: the change is larger "
            "than one linearisation can carry, and the model is damaged; do not use it without a closer look. A "
            "smaller strength= takes less of these samples away, and does less harm"
        )
    told += expected.doubts if expected is not None else []
    return told


def _row(
    report: RollbackReport,
    digest_before: str,
    removed: list[list[int]],
    parameters: frozenset[str] | None,
    correction: Correction,
) -> dict[str, Any]:
    return {
        "at": datetime.now(UTC).isoformat(),
        "samples": list(report.samples),
        "strength": report.strength,
        "method": report.method,
        "records": report.records,
        "delta_norm": report.delta_norm,
        "digest_before": digest_before,
        "digest_after": report.rollback_id,
        "removed": removed,
        "parameters": None if parameters is None else sorted(parameters),
        "optimizer_states": correction.states,
    }
