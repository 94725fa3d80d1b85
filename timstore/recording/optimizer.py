"""What optimizers train, and what a step of theirs really used: its groups' scalars."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from timstore.errors import CoverageError, InvalidInputError
from timstore.model.optimizer_names import class_name
from timstore.records import StepGroup


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """One recorded optimizer.

    Attributes:
        parameters: those of the model that it trains, by name.
        groups: name to the number of its group, counted over all optimizers.
        first_group: the number of its first group.
    """

    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, nn.Parameter]
    groups: Mapping[str, int]
    first_group: int


def trained_by(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[Trained]:
    """Return what each optimizer trains of a model.

    Raises:
        InvalidInputError: one trains nothing, two train the same parameter, or they cannot be recorded.
    """
    trained: list[Trained] = []
    owners: dict[str, int] = {}
    first = 0
    for number, optimizer in enumerate(optimizers):
        if isinstance(optimizer, torch.optim.LBFGS):
            raise InvalidInputError(
                "LBFGS evaluates several times in one step, so no step has one gradient; use another"
            )
        group_of = {
            id(parameter): group_id
            for group_id, group in enumerate(optimizer.param_groups, first)
            for parameter in group["params"]
        }
        parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            # One with an empty axis has no gradient to record.
            if parameter.requires_grad and id(parameter) in group_of and parameter.numel()
        }
        if not parameters:
            what = "the optimizer" if len(optimizers) == 1 else f"optimizer {number} of the list"
            raise InvalidInputError(f"{what} holds none of the model's parameters: build it from model.parameters()")
        wrong = next((name for name, parameter in parameters.items() if parameter.is_complex()), None)
        if wrong:
            raise InvalidInputError(f"parameter {wrong} is complex; gradients are real numbers here", parameter=wrong)
        twice = next((name for name in parameters if name in owners), None)
        if twice:
            raise InvalidInputError(
                f"parameter {twice} is trained by two of the optimizers (numbers {owners[twice]} and {number} of the "
                "list), and each would undo what is known of the other's steps: give it to one of them",
                parameter=twice,
            )
        owners.update(dict.fromkeys(parameters, number))
        groups = {name: group_of[id(parameter)] for name, parameter in parameters.items()}
        trained.append(Trained(optimizer, parameters, groups, first))
        first += len(optimizer.param_groups)
    return trained


def step_groups(optimizer: torch.optim.Optimizer, names: Mapping[int, str], first: int = 0) -> list[StepGroup]:
    """Return each group's scalars as they are now, when the step is about to use them.

    Args:
        names: parameter (by identity) to its name.
        first: number of the first group.
    """
    name = class_name(type(optimizer))
    groups = []
    for number, group in enumerate(optimizer.param_groups, first):
        mine = [parameter for parameter in group["params"] if id(parameter) in names]
        active = [parameter for parameter in mine if parameter.grad is not None]
        betas = group.get("betas") or (None, None)
        momentum = _number(group.get("momentum")) or 0.0
        buffer = "momentum_buffer" if momentum else "exp_avg" if betas[0] is not None else None
        fresh = [one for one in active if buffer and optimizer.state.get(one, {}).get(buffer) is None]
        counters = {count + 1 for count in _counts([optimizer.state.get(one, {}).get("step", 0) for one in active])}
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
                amsgrad=bool(group.get("amsgrad", False)),
                counter=counters.pop() if len(counters) == 1 and buffer else None,
                idle=tuple(names[id(one)] for one in mine if one.grad is None),
                fresh=tuple(names[id(one)] for one in fresh),
                options=_options(group),
            )
        )
    return groups


def norm_of_gradients(gradients: Collection[torch.Tensor]) -> float:
    """Return the norm of all gradients together; of float32 and less it is taken in float32, as clipping does."""
    exact = (torch.float32, torch.float64)
    halves = [one for one in gradients if one.dtype not in exact]
    norms = torch._foreach_norm(halves, 2, dtype=torch.float32) if halves else ()
    whole = float(nn.utils.get_total_norm([*norms, *(one for one in gradients if one.dtype in exact)]))
    if math.isfinite(whole):
        return whole
    # Numbers whose squares are beyond float32, if they are finite at all.
    return float(nn.utils.get_total_norm([one.double().norm() for one in gradients]))


def amp_scales(optimizer: torch.optim.Optimizer, scaler: Any) -> tuple[float, float]:
    """Return (what the step itself divides the gradients by, what the loss had been multiplied by); 1 without AMP.

    Args:
        scaler: the GradScaler, None where there is none or it was not given.
    """
    # A fused optimizer is handed gradients that are still scaled, and the scale beside them.
    inside = _number(getattr(optimizer, "grad_scale", None)) or 1.0
    return inside, float(scaler.get_scale()) if scaler is not None else inside


def is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether this call of a fused optimizer's step will change nothing, since the scaled gradients overflowed."""
    return bool(getattr(optimizer, "found_inf", None) or 0)


def check_untrained(
    optimizers: Sequence[torch.optim.Optimizer], untrained: Mapping[str, nn.Parameter], *, all_seen: bool
) -> None:
    """Refuse a step that changes a parameter of the model which is not recorded, or that goes by while another does.

    Args:
        untrained: the model's parameters that were not trained when recording began.
        all_seen: look for parameters that no optimizer here holds, too.

    Raises:
        CoverageError: naming the parameter.
    """
    reached = {name: one for name, one in untrained.items() if one.grad is not None}
    if not reached:
        return
    held = {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
    for name, parameter in reached.items():
        if id(parameter) in held:
            raise CoverageError(
                f"parameter {name} is trained in this step, and was frozen or not in the optimizer when recording "
                "began: leave the `with` block before changing what is trained, and enter it again after",
                kind="not-captured",
                parameter=name,
            )
        if all_seen and parameter.requires_grad and bool(parameter.grad.any()):  # type: ignore[union-attr]
            raise CoverageError(
                f"parameter {name} gets a gradient, and no recorded optimizer holds it, so that what samples do to it "
                "could not be rolled back: pass all optimizers in a list, record(model, [one, two]), or freeze it with "
                "requires_grad_(False) where none trains it",
                kind="not-captured",
                parameter=name,
            )


def _options(group: Mapping[str, Any]) -> str | None:
    """Return every hyperparameter of a group as JSON; None if one is no plain value."""
    plain = {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name, value in group.items()
        if name not in ("params", "param_names")
    }
    try:
        return json.dumps(plain, sort_keys=True)
    except TypeError:
        return None


def _counts(values: Sequence[Any]) -> list[int]:
    """Return numbers, of which some may be tensors; those of a CUDA device in one transfer."""
    cuda = [one for one in values if isinstance(one, torch.Tensor) and one.is_cuda]
    fetched = iter(torch.stack([one.reshape(()) for one in cuda]).tolist() if cuda else [])
    return [int(next(fetched) if isinstance(one, torch.Tensor) and one.is_cuda else one) for one in values]


def _number(value: Any) -> float | None:
    """Return a number as a float, also one in a tensor; None for anything else."""
    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) else None
