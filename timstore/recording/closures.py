"""A step that is given a closure, which runs forward and backward itself.

The closure runs before the step, so that what the step consumes can be looked at; the optimizer is handed another one,
which returns the same loss. That is the same step where the closure is evaluated once, before anything else.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from timstore.errors import CoverageError, InvalidInputError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def run_closure(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Iterable[nn.Parameter]
) -> Arguments | None:
    """Run the closure that a step was given; return what to give the step instead, None where there was none.

    Args:
        args, kwargs: of the step, the optimizer itself first.

    Raises:
        InvalidInputError: the step was given something else.
        CoverageError: the optimizer evaluates closures several times; also later, by the closure that is returned.
    """
    given = [one for one in (*args[1:], *kwargs.values()) if one is not None]
    if not given:
        return None
    closure = given[0]
    if len(given) > 1 or not callable(closure):
        raise InvalidInputError("optimizer.step takes a closure or nothing to be recorded, not other arguments")
    with torch.enable_grad():
        loss = closure()
    trained = list(parameters)
    left = _state(trained)
    calls = 0

    def same_loss() -> Any:
        nonlocal calls
        calls += 1
        if calls > 1 or _state(trained) != left:
            raise _evaluated_again(optimizer)
        return loss

    def instead(value: Any) -> Any:
        return same_loss if value is closure else value

    return tuple(instead(one) for one in args), {name: instead(one) for name, one in kwargs.items()}


def _state(parameters: Iterable[nn.Parameter]) -> list[tuple[int, int, int]]:
    """Return what changes when parameters or their gradients do."""
    return [(one._version, id(one.grad), -1 if one.grad is None else one.grad._version) for one in parameters]


def _evaluated_again(optimizer: torch.optim.Optimizer) -> CoverageError:
    return CoverageError(
        f"{type(optimizer).__name__} evaluates its closure more than once in a step, or changes parameters or "
        "gradients before it does: no one gradient is what the step consumes, so it cannot be recorded. Use an "
        "optimizer that takes one gradient per step",
        kind="closure",
    )
