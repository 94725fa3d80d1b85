"""Looking at a batch go through the model before it is recorded: where does each module have the samples?

The sum of all gradients cannot see a batch axis in the wrong place when there are as many tokens as rows. So the
batch is run again with its rows reversed, and with one row fewer: what every module is given must turn and shrink alike.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from timstore.recording.layouts import CANDIDATES, Layout
from timstore.undisturbed import undisturbed


class Watch:
    """What every module is given in one forward pass.

    Attributes:
        rows: of the batch.
        given: module and, for each layout that fits, a summary of every sample's part; with the shape.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.given: list[tuple[str, torch.Size, dict[Layout, torch.Tensor]]] = []

    def note(self, name: str, tensor: torch.Tensor) -> None:
        """Note what a module is given."""
        fitting = [layout for layout in CANDIDATES if layout.fits(tensor.shape, self.rows)]
        summaries = {layout: _summary(layout.parts(tensor.detach(), self.rows)) for layout in fitting}
        self.given.append((name, tensor.shape, summaries))


def find_layouts(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int, capture: Any, axis: int
) -> dict[str, Layout | None]:
    """Return where each module has the samples, None where it is nowhere to be seen.

    Cost: three forward passes without gradients, in eval mode; the model is left as it was.

    Args:
        args, kwargs: of the model, for a batch of `rows` samples, 2 or more.
        capture: whose hooks tell.
        axis: of the batch in the model's arguments.
    """

    def run(rows: int, turn: Any) -> list[tuple[str, torch.Size, dict[Layout, torch.Tensor]]]:
        capture.watch = watch = Watch(rows)
        try:
            model(*(turn(value) for value in args), **{name: turn(value) for name, value in kwargs.items()})
        finally:
            capture.watch = None
        return watch.given

    def along(value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        places = (axis, 0) if axis else (0,)
        return next((place for place in places if value.ndim > place and value.shape[place] == rows), None)

    def turned(value: Any) -> Any:
        place = along(value)
        return value if place is None else value.flip(place)

    def thinned(value: Any) -> Any:
        place = along(value)
        return value if place is None else value.narrow(place, 0, rows - 1)

    with undisturbed(model), torch.no_grad(), _slow_attention():
        straight = run(rows, lambda value: value)
        reverse = run(rows, turned)
        try:
            fewer = run(rows - 1, thinned)
        except Exception:  # a model may be made for one size of batch
            fewer = straight
    found: dict[str, list[Layout]] = {}
    if len(fewer) != len(straight):
        fewer = straight  # a path through the model that hangs on the data
    for (name, _, before), (_, _, after), (_, shape, _) in zip(straight, reverse, fewer, strict=False):
        count = rows if fewer is straight else rows - 1
        likely = [layout for layout in before if layout in after and layout.fits(shape, count)]
        alike = [layout for layout in likely if _turned_alike(before[layout], after[layout])]
        found[name] = [layout for layout in found.get(name, alike) if layout in alike]
    return {name: layouts[0] if layouts else None for name, layouts in found.items()}


def _turned_alike(before: torch.Tensor, after: torch.Tensor) -> bool:
    scale = float(before.abs().max()) or 1.0
    return torch.allclose(before.flip(0) / scale, after / scale, rtol=1e-2, atol=1e-3)


def _summary(parts: Any) -> torch.Tensor:
    """Return three numbers per sample, enough to tell them apart."""
    rows = parts.reshape(len(parts), -1).double()
    ramp = torch.linspace(0, 1, rows.shape[1], dtype=torch.float64, device=rows.device)
    return torch.stack([rows.sum(1), rows @ ramp, rows.abs().sum(1)], dim=1).cpu()


@contextmanager
def _slow_attention() -> Iterator[None]:
    """Run without the fast path of torch's own Transformer layers, which calls none of their children."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
