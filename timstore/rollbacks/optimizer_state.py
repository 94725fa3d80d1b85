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
        replaced: state's name to what takes its place, in the parameters' shapes; `others` in other shapes.
    """

    added: Vector | None = None
    buffers: Mapping[str, str] = field(default_factory=dict)
    replaced: Mapping[str, Vector] = field(default_factory=dict)
    others: Mapping[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    @property
    def states(self) -> list[str]:
        """The states that it changes."""
        added = () if self.added is None else self.buffers.values()
        return sorted({*added, *self.replaced, *(key for _, key in self.others)})

    def writes(
        self, optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, torch.nn.Parameter]
    ) -> list[Write]:
        """Return what changes the optimizers' state, where it is.

        Raises:
            InvalidInputError: a state has another size than what the records determine.
        """
        found = []
        states = {id(parameter): held for one in optimizers for parameter, held in one.state.items()}
        for name, parameter in parameters.items():
            state = {key: one for key, one in states.get(id(parameter), {}).items() if torch.is_tensor(one)}
            buffer = state.get(self.buffers.get(name, ""))
            if self.added is not None and buffer is not None:
                _check_size(buffer, self.added.workspace.sizes[name], name, self.buffers[name])
                found += moves({name: InModule(buffer)}, self.added)
            for key in sorted(state.keys() & self.replaced.keys()):
                _check_size(state[key], self.replaced[key].workspace.sizes[name], name, key)
                found.append(Write(InModule(state[key]), partial(self.replaced[key].in_blocks, name)))
            for key in sorted(state.keys() & {key for owner, key in self.others if owner == name}):
                numbers = self.others[name, key].reshape(-1)
                _check_size(state[key], numbers.numel(), name, key)
                found.append(Write(InModule(state[key]), partial(iter, [numbers])))
        return found


def _check_size(held: torch.Tensor, numel: int, name: str, key: str) -> None:
    if held.numel() != numel:
        raise InvalidInputError(
            f"the optimizer's {key} of parameter {name} has {held.numel()} elements, where {numel} were recorded: pass "
            "the optimizer that trained the model",
            parameter=name,
        )


def buffers_of(timelines: Mapping[int, Timeline], known: Mapping[str, Parameter]) -> dict[str, str]:
    """Return, of each parameter that has one, the name of the state whose change is a sum over the gradients.

    With coupled decay Adam's moments hold the parameters too, and their change is no such sum.
    """
    of_group = {}
    for group, timeline in timelines.items():
        if timeline.optimizer in ADAM_FAMILY and not _is_coupled(timelines):
            of_group[group] = "exp_avg"
        elif timeline.optimizer in SGD_FAMILY and timeline.schedule.momentum.any():
            of_group[group] = "momentum_buffer"
    return {name: of_group[one.group_id] for name, one in known.items() if one.group_id in of_group}


def check_optimizers(
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: Mapping[str, torch.nn.Parameter],
    known: Mapping[str, Parameter],
    timelines: Mapping[int, Timeline],
) -> None:
    """Refuse optimizers that are not those that trained these parameters.

    Raises:
        InvalidInputError: another class, or none holds a parameter, or its state.
    """
    names = {timeline.optimizer for timeline in timelines.values()}
    other = next((one for one in optimizers if class_name(type(one)) not in names), None)
    if other is not None:
        raise InvalidInputError(
            f"optimizer is a {class_name(type(other))}; the run was trained by {' and '.join(sorted(names))}"
        )
    holders = {
        id(one): optimizer for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]
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
        stateful = timeline.optimizer not in SGD_FAMILY or timeline.schedule.momentum.any()
        if stateful and not any(holder.state.values()):
            raise InvalidInputError(
                "optimizer holds no state yet: pass the one that trained the model, or load its state"
            )


def described(timelines: Mapping[int, Timeline], replayed: Replayed | None) -> str:
    """Return what becomes of the optimizers' state, in words."""
    if replayed is not None:
        names = sorted({*replayed.states, *(key for _, key in replayed.others)})
        return f"{', '.join(names) or 'it holds nothing'} corrected"
    found = []
    if any(one.optimizer in ADAM_FAMILY for one in timelines.values()):
        first = "exp_avg and" if _is_coupled(timelines) else "exp_avg corrected,"
        found.append(f"{first} exp_avg_sq left as it was: optimizer_history='gradients' would determine it")
    if any(one.optimizer in SGD_FAMILY and one.schedule.momentum.any() for one in timelines.values()):
        found.append("momentum_buffer corrected")
    return "; ".join(found) or "it holds nothing to correct"


def _is_coupled(timelines: Mapping[int, Timeline]) -> bool:
    adams = (one for one in timelines.values() if one.optimizer in ADAM_FAMILY)
    return any((one.schedule.weight_decay != 0)[~one.schedule.decoupled.astype(bool)].any() for one in adams)
