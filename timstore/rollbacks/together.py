"""A change of the model in every process that holds it: the first one computes, all get the same bits."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from timstore.database.store import Store
from timstore.interrupts import CriticalSection
from timstore.model.distributed import Ranks
from timstore.model.unwrap import inner_optimizers, unwrapped
from timstore.rollbacks.apply import Write, Writes
from timstore.rollbacks.targets import InModule
from timstore.rollbacks.vectors import KEPT_BYTES, Workspace

T = TypeVar("T")


def changed_together(
    store: Store,
    model: Any,
    optimizers: Any,
    section: CriticalSection,
    change: Callable[[nn.Module, Sequence[torch.optim.Optimizer]], T],
) -> T:
    """Change a model, and its optimizers with it, in every process of its DistributedDataParallel.

    Every process has to call this. Where the first one fails or is interrupted, all raise what it raised, and no model
    is changed. Where one dies while numbers are sent, each of the others has the old ones or the new ones.

    Args:
        optimizers: one, several or None.
        section: of this process; the first one's is entered by `change`, once nothing can fail any more.
        change: is given all of them without what is around them.
    """
    inner, group = unwrapped(model)
    given = [] if optimizers is None else inner_optimizers(optimizers)[0]
    ranks = Ranks(group)
    if ranks.rank != 0:
        # The first process decides; one that left alone would keep its own parameters, and the others waiting.
        section.enter()
    result = ranks.lead(lambda: change(inner, given))
    if ranks.alone:
        return result
    tensors = _tensors(inner, given)
    if ranks.rank == 0:
        for tensor in tensors:
            ranks.send(tensor)
        return result
    with Workspace({}, memory_limit_bytes=KEPT_BYTES) as workspace:
        received = _received(tensors, ranks, workspace)
        received.make_or_restore(received.keep())
        section.finish(result)
    store.refresh()
    return result


def _received(tensors: Sequence[torch.Tensor], ranks: Ranks, workspace: Workspace) -> Writes:
    """Return what the first process sends, all of it before anything is written."""
    writes, failure = [], None
    for tensor in tensors:
        numbers = torch.empty_like(tensor)
        ranks.send(numbers)
        try:
            kept = workspace.keep([numbers.reshape(-1)], numbers.numel(), numbers.dtype)
            writes.append(Write(InModule(tensor), kept.blocks))
        except Exception as error:  # the others would wait for who no longer receives
            failure = failure or error
    if failure is not None:
        raise failure
    return Writes(writes, workspace)


def _tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.Tensor]:
    """Return what a change may have reached, in the same order in every process."""
    found = [parameter.detach() for parameter in model.parameters()]
    for optimizer in optimizers:
        for parameter in (one for group in optimizer.param_groups for one in group["params"]):
            state = optimizer.state.get(parameter, {})
            found += [state[name] for name in sorted(state) if isinstance(state[name], torch.Tensor)]
    return found
