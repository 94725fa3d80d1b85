"""The processes that train one model together, each on samples of its own, under DistributedDataParallel."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from timstore.errors import InvalidInputError, StateError, shown

T = TypeVar("T")


class Ranks:
    """This process among those that average their gradients.

    Args:
        group: the process group; None for a process that trains alone.

    Attributes:
        rank, count: of this process, and how many there are.

    Raises:
        InvalidInputError: it is no process group.
    """

    def __init__(self, group: Any = None) -> None:
        if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise InvalidInputError(
                f"process_group is a torch.distributed.ProcessGroup, such as dist.group.WORLD, not {shown(group)}"
            )
        self._group: Any = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.count == 1

    def lead(self, work: Callable[[], T]) -> T:
        """Let the first process do something for all; each returns what it returned, or raises what it raised."""
        if self.alone:
            return work()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except BaseException as error:  # interrupts too: the others wait
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=dist.get_global_rank(self._group, 0), group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Return when every process has come here."""
        if not self.alone:
            dist.barrier(self._group)

    def mean(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the mean over all processes."""
        if self.alone:
            return numbers
        summed = numbers.clone()
        dist.all_reduce(summed, group=self._group)
        return summed / self.count

    def send(self, tensor: torch.Tensor) -> None:
        """Give every process the first one's numbers, in place."""
        if not self.alone:
            dist.broadcast(tensor, src=dist.get_global_rank(self._group, 0), group=self._group)


def world() -> Any:
    """Return the group of all processes.

    Raises:
        StateError: there is none.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise StateError("torch.distributed is not initialised: start the processes with torchrun")
    return dist.group.WORLD
