"""Exact replay: the optimizer itself, run twice over the recorded gradients, with the samples and without them.

A parameter, or a block of its rows, goes through the whole run before the next one begins, so that memory does not
grow with the model or with the run. It is right for every optimizer whose step depends on nothing but the gradients,
its own state and its hyperparameters; that the first of the two runs ends where the model is shows that.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from timstore.errors import InvalidInputError
from timstore.model.optimizer_names import ELEMENTWISE
from timstore.records import Parameter
from timstore.rollbacks.clip_factors import Change
from timstore.rollbacks.gradient_blocks import ParameterRows, Piece, pieces_of
from timstore.rollbacks.places import Place
from timstore.rollbacks.reruns import Rerun
from timstore.rollbacks.streaming_sum import Budget, Readers, sums_by_bin
from timstore.rollbacks.tape import Tape
from timstore.rollbacks.timeline import Timeline
from timstore.rollbacks.vectors import Vector, Workspace

_EXACT = torch.float64
# Two runs in float64: parameters, up to four numbers of state each, gradients and what they are made of.
_ELEMENT_BYTES = 20 * 8

# Up to this part of what goes in, a difference of two gradients is rounding; Adam would make a whole step of it.
_ROUNDING = {"float64": 1e-14, "float32": 1e-6, "float16": 2.0**-9, "bfloat16": 2.0**-7, "int8": 2.0**-6}


@dataclass(eq=False, slots=True)
class Replayed:
    """What a replay found.

    Attributes:
        states: optimizer state without the samples, by name, if it has the parameters' shapes.
        others: of other shapes: (parameter, name) to numbers.
        off, moved: norm of how far the first run ended from the model; norm of how far the run went.
    """

    states: dict[str, Vector] = field(default_factory=dict)
    others: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    off: float = 0.0
    moved: float = 0.0

    @property
    def relative_off(self) -> float:
        """How far the first run ended from the model, over how far the run went."""
        return self.off / self.moved if self.moved else 0.0


@dataclass(frozen=True, eq=False, slots=True)
class Replay:
    """The run, and what leaves it.

    Attributes:
        rows: parameter to the gradients that leave, weight 1, with the position of their step as bin.
        edges: `moment_key` of the last step of each time bin but the last.
        precision: of the store's records.
        keep_states: whether the optimizer's state is wanted too.
    """

    tape: Tape
    known: dict[str, Parameter]
    timelines: dict[int, Timeline]
    changes: dict[int, Change]
    rows: dict[str, ParameterRows]
    edges: np.ndarray
    precision: str
    strength: float
    keep_states: bool

    def run(
        self,
        places: Mapping[str, Place],
        increments: Sequence[Vector],
        readers: Readers,
        budget: Budget,
        workspace: Workspace,
        advance: Callable[[int], None],
    ) -> Replayed:
        """Write the difference of the two runs' parameters into one vector per time bin.

        Cost: one pass over the whole gradients and the leaving records; two optimizer steps for every step,
        parameter and block of rows; in float64.

        Raises:
            InvalidInputError: an optimizer that needs whole matrices, of which one does not fit the memory limit.
            CorruptionError: an object is missing or was changed.
        """
        result = Replayed()
        squares = torch.zeros(2, dtype=_EXACT, device="cpu")
        for name in workspace.sizes:
            for piece in self._pieces(self.known[name], budget):
                began = self._start(piece, workspace.device)
                actual, other = self._both(piece, began, increments, readers, budget)
                start, stop = piece.span
                end = places[name].read(start, stop).to(_EXACT)
                ended = actual.parameter.detach().reshape(-1)
                squares += torch.stack([(ended - end).square().sum(), (ended - began).square().sum()]).cpu()
                if self.keep_states:
                    _keep(result, other, piece, workspace)
            advance(1)
        result.off, result.moved = squares.sqrt().tolist()
        return result

    def _both(
        self, piece: Piece, began: torch.Tensor, increments: Sequence[Vector], readers: Readers, budget: Budget
    ) -> tuple[Rerun, Rerun]:
        """Run one piece twice, and write what sets the runs apart; return them."""
        name, device = piece.parameter.name, increments[0].workspace.device
        group = piece.parameter.group_id
        timeline, change = self.timelines[group], self.changes[group]
        first = int(np.searchsorted(timeline.keys, self.tape.start))
        options = self.tape.options[group]
        actual = self._begin(piece, began)
        other: Rerun | None = None
        rows = self.rows.get(name)
        leaving: Iterator[tuple[int, torch.Tensor]] = iter(())
        if rows is not None:
            leaving = sums_by_bin(rows, piece, readers, budget.unit_bytes, _EXACT, device)
        upcoming = next(leaving, None)
        tolerance = self._tolerance(piece.parameter, rows, readers)
        bin_ends = [*np.searchsorted(timeline.keys, self.edges, side="right").tolist(), len(timeline.keys)]
        written = torch.zeros((), dtype=_EXACT, device=device)
        number = 0
        for step in range(first, len(timeline.keys)):
            consumed = self._consumed(piece, timeline, step, readers, device)
            removed = None
            if upcoming is not None and upcoming[0] == step:
                removed, upcoming = upcoming[1], next(leaving, None)
            if consumed is not None:
                if other is None and (removed is not None or change.on_whole[step]):
                    other = copy.deepcopy(actual)
                if other is not None:
                    without = self._without(consumed, removed, timeline, change, step, tolerance)
                    other.step(options[step - first], without)
                bound = timeline.clip_value[step]
                clipped = consumed if np.isnan(bound) else consumed.clamp(-bound, bound)
                actual.step(options[step - first], clipped)
            while number < len(increments) - 1 and step + 1 >= bin_ends[number]:
                written = _write(increments[number], piece, actual, other, written, self.strength)
                number += 1
        _write(increments[number], piece, actual, other, written, self.strength)
        return actual, other or actual

    def _without(
        self,
        consumed: torch.Tensor,
        removed: torch.Tensor | None,
        timeline: Timeline,
        change: Change,
        step: int,
        tolerance: float,
    ) -> torch.Tensor:
        """Return what the step would have consumed without the leaving samples."""
        ratio = timeline.ratio[step]
        whole = consumed / ratio if ratio else torch.zeros_like(consumed)
        rest = whole
        if change.emptied[step]:
            rest = torch.zeros_like(whole)
        elif removed is not None:
            rest = whole - removed
            # A coordinate that only the leaving samples reached: the rest of it is rounding.
            limit = tolerance * (whole.abs() + removed.abs())
            rest = torch.where(rest.abs() <= limit, 0.0, rest)
        result: torch.Tensor = rest * change.on_removed[step]
        bound = float(timeline.clip_value[step])
        return result if np.isnan(bound) else result.clamp(-bound, bound)

    def _consumed(
        self, piece: Piece, timeline: Timeline, step: int, readers: Readers, device: torch.device
    ) -> torch.Tensor | None:
        """Return what a step consumed, None where the parameter was left alone."""
        keys, commits, owners = self.tape.gradients[piece.parameter.name]
        at = int(np.searchsorted(keys, timeline.keys[step]))
        if at == len(keys) or keys[at] != timeline.keys[step]:
            return None
        found = readers[int(commits[at])].rows([int(owners[at])], "gradient", piece.first, piece.last)
        return torch.from_numpy(found).to(device, _EXACT)

    def _begin(self, piece: Piece, began: torch.Tensor) -> Rerun:
        """Return the run at its start, from these parameters."""
        group = piece.parameter.group_id
        kind = self.tape.kinds[group]
        shape = piece.parameter.shape if kind.__name__ not in ELEMENTWISE else (piece.last - piece.first, piece.width)
        states = {}
        for name, state in self.tape.states.items():
            if piece.parameter.name in state.places:
                single = name == "step" or state.size(piece.parameter.name) != piece.parameter.numel
                span = (0, 1) if single else piece.span
                numbers = torch.from_numpy(state.read(piece.parameter.name, 1 if single else piece.width, *span))
                states[name] = numbers.to(began.device, _EXACT).reshape(() if single else shape)
        return Rerun(kind, began.clone().reshape(shape), self.tape.options[group][0], states)

    def _start(self, piece: Piece, device: torch.device) -> torch.Tensor:
        found = self.tape.theta.read(piece.parameter.name, piece.width, *piece.span)
        return torch.from_numpy(found).to(device, _EXACT)

    def _pieces(self, parameter: Parameter, budget: Budget) -> Iterator[Piece]:
        kind = self.tape.kinds[parameter.group_id].__name__
        if kind in ELEMENTWISE:
            return pieces_of(parameter, budget.sums_bytes, _ELEMENT_BYTES)
        needed = parameter.numel * _ELEMENT_BYTES
        if needed > budget.sums_bytes + budget.deltas_bytes:
            raise InvalidInputError(
                f"{kind} steps whole matrices, and running it again over parameter {parameter.name} takes "
                f"{needed:,} bytes beside the rest: raise memory_limit to {4 * needed:,}",
                kind="memory-limit",
                needed_bytes=4 * needed,
            )
        return iter([Piece(parameter, 0, parameter.matrix_shape[0])])

    def _tolerance(self, parameter: Parameter, rows: ParameterRows | None, readers: Readers) -> float:
        """Return the coarsest rounding of the parameter's gradients: its own, the store's, or autocast's."""
        dtypes = [self.precision, parameter.dtype]
        if rows is not None:
            reader, owner = readers[int(rows.commit[0])], int(rows.owner[0])
            dtypes += [reader.dtype(owner, role) for role in ("output_gradients", "values") if reader.has(owner, role)]
        return max(_ROUNDING.get(dtype, 0.0) for dtype in dtypes)


def _write(
    increment: Vector, piece: Piece, actual: Rerun, other: Rerun | None, written: torch.Tensor, strength: float
) -> torch.Tensor:
    """Write what the runs moved apart since the last time; return how far they are apart now."""
    if other is None:
        return written
    apart = (other.parameter - actual.parameter).detach().reshape(-1)
    increment.write(piece.parameter.name, piece.span[0], (apart - written) * strength)
    return apart


def _keep(result: Replayed, run: Rerun, piece: Piece, workspace: Workspace) -> None:
    for name, numbers in run.state().items():
        if numbers.shape == run.parameter.shape and name != "step":
            if name not in result.states:
                result.states[name] = workspace.new()
            result.states[name].write(piece.parameter.name, piece.span[0], numbers.detach().reshape(-1))
        elif numbers.numel() > 1:
            result.others[piece.parameter.name, name] = numbers.detach().clone()
