"""The model's output: where a backward pass enters it, and may be run once more for each sample.

A module's hook cannot see a weight that is used directly, an LSTM, a table that is not looked up by sample. Of such
parameters the gradient that arrives at the model's output is sent back once more for each recorded sample, with zeros
for all others. Which they are, modules say in the forward pass, and proofs show.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from timstore.errors import CoverageError, TimstoreWarning
from timstore.recording.batch_axis import CANDIDATES, Axis, Layout, Whole, only
from timstore.recording.batches import Entry, MicroBatch
from timstore.recording.capture import Capture
from timstore.recording.outputs import outputs_of
from timstore.recording.pending import Running
from timstore.recording.proof import is_reentrant, sent_back
from timstore.records import Gradient

# Of a gradient that came through another output: what rounding leaves of it.
_NOTHING = 1e-4


class Passes:
    """Watches the gradients that arrive at the model's output: has the proof begin there, and a pass of each sample.

    Args:
        axis: of the batch in the model's output.
        scale: as for `Capture`.
        running: told when a gradient enters the model.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        capture: Capture,
        running: Running,
        *,
        axis: int,
        scale: float,
    ) -> None:
        self._parameters = parameters
        self._capture = capture
        self._axis = axis
        self._scale = scale
        self._running = running
        self._named: set[int] = set()
        self._blocked = False

    def watch(self, output: Any, batch: MicroBatch) -> None:
        """Put hooks on what the model returned for a batch.

        Raises:
            CoverageError: none of it has an axis for the samples that are to be told apart.
        """
        batch.whole |= self._capture.used_directly
        entered = (batch.whole or batch.proving) and not batch.empty
        for path, tensor in outputs_of(output).items():
            if not tensor.requires_grad:
                continue
            number = -1
            if entered and tensor.ndim:
                number = len(batch.entries)
                # The batch's, not the hook's: a hook that held on to its own graph would never be let go of.
                batch.entries.append(Entry(path, get_gradient_edge(tensor), self._layout(path, tensor, batch)))
            tensor.register_hook(self._arrived(number, ref(batch)))  # type: ignore[no-untyped-call]
        if batch.whole and not batch.empty and not any(entry.layout or batch.proving for entry in batch.entries):
            raise CoverageError(
                "a backward pass of each sample needs a model that returns a tensor with the batch on an axis (logits, "
                f"hidden states): the loss alone cannot be told apart, and no module shows {self._names(batch.whole)}"
            )

    def _names(self, parameters: set[int]) -> str:
        """Return the names of some parameters, the first few of them."""
        names = [name for name, parameter in self._parameters.items() if id(parameter) in parameters]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def _layout(self, path: str, tensor: torch.Tensor, batch: MicroBatch) -> Layout | None:
        """Return where an output has the samples, None where that is not known."""
        rows = len(batch.ids)
        layout: Layout | None = Axis(self._axis)
        if batch.layout is not None:
            layout = batch.layout.of(tensor.shape)
        elif rows == 1:
            layout = Whole()
        elif (known := self._capture.places.known(_output(path), tensor.shape, rows, batch.sizes)) is not None:
            layout = known
        elif batch.proving and tensor.shape.count(rows) > 1:
            layout = None  # as many tokens as rows, or classes: proved
        return layout if layout is not None and layout.fits(tensor.shape, rows) else None

    def _arrived(self, entry: int, owner: "ref[MicroBatch]") -> Callable[[torch.Tensor], torch.Tensor | None]:
        def arrived(gradient: torch.Tensor) -> torch.Tensor | None:
            batch = owner()
            if batch is None:
                return None
            if self._capture.is_replaying:
                blocked = self._blocked and entry >= 0 and batch.entries and batch.entries[entry].layout is not None
                return torch.zeros_like(gradient) if blocked else None
            self._running.arrived(batch)
            if entry >= 0 and batch.entries:
                batch.enter()
                self._enter(batch.entries[entry], gradient, batch)
            return None

        return arrived

    def _enter(self, entry: Entry, gradient: torch.Tensor, batch: MicroBatch) -> None:
        """Send on what enters the model here, but for what has come through another of its outputs."""
        if batch.proving and not entry.proven:
            self._prove(entry, gradient, batch)
        if not batch.whole:
            return
        if entry.layout is None:
            self._refuse_direct(entry, gradient, batch)
            return
        others = [one for one in batch.entries if one is not entry and not one.arrived]
        entry.arrived = True
        if entry.through is not None:
            whole, gradient = gradient, gradient - entry.through
            if float(gradient.norm()) <= _NOTHING * float(whole.norm()):
                return
        if others:
            with self._capture.replaying():
                edges = [one.edge for one in others]
                through = self._back(entry.edge, edges, gradient)
            for one, more in zip(others, through, strict=True):
                if more is not None:
                    one.through = more if one.through is None else one.through + more
        self._run(entry, entry.layout, gradient, batch)

    def _prove(self, entry: Entry, gradient: torch.Tensor, batch: MicroBatch) -> None:
        """Find out where the modules before an output have the samples; and the output itself, unless that is known."""
        entry.proven = True
        rows, shape = len(batch.ids), gradient.shape
        declared = Axis(self._axis)
        layouts: list[Layout] = [layout for layout in CANDIDATES if layout.fits(shape, rows)]
        if entry.layout is not None:
            layouts = [entry.layout]
        elif declared.fits(shape, rows):
            layouts = [layout for layout in layouts if isinstance(layout, Axis)]
        layout = self._capture.prove(batch, entry.edge, gradient, shape, layouts, declared) if layouts else None
        if layout is not None:
            entry.layout = layout
        if layout is not None and batch.layout is None:
            self._capture.places.moved(_output(entry.path), layout, shape, rows, batch.sizes)

    def _refuse_direct(self, entry: Entry, gradient: torch.Tensor, batch: MicroBatch) -> None:
        """Refuse a gradient that goes to a parameter without coming through an output that has the samples.

        Raises:
            CoverageError: it does.
        """
        self._blocked = True
        try:
            with self._capture.replaying():
                direct = self._back(entry.edge, self._whole(batch), gradient)
        finally:
            self._blocked = False
        if any(part is not None and bool(part.any()) for part in direct):
            raise CoverageError(
                f"the loss takes {entry.path or 'an output'} of the model, {tuple(gradient.shape)}, which has the "
                "samples on no axis that is known: no backward pass of each sample can tell them apart there. Return "
                "it with the batch on axis 0",
                kind="order-check",
            )

    def _whole(self, batch: MicroBatch) -> list[nn.Parameter]:
        return [one for one in self._parameters.values() if id(one) in batch.whole and one.requires_grad]

    def _run(self, entry: Entry, layout: Layout, gradient: torch.Tensor, batch: MicroBatch) -> None:
        """Take the gradients that modules do not show by a backward pass of each sample."""
        whole = self._whole(batch)
        if not whole:
            return
        self._warn(batch.whole)
        found: list[list[Gradient]] = [[] for _ in whole]
        with self._capture.replaying(), self._capture.undisturbed():
            for rows in batch.chosen.rows:
                masked = only(gradient, layout, len(batch.ids), rows)
                grads = self._back(entry.edge, whole, masked)
                for parts, parameter, grad in zip(found, whole, grads, strict=True):
                    scaled = torch.zeros_like(parameter) if grad is None else grad * self._scale
                    parts.append(self._capture.buffers.copy(scaled))
        batch.arrive(list(zip(whole, found, strict=True)), passed=True)

    def _warn(self, whole: set[int]) -> None:
        """Say, once of each parameter, what recording it costs."""
        if self._capture.mode == "auto" and not whole <= self._named:
            numbers = sum(one.numel() for one in self._parameters.values() if id(one) in whole)
            warnings.warn(
                f"no module shows the gradients of {self._names(whole - self._named)} by sample: they are recorded by "
                "one more backward pass for each recorded sample of a batch, as far back as the first of them, and "
                f"kept whole ({numbers:,} numbers a record). To save that, freeze them; pass capture='per-sample' to "
                "accept it without this warning, or capture='modules' to have it refused",
                TimstoreWarning,
                stacklevel=2,
            )
            self._named |= whole

    def _back(self, output: GradientEdge, inputs: Sequence[Any], gradient: torch.Tensor) -> Sequence[Any]:
        try:
            return sent_back(output, inputs, gradient)
        except RuntimeError as error:
            if not is_reentrant(error):
                raise
            raise CoverageError(
                "a backward pass of each sample cannot go through a checkpoint with use_reentrant=True: use "
                "use_reentrant=False"
            ) from error


def _output(path: str) -> str:
    return f"output {path}"
