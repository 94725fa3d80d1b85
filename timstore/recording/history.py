"""Whole parameters' worth of history: optimizers' second moment or what they consumed, parameters on the way."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from timstore.database.store import Store
from timstore.errors import InvalidInputError
from timstore.model.optimizer_names import SGD_FAMILY, class_name
from timstore.options import OptimizerHistory
from timstore.recording.optimizer import amp_scales


class History:
    """Keeps what a rollback needs of the optimizers beyond their scalars.

    Args:
        rank: of this process; the others hold the same optimizers, and the first one keeps it for all.
        kind: `final` keeps the second moment when recording ends and at save points; `gradients` also every step's
            consumed gradient, and the parameters and the optimizer's state that the first one met.
        parameters: name to parameter, of all that are trained.
        waypoints: whether the parameters are kept at some moments on the way, which a rollback asks for the curvature
            that there was.
    """

    def __init__(
        self,
        store: Store,
        optimizers: Sequence[torch.optim.Optimizer],
        parameters: Mapping[str, nn.Parameter],
        kind: OptimizerHistory,
        rank: int,
        *,
        waypoints: bool,
    ) -> None:
        self.needs_products = kind == "gradients"
        self.keeps_gradients = self.needs_products and rank == 0
        self._keeps_moments = rank == 0
        self._keeps_waypoints = waypoints and rank == 0
        self._store = store
        self._optimizers = optimizers
        self._parameters = parameters
        self._names = {id(one): name for name, one in parameters.items()}
        self._begun = not self.keeps_gradients

    @property
    def is_replayed(self) -> bool:
        """Whether a rollback will run the optimizers again, which it needs not for SGD, and see where that ends."""
        linear = all(class_name(type(one)) in SGD_FAMILY for one in self._optimizers)
        return self.needs_products and not linear

    def before_step(self, epoch: int, step: int) -> None:
        """Keep what the first step of a stretch begins from.

        Raises:
            InvalidInputError: the optimizer holds state that no later run could be begun with.
        """
        if self._begun:
            return
        states = start_states(self._optimizers, self._names)
        if not self._follows(epoch, step):
            self._store.append_states(epoch, step, "start_theta", self._theta())
            for name, numbers in states.items():
                self._store.append_states(epoch, step, "start_state", numbers, name=name)
        self._begun = True

    def copied(
        self, optimizer: torch.optim.Optimizer, gradients: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return copies on the host of what a step is about to consume; none where they are not kept."""
        if not self.keeps_gradients:
            return {}
        inside, _ = amp_scales(optimizer, None)
        copies = {name: one.detach().cpu().clone() for name, one in gradients.items()}
        return copies if inside == 1 else {name: one.div_(inside) for name, one in copies.items()}

    def after_step(self, epoch: int, step: int, gradients: Mapping[str, torch.Tensor]) -> None:
        """Keep what a step consumed, the tensors are handed over; and what it left, at a waypoint.

        Args:
            step: counted over the whole run.
        """
        if gradients:
            self._store.append_states(epoch, step, "gradient", gradients)
        if self._keeps_waypoints and step + 1 in waypoints_until(step + 1):
            self._store.append_states(epoch, step, "theta", self._theta())

    def save_point(self, epoch: int, step: int) -> None:
        """Keep the second moment as it is now."""
        moments = second_moments(self._optimizers, self._names) if self._keeps_moments else None
        if moments:
            self._store.append_states(epoch, step, "exp_avg_sq", moments)

    def _theta(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().cpu().clone() for name, parameter in self._parameters.items()}

    def _follows(self, epoch: int, step: int) -> bool:
        """Say whether the step right before this one is of the same attempt and has its gradient in the store."""
        # Where an attempt begins the optimizer may be a new one, and the model another: a rolled-back one.
        before = f"attempt = {self._store.attempt} AND (epoch < {epoch} OR (epoch = {epoch} AND step < {step}))"
        query = (
            f"SELECT (SELECT max((epoch, step)) FROM steps WHERE {before}) = "
            f"(SELECT max((epoch, step)) FROM states WHERE role = 'gradient' AND {before})"
        )
        return bool(self._store.snapshot().catalog.sql(query).fetchall()[0][0])


def waypoints_until(steps: int) -> list[int]:
    """Return after how many steps each the parameters are kept in a run of so many."""
    # Curvature changes most early in a run, and nobody knows yet how long it will be: powers of two, from 8 on.
    return [1 << power for power in range(3, steps.bit_length())]


def second_moments(optimizers: Sequence[torch.optim.Optimizer], names: Mapping[int, str]) -> dict[str, torch.Tensor]:
    """Return what the optimizer divides by, squared and before bias correction: its second moment, or AMSGrad's.

    Args:
        names: parameter (by identity) to its name.
    """
    found = {}
    for optimizer, group in ((one, group) for one in optimizers for group in one.param_groups):
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            moment = state.get("max_exp_avg_sq") if group.get("amsgrad") else state.get("exp_avg_sq")
            if id(parameter) in names and isinstance(moment, torch.Tensor) and moment.shape == parameter.shape:
                found[names[id(parameter)]] = moment
    return found


def start_states(
    optimizers: Sequence[torch.optim.Optimizer], names: Mapping[int, str]
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the optimizers' whole state, copied: state's name to parameter to numbers.

    Raises:
        InvalidInputError: for state that is neither one number nor has the parameter's shape.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for parameter, state in (held for optimizer in optimizers for held in optimizer.state.items()):
        if id(parameter) not in names:
            continue
        for name, value in state.items():
            if value is None:
                continue
            numbers = _numbers(value)
            if numbers is None or (numbers.numel() != 1 and numbers.shape != parameter.shape):
                raise InvalidInputError(
                    f"the optimizer already holds state {name!r} that is neither a number nor of the parameter's "
                    "shape, so that its steps could not be run again: record with optimizer_history='gradients' from "
                    "the optimizer's first step, or with 'final'",
                    kind="optimizer-state",
                )
            found.setdefault(name, {})[names[id(parameter)]] = numbers
    return found


def _numbers(value: Any) -> torch.Tensor | None:
    if isinstance(value, int | float):
        return torch.tensor(float(value), dtype=torch.float64, device="cpu")
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone() if value.is_floating_point() else value.detach().cpu().double()
    return None
