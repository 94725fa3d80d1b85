"""What awaits one optimizer's step: the micro-batches whose gradients it has yet to consume."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from timstore.recording.batches import MicroBatch
from timstore.recording.clip_measurement import Accumulation
from timstore.recording.modules import Captured


class Pending:
    """Keeps, for one optimizer, the micro-batches since its last step.

    Several optimizers may consume one backward pass, each at its own time; a micro-batch keeps the parts of an
    optimizer's parameters until that one has stepped.

    Args:
        parameters: the optimizer's, by name.
        options: of its `Accumulation`.

    Attributes:
        batches: the micro-batches.
        skipped: steps that were skipped since the last one.
        proven: (epoch, step) of the latest step whose parts were seen to add up.
        proved: parts were seen to add up, so that only the chosen samples are captured until `prove` is called.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], **options: Any) -> None:
        self.batches: list[MicroBatch] = []
        self.skipped = 0
        self.proved = False
        self.proven: tuple[int, int] | None = None
        self.accumulation = Accumulation(parameters, self._skip, accumulated=self._settle, **options)
        self._owned = frozenset(map(id, parameters.values()))
        self._whole = bool(options.get("whole"))
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
        if self.accumulation.begun:
            self._earlier = len(self.batches)
            if self.accumulation.lost():
                self._skip()
        batch.awaited += 1
        self.batches.append(batch)
        self.accumulation.extremes = self._whole or not all(one.empty for one in self.batches)

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
        self.accumulation.clear()

    def prove(self) -> None:
        """Hold all of the next step's parts to what is accumulated."""
        self.proved = False
        self.accumulation.keep_local()

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
