"""One recorded run and what leaves it: the method that its records allow, and the sums that the method makes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from timstore.database.identity import Identity
from timstore.database.snapshot import Snapshot
from timstore.errors import CoverageError
from timstore.model.optimizer_names import ADAM_FAMILY, SGD_FAMILY
from timstore.rollbacks.clip_factors import Change
from timstore.rollbacks.expectation import first_use
from timstore.rollbacks.methods import FINAL_MOMENT, REPLAY, Method, approximated, choose
from timstore.rollbacks.optimizer_state import Correction, buffers_of, described
from timstore.rollbacks.places import Place
from timstore.rollbacks.plan import Plan, Sources, bin_edges, check_steps, make_plan, step_rows
from timstore.rollbacks.replay import Replay, Replayed
from timstore.rollbacks.request import Request
from timstore.rollbacks.selection import Selection
from timstore.rollbacks.step_changes import changes_of, sources_of
from timstore.rollbacks.streaming_sum import Budget, Readers, stream
from timstore.rollbacks.tape import Tape, find_tape
from timstore.rollbacks.timeline import Timeline, moment_key, read_timelines
from timstore.rollbacks.vectors import Vector, Workspace


@dataclass(frozen=True, eq=False, slots=True)
class Run:
    """A recorded run, seen from one request.

    Attributes:
        changes: how each group's consumed gradients change.
        sources: what the changed steps' whole gradients are made of; None for a replay, which has them all.
        dtype: of the sums.
    """

    snapshot: Snapshot
    request: Request
    selection: Selection
    timelines: dict[int, Timeline]
    changes: dict[int, Change]
    sources: Sources | None
    method: Method
    tape: Tape | None
    readers: Readers
    budget: Budget
    dtype: torch.dtype

    @classmethod
    def read(
        cls,
        snapshot: Snapshot,
        request: Request,
        identity: Identity,
        selection: Selection,
        budget: Budget,
        dtype: torch.dtype,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> "Run":
        """Read a run's history, and choose the method.

        Raises:
            CoverageError: the records do not allow the method, the denominator, or any rollback.
            StateError: several optimizers in one group.
        """
        timelines = read_timelines(snapshot, identity.moment, selection.samples)
        check_steps(selection, timelines)
        readers = Readers(snapshot, budget)
        first = int(selection.leaving.keys[0])

        @cache
        def tape() -> Tape | str:
            return find_tape(snapshot, readers.cache, identity, selection.known, timelines, first, optimizers)

        method = choose(request.method, timelines, lambda: why if isinstance(why := tape(), str) else None)
        changes = changes_of(snapshot, request, identity, selection, timelines, readers, budget, dtype)
        sources = None
        if method is not REPLAY:
            changes, sources = sources_of(snapshot, request, identity, selection.known, timelines, changes)
            _check_denominator(request, changes)
        found = tape() if method is REPLAY else None
        kept = found if isinstance(found, Tape) else None
        return cls(snapshot, request, selection, timelines, changes, sources, method, kept, readers, budget, dtype)

    @property
    def optimizers(self) -> str:
        """The optimizers' classes, in words."""
        return " and ".join(sorted({timeline.optimizer for timeline in self.timelines.values()}))

    @property
    def has_coordinates(self) -> bool:
        """Whether it is known what the optimizers multiply a gradient by, which the probe filter works with."""
        return all(one.optimizer in SGD_FAMILY + ADAM_FAMILY for one in self.timelines.values())

    @property
    def divides(self) -> bool:
        """Whether the sums are of gradients that Adam has yet to divide."""
        return self.method is FINAL_MOMENT

    @property
    def clipping(self) -> str:
        """What becomes of the clip factors, in words."""
        if not any(change.clipped for change in self.changes.values()):
            return "none"
        change = max(self.changes.values(), key=lambda one: int(one.unknown.sum()))
        touched = len(self.selection.leaving.keys)
        unknown = int(change.unknown.sum())
        if not unknown:
            return "followed"
        return f"kept in {unknown} of the {touched} steps that held a removed sample: their whole gradient is not known"

    def approximates(self, sequences: int | None) -> str:
        """Return what the change takes for granted, in words; `sequences` are the probe's, None without one."""
        steps = max(len(timeline.keys) for timeline in self.timelines.values())
        return approximated(self.method, len(self.selection.leaving.keys), steps, sequences)

    def plan(self, bins: int) -> Plan:
        """Return what changes, and for a sum what is read with which weights."""
        # No bin without a step.
        bins = min(bins, max((len(timeline.keys) for timeline in self.timelines.values()), default=1))
        names = self.selection.names(self.request.parameters)
        if self.method is REPLAY or any(change.on_whole.any() for change in self.changes.values()):
            # Another clip factor changes every parameter, whether the leaving samples reached it or not.
            trained = [name for name, one in self.selection.known.items() if one.group_id in self.timelines]
            if self.tape is not None:
                trained = [name for name in trained if name in self.tape.gradients]
            wanted = self.request.parameters
            names = [name for name in trained if wanted is None or name in wanted]
        strength = self.request.strength
        plan = make_plan(self.selection, names, self.timelines, self.changes, self.sources, bins, strength)
        return plan if self.tape is None else replace(plan, dense_bytes=self.selection.dense_bytes + self.tape.bytes)

    def work(self, plan: Plan) -> int:
        """Return how often `sum_up` will advance."""
        return sum(len(rows.owner) for rows in plan.rows.values()) if self.tape is None else len(plan.parameters)

    def sum_up(
        self,
        plan: Plan,
        places: Mapping[str, Place],
        increments: Sequence[Vector],
        workspace: Workspace,
        keep_states: bool,
        advance: Callable[[int], None],
    ) -> Replayed | None:
        """Write the change into one vector per time bin, before Adam's division where `divides`."""
        if self.tape is None:
            stream(plan, self.readers, increments, self.budget, advance)
            return None
        return Replay(
            tape=self.tape,
            known=self.selection.known,
            timelines=self.timelines,
            changes=self.changes,
            rows=step_rows(self.selection, self.timelines),
            edges=bin_edges(self.timelines, len(increments)),
            precision=self.snapshot.settings.precision,
            strength=self.request.strength,
            keep_states=keep_states,
        ).run(places, increments, self.readers, self.budget, workspace, advance)

    def rise(self, plan: Plan, delta: Vector) -> float:
        """Return how much a change raises the leaving samples' mean loss at their first use, to first order.

        Cost: reads what each of them did in the first step that used it.
        """
        rows = {name: one for name, one in first_use(self.selection, self.timelines).items() if name in plan.parameters}
        used = replace(plan, rows=rows, parameters={name: plan.parameters[name] for name in rows})
        gradient = delta.workspace.new()
        stream(used, self.readers, [gradient], self.budget)
        rise = gradient.dot(delta)
        gradient.free()
        return rise

    def correction(
        self, optimizers: Sequence[torch.optim.Optimizer], replayed: Replayed | None, workspace: Workspace
    ) -> tuple[Correction, str | None]:
        """Return what is to be done to the optimizers' state, and that in words (None without an optimizer)."""
        if not optimizers:
            return Correction(), None
        text = described(self.timelines, replayed)
        if replayed is not None:
            return Correction(replaced=replayed.states, others=replayed.others), text
        buffers = buffers_of(self.timelines, self.selection.known)
        if not workspace.sizes.keys() & buffers.keys():
            return Correction(), text
        plan = make_plan(
            self.selection,
            list(workspace.sizes),
            self.timelines,
            self.changes,
            self.sources,
            1,
            self.request.strength,
            of="buffer",
        )
        vector = workspace.new()
        stream(plan, self.readers, [vector], self.budget)
        return Correction(vector, buffers), text

    def warnings(self, identity: Identity) -> list[str]:
        """Return what the user should know of the change before curvature is asked."""
        found = []
        several = max(one.micro_batches for one in self.timelines.values()) > 1
        if self.request.denominator == "renormalised" and several:
            found.append(
                "steps had several micro-batches, or processes, and the mean is taken again over all of them together: "
                "wrong if each had a mean of its own"
            )
        moved = any(change.on_whole.any() or change.emptied.any() for change in self.changes.values())
        first = int(self.selection.leaving.keys[0])
        # Training that went on after a rollback recorded factors and means as they are without its samples.
        together = identity.is_rolled_back or first < moment_key(*identity.restarted)
        if identity.removals and together and (self.method is REPLAY or moved):
            found.append(
                f"{len(identity.removed)} samples were removed from this model before, and clip factors, means and "
                "Adam's moments do not add up over two rollbacks: undo the earlier one and remove all of them at once"
            )
        if identity.moment is None and self.method is REPLAY:
            found.append("the model was not recognised by its bits; that the replay ends near it has to do")
        return found


def _check_denominator(request: Request, changes: dict[int, Change]) -> None:
    unknown = sum(int(np.sum(change.unknown)) for change in changes.values())
    if request.denominator == "renormalised" and unknown:
        raise CoverageError(
            f"denominator='renormalised' needs the whole gradient of every step that samples leave, and of {unknown} "
            "it is not known: record with optimizer_history='gradients', or all samples; or use denominator='kept'",
            kind="no-whole-gradient",
        )
