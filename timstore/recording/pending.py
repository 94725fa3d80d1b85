"""What awaits the optimizers' steps, and which micro-batch runs: what the hooks of a model and of optimizers share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import ref

import torch
from torch import nn

from timstore.errors import CoverageError
from timstore.recording.batches import Ids, MicroBatch
from timstore.recording.chosen import Chosen
from timstore.recording.clip_measurement import ClipMeasurement
from timstore.recording.modules import Captured


@dataclass(slots=True)
class Clock:
    """When a recording is.

    Attributes:
        epoch, step: of the next step, whichever optimizer takes it.
        last: (epoch, step) of the latest one, None before the first.
    """

    epoch: int = 0
    step: int = 0
    last: tuple[int, int] | None = None


class OwnPass:
    """Passes of our own through a model that is recorded: no hook of ours takes anything from them."""

    def __init__(self) -> None:
        self._depth = 0

    def runs(self) -> bool:
        """Say whether one runs."""
        return self._depth > 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run one; they may be within each other."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1


class Pending:
    """Keeps, for one optimizer, the micro-batches whose gradients it has yet to consume.

    Several optimizers may consume one backward pass, each at its own time; a micro-batch keeps the parts of an
    optimizer's parameters until that one has stepped.

    Args:
        parameters: the optimizer's, by name.
        own: passes of our own, which consume nothing.
        whole, averaged: as `ClipMeasurement` takes them.

    Attributes:
        batches: the micro-batches.
        skipped: steps that were skipped since the last one.
        proven: (epoch, step) of the latest step whose parts were seen to add up.
        proved: parts were seen to add up, so that only the chosen samples are captured until `prove` is called.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], own: OwnPass, *, whole: bool, averaged: bool) -> None:
        self.batches: list[MicroBatch] = []
        self.skipped = 0
        self.proved = False
        self.proven: tuple[int, int] | None = None
        self.clip = ClipMeasurement(
            parameters,
            paused=own.runs,
            vanished=self._skip,
            accumulated=self._settle,
            whole=whole,
            averaged=averaged,
        )
        self._owned = frozenset(map(id, parameters.values()))
        self._whole = whole
        self._earlier = 0  # how many of them had their forward pass before the latest backward pass was over

    @property
    def used(self) -> list[MicroBatch]:
        """Those whose backward pass reached the optimizer's parameters, as far as can be told."""
        return [batch for batch in self.batches if batch.reaches(self._owned)]

    @property
    def parts(self) -> Captured:
        """The optimizer's parameters and, per captured sample, a part of the gradient."""
        return [pair for batch in self.batches for pair in batch.parts() if id(pair[0]) in self._owned]

    def begin(self, batch: MicroBatch) -> None:
        """A micro-batch is about to have its forward pass."""
        if self.clip.begun:
            self._earlier = len(self.batches)
            if self.clip.lost():
                self._skip()
        batch.awaited += 1
        self.batches.append(batch)
        self.clip.extremes = self._whole or not all(batch.empty for batch in self.batches)

    def drop(self, batch: MicroBatch) -> None:
        """Forget a micro-batch whose forward pass failed."""
        if batch in self.batches:
            self.batches.remove(batch)

    def discard(self, count: int | None = None) -> None:
        """Let go of the first micro-batches, or all: the step that they were for is over, or was skipped."""
        for batch in self.batches[:count]:
            batch.leave(self._owned)
        del self.batches[:count]
        self._earlier = 0
        self.clip.clear()

    def prove(self) -> None:
        """Hold all of the next step's parts to what is accumulated."""
        self.proved = False
        self.clip.keep_local()

    def since_proof(self) -> str:
        """Return what to say, in the error that a later proof is, of the records since the latest one that held."""
        if self.proven is None:
            return ""
        epoch, step = self.proven
        return (
            f". All was right at epoch {epoch}, step {step}; what was recorded since may not be. Go on from a "
            f"checkpoint of that step with resume_from=({epoch}, {step + 1}), which supersedes it"
        )

    def _skip(self) -> None:
        """The gradients accumulated so far were zeroed without a step."""
        self.skipped += 1
        self.discard(self._earlier)

    def _settle(self, parameter: nn.Parameter) -> None:
        """A backward pass has accumulated into a parameter."""
        for batch in self.batches:
            batch.settle(parameter)


class Running:
    """Says which micro-batch runs: forward, and in a backward pass that computes a part of its forward pass again.

    Args:
        awaiting: what each of the optimizers has pending.
        samples: the ids to record, None for all.

    Attributes:
        held: a block names the batch of several forward passes.
    """

    def __init__(self, awaiting: Sequence[Pending], samples: frozenset[int] | None) -> None:
        self.awaiting = awaiting
        self.held = False
        self._samples = samples
        self._current: MicroBatch | None = None
        # The backward pass that a gradient last arrived in, and whose batch it is.
        self._task = -1
        self._backward: ref[MicroBatch] | None = None
        self._several = False

    @property
    def current(self) -> MicroBatch | None:
        """The micro-batch of the forward pass that runs."""
        batch = self._current
        if batch is not None and self.held and torch.is_grad_enabled() and not self._is_awaited(batch):
            # The block goes on after a step: what it runs from here on is for the next one.
            self.begin(Ids(batch.ids, batch.rows_given, batch.layout))
        return self._current

    def begin(self, ids: Ids) -> MicroBatch:
        """Make a micro-batch of these samples; the next forward pass is its."""
        # In a step that proves that the parts add up, all of them are needed.
        proved = all(pending.proved for pending in self.awaiting)
        batch = MicroBatch(ids.samples, Chosen(ids.samples, self._samples if proved else None), ids.rows, ids.layout)
        batch.block = self.held
        self._current = batch
        for pending in self.awaiting:
            pending.begin(batch)
        return batch

    def hold(self) -> None:
        """Keep these samples for every forward pass until `end`."""
        self.held = True
        if self._current is not None:
            self._current.block = True

    def end(self) -> None:
        """Name no samples any more."""
        self.held = False
        self._current = None

    def over(self) -> None:
        """The forward pass is over."""
        if not self.held:
            self._current = None

    def drop(self, batch: MicroBatch) -> None:
        """Forget a micro-batch whose forward pass failed."""
        for pending in self.awaiting:
            pending.drop(batch)
        self._current = None

    def discard(self) -> None:
        """Drop all micro-batches."""
        for pending in self.awaiting:
            pending.discard()

    def since_proof(self) -> str:
        """Return the same as `Pending.since_proof`, of the optimizer whose latest proof is the earliest."""
        return min(self.awaiting, key=lambda pending: pending.proven or (-1, -1)).since_proof()

    def arrived(self, batch: MicroBatch) -> None:
        """A gradient has come to what the model returned for a batch."""
        for pending in self.awaiting:
            pending.clip.await_mean()
        task = torch._C._current_graph_task_id()
        if self._backward is None or self._backward() is not batch:
            self._several = self._backward is not None and self._task == task
            self._task, self._backward = task, ref(batch)

    def recomputed(self, module: nn.Module) -> MicroBatch | None:
        """Return the batch whose backward pass runs, where it had this module's forward pass without gradients.

        Raises:
            CoverageError: it could be another batch's.
        """
        batch = self._backward() if self._backward is not None else None
        # Where layers are called one by one, no output of the model says whose backward pass runs.
        in_blocks = any(
            other.block and id(module) in other.unseen for pending in self.awaiting for other in pending.batches
        )
        if not in_blocks and (batch is None or id(module) not in batch.unseen):
            return None
        if self._several or in_blocks:
            raise CoverageError(
                "two batches run backward at once under a checkpoint with use_reentrant=True, or one whose layers were "
                "called one by one in a block of recorder.batch, so that what is computed again cannot be told apart; "
                "use use_reentrant=False, or a backward pass for each batch of the whole model"
            )
        return batch

    def _is_awaited(self, batch: MicroBatch) -> bool:
        """Say whether every optimizer has yet to consume a micro-batch."""
        return all(batch in pending.batches for pending in self.awaiting)
