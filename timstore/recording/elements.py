"""Some numbers of each of several tensors, by which is seen what happened to these in between."""

import math
from collections.abc import Mapping
from functools import cache, cached_property

import numpy as np
import torch
from torch import nn

# So many runs of so many numbers, since memory comes by the line.
_RUNS, _RUN = 32, 8


class Elements:
    """Evenly spread numbers of each tensor, and its extremes, the only ones that a clipping by value is sure to change.

    In single and double precision on the host, extremes are two places, and all is looked up by numpy, on one core:
    torch would split so small an operation among all cores, and mostly wait for the last. Of any other tensors the
    last number is the largest magnitude: a few operations for all of them, for none of which the host waits.

    Args:
        tensors: none of them empty.
        like: take the places that were taken of other tensors of these names and shapes.
        extremes: without them, as suffices where nothing hangs on a clipping, they are looked for only in a tensor
            (such as a table's gradient) of which all else is zero.

    Attributes:
        names: in the order in which `numbers` holds them.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], *, like: "Elements | None" = None, extremes: bool = True
    ) -> None:
        host = {name: one for name, one in tensors.items() if _is_looked_up(one)}
        self._places: dict[str, np.ndarray] = {}
        self._values: list[np.ndarray] = []
        for name, tensor in host.items():
            flat = tensor.detach().numpy().reshape(-1)
            places = _places(flat, extremes) if like is None else like._places[name]
            self._places[name] = places
            self._values.append(flat.take(places))
        self._lengths = list(map(len, self._values))
        others: dict[torch.device, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name not in host:
                others.setdefault(tensor.device, {})[name] = tensor.detach().reshape(-1)
        self.names = [*host, *(name for together in others.values() for name in together)]
        self._together = [self._taken(list(together.values())) for together in others.values()]

    @cached_property
    def numbers(self) -> np.ndarray:
        """The numbers of all tensors, (n,) float64; a device is waited for here."""
        together = [one.cpu().double().numpy() for one in self._together]
        return np.concatenate([*self._values, *together]).astype(np.float64)

    @property
    def starts(self) -> np.ndarray:
        """Where each tensor's numbers begin."""
        return np.cumsum([0, *self._lengths[:-1]])

    @property
    def linear(self) -> np.ndarray:
        """Which of `numbers` are means where the tensor is one: all but largest magnitudes, (n,) bool."""
        linear = np.ones(sum(self._lengths), bool)
        linear[np.cumsum(self._lengths)[len(self._values) :] - 1] = False
        return linear

    def of(self, name: str) -> np.ndarray:
        """Return one tensor's numbers."""
        place = self.names.index(name)
        start = self.starts[place]
        return self.numbers[start : start + self._lengths[place]]

    def _taken(self, flat: list[torch.Tensor]) -> torch.Tensor:
        """Return runs of each tensor, and in a last run its largest magnitude, as one axis."""
        runs = [_runs(one) for one in flat]
        self._lengths += [(len(one) + 1) * _RUN for one in runs]
        largest = torch.stack(torch._foreach_norm(flat, math.inf))
        ends = torch.split(nn.functional.pad(largest[:, None], (_RUN - 1, 0)), 1)
        return torch.cat([rows for pair in zip(runs, ends, strict=True) for rows in pair]).flatten()


def _is_looked_up(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)


def _places(flat: np.ndarray, extremes: bool) -> np.ndarray:
    spread = _spread(len(flat))
    if not extremes and np.count_nonzero(flat.take(spread)):
        return spread
    return np.append(spread, (flat.argmax(), flat.argmin()))


@cache
def _spread(count: int) -> np.ndarray:
    starts = np.arange(0, count, max(_RUN, count // _RUNS))
    spread = (starts[:, None] + np.arange(_RUN)).reshape(-1)
    return spread[spread < count]


def _runs(flat: torch.Tensor) -> torch.Tensor:
    """Return (runs, _RUN), evenly spread; of fewer numbers than that, all of them and zeros."""
    if len(flat) < _RUN:
        return nn.functional.pad(flat, (0, _RUN - len(flat)))[None]
    step = max(_RUN, len(flat) // _RUNS)
    return flat.as_strided(((len(flat) - _RUN) // step + 1, _RUN), (step, 1))
