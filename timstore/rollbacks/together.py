"""A change of the model in every process that holds it: the first one computes, all get the same bits."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from timstore.ranks import Ranks
from timstore.store import Store
from timstore.wrappers import inner_optimizers, unwrapped

T = TypeVar("T")


def changed_together(
    store: Store,
    model: Any,
    optimizers: Any,
    change: Callable[[nn.Module, Sequence[torch.optim.Optimizer]], T],
) -> T:
    """Change a model, and its optimizers with it, in every process of its DistributedDataParallel.

    Every process has to call this. Where the first one fails, all raise what it raised, and no model is changed.

    Args:
        optimizers: one, several or None.
        change: is given all of them without what is around them.
    """
    inner, group = unwrapped(model)
    given = [] if optimizers is None else inner_optimizers(optimizers)[0]
    ranks = Ranks(group)
    result = ranks.lead(lambda: change(inner, given))
    if not ranks.alone:
        with torch.no_grad():
            for tensor in _tensors(inner, given):
                ranks.send(tensor)
        if ranks.rank != 0:
            store.refresh()
    return result


def _tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.Tensor]:
    """Return what a change may have reached, in the same order in every process."""
    found = [parameter.detach() for parameter in model.parameters()]
    for optimizer in optimizers:
        for parameter in (one for group in optimizer.param_groups for one in group["params"]):
            state = optimizer.state.get(parameter, {})
            found += [state[name] for name in sorted(state) if isinstance(state[name], torch.Tensor)]
    return found
