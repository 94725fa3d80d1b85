"""Where each module has the samples, proved by the gradients of a few rows alone.

In a step that is a proof the gradient at the model's output is sent back thrice before the backward pass goes on: for
one row, for another one, and for all the others. What comes to a module's output lies in those rows' part of it, on the
axis that the batch has there; on a wrong axis, or of rows in another order, it does not. And what comes to a parameter
is what its modules' calls make of it, or something else uses the parameter too.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from timstore.errors import CoverageError
from timstore.recording.batch_axis import Axis, Folded, Layout, only
from timstore.recording.batches import MicroBatch, Sizes, by_parameter
from timstore.recording.buffers import Buffers
from timstore.recording.calls import Call, Input
from timstore.recording.checks import unlike
from timstore.recording.chosen import Chosen
from timstore.recording.modules import Captured, Kind
from timstore.recording.pending import OwnPass

# Of a gradient's square, what rounding may put beside the rows that it was sent back for: in half precision, and else.
_ROUNDING_HALF, _ROUNDING = 1e-4, 1e-7


class Places:
    """Where modules, and the model's outputs, were proved to have the samples.

    Attributes:
        nowhere: names of those that have them on no axis, or not always on the same one.
    """

    def __init__(self) -> None:
        self.nowhere: set[str] = set()
        self._layouts: dict[str, Layout] = {}
        self._irregular: set[str] = set()
        self._batches = 0
        self._first: dict[str, int] = {}
        self._latest: ref[MicroBatch] | None = None
        # Tokens of a sample where batch and tokens are one axis, by the shapes of the model's arguments.
        self._lengths: dict[str, dict[Sizes, set[int]]] = {}

    def meet(self, name: str, batch: MicroBatch) -> None:
        """A module runs in a batch: one that did not in the first one may get what was routed to it."""
        if self._latest is None or self._latest() is not batch:
            self._latest = ref(batch)
            self._batches += 1
        if name not in self._first:
            self._first[name] = self._batches
            if self._batches > 1:
                self._irregular.add(name)

    def misfit(self, name: str) -> None:
        """A module got rows that are no multiple of the batch, or none: it may be given what is routed to it."""
        self._irregular.add(name)

    def known(self, name: str, shape: Sequence[int], rows: int, sizes: Sizes) -> Layout | None:
        """Return where a tensor of this shape has the samples; None where that has to be proved first.

        Tokens that are routed, as to experts, may be a multiple of the batch by chance: their number has to be that of
        an argument's tokens, or the one that was proved for arguments of these shapes. Where it was another one for the
        same shapes, the samples are nowhere.
        """
        layout = self._layouts.get(name)
        if layout is None or name in self.nowhere or not layout.fits(shape, rows):
            return None
        if isinstance(layout, Folded):
            length, proved = shape[0] // rows, self._lengths[name].get(sizes, ())
            if length not in proved and length not in {size[0] for size in sizes if size}:
                if proved:
                    self.nowhere.add(name)
                return None
        return layout

    def is_proved(self, name: str) -> bool:
        return name in self._layouts

    def moved(
        self, name: str, layout: Layout, shape: Sequence[int], rows: int, sizes: Sizes, *, tokens: bool = False
    ) -> bool:
        """Note what was proved; say whether it denies what would have been taken for known.

        Args:
            tokens: the model's arguments have tokens, of which one of each sample may be routed to a module.
        """
        if name in self._irregular:
            one_each = tokens and layout == Axis(0) and len(shape) == 2 and tuple(shape[1:]) not in sizes
            lengths = {size[0] for size in sizes if size}
            if one_each or (isinstance(layout, Folded) and shape[0] // rows not in lengths):
                self.nowhere.add(name)
                return False
        earlier = self._layouts.get(name)
        if isinstance(earlier, Folded) and layout == Axis(0):
            layout = earlier  # of one token each the two are the same
        if earlier is not None and earlier != layout:
            denied = self.known(name, shape, rows, sizes) is not None
            self.nowhere.add(name)
            return denied
        self._layouts[name] = layout
        if isinstance(layout, Folded):
            self._lengths.setdefault(name, {}).setdefault(sizes, set()).add(shape[0] // rows)
        return False


@dataclass(eq=False, slots=True)
class Evidence:
    """What the passes of a proof say of one call.

    Attributes:
        candidates: layouts that agree with all of them.
        shares: of each layout that was tried, how much of each pass was in the part of its rows.
        reached: which numbers got something in some pass.
        tied: some of them did in two, so that rows are not apart.
        error: why it cannot be captured.
    """

    kind: Kind
    call: Call
    candidates: list[Layout]
    shares: dict[Layout, list[float]] = field(default_factory=dict)
    reached: torch.Tensor | None = None
    tied: bool = False
    error: CoverageError | None = None

    @property
    def likeliest(self) -> tuple[Layout, float]:
        """The layout with the most in the rows' own part, and how much that is."""
        means = {layout: sum(shares) / len(shares) for layout, shares in self.shares.items()}
        best = max(means, key=lambda layout: means[layout])
        return best, means[best]


@dataclass(slots=True)
class Proof:
    """The outcome of sending a gradient back for some rows, which has them in some layout.

    Attributes:
        layout: of the gradient.
        evidence: of each call that any of it came to.
        off: parameters, by name, that got something else than their modules' calls make of it, and by how much.
        agreeing: those that got the same, and not nothing.
        partners: of a call that is one row for all samples, (1, T, d), the names of modules whose gradients, added up
            over the samples, are its own: what comes to such a module by sample is the call's gradient by sample.
    """

    layout: Layout
    evidence: dict[Call, Evidence] = field(default_factory=dict)
    off: dict[str, float] = field(default_factory=dict)
    agreeing: set[str] = field(default_factory=set)
    partners: dict[Call, set[str]] = field(default_factory=dict)

    @property
    def agrees_with_arguments(self) -> bool:
        """Whether modules that are given an argument of the model have the samples on the argument's axis."""
        calls = [found for found in self.evidence.values() if found.call.takes_argument]
        return bool(calls) and all(found.candidates for found in calls)

    @property
    def denied(self) -> int:
        """Of how many calls no layout agrees."""
        return sum(not found.candidates for found in self.evidence.values())


class Prover:
    """Sends gradients back, for a proof.

    Args:
        parameters: the trained ones, by name.
        buffers: where what is captured is copied to.
        scale: of the gradients that arrive in those that the optimizer consumes.
        own: passes of our own, of which these are some.

    Attributes:
        running: a proof's own backward pass runs.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], buffers: Buffers, scale: float, own: OwnPass) -> None:
        self._parameters = parameters
        self._own = own
        self._buffers = buffers
        self._scale = scale
        self._draw = random.Random(0)
        self._proof: Proof | None = None
        self._rows: list[int] = []
        self._chosen = Chosen([])
        self._shown: Captured = []
        self._not_shown: set[int] = set()
        self._shared: dict[Call, torch.Tensor] = {}
        self._shapes: set[torch.Size] = set()
        self._sums: dict[str, list[torch.Tensor]] = {}

    @property
    def running(self) -> bool:
        return self._proof is not None

    def prove(
        self,
        batch: MicroBatch,
        edge: GradientEdge,
        gradient: torch.Tensor,
        shape: torch.Size,
        layout: Layout,
        *,
        coupled: bool,
    ) -> Proof:
        """Send a gradient back from where it arrived, for a few rows at a time.

        Args:
            shape: of the output that it arrived at, which may be a view of the tensor that has the gradient.
            layout: where the output has the samples.
            coupled: samples are known to be tied together, so that a row's gradient comes to others' parts.
        """
        proof = Proof(layout)
        trained = {
            name: parameter
            for name, parameter in self._parameters.items()
            if parameter.requires_grad and id(parameter) not in batch.whole
        }
        self._shapes = {call.output_shape[1:] for call in batch.shared}
        whole = gradient.detach().reshape(shape)
        for rows in self._passes(whole, layout, len(batch.ids)) if trained else ():
            self._proof, self._rows, self._shown, self._not_shown = proof, rows, [], set()
            self._shared, self._sums = {}, {}
            every = list(range(len(batch.ids)))
            self._chosen = Chosen(every, None if coupled else frozenset(rows))
            try:
                arriving = only(whole, layout, len(batch.ids), rows)
                with self._own.running():
                    gradients = sent_back(edge, list(trained.values()), arriving.reshape(gradient.shape))
            except RuntimeError as error:
                if not is_reentrant(error):
                    raise
                continue  # what is computed again in backward is proved there
            finally:
                self._proof = None
            for call, arrived in self._shared.items():
                alike = {name for name, sums in self._sums.items() if len(sums) == 1 and _alike(sums[0], arrived[0])}
                proof.partners[call] = alike & proof.partners.get(call, alike)
            pairs = zip(trained.items(), gradients, strict=True)
            told = {
                name: got
                for (name, parameter), got in pairs
                if got is not None and id(parameter) not in self._not_shown
            }
            self._buffers.wait()
            off = unlike(self._parameters, told, by_parameter(self._shown), 1 / self._scale)
            proof.off |= off
            proof.agreeing |= {name for name, got in told.items() if name not in off and bool(got.any())}
        self._shown, self._shared, self._sums = [], {}, {}
        proof.agreeing -= proof.off.keys()
        return proof

    def note(self, kind: Kind, call: Call, gradient: torch.Tensor, wanted: Any) -> None:
        """A gradient of some rows has come to a call's output."""
        proof, rows = self._proof, call.chosen.batch
        assert proof is not None
        if not bool(gradient.any()):
            return
        if not call.candidates:
            # Copied: autograd may go on adding to it.
            self._shared[call] = gradient.detach().clone()
            self._not_shown.update(id(parameter) for parameter in kind.parameters())
            return
        if gradient.shape[1:] in self._shapes and len(gradient) == rows:
            self._sums.setdefault(call.place, []).append(gradient.detach().sum(0))
        found = proof.evidence.get(call)
        if found is None:
            found = proof.evidence[call] = Evidence(kind, call, list(call.candidates))
        reached = gradient.detach() != 0
        found.tied |= found.reached is not None and bool((found.reached & reached).any())
        found.reached = reached if found.reached is None else found.reached | reached
        rounding = _ROUNDING_HALF if gradient.dtype in (torch.float16, torch.bfloat16) else _ROUNDING
        for layout in call.candidates:
            squares = _squares(gradient, layout, rows)
            share = float(squares[self._rows].sum()) / float(_square(gradient))
            found.shares.setdefault(layout, []).append(share)
            if share < 1 - rounding and layout in found.candidates:
                found.candidates.remove(layout)
        layout = found.candidates[0] if found.candidates else found.likeliest[0]
        if call.input.tensor is None:
            # An earlier backward pass has taken it away.
            self._not_shown.update(id(parameter) for parameter in kind.parameters())
            return
        alone = replace(call, layout=layout, chosen=self._chosen, input=Input(call.input.tensor))
        try:
            self._shown += kind.capture(alone, gradient, wanted)
        except CoverageError as error:
            found.error = error
            found.candidates.clear()

    def _passes(self, gradient: torch.Tensor, layout: Layout, rows: int) -> Iterator[list[int]]:
        """Yield the rows of each pass: two that have a gradient, and all others."""
        squares = _squares(gradient, layout, rows)
        if not bool(squares.isfinite().all()):
            return  # such a step is skipped
        reached = squares.nonzero().flatten().tolist()
        alone = self._draw.sample(reached, min(2, len(reached)))
        for row in alone:
            yield [row]
        if len(reached) > len(alone):
            yield [row for row in range(rows) if row not in alone]


def sent_back(edge: GradientEdge, inputs: Sequence[Any], gradient: torch.Tensor) -> Sequence[Any]:
    """Return the gradients at inputs, None where nothing comes; the graph stays for the pass that runs."""
    return torch.autograd.grad([edge], inputs, [gradient], retain_graph=True, allow_unused=True)


def is_reentrant(error: RuntimeError) -> bool:
    """Say whether this is what torch raises of a checkpoint that only a whole backward pass may go through."""
    return "use_reentrant" in str(error)


def _alike(gradient: torch.Tensor, other: torch.Tensor) -> bool:
    rounding = _ROUNDING_HALF if other.dtype in (torch.float16, torch.bfloat16) else _ROUNDING
    return float(_square(gradient - other)) <= rounding * float(_square(other))


def _square(tensor: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64)
    return norm.square()


def _squares(gradient: torch.Tensor, layout: Layout, rows: int) -> torch.Tensor:
    """Return (rows,), the squared norm of each sample's part."""
    parts = layout.parts(gradient.detach(), rows)
    if isinstance(parts, list):
        return torch.stack([_square(part) for part in parts])
    norms: torch.Tensor = torch.linalg.vector_norm(parts.reshape(rows, -1), dim=1, dtype=torch.float64)
    return norms.square()
