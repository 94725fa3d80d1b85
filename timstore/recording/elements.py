"""Some numbers of each gradient or parameter, by which is seen what happened to it in between.

So many runs of so many, since memory comes by the line, and its extremes, the only ones that a clipping by value is
sure to change.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

Values = np.ndarray | torch.Tensor

_RUNS, _RUN = 32, 8


class Elements:
    """Which elements of one parameter, or of its gradient, are kept: some, and where it was largest and smallest.

    On the host they are looked up by numpy, on one core: torch would split so small an operation among all, and mostly
    wait for the last.
    """

    def __init__(self, parameter: torch.Tensor) -> None:
        numel, device = parameter.numel(), parameter.device
        starts = torch.arange(0, numel, max(_RUN, numel // _RUNS), device=device)
        spread = (starts[:, None] + torch.arange(_RUN, device=device)).flatten()
        spread = spread[spread < numel]
        self._positions = torch.cat([spread, spread[:1], spread[:1]])
        self._by_numpy = parameter.device.type == "cpu" and parameter.dtype in (torch.float32, torch.float64)
        self._host = self._positions.numpy() if self._by_numpy else np.empty(0, np.int64)

    def chosen(self, numbers: torch.Tensor, extremes: bool) -> Values:
        """Return a copy of the elements, chosen by these numbers; the extremes of a table, which is mostly zero."""
        if not extremes and _any(found := self.of(numbers)):
            return found
        if self._by_numpy:
            host = _on_host(numbers)
            self._host[-2:] = host.argmax(), host.argmin()
        else:
            flat = _flat(numbers)
            self._positions[-2:] = torch.stack([flat.argmax(), flat.argmin()])
        return self.of(numbers)

    def of_flat(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return these elements of other numbers, given flat."""
        places = torch.from_numpy(self._host) if self._by_numpy else self._positions
        return numbers[places.to(numbers.device)]

    def of(self, numbers: torch.Tensor) -> Values:
        """Return a copy of the elements that were chosen last, as they are now."""
        if self._by_numpy:
            return _on_host(numbers).take(self._host)
        return _flat(numbers)[self._positions]


def is_kept_together(parameter: torch.Tensor) -> bool:
    """Say whether its gradient is looked at with all others at once: on a CUDA device that is what takes time."""
    return parameter.is_cuda


def kept_together(gradients: Mapping[str, torch.Tensor]) -> dict[str, Values]:
    """Return some elements of each gradient, (runs, `_RUN`) taken as one axis, and a last run: its largest magnitude.

    A few operations for all of them, for none of which the host waits.
    """
    found: dict[str, Values] = {}
    kinds = {name: (str(one.device), str(one.dtype)) for name, one in gradients.items()}
    for kind in sorted(set(kinds.values())):
        names = [name for name in gradients if kinds[name] == kind]
        flat = [gradients[name].reshape(-1) for name in names]
        runs = [_runs(one) for one in flat]
        largest = torch.stack(torch._foreach_norm(flat, math.inf))
        ends = torch.split(nn.functional.pad(largest[:, None], (_RUN - 1, 0)), 1)
        values = torch.cat([rows for pair in zip(runs, ends, strict=True) for rows in pair]).flatten()
        found.update(zip(names, torch.split(values, [(len(one) + 1) * _RUN for one in runs]), strict=True))
    return found


def without_largest(values: Values) -> Values:
    """Return what `kept_together` kept, but for the largest magnitude."""
    return values[:-_RUN]


def on_host(pieces: Sequence[Values]) -> np.ndarray:
    """Return the values of all pieces as one float64 array."""
    tensors = [one for one in pieces if isinstance(one, torch.Tensor)]
    if len(tensors) == len(pieces) and len({(one.device, one.dtype) for one in tensors}) == 1:
        pieces = [torch.cat(tensors)]  # one transfer
    return np.concatenate(
        [one.cpu().double().numpy() if isinstance(one, torch.Tensor) else one for one in pieces]
    ).astype(np.float64)


def _runs(flat: torch.Tensor) -> torch.Tensor:
    """Return (runs, _RUN), evenly spread; of fewer numbers than that, all of them and zeros."""
    if len(flat) < _RUN:
        return nn.functional.pad(flat, (0, _RUN - len(flat)))[None]
    step = max(_RUN, len(flat) // _RUNS)
    return flat.as_strided(((len(flat) - _RUN) // step + 1, _RUN), (step, 1))


def _any(values: Values) -> bool:
    return bool(values.any()) if isinstance(values, torch.Tensor) else bool(np.count_nonzero(values))


def _on_host(numbers: torch.Tensor) -> np.ndarray:
    return numbers.detach().numpy().reshape(-1)


def _flat(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.detach().reshape(-1)
