"""The optimizer goes along: its buffers as they would be without the samples, where the records say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from timstore.errors import InvalidInputError
from timstore.optimizers import ADAM_FAMILY, class_name
from timstore.rollbacks.apply import Write, moves
from timstore.rollbacks.methods import FINAL_MOMENT, Method
from timstore.rollbacks.replay import Replayed
from timstore.rollbacks.targets import InModule
from timstore.rollbacks.timeline import Timeline
from timstore.rollbacks.vectors import Vector


@dataclass(frozen=True, eq=False, slots=True)
class Correction:
    """What is done to an optimizer's state.

    Attributes:
        added: state's name to what is added to it.
        replaced: state's name to what takes its place, in the parameters' shapes; `others` in other shapes.
    """

    added: Mapping[str, Vector] = field(default_factory=dict)
    replaced: Mapping[str, Vector] = field(default_factory=dict)
    others: Mapping[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    @property
    def states(self) -> list[str]:
        """The states that it changes."""
        return sorted({*self.added, *self.replaced, *(key for _, key in self.others)})

    def writes(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> list[Write]:
        """Return what changes the optimizer's state, where it is.

        Raises:
            InvalidInputError: a state has another size than what the records determine.
        """
        found = []
        for name, parameter in parameters.items():
            state = {key: one for key, one in optimizer.state.get(parameter, {}).items() if torch.is_tensor(one)}
            for key in sorted(state.keys() & self.added.keys()):
                _check_size(state[key], self.added[key].workspace.sizes[name], name, key)
                found += moves({name: InModule(state[key])}, self.added[key])
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


def buffer_of(optimizers: set[str]) -> str:
    """Return the name of the state that is linear in the gradients."""
    return "exp_avg" if optimizers & set(ADAM_FAMILY) else "momentum_buffer"


def check_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], timelines: dict[int, Timeline]
) -> None:
    """Refuse an optimizer that is not the one that trained these parameters.

    Raises:
        InvalidInputError: another class, or it does not hold a parameter or its state.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidInputError(f"optimizer is a torch.optim.Optimizer, not {type(optimizer).__name__}")
    names = {timeline.optimizer for timeline in timelines.values()}
    if class_name(type(optimizer)) not in names:
        raise InvalidInputError(
            f"optimizer is a {class_name(type(optimizer))}; the run was trained by {' and '.join(sorted(names))}"
        )
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    absent = next((name for name, one in parameters.items() if id(one) not in held), None)
    if absent:
        raise InvalidInputError(f"optimizer does not hold parameter {absent} of this model", parameter=absent)
    stateful = names != {"SGD"} or any(timeline.schedule.momentum.any() for timeline in timelines.values())
    if stateful and not any(optimizer.state.get(one) for one in parameters.values()):
        raise InvalidInputError("optimizer holds no state yet: pass the one that trained the model, or load its state")


def described(method: Method, timelines: dict[int, Timeline], replayed: Replayed | None) -> tuple[str, bool]:
    """Return (what becomes of the optimizer's state, in words; whether its momentum is corrected by a sum)."""
    if replayed is not None:
        names = sorted({*replayed.states, *(key for _, key in replayed.others)})
        return f"{', '.join(names) or 'it holds nothing'} corrected", False
    if method is FINAL_MOMENT:
        moved = [one for one in timelines.values() if one.optimizer in ADAM_FAMILY]
        coupled = any((one.schedule.weight_decay != 0)[~one.schedule.decoupled.astype(bool)].any() for one in moved)
        rest = "exp_avg_sq left as it was: optimizer_history='gradients' would determine it"
        if coupled:
            return f"exp_avg and {rest}", False
        return f"exp_avg corrected, {rest}", True
    if any(timeline.schedule.momentum.any() for timeline in timelines.values()):
        return "momentum_buffer corrected", True
    return "it holds nothing to correct", False
