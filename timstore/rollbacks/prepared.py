"""What a rollback knows before it computes anything: what leaves, from which run, by which method, asking what."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from timstore.database.identity import Identity, recognise
from timstore.database.kept_rows import asks_kept
from timstore.database.snapshot import Snapshot
from timstore.database.store import Store
from timstore.errors import CoverageError, InvalidInputError, ReadOnlyError
from timstore.model.optimizer_names import ADAM_FAMILY, SGD_FAMILY
from timstore.options import RollbackOptions
from timstore.rollbacks.clip_factors import StepChange
from timstore.rollbacks.optimizer_state import check_optimizers
from timstore.rollbacks.places import Place
from timstore.rollbacks.plan import Plan, check_steps, make_plan
from timstore.rollbacks.probe import Asked, probe_to_ask
from timstore.rollbacks.replay import Tape, find_tape
from timstore.rollbacks.selection import Selection, asked_samples, select
from timstore.rollbacks.step_changes import Sources, changes_of, sources_of
from timstore.rollbacks.streaming_sum import MemoryShares, Readers
from timstore.rollbacks.targets import Target
from timstore.rollbacks.timeline import Timeline, moment_key, read_timelines

# The methods, and what each does with the removed samples' gradients, where `touched` of `steps` steps held one.
CLOSED_FORM, REPLAY, FINAL_MOMENT = "closed form", "exact replay", "final moment"
_SAYS = {
    CLOSED_FORM: "what the samples did is taken out of {touched} of {steps} steps, those that held one of them, by the "
    "optimizer's own formula, to rounding",
    REPLAY: "the optimizer runs again over {steps} steps' recorded gradients, with and without what the samples did in "
    "{touched} of them, to rounding",
    FINAL_MOMENT: "what the samples did is taken out of {touched} of {steps} steps, those that held one of them, "
    "divided by the second moment that Adam had at the end of the run, not at each of those steps",
}


@dataclass(frozen=True, eq=False, slots=True)
class Prepared:
    """A rollback before anything of it was computed.

    Attributes:
        optimizers: whose state goes along.
        recognised: the model's place in the history; `selection.identity` is what counts of its earlier rollbacks.
        changes: by group, how the consumed gradients change.
        sources: what the changed steps' whole gradients are made of; None for a replay, which has them all.
        tape: of a replay.
        places: where each parameter that changes is; `live` are those of a model in memory, where they are needed.
    """

    store: Store
    target: Target
    options: RollbackOptions
    optimizers: Sequence[torch.optim.Optimizer]
    recognised: Identity
    digests: Mapping[str, str]
    selection: Selection
    timelines: dict[int, Timeline]
    readers: Readers
    method: str
    changes: dict[int, StepChange]
    sources: Sources | None
    tape: Tape | None
    asked: Asked
    plan: Plan
    places: dict[str, Place]
    live: dict[str, torch.nn.Parameter]

    @property
    def snapshot(self) -> Snapshot:
        return self.selection.snapshot

    @property
    def divides(self) -> bool:
        """Whether the sums are of gradients that Adam has yet to divide."""
        return self.method == FINAL_MOMENT

    def plan_of(self, names: Iterable[str], bins: int, of: str = "parameter") -> Plan:
        """Return a plan of some parameters, or of their optimizers' buffers."""
        strength = self.options.strength
        return make_plan(self.selection, list(names), self.timelines, self.changes, self.sources, bins, strength, of)

    @property
    def clipping(self) -> str:
        """What becomes of the clip factors, in words."""
        if not any(change.clipped for change in self.changes.values()):
            return "none"
        unknown = max(int(change.unknown.sum()) for change in self.changes.values())
        touched = len(self.selection.leaving.keys)
        if not unknown:
            return "followed"
        return f"kept in {unknown} of the {touched} steps that held a removed sample: their whole gradient is not known"

    def approximates(self, sequences: int | None) -> str:
        """Return what the change takes for granted, in words; `sequences` are the probe's, None without one."""
        steps = max(len(timeline.keys) for timeline in self.timelines.values())
        others = (
            "the other samples' gradients stay as they were recorded, though without these samples they would have "
            "been others"
            if sequences is None
            else "how the other samples would have answered is estimated by the model's curvature at the end of the "
            f"run, on the probe's {sequences} sequences"
        )
        return f"{_SAYS[self.method].format(touched=len(self.selection.leaving.keys), steps=steps)}; {others}"

    def warnings(self) -> list[str]:
        """Return what the user should know of the change before curvature is asked."""
        told, identity = [], self.recognised
        several = max(timeline.micro_batches for timeline in self.timelines.values()) > 1
        if self.options.denominator == "renormalised" and several:
            told.append(
                "steps had several micro-batches, or processes, and the mean is taken again over all of them together: "
                "wrong if each had a mean of its own"
            )
        moved = any(change.on_whole.any() or change.emptied.any() for change in self.changes.values())
        first = int(self.selection.leaving.keys[0])
        # Training that went on after a rollback recorded factors and means as they are without its samples.
        together = identity.is_rolled_back or first < moment_key(*identity.restarted)
        if identity.removals and together and (self.method == REPLAY or moved):
            told.append(
                f"{len(identity.removed)} samples were removed from this model before, and clip factors, means and "
                "Adam's moments do not add up over two rollbacks: undo the earlier one and remove all of them at once"
            )
        if identity.moment is None and self.method == REPLAY:
            told.append("the model was not recognised by its bits; that the replay ends near it has to do")
        return told


def prepare(
    store: Store,
    target: Target,
    ids: Iterable[int] | None,
    options: RollbackOptions,
    optimizers: Sequence[torch.optim.Optimizer],
) -> Prepared:
    """Find out what leaves and how; check all that can be checked before anything is computed."""
    # What was asked for, and which model this is.
    samples = asked_samples(ids, options.where)
    if store.mode == "r" and not options.dry_run:
        raise ReadOnlyError(f"{store.path} was opened to read, and a rollback is written down: open it with mode 'a'")
    snapshot, digests = store.snapshot(), target.digests()
    recognised = recognise(snapshot, digests)
    identity = recognised.taken_for_whole() if options.force else recognised
    selection = select(snapshot, samples, options, identity)
    asked = probe_to_ask(snapshot, target, options, {*selection.samples, *recognised.removed})
    # What the steps were, and what they would have been without what leaves.
    readers = Readers(snapshot, MemoryShares.divide(options.memory_limit_bytes, snapshot))
    timelines = read_timelines(snapshot, identity.moment, selection.samples)
    check_steps(selection, timelines)
    method, tape = _choose(options.method, timelines, lambda: find_tape(selection, readers, timelines, optimizers))
    dtype = getattr(torch, options.accumulate)
    changes, sources = changes_of(selection, timelines, readers, options.denominator, dtype), None
    if tape is None:
        changes, sources = sources_of(selection, timelines, changes)
        _check_denominator(options, changes)
    # What changes by that, and where it is.
    asked = _answerable(asked, options, timelines)
    names = _changing(selection, options, timelines, changes, tape)
    # No bin without a step; without curvature one bin tells all.
    steps = max((len(timeline.keys) for timeline in timelines.values()), default=1)
    bins = min(options.bins if asked.probe else 1, steps)
    plan = make_plan(selection, names, timelines, changes, sources, bins, options.strength)
    if not plan.parameters:
        raise InvalidInputError("parameters names none that these records changed: nothing to remove")
    places = target.places(plan.parameters)
    parameters = dict(target.model().named_parameters()) if optimizers or options.keep_delta else {}
    live = {name: parameters[name] for name in places if name in parameters}
    if optimizers:
        check_optimizers(optimizers, live, selection.known, timelines)
    return Prepared(
        store=store,
        target=target,
        options=options,
        optimizers=optimizers,
        recognised=recognised,
        digests=digests,
        selection=selection,
        timelines=timelines,
        readers=readers,
        method=method,
        changes=changes,
        sources=sources,
        tape=tape,
        asked=asked,
        plan=plan,
        places=places,
        live=live,
    )


def _choose(asked: str, timelines: dict[int, Timeline], find: Callable[[], Tape | str]) -> tuple[str, Tape | None]:
    """Return the method that was asked for, or the best one that the records allow; and the tape of a replay.

    Args:
        find: returns the tape, or why there is none; called only where that decides.
    """
    optimizers = {timeline.optimizer for timeline in timelines.values()}
    # A NaN is a step that was not clipped by value.
    by_value = any((timeline.clip_value == timeline.clip_value).any() for timeline in timelines.values())
    linear = optimizers <= set(SGD_FAMILY) and not by_value
    adam = optimizers <= {*SGD_FAMILY, *ADAM_FAMILY} and not by_value
    if linear and asked in ("auto", CLOSED_FORM):
        return CLOSED_FORM, None
    if adam and not linear and asked == FINAL_MOMENT:
        return FINAL_MOMENT, None
    # In this order: to rounding and cheap, to rounding, an approximation.
    tape = find()
    possible = [CLOSED_FORM] * linear + [REPLAY] * isinstance(tape, Tape) + [FINAL_MOMENT] * (adam and not linear)
    chosen = next((method for method in possible if asked in ("auto", method)), None)
    if chosen is not None:
        return chosen, tape if isinstance(tape, Tape) and chosen == REPLAY else None
    names = " and ".join(sorted(optimizers))
    if asked == REPLAY or not possible:
        what = " with clipping by value" if by_value else ""
        raise CoverageError(
            f"a run of {names}{what} can be rolled back by running the optimizer again, and that cannot be done: "
            f"{tape}",
            kind="no-replay",
        )
    raise CoverageError(
        f"method {asked!r} does not fit a run of {names}; {' or '.join(map(repr, possible))} does",
        kind="other-method",
    )


def _check_denominator(options: RollbackOptions, changes: dict[int, StepChange]) -> None:
    unknown = sum(int(change.unknown.sum()) for change in changes.values())
    if options.denominator == "renormalised" and unknown:
        raise CoverageError(
            f"denominator='renormalised' needs the whole gradient of every step that samples leave, and of {unknown} "
            "it is not known: record with optimizer_history='gradients', or all samples; or use denominator='kept'",
            kind="no-whole-gradient",
        )


def _answerable(asked: Asked, options: RollbackOptions, timelines: dict[int, Timeline]) -> Asked:
    """Return what is asked where it is known what the optimizers multiply a gradient by; else nothing is."""
    optimizers = {timeline.optimizer for timeline in timelines.values()}
    if asked.probe is None or optimizers <= {*SGD_FAMILY, *ADAM_FAMILY}:
        return asked
    if options.probe is not None and not asks_kept(options.probe):
        raise InvalidInputError(
            f"the probe filter knows the steps of SGD and Adam, not of {' and '.join(sorted(optimizers))}: "
            "leave probe out",
            kind="no-coordinates",
        )
    return Asked(None)


def _changing(
    selection: Selection,
    options: RollbackOptions,
    timelines: dict[int, Timeline],
    changes: dict[int, StepChange],
    tape: Tape | None,
) -> list[str]:
    """Return the parameters that change."""
    names = selection.names(options.parameters)
    if tape is None and not any(change.on_whole.any() for change in changes.values()):
        return names
    # Another clip factor changes every parameter, whether the leaving samples reached it or not.
    trained = [name for name, parameter in selection.known.items() if parameter.group_id in timelines]
    if tape is not None:
        trained = [name for name in trained if name in tape.gradients]
    return [name for name in trained if options.parameters is None or name in options.parameters]
