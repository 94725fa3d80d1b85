"""The model's output: where a backward pass enters it, and may be run once more for each sample.

A module's hook cannot see a weight that is used directly, an LSTM, a table that is not looked up by sample. With
`capture="per-sample"`, and of tables that are looked up by one row of ids without it, the gradient that arrives at the
model's output is sent back once more for each recorded sample, with zeros for all others, to those parameters alone.
What else runs this way is found out: modules say so in the forward pass, and in steps that are proofs one backward pass
to all parameters shows where the modules' parts do not add up.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from timstore.errors import CoverageError
from timstore.recording.batches import Entry, MicroBatch, by_parameter
from timstore.recording.capture import Capture
from timstore.recording.checks import unlike
from timstore.recording.layouts import Axis, Layout, Whole, only
from timstore.recording.looking import output_name
from timstore.recording.outputs import outputs_of
from timstore.recording.pending import Running
from timstore.records import Gradient

# Of a gradient that came through another output: what rounding leaves of it.
_NOTHING = 1e-4


class Passes:
    """Watches the gradients that arrive at the model's output.

    Args:
        by_sample: run them once more for each sample where modules cannot tell.
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
        by_sample: bool,
        axis: int,
        scale: float,
    ) -> None:
        self._parameters = parameters
        self._capture = capture
        self._by_sample = by_sample
        self._axis = axis
        self._scale = scale
        self._running = running
        self._used_directly: set[int] = set()
        self._looked_at: set[str] = set()
        self._looking = False

    def watch(self, output: Any, batch: MicroBatch) -> None:
        """Put hooks on what the model returned for a batch.

        Raises:
            CoverageError: none of it has an axis for the samples that are to be told apart.
        """
        for path, tensor in outputs_of(output).items():
            if not tensor.requires_grad:
                continue
            number = -1
            if (self._by_sample or batch.whole) and not batch.empty and tensor.ndim:
                number = len(batch.entries)
                # The batch's, not the hook's: a hook that held on to its own graph would never be let go of.
                batch.entries.append(Entry(path, get_gradient_edge(tensor), self._layout(path, tensor, batch)))
            tensor.register_hook(self._arrived(number, ref(batch)))  # type: ignore[no-untyped-call]
        if batch.whole and not batch.empty and all(entry.layout is None for entry in batch.entries):
            raise CoverageError(
                "capture='per-sample' needs a model that returns a tensor with the batch on an axis (logits, hidden "
                "states): the loss alone cannot be told apart. So does a table that all samples look up by one row of "
                "ids and do not use row by row"
            )

    def _layout(self, path: str, tensor: torch.Tensor, batch: MicroBatch) -> Layout | None:
        """Return where an output has the samples, None where it has them nowhere."""
        rows, seen = len(batch.ids), self._capture.seen
        found: Layout | None
        if batch.layout is not None:
            found = batch.layout.of(tensor.shape)
        elif rows == 1:
            found = Whole()
        elif seen is None or output_name(path) not in seen.places:
            found = Axis(self._axis)
        else:
            found = seen.layout(output_name(path), tensor.shape, rows, batch.sizes)
        return found if found is not None and found.fits(tensor.shape, rows) else None

    def look_again(self) -> None:
        """Find out anew, in the next backward pass, what else than modules uses parameters."""
        self._looked_at.clear()

    def _arrived(self, entry: int, owner: "ref[MicroBatch]") -> Callable[[torch.Tensor], None]:
        def arrived(gradient: torch.Tensor) -> None:
            batch = owner()
            if batch is None or self._capture.is_replaying or self._looking:
                return
            self._running.arrived(batch)
            if entry >= 0 and batch.entries:
                batch.enter()
                self._enter(batch.entries[entry], gradient, batch)

        return arrived

    def _enter(self, entry: Entry, gradient: torch.Tensor, batch: MicroBatch) -> None:
        """Send on what enters the model here, but for what has come through another of its outputs."""
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
        self._run(entry, gradient, batch)

    def _run(self, entry: Entry, gradient: torch.Tensor, batch: MicroBatch) -> None:
        if self._by_sample and entry.path not in self._looked_at:
            self._looked_at.add(entry.path)
            self._used_directly |= self._look(entry, gradient, batch)
        batch.whole |= self._used_directly
        whole = [one for one in self._parameters.values() if id(one) in batch.whole and one.requires_grad]
        if not whole:
            return
        layout = entry.layout
        if layout is None:
            raise CoverageError(
                f"the loss takes {entry.path or 'an output'} of the model, {tuple(gradient.shape)}, which has the "
                "samples on no axis that is known: capture='per-sample' cannot tell them apart there. Return it with "
                "the batch on axis 0",
                kind="order-check",
            )
        found: list[list[Gradient]] = [[] for _ in whole]
        with self._capture.replaying():
            for rows in batch.chosen.rows:
                masked = only(gradient, layout, len(batch.ids), rows)
                grads = self._back(entry.edge, whole, masked)
                for parts, parameter, grad in zip(found, whole, grads, strict=True):
                    scaled = torch.zeros_like(parameter) if grad is None else grad * self._scale
                    parts.append(self._capture.buffers.copy(scaled))
        batch.arrive(list(zip(whole, found, strict=True)), passed=True)

    def _back(self, output: GradientEdge, inputs: Sequence[Any], gradient: torch.Tensor) -> Sequence[Any]:
        """Return the gradients at inputs, None where nothing comes; the graph stays for the pass that runs."""
        try:
            return torch.autograd.grad([output], inputs, [gradient], retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise CoverageError(
                "capture='per-sample' cannot go through a checkpoint with use_reentrant=True: use use_reentrant=False"
            ) from error

    def _look(self, entry: Entry, gradient: torch.Tensor, batch: MicroBatch) -> set[int]:
        """Return the parameters that something else than hooked modules uses: their modules' parts fall short."""
        trained = {name: one for name, one in self._parameters.items() if one.requires_grad}
        names = [name for name, one in trained.items() if id(one) not in batch.whole]
        tried = [self._parameters[name] for name in names]
        # The module whose output this is has seen its gradient already, and will see the rest after this.
        before, batch.arriving = batch.arriving, {}
        self._looking = True
        try:
            grads = self._back(entry.edge, tried, gradient) if tried else ()
        finally:
            self._looking = False
        shown = [pair for captured, _ in batch.arriving.values() for pair in captured]
        batch.arriving = before
        known = {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}
        self._capture.buffers.wait()
        off = unlike(self._parameters, known, by_parameter(shown), 1 / self._scale)
        return {id(self._parameters[name]) for name in off}
