"""A recorded optimizer made again: its class, its hyperparameters at every step, one parameter to step."""

import inspect
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from timstore.model.optimizer_names import ADAM_FAMILY, SGD_FAMILY
from timstore.rollbacks.timeline import Timeline

# Ways to compute the same step; one plain way is enough here.
_VARIANTS = ("foreach", "fused", "capturable", "differentiable")


def hyperparameters(timeline: Timeline, first: int) -> list[dict[str, Any]] | str:
    """Return every hyperparameter of the steps from `first` on, or why they are not known."""
    found = []
    for number in range(first, len(timeline.keys)):
        options = timeline.options[number]
        plain = _from_columns(timeline, number) if options is None else json.loads(options)
        if plain is None:
            return (
                f"the hyperparameters of {timeline.optimizer} were not recorded: some are no plain numbers, words or "
                "lists; pass options= (JSON) in append_step's groups"
            )
        found.append({name: tuple(one) if isinstance(one, list) else one for name, one in plain.items()})
    return found


class Rerun:
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
        held = self.optimizer.state.get(self.parameter, {})
        return {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {**options, **{name: False for name in _VARIANTS if name in options}}


def _from_columns(timeline: Timeline, number: int) -> dict[str, Any] | None:
    """Return the hyperparameters of a step that was appended by hand."""
    schedule = timeline.schedule
    names = {
        SGD_FAMILY: ("lr", "momentum", "dampening", "nesterov", "weight_decay", "maximize"),
        ADAM_FAMILY: ("lr", "eps", "weight_decay", "maximize"),
    }
    for family, columns in names.items():
        if timeline.optimizer in family:
            plain: dict[str, Any] = {name: _python(getattr(schedule, name)[number]) for name in columns}
            if family == ADAM_FAMILY:
                plain["betas"] = [float(schedule.beta1[number]), float(schedule.beta2[number])]
                plain["amsgrad"] = bool(timeline.amsgrad[number])
            if timeline.optimizer == "Adam" and schedule.decoupled[number]:
                plain["decoupled_weight_decay"] = True
            if timeline.optimizer == "SGD" and schedule.decoupled[number] and plain["weight_decay"]:
                return None  # torch's SGD has no decoupled decay
            return plain
    return None


def _python(value: Any) -> Any:
    return bool(value) if isinstance(value, np.bool_ | bool) else float(value)
