"""What a rollback changes: a model in memory, in every process that holds it, or one elsewhere."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from timstore.database.store import Store
from timstore.errors import ModelMismatchError
from timstore.interrupts import CriticalSection
from timstore.model.distributed import Ranks
from timstore.model.fingerprints import digests
from timstore.model.unwrap import inner_optimizers, unwrapped
from timstore.records import Parameter
from timstore.rollbacks.apply import Write, Writes
from timstore.rollbacks.places import Place
from timstore.rollbacks.vectors import KEPT_BYTES, Workspace

T = TypeVar("T")


class Target(Protocol):
    """A model to roll back, in memory or not."""

    @property
    def is_loaded(self) -> bool:
        """Whether a model is in memory anyway, so that the probe that the store keeps is asked without being told."""

    @property
    def text(self) -> str | None:
        """What is changed, in words; None where that goes without saying."""

    def model(self) -> torch.nn.Module:
        """Return the model itself, to be asked and not changed; loaded if need be."""

    def digests(self) -> dict[str, str]:
        """Return the digest of every parameter."""

    def places(self, wanted: Mapping[str, Parameter]) -> dict[str, Place]:
        """Return where the wanted parameters are, in their order.

        Raises:
            ModelMismatchError: one is missing or has another shape.
        """

    def change(self, writes: Writes, record: Callable[[], None], section: CriticalSection) -> None:
        """Change the places that were handed out, and have `record` write that down.

        Digests decide what a model is, so that a record whose change never came is harmless; a change without a record
        is not. So the record comes before anything of the change can be seen, and the section is entered after it:
        what comes then is done as a whole.
        """


class ModelInMemory:
    """A module whose parameters are changed in place."""

    is_loaded = True
    text = None

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def model(self) -> torch.nn.Module:
        return self._model

    def digests(self) -> dict[str, str]:
        return digests(self._model)

    def places(self, wanted: Mapping[str, Parameter]) -> dict[str, Place]:
        parameters, places = dict(self._model.named_parameters()), {}
        for name, recorded in wanted.items():
            if name not in parameters:
                raise ModelMismatchError(f"the model has no parameter {name}, which was recorded", parameter=name)
            shape = tuple(parameters[name].shape)
            if shape != recorded.shape:
                raise ModelMismatchError(
                    f"parameter {name} has shape {shape}; {recorded.shape} was recorded", parameter=name
                )
            places[name] = InModule(parameters[name])
        return dict(places)

    def change(self, writes: Writes, record: Callable[[], None], section: CriticalSection) -> None:
        # What may fail comes first: room for the old values, then the record. After that handlers of signals wait.
        old = writes.keep()
        record()
        section.enter()
        writes.make_or_restore(old)


class InModule:
    """A module's parameter or buffer, or an optimizer's state."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self._parameter = parameter
        self.shape = tuple(parameter.shape)
        self.dtype = parameter.dtype
        self.device = parameter.device

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self._parameter.detach().reshape(-1)[start:stop]

    def blocks(self, numel: int) -> Iterator[torch.Tensor]:
        flat = self._parameter.detach().reshape(-1)
        for start in range(0, flat.numel(), numel):
            yield flat[start : start + numel]

    def write(self, blocks: Iterator[torch.Tensor]) -> None:
        with torch.no_grad():
            # Block by block where memory lies in the order of elements; else the new values are put together first.
            if self._parameter.is_contiguous():
                start, flat = 0, self._parameter.view(-1)
                for new in blocks:
                    flat[start : start + len(new)] = new
                    start += len(new)
            else:
                self._parameter.copy_(torch.cat(list(blocks)).view(self._parameter.shape))


def changed_in_every_process(
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
    bare = [] if optimizers is None else inner_optimizers(optimizers)[0]
    ranks = Ranks(group)
    if ranks.rank != 0:
        # The first process decides; one that left alone would keep its own parameters, and the others waiting.
        section.enter()
    result = ranks.lead(lambda: change(inner, bare))
    if ranks.alone:
        return result
    tensors = _tensors(inner, bare)
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
            kept = workspace.keep([numbers.reshape(-1)], numbers.numel(), numbers.dtype, numbers.device)
            writes.append(Write(InModule(tensor), kept.blocks))
        except Exception as error:  # the others would wait for who no longer receives
            failure = failure or error
    if failure is not None:
        raise failure
    return Writes(writes, workspace)


def _tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.Tensor]:
    """Return what a change may have reached, in the same order in every process."""
    tensors = [parameter.detach() for parameter in model.parameters()]
    for optimizer in optimizers:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            state = optimizer.state.get(parameter, {})
            tensors += [state[name] for name in sorted(state) if isinstance(state[name], torch.Tensor)]
    return tensors
