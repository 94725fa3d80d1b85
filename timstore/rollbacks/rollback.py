"""Prepare, compute, filter, publish: the way of a rollback, in this order and no other."""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import fmean

import torch

from timstore.database.identity import combined_digest
from timstore.database.states import State
from timstore.database.store import Store
from timstore.errors import StateError
from timstore.interrupts import CriticalSection
from timstore.options import RollbackOptions
from timstore.rollbacks.adam_preconditioner import decayed, into_steps, read_preconditioner
from timstore.rollbacks.apply import Writes, foresee, moves
from timstore.rollbacks.expectation import expected_kl, faded, first_use, order_noise
from timstore.rollbacks.filtering import probe_filter, read_path
from timstore.rollbacks.optimizer_state import Correction, buffers_of, described
from timstore.rollbacks.plan import bin_edges, longest, step_rows
from timstore.rollbacks.prepared import Prepared, prepare
from timstore.rollbacks.probe import Outcome, Room
from timstore.rollbacks.replay import Replay, Replayed
from timstore.rollbacks.report import Bar, ExpectedKL, ProbeReport, RollbackReport, rollback_shown
from timstore.rollbacks.selection import warnings_of_earlier
from timstore.rollbacks.streaming_sum import stream
from timstore.rollbacks.targets import Target
from timstore.rollbacks.vectors import Vector, Workspace

_log = logging.getLogger(__name__)

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
    ids: Iterable[int] | None,
    options: RollbackOptions,
    *,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    section: CriticalSection,
) -> RollbackReport:
    """Remove the contribution of samples from the target; see `timstore.Store.rollback`.

    Args:
        optimizers: those of `options.optimizer`, without what is around them.
        section: entered once nothing can fail any more.
    """
    began = time.perf_counter()
    prepared = prepare(store, target, ids, options, optimizers)
    plan, memory = prepared.plan, prepared.readers.memory
    sizes = {name: parameter.numel for name, parameter in plan.parameters.items()}
    dtype, device = getattr(torch, options.accumulate), next(iter(prepared.places.values())).device
    with Workspace(sizes, dtype=dtype, memory_limit_bytes=memory.deltas_bytes, device=device) as workspace:
        gradients = sum(len(rows.owner) for rows in plan.rows.values()) if prepared.tape is None else len(sizes)
        # For either half of the probe every bin starts a part of the space, and so does the trace.
        products = 2 * _depth(prepared) * (len(plan.lengths) + 1) if prepared.asked.probe else 0
        with rollback_shown(options.progress, gradients, products) as bar:
            first_order = compute(prepared, workspace, bar)
            filtered = filter_change(prepared, first_order, workspace, bar)
        return publish(prepared, first_order, filtered, began, section)


@dataclass(frozen=True, eq=False, slots=True)
class FirstOrder:
    """The change while the other samples' gradients stay as they were recorded.

    Attributes:
        increments: of each time bin.
        preconditioner: of Adam's steps; None where nothing is to be divided and no probe asked.
        largest: by parameter, the most that an error of its sum was multiplied by.
    """

    increments: list[Vector]
    replayed: Replayed | None
    preconditioner: Vector | None
    largest: dict[str, float]
    correction: Correction


def compute(prepared: Prepared, workspace: Workspace, bar: Bar) -> FirstOrder:
    """Sum the change up, or run the optimizer again."""
    plan, readers = prepared.plan, prepared.readers
    increments, replayed = [workspace.new() for _ in plan.lengths], None
    if prepared.tape is None:
        stream(plan.parameters, plan.rows, readers, increments, bar.added)
    else:
        replayed = Replay(
            tape=prepared.tape,
            known=prepared.selection.known,
            timelines=prepared.timelines,
            changes=prepared.changes,
            rows=step_rows(prepared.selection, prepared.timelines),
            edges=bin_edges(prepared.timelines, len(increments)),
            strength=prepared.options.strength,
            readers=readers,
            keep_states=bool(prepared.optimizers),
        ).run(prepared.places, increments, bar.added)
        _check_replayed(prepared, replayed)
    preconditioner, largest = None, dict.fromkeys(workspace.sizes, 1.0)
    if prepared.asked.probe is not None or prepared.divides:
        moment = prepared.selection.identity.moment
        moments = State.find(prepared.snapshot, readers.cache, "exp_avg_sq", moment=moment)
        preconditioner = read_preconditioner(plan, moments, workspace)
    if preconditioner is not None and prepared.divides:
        largest = into_steps(increments, preconditioner)
    correction = _correction(prepared, replayed, workspace)
    return FirstOrder(increments, replayed, preconditioner, largest, correction)


def _check_replayed(prepared: Prepared, replayed: Replayed) -> None:
    """Refuse a replay that does not end where the model is: something else than the optimizer changed it."""
    if prepared.selection.identity.is_rolled_back:
        return
    halves = any(place.dtype in (torch.float16, torch.bfloat16) for place in prepared.places.values())
    if replayed.relative_off > _OFF and not halves:
        raise StateError(
            f"run again over the recorded gradients, the optimizer ends {replayed.relative_off:.1%} of the run's "
            "length away from the model: something else changed the parameters (weights averaged or copied in the "
            "loop, or an optimizer with a memory of its own), so that the replay would be wrong",
            kind="replay-off",
        )


def _correction(prepared: Prepared, replayed: Replayed | None, workspace: Workspace) -> Correction:
    """Return what is to be done to the optimizers' state."""
    if not prepared.optimizers:
        return Correction()
    text = described(prepared.timelines, replayed)
    if replayed is not None:
        return Correction(replayed=replayed, text=text)
    buffers = buffers_of(prepared.timelines, prepared.selection.known)
    if not workspace.sizes.keys() & buffers.keys():
        return Correction(text=text)
    plan, change = prepared.plan_of(workspace.sizes, 1, of="buffer"), workspace.new()
    stream(plan.parameters, plan.rows, prepared.readers, [change])
    return Correction(change, buffers, text=text)


@dataclass(frozen=True, eq=False, slots=True)
class FilteredChange:
    """What is added to the parameters, and what the probe says of it; None without one."""

    delta: Vector
    probe: ProbeReport | None = None
    expected: ExpectedKL | None = None


def _depth(prepared: Prepared) -> int:
    """Return how many products each bin's space takes."""
    # Five are as good as eight for each of several bins (docs/design/curvature.md); a single bin takes more.
    return 5 if len(prepared.plan.lengths) > 1 else 16


def filter_change(prepared: Prepared, first_order: FirstOrder, workspace: Workspace, bar: Bar) -> FilteredChange:
    """Let the other samples answer, as far as the model's curvature on the probe tells."""
    plan, asked, preconditioner = prepared.plan, prepared.asked, first_order.preconditioner
    probe, identity, cache = asked.probe, prepared.selection.identity, prepared.readers.cache
    if probe is None:
        (delta,) = first_order.increments
        if preconditioner is not None:
            decayed(delta, preconditioner, plan)
            preconditioner.free()
        return FilteredChange(delta)
    path = read_path(prepared.snapshot, cache, identity.moment, plan, prepared.timelines, workspace)
    # Coupled decay is in the closed form; Adam's acts through the division, as a curvature of its own.
    decays = {name: division.decay for name, division in plan.divisions.items() if division.decay}
    model, limit_bytes = prepared.target.model(), prepared.options.memory_limit_bytes
    bar.curved(probe.sequences)
    try:
        filtered = probe_filter(
            model,
            first_order.increments,
            plan.lengths,
            probe,
            workspace,
            depth=_depth(prepared),
            path=path,
            preconditioner=preconditioner,
            decays=decays if prepared.divides else {},
            judge=asked.training,
            keep_bytes=limit_bytes,
            advance=bar.taken,
        )
        outcome = Outcome(model, probe, room=Room(limit_bytes))
        losses = outcome.losses(filtered.delta)
        # Held against rows of the training, which are like it: how much more the change moves those than the probe.
        compares = asked.training is not None and min(asked.training.sequences, probe.sequences) >= _FEW
        own = outcome.divergence(filtered.delta) if compares else 0.0
    except Exception as error:
        if asked.rows is not None:
            error.add_note("timstore: these rows were kept of the training by themselves; probe=False asks nothing")
        raise
    for vector in (preconditioner, *(stretch.parameters for stretch in path)):
        if vector is not None:
            vector.free()
    ways = filtered.ways
    report = ProbeReport(
        sequences=probe.sequences,
        products=sum(way.products for way in ways),
        damping=fmean(way.damping for way in ways),
        expected=fmean(way.expected for way in ways),
        seen=fmean(way.seen for way in ways),
        moved=filtered.moved,
        apart=filtered.apart,
        loss_before=losses[0],
        loss_after=losses[1],
        noise=order_noise(ways, longest(prepared.timelines)) if probe.loss == "cross_entropy" else None,
        misfit=ways[0].seen / own if own else None,
        waypoints=len(path) - 1,
        kept=asked.rows,
        left_out=asked.left_out,
    )
    return FilteredChange(filtered.delta, report, _expected(prepared, filtered.delta, report))


def _expected(prepared: Prepared, delta: Vector, probed: ProbeReport) -> ExpectedKL | None:
    """Return how far from a retrained model this is expected to end, where rows of the training were asked."""
    if not (prepared.options.removes_everything and prepared.asked.knows_training) or probed.noise is None:
        return None
    # <gradient of the samples' mean loss where they were first used, delta>: what the change raises it by.
    plan, gradient = prepared.plan, delta.workspace.new()
    rows = {
        name: mine
        for name, mine in first_use(prepared.selection, prepared.timelines).items()
        if name in plan.parameters
    }
    stream({name: plan.parameters[name] for name in rows}, rows, prepared.readers, [gradient])
    rise = gradient.dot(delta)
    gradient.free()
    return expected_kl(rise, faded(prepared.selection), probed.seen, probed.noise)


def publish(
    prepared: Prepared,
    first_order: FirstOrder,
    filtered: FilteredChange,
    began: float,
    section: CriticalSection,
) -> RollbackReport:
    """Say what the change will do, put it on record, and change the target at last."""
    options, selection, plan, probed = prepared.options, prepared.selection, prepared.plan, filtered.probe
    identity, workers = selection.identity, prepared.readers.memory.workers
    delta, correction = filtered.delta, first_order.correction
    change = foresee(prepared.places, delta, delta.workspace, workers)
    if not change.finite:
        raise StateError(
            "the change holds NaN or Inf, as records kept with allow_nonfinite do; leave them out by where=",
            kind="not-finite",
        )
    # What the model will be known by, before it is that: the digests of the new values.
    after = {**prepared.digests, **change.digests}
    # What is stored is off by at most its measured error, which Adam's division multiplies; parameters are orthogonal.
    error_bound = sum((bound * first_order.largest[name]) ** 2 for name, bound in plan.error_bounds.items()) ** 0.5
    nothing = not change.norm and not selection.leaving.largest.any()
    report = RollbackReport(
        samples=selection.samples,
        skipped=selection.skipped,
        records=len(selection.removed),
        left_out=selection.before[0],
        parameters=delta.workspace.numel,
        method=prepared.method + " + probe" * bool(probed),
        approximates=prepared.approximates(None if probed is None else probed.sequences),
        denominator=options.denominator,
        clipping=prepared.clipping,
        strength=options.strength,
        dry_run=options.dry_run,
        model=str(prepared.recognised),
        delta_norm=change.norm,
        relative_change=change.norm / change.before_norm if change.before_norm else 0.0,
        error_bound=error_bound,
        rounding=change.lost_norm / change.norm if change.norm else 0.0,
        read_bytes=plan.dense_bytes if prepared.tape is None else selection.dense_bytes + prepared.tape.dense_bytes,
        seconds=0.0,
        rollback_id=combined_digest({name: after[name] for name in identity.names}),
        replay_off=None if first_order.replayed is None else first_order.replayed.relative_off,
        optimizer=correction.text,
        probe=probed,
        expected_kl=filtered.expected,
        checkpoint=prepared.target.text,
        warnings=(*warnings_of_earlier(selection), *prepared.warnings(), *_warnings(prepared, filtered, nothing)),
    )
    if not options.dry_run:
        _change(prepared, report, delta, correction, section)
    report = replace(report, seconds=time.perf_counter() - began)
    return report if options.dry_run else section.finish(report)


def _change(
    prepared: Prepared, report: RollbackReport, delta: Vector, correction: Correction, section: CriticalSection
) -> None:
    """Write the rollback down, and change the target and the optimizers, all of it or nothing."""
    options, selection, store = prepared.options, prepared.selection, prepared.store
    # All or nothing: the parameters and the optimizers' state are one list of writes.
    writes = [*moves(prepared.places, delta), *correction.writes(prepared.optimizers, prepared.live)]
    row = {
        "at": datetime.now(UTC).isoformat(),
        "samples": list(report.samples),
        "strength": report.strength,
        "method": report.method,
        "records": report.records,
        "delta_norm": report.delta_norm,
        "digest_before": selection.identity.digest,
        "digest_after": report.rollback_id,
        "removed": selection.removed,
        "parameters": None if options.parameters is None else sorted(options.parameters),
        "optimizer_states": correction.states,
    }
    prepared.target.change(
        Writes(writes, delta.workspace, prepared.readers.memory.workers),
        record=lambda: store.append_rollback(row, prepared.live if options.keep_delta else None),
        section=section,
    )
    _log.info(
        "%s: %d samples removed, %s, change %.4g", store.path, len(report.samples), report.method, report.delta_norm
    )


def _warnings(prepared: Prepared, filtered: FilteredChange, nothing: bool) -> list[str]:
    """Return what the probe, or that there is none, gives reason to warn of."""
    asked, probed, told = prepared.asked, filtered.probe, []
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
    return told + (filtered.expected.doubts if filtered.expected is not None else [])
