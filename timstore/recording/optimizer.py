"""What an optimizer's step really used: its groups' scalars, and how gradients were scaled before it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from timstore.errors import InvalidInputError, StateError
from timstore.records import StepGroup

_SAMPLED = 256
# How far a parameter's consumed gradient may be from one common multiple of the accumulated one.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_TOLERANCE = 2e-2


def trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[nn.Parameter, int]]:
    """Return name to (parameter, group number) of the model's parameters that the optimizer trains.

    Raises:
        InvalidInputError: if there is none.
    """
    groups = {
        id(parameter): number for number, group in enumerate(optimizer.param_groups) for parameter in group["params"]
    }
    found = {
        name: (parameter, groups[id(parameter)])
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) in groups
    }
    if not found:
        raise InvalidInputError("the optimizer holds none of the model's parameters: build it from model.parameters()")
    return found


def step_groups(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[StepGroup]:
    """Return each group's scalars as they are now, when the step is about to use them.

    Args:
        names: parameter (by identity) to its name.
    """
    # A subclass may step differently: only the class itself is known.
    kind = type(optimizer)
    name = "SGD" if kind is torch.optim.SGD else kind.__name__
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        mine = [parameter for parameter in group["params"] if id(parameter) in names]
        active = [parameter for parameter in mine if parameter.grad is not None]
        betas = group.get("betas") or (None, None)
        momentum = _number(group.get("momentum")) or 0.0
        fresh = [one for one in active if momentum and optimizer.state[one].get("momentum_buffer") is None]
        groups.append(
            StepGroup(
                group_id=number,
                optimizer=name,
                lr=_number(group.get("lr")),
                momentum=momentum,
                dampening=_number(group.get("dampening")) or 0.0,
                nesterov=bool(group.get("nesterov", False)),
                beta1=_number(betas[0]),
                beta2=_number(betas[1]),
                eps=_number(group.get("eps")),
                weight_decay=_number(group.get("weight_decay")) or 0.0,
                decoupled=name == "AdamW" or bool(group.get("decoupled_weight_decay", False)),
                maximize=bool(group.get("maximize", False)),
                idle=tuple(names[id(one)] for one in mine if one.grad is None),
                fresh=tuple(names[id(one)] for one in fresh),
            )
        )
    return groups


class GradientScale:
    """Measures consumed over accumulated gradient: the clip factor, without being told of any clipping.

    Right after backward has accumulated into a parameter, some of its gradient's elements are kept; the
    optimizer consumes a common multiple of them, or something that no record can be weighted by.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._kept: dict[str, torch.Tensor] = {}
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._keeper(name))  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items()
        ]

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clear(self) -> None:
        """Forget the step that is over."""
        self._kept.clear()

    def ratio(self) -> float:
        """Return the common factor, measured over all parameters.

        Raises:
            StateError: if there is none: per-layer clipping, added noise, gradients changed by hand.
        """
        names = [name for name in self._kept if self._parameters[name].grad is not None]
        if not names:
            return 1.0
        sums = torch.stack([_sums(_sample(self._parameters[name]), self._kept[name]) for name in names]).cpu()
        between, accumulated, _ = sums.sum(0).tolist()
        if accumulated == 0:
            return 1.0
        ratio = float(between / accumulated)
        expected = ratio * ratio * sums[:, 1]
        off = (sums[:, 2] - 2 * ratio * sums[:, 0] + expected).clamp(min=0).sqrt()
        for name, error, size in zip(names, off.tolist(), expected.sqrt().tolist(), strict=True):
            if error > _TOLERANCE.get(self._parameters[name].dtype, _HALF_TOLERANCE) * max(size, 1e-30):
                raise StateError(
                    f"parameter {name}: between backward and step its gradient was changed by more than one factor "
                    "common to all parameters (per-layer clipping, noise, or by hand): records could not be weighted. "
                    "Clip by the total norm, or record without that change",
                    kind="gradient-changed",
                    parameter=name,
                )
        return ratio

    def _keeper(self, name: str) -> Any:
        def keep(parameter: torch.Tensor) -> None:
            self._kept[name] = _sample(parameter).clone()

        return keep


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    flat = parameter.grad.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED]


def _sums(consumed: torch.Tensor, accumulated: torch.Tensor) -> torch.Tensor:
    left, right = consumed.double(), accumulated.double()
    return torch.stack([left @ right, right @ right, left @ left])


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
