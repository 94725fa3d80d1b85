"""Exact replay: the optimizer itself, run twice over the recorded gradients, with the samples and without them.

A parameter, or a block of its rows, goes through the whole run before the next one begins, so that memory does not
grow with the model or with the run. It is right for every optimizer whose step depends on nothing but the gradients,
its own state and its hyperparameters; that the first of the two runs ends where the model is shows that.
"""

import copy
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from timstore.database.states import State
from timstore.errors import InvalidInputError
from timstore.model.optimizer_names import ADAM_FAMILY, ELEMENTWISE, SGD_FAMILY, class_of
from timstore.records import Parameter
from timstore.rollbacks.clip_factors import StepChange
from timstore.rollbacks.gradient_blocks import GradientRows, Piece, by_parameter, pieces_of
from timstore.rollbacks.places import Place
from timstore.rollbacks.selection import Selection
from timstore.rollbacks.step_changes import complete_steps
from timstore.rollbacks.streaming_sum import Readers, sums_by_bin
from timstore.rollbacks.timeline import Moment, Timeline, moment_key, moment_of, up_to
from timstore.rollbacks.vectors import Vector

_EXACT = torch.float64
# Two runs in float64: parameters, up to four numbers of state each, gradients and what they are made of.
_ELEMENT_BYTES = 20 * 8
# Up to this part of what goes in, a difference of two gradients is rounding; Adam would make a whole step of it.
_ROUNDING = {"float64": 1e-14, "float32": 1e-6, "float16": 2.0**-9, "bfloat16": 2.0**-7, "int8": 2.0**-6}
# Ways to compute the same step; one plain way is enough here.
_VARIANTS = ("foreach", "fused", "capturable", "differentiable")
_RECORD_IT = "record with optimizer_history='gradients' from the run's start on"


@dataclass(frozen=True, eq=False, slots=True)
class Tape:
    """Every gradient that a run's optimizers consumed, and what the run is made again from.

    Attributes:
        start: `moment_key` of its first step.
        theta: the parameters before it.
        states: the optimizer's state before it, by name; none for a fresh optimizer.
        gradients: parameter to (keys, commits, owners) of its consumed gradients, in order of time.
        dense_bytes: size of all of these gradients.
        kinds, options: by group the optimizer's class, and the hyperparameters of each step from the start on.
    """

    start: int
    theta: State
    states: dict[str, State]
    gradients: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    dense_bytes: int
    kinds: dict[int, type[torch.optim.Optimizer]]
    options: dict[int, list[dict[str, Any]]]


def find_tape(
    selection: Selection,
    readers: Readers,
    timelines: dict[int, Timeline],
    optimizers: Sequence[torch.optim.Optimizer],
) -> Tape | str:
    """Return the tape of a run, or why there is none.

    Args:
        optimizers: of the classes that took the steps, where those are not torch's own.
    """
    snapshot = selection.snapshot
    epoch, step = selection.identity.restarted
    if int(selection.leaving.keys[0]) < moment_key(epoch, step):
        return (
            f"training went on from a rolled-back model at epoch {epoch}, step {step}, and a replay from before that "
            "would not end at this model"
        )
    gradients = selection.whole_gradients()
    if not gradients.num_rows:
        return f"no step's whole gradient was kept; {_RECORD_IT}"
    began = _latest_start(selection, gradients, timelines)
    if isinstance(began, str):
        return began
    kinds: dict[int, type[torch.optim.Optimizer]] = {}
    options: dict[int, list[dict[str, Any]]] = {}
    for group, timeline in timelines.items():
        kind = class_of(timeline.optimizer, optimizers)
        if kind is None:
            return f"{timeline.optimizer} is not one of torch's own classes: pass optimizer= of that class"
        kinds[group], options[group] = kind, []
        for step in range(int(np.searchsorted(timeline.keys, moment_key(*began))), len(timeline.keys)):
            taken = _hyperparameters(timeline, step)
            if taken is None:
                return (
                    f"the hyperparameters of {timeline.optimizer} were not recorded: some are no plain numbers, words "
                    "or lists; pass options= (JSON) in append_step's groups"
                )
            options[group].append(taken)
    names = snapshot.catalog.sql(
        "SELECT DISTINCT name FROM states WHERE role = 'start_state' AND epoch = ? AND step = ?", list(began)
    ).fetchall()
    places = {}
    for name, rows in by_parameter(gradients.sort_by("key")).items():
        places[name] = rows["key"].to_numpy(), rows["commit"].to_numpy(), rows["owner"].to_numpy()
    return Tape(
        moment_key(*began),
        State.find(snapshot, readers.cache, "start_theta", moment=began),
        {name: State.find(snapshot, readers.cache, "start_state", moment=began, name=name) for (name,) in names},
        places,
        int(np.sum(gradients["dense_bytes"].to_numpy())),
        kinds,
        options,
    )


def _latest_start(selection: Selection, gradients: pa.Table, timelines: dict[int, Timeline]) -> Moment | str:
    """Return where a replay can begin: at a start that was kept, after which no step's gradient is missing."""
    identity, first = selection.identity, int(selection.leaving.keys[0])
    keys = np.unique(np.concatenate([timeline.keys for timeline in timelines.values()]))
    gaps = np.setdiff1d(keys, complete_steps(gradients["key"].to_numpy(), selection.known, timelines))
    starts = selection.snapshot.catalog.sql(
        "SELECT DISTINCT epoch, step FROM states "
        f"WHERE role = 'start_theta' AND {up_to(identity.moment)} ORDER BY ALL DESC"
    ).fetchall()
    for epoch, step in starts:
        key = moment_key(epoch, step)
        if moment_key(*identity.restarted) <= key <= first and not (gaps >= key).any():
            return epoch, step
    later = gaps[gaps >= first]
    epoch, step = moment_of(later[0] if len(later) else first)
    what = "its whole gradient" if len(later) else "what the run began from before it"
    return f"epoch {epoch}, step {step}: {what} was not kept; {_RECORD_IT}"


def _hyperparameters(timeline: Timeline, step: int) -> dict[str, Any] | None:
    """Return every hyperparameter of a step, None where they are not known."""
    options = timeline.options[step]
    plain = _from_columns(timeline, step) if options is None else json.loads(options)
    if plain is None:
        return None
    return {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}


def _from_columns(timeline: Timeline, step: int) -> dict[str, Any] | None:
    """Return the hyperparameters of a step that was appended by hand."""
    schedule = timeline.schedule

    def numbers(*names: str) -> dict[str, Any]:
        values = {name: getattr(schedule, name)[step] for name in names}
        return {name: bool(one) if isinstance(one, np.bool_ | bool) else float(one) for name, one in values.items()}

    decoupled = bool(schedule.decoupled[step])
    if timeline.optimizer in SGD_FAMILY:
        plain = numbers("lr", "momentum", "dampening", "nesterov", "weight_decay", "maximize")
        # torch's SGD has no decoupled decay
        return None if timeline.optimizer == "SGD" and decoupled and plain["weight_decay"] else plain
    if timeline.optimizer in ADAM_FAMILY:
        plain = numbers("lr", "eps", "weight_decay", "maximize")
        plain["betas"] = [float(schedule.beta1[step]), float(schedule.beta2[step])]
        plain["amsgrad"] = bool(timeline.amsgrad[step])
        if timeline.optimizer == "Adam" and decoupled:
            plain["decoupled_weight_decay"] = True
        return plain
    return None


class _Rerun:
    """One parameter, or a block of it, and an optimizer for it alone.

    Args:
        states: the optimizer's state to begin with, by name; none for a fresh one.
    """

    def __init__(
        self,
        kind: type[torch.optim.Optimizer],
        theta: torch.Tensor,
        options: Mapping[str, Any],
        states: Mapping[str, torch.Tensor],
    ) -> None:
        self.parameter = torch.nn.Parameter(theta)
        accepted = inspect.signature(kind.__init__).parameters
        # Recorded hyperparameters hold what `step` reads, which may be more than the constructor takes.
        taken = {name: value for name, value in _plain(options).items() if name in accepted and name != "params"}
        self.optimizer = kind([self.parameter], **taken)
        if states:
            self.optimizer.state[self.parameter] = dict(states)

    def step(self, options: Mapping[str, Any], gradient: torch.Tensor) -> None:
        """Take one step with these hyperparameters."""
        self.optimizer.param_groups[0].update(_plain(options))
        self.parameter.grad = gradient.view_as(self.parameter)
        self.optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Return the optimizer's state as it is now, by name."""
        state = self.optimizer.state.get(self.parameter, {})
        return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {**options, **{name: False for name in _VARIANTS if name in options}}


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

    @property
    def state_names(self) -> list[str]:
        return sorted({*self.states, *(key for _, key in self.others)})

    def keep_state(self, run: _Rerun, piece: Piece, like: Vector) -> None:
        """Take over the optimizer's state at the end of a run."""
        for name, numbers in run.state().items():
            if numbers.shape == run.parameter.shape and name != "step":
                if name not in self.states:
                    self.states[name] = like.workspace.new()
                self.states[name].write(piece.parameter.name, piece.span[0], numbers.detach().reshape(-1))
            elif numbers.numel() > 1:
                self.others[piece.parameter.name, name] = numbers.detach().clone()


@dataclass(frozen=True, eq=False, slots=True)
class Replay:
    """The run, and what leaves it.

    Attributes:
        rows: parameter to the gradients that leave, weight 1, with the position of their step as bin.
        edges: `moment_key` of the last step of each time bin but the last.
        keep_states: whether the optimizer's state is wanted too.
    """

    tape: Tape
    known: dict[str, Parameter]
    timelines: dict[int, Timeline]
    changes: dict[int, StepChange]
    rows: dict[str, GradientRows]
    edges: np.ndarray
    strength: float
    readers: Readers
    keep_states: bool

    def run(
        self, places: Mapping[str, Place], increments: Sequence[Vector], advance: Callable[[int], None]
    ) -> Replayed:
        """Write the difference of the two runs' parameters into one vector per time bin.

        Cost: one pass over the whole gradients and the leaving records; two optimizer steps for every step,
        parameter and block of rows; in float64.
        """
        result, device = Replayed(), increments[0].workspace.device
        squares = torch.zeros(2, dtype=_EXACT, device="cpu")
        for name in increments[0].workspace.sizes:
            for piece in self._pieces(self.known[name]):
                began = _numbers(self.tape.theta.read(name, piece.shape[1], *piece.span), device)
                actual, other = self._both(piece, began, increments)
                end = places[name].read(*piece.span).to(_EXACT)
                ended = actual.parameter.detach().reshape(-1)
                squares += torch.stack([(ended - end).square().sum(), (ended - began).square().sum()]).cpu()
                if self.keep_states:
                    result.keep_state(other, piece, increments[0])
            advance(1)
        result.off, result.moved = squares.sqrt().tolist()
        return result

    def _both(self, piece: Piece, began: torch.Tensor, increments: Sequence[Vector]) -> tuple[_Rerun, _Rerun]:
        """Run one piece twice, and write what sets the runs apart; return them."""
        name, group, device = piece.parameter.name, piece.parameter.group_id, began.device
        timeline, options, actual = self.timelines[group], iter(self.tape.options[group]), self._begin(piece, began)
        # Until something changes, both runs are one.
        other: _Rerun | None = None
        rows = self.rows.get(name)
        leaving: Iterator[tuple[int, torch.Tensor]] = iter(())
        if rows is not None:
            leaving = sums_by_bin(rows, piece, self.readers, _EXACT, device)
        upcoming = next(leaving, None)
        tolerance = self._tolerance(piece.parameter, rows)
        # What the runs moved apart in a time bin is that bin's increment: the filter bends early ones more than late
        # ones.
        ends = [*np.searchsorted(timeline.keys, self.edges, side="right").tolist(), len(timeline.keys)]
        written = torch.zeros((), dtype=_EXACT, device=device)
        number = 0
        for step in range(int(np.searchsorted(timeline.keys, self.tape.start)), len(timeline.keys)):
            taken, consumed, removed = next(options), self._consumed(piece, timeline, step, device), None
            if upcoming is not None and upcoming[0] == step:
                removed, upcoming = upcoming[1], next(leaving, None)
            if consumed is not None:
                if other is None and (removed is not None or self.changes[group].on_whole[step]):
                    other = copy.deepcopy(actual)
                if other is not None:
                    other.step(taken, self._without(consumed, removed, group, step, tolerance))
                actual.step(taken, _clamped(consumed, timeline, step))
            while number < len(increments) - 1 and step + 1 >= ends[number]:
                written = self._write(increments[number], piece, actual, other, written)
                number += 1
        self._write(increments[number], piece, actual, other, written)
        return actual, other or actual

    def _write(
        self, increment: Vector, piece: Piece, actual: _Rerun, other: _Rerun | None, written: torch.Tensor
    ) -> torch.Tensor:
        """Write what the runs moved apart since the last time; return how far they are apart now."""
        if other is None:
            return written
        apart = (other.parameter - actual.parameter).detach().reshape(-1)
        increment.write(piece.parameter.name, piece.span[0], (apart - written) * self.strength)
        return apart

    def _without(
        self, consumed: torch.Tensor, removed: torch.Tensor | None, group: int, step: int, tolerance: float
    ) -> torch.Tensor:
        """Return what the step would have consumed without the leaving samples, a (g - h)."""
        timeline, change = self.timelines[group], self.changes[group]
        # The tape holds what was consumed, c g. Where b = 0 nothing but h is taken away, and a = c.
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
        return _clamped(rest * change.on_removed[step], timeline, step)

    def _consumed(self, piece: Piece, timeline: Timeline, step: int, device: torch.device) -> torch.Tensor | None:
        """Return what a step consumed, None where the parameter was left alone."""
        keys, commits, owners = self.tape.gradients[piece.parameter.name]
        place = int(np.searchsorted(keys, timeline.keys[step]))
        if place == len(keys) or keys[place] != timeline.keys[step]:
            return None
        reader = self.readers[int(commits[place])]
        return _numbers(reader.rows([int(owners[place])], "gradient", piece.first, piece.last), device)

    def _begin(self, piece: Piece, began: torch.Tensor) -> _Rerun:
        """Return the run at its start, from these parameters."""
        name, group = piece.parameter.name, piece.parameter.group_id
        # An optimizer that treats each element by itself may be given any rows; another needs the parameter as it is.
        kind = self.tape.kinds[group]
        shape = piece.parameter.shape if kind.__name__ not in ELEMENTWISE else piece.shape
        states = {}
        for key, state in self.tape.states.items():
            if name in state.places:
                single = key == "step" or state.size(name) != piece.parameter.numel
                width, span = (1, (0, 1)) if single else (piece.shape[1], piece.span)
                states[key] = _numbers(state.read(name, width, *span), began.device).reshape(() if single else shape)
        return _Rerun(kind, began.clone().reshape(shape), self.tape.options[group][0], states)

    def _pieces(self, parameter: Parameter) -> Iterator[Piece]:
        kind, memory = self.tape.kinds[parameter.group_id].__name__, self.readers.memory
        if kind in ELEMENTWISE:
            return pieces_of(parameter, memory.sums_bytes, _ELEMENT_BYTES)
        needed = parameter.numel * _ELEMENT_BYTES
        if needed > memory.sums_bytes + memory.deltas_bytes:
            raise InvalidInputError(
                f"{kind} steps whole matrices, and running it again over parameter {parameter.name} takes "
                f"{needed:,} bytes beside the rest: raise memory_limit to {4 * needed:,}",
                kind="memory-limit",
                needed_bytes=4 * needed,
            )
        return iter([Piece(parameter, 0, parameter.matrix_shape[0])])

    def _tolerance(self, parameter: Parameter, rows: GradientRows | None) -> float:
        """Return the coarsest rounding of the parameter's gradients: its own, the store's, or autocast's."""
        dtypes = [self.readers.snapshot.settings.precision, parameter.dtype]
        if rows is not None:
            reader, owner = self.readers[int(rows.commit[0])], int(rows.owner[0])
            dtypes += [reader.dtype(owner, role) for role in ("output_gradients", "values") if reader.has(owner, role)]
        return max(_ROUNDING.get(dtype, 0.0) for dtype in dtypes)


def _numbers(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device, _EXACT)


def _clamped(gradient: torch.Tensor, timeline: Timeline, step: int) -> torch.Tensor:
    """Clip a gradient by value, where that step was."""
    bound = float(timeline.clip_value[step])
    return gradient if np.isnan(bound) else gradient.clamp(-bound, bound)
