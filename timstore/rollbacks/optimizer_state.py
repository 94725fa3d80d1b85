"""The optimizers go along: their buffers as they would be without the samples, where the records say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from timstore.errors import InvalidInputError
from timstore.model.optimizer_names import ADAM_FAMILY, SGD_FAMILY, class_name
from timstore.records import Parameter
from timstore.rollbacks.apply import Write, moves
from timstore.rollbacks.replay import Replayed
from timstore.rollbacks.targets import InModule
from timstore.rollbacks.timeline import Timeline
from timstore.rollbacks.vectors import Vector


@dataclass(frozen=True, eq=False, slots=True)
class Correction:
    """What is done to the optimizers' state.

    Attributes:
        added: what is added to the state that `buffers` names, parameter by parameter.
        replayed: holds what takes the place of all state, instead.
        text: all that in words; None where no optimizer was given.
    """

    added: Vector | None = None
    buffers: Mapping[str, str] = field(default_factory=dict)
    replayed: Replayed | None = None
    text: str | None = None

    @property
    def states(self) -> list[str]:
        """The states that it changes."""
        if self.replayed is not None:
            return self.replayed.state_names
        return sorted({*self.buffers.values()}) if self.added is not None else []

    def writes(
        self, optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, torch.nn.Parameter]
    ) -> list[Write]:
        """Return what changes the optimizers' state, where it is."""
        writes: list[Write] = []
        replayed = self.replayed or Replayed()
        states = {id(parameter): state for one in optimizers for parameter, state in one.state.items()}
        for name, parameter in parameters.items():
            state = {key: value for key, value in states.get(id(parameter), {}).items() if torch.is_tensor(value)}
            buffer = self.buffers.get(name, "")
            if self.added is not None and buffer in state:
                _check_size(state[buffer], self.added.workspace.sizes[name], name, buffer)
                writes += moves({name: InModule(state[buffer])}, self.added)
            for key in sorted(state):
                vector, numbers = replayed.states.get(key), replayed.others.get((name, key))
                if vector is not None:
                    _check_size(state[key], vector.workspace.sizes[name], name, key)
                    writes.append(Write(InModule(state[key]), partial(vector.in_blocks, name)))
                if numbers is not None:
                    _check_size(state[key], numbers.numel(), name, key)
                    writes.append(Write(InModule(state[key]), partial(iter, [numbers.reshape(-1)])))
        return writes


def _check_size(state: torch.Tensor, numel: int, name: str, key: str) -> None:
    if state.numel() != numel:
        raise InvalidInputError(
            f"the optimizer's {key} of parameter {name} has {state.numel()} elements, where {numel} were recorded: "
            "pass the optimizer that trained the model",
            parameter=name,
        )


def buffers_of(timelines: Mapping[int, Timeline], known: Mapping[str, Parameter]) -> dict[str, str]:
    """Return, of each parameter that has one, the name of the state whose change is a sum over the gradients.

    With coupled decay Adam's moments hold the parameters too, and their change is no such sum.
    """
    # A momentum buffer, and Adam's first moment, are sums over the gradients; the second is of squares.
    of_group = {}
    for group, timeline in timelines.items():
        if timeline.optimizer in ADAM_FAMILY and not _is_coupled(timelines):
            of_group[group] = "exp_avg"
        elif _has_momentum(timeline):
            of_group[group] = "momentum_buffer"
    return {name: of_group[parameter.group_id] for name, parameter in known.items() if parameter.group_id in of_group}


def check_optimizers(
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: Mapping[str, torch.nn.Parameter],
    known: Mapping[str, Parameter],
    timelines: Mapping[int, Timeline],
) -> None:
    """Refuse optimizers that are not those that trained these parameters."""
    # Each parameter is held by an optimizer of the class that took its steps, with the state that they left.
    names = {timeline.optimizer for timeline in timelines.values()}
    other = next((optimizer for optimizer in optimizers if class_name(type(optimizer)) not in names), None)
    if other is not None:
        raise InvalidInputError(
            f"optimizer is a {class_name(type(other))}; the run was trained by {' and '.join(sorted(names))}"
        )
    holders = {
        id(parameter): optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in parameters.items():
        holder, timeline = holders.get(id(parameter)), timelines[known[name].group_id]
        if holder is None:
            raise InvalidInputError(
                f"optimizer does not hold parameter {name} of this model: where several trained it, pass them all, "
                "optimizer=[one, two]",
                parameter=name,
            )
        if class_name(type(holder)) != timeline.optimizer:
            raise InvalidInputError(
                f"parameter {name} is held by a {class_name(type(holder))}, and was trained by a {timeline.optimizer}",
                parameter=name,
            )
        stateful = timeline.optimizer not in SGD_FAMILY or _has_momentum(timeline)
        if stateful and not any(holder.state.values()):
            raise InvalidInputError(
                "optimizer holds no state yet: pass the one that trained the model, or load its state"
            )


def described(timelines: Mapping[int, Timeline], replayed: Replayed | None) -> str:
    """Return what becomes of the optimizers' state, in words."""
    if replayed is not None:
        return f"{', '.join(replayed.state_names) or 'it holds nothing'} corrected"
    told = []
    if any(timeline.optimizer in ADAM_FAMILY for timeline in timelines.values()):
        first = "exp_avg and" if _is_coupled(timelines) else "exp_avg corrected,"
        told.append(f"{first} exp_avg_sq left as it was: optimizer_history='gradients' would determine it")
    if any(_has_momentum(timeline) for timeline in timelines.values()):
        told.append("momentum_buffer corrected")
    return "; ".join(told) or "it holds nothing to correct"


def _is_coupled(timelines: Mapping[int, Timeline]) -> bool:
    schedules = (timeline.schedule for timeline in timelines.values() if timeline.optimizer in ADAM_FAMILY)
    return any((one.weight_decay != 0)[~one.decoupled.astype(bool)].any() for one in schedules)


def _has_momentum(timeline: Timeline) -> bool:
    return timeline.optimizer in SGD_FAMILY and bool(timeline.schedule.momentum.any())
