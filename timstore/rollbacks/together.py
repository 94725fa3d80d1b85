"""A change of the model in every process that holds it: the first one computes, all get the same bits."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from timstore.ranks import Ranks
from timstore.store import Store
from timstore.wrappers import inner_optimizer, unwrapped

T = TypeVar("T")


def changed_together(
    store: Store,
    model: Any,
    optimizer: Any,
    change: Callable[[nn.Module, torch.optim.Optimizer | None], T],
) -> T:
    """Change a model, and an optimizer with it, in every process of its DistributedDataParallel.

    Every process has to call this. Where the first one fails, all raise what it raised, and no model is changed.

    Args:
        change: is given both without what is around them.
    """
    inner, group = unwrapped(model)
    steps = None if optimizer is None else inner_optimizer(optimizer)[0]
    ranks = Ranks(group)
    result = ranks.lead(lambda: change(inner, steps))
    if not ranks.alone:
        with torch.no_grad():
            for tensor in _tensors(inner, steps):
                ranks.send(tensor)
        if ranks.rank != 0:
            store.refresh()
    return result


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[torch.Tensor]:
    """Return what a change may have reached, in the same order in every process."""
    found = [parameter.detach() for parameter in model.parameters()]
    if optimizer is None:
        return found
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            found += [state[name] for name in sorted(state) if isinstance(state[name], torch.Tensor)]
    return found
