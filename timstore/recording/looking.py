"""Looking at a batch go through the model before it is recorded: where does each module have the samples?

The sum of all gradients cannot see a batch axis in the wrong place when there are as many tokens as rows. So the batch
is run again with its rows reversed, and with one row fewer: what each module is given must turn and shrink alike. What
the model returns, and its loss, must be the same for the rows that are left: else samples are tied together.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from timstore.recording.batches import token_counts
from timstore.recording.layouts import CANDIDATES, Layout
from timstore.undisturbed import undisturbed

# Samples, tokens, and one: what a loss may have been divided by.
Counts = tuple[int, int, int]
# Of a loss, that rounding may make of its parts.
_ADDS_UP = 1e-2


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


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen.

    Attributes:
        layouts: where each module has the samples, None where they are nowhere to be seen.
        tied: the model's loss is not a mean or a sum over samples.
    """

    layouts: dict[str, Layout | None]
    tied: bool


def look(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int, capture: Any, axis: int
) -> Look:
    """Run a batch through the model and see where the samples are.

    Cost: four forward passes without gradients, in eval mode, one of them of one row; the model is left as it was.

    Args:
        args, kwargs: of the model, for a batch of `rows` samples, 2 or more.
        capture: whose hooks tell.
        axis: of the batch in the model's arguments.
    """

    def run(count: int, turn: Callable[[torch.Tensor, int], torch.Tensor]) -> tuple[Watch, float | None, Counts]:
        def turned(value: Any) -> Any:
            place = _batch_axis(value, rows, axis)
            return value if place is None else turn(value, place)

        mine = {name: turned(value) for name, value in kwargs.items()}
        capture.watch = watch = Watch(count)
        try:
            returned = model(*(turned(value) for value in args), **mine)
        finally:
            capture.watch = None
        loss = getattr(returned, "loss", None)
        loss = float(loss) if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None
        return watch, loss, (count, sum(token_counts(model, mine, count) or [0]), 1)

    with undisturbed(model), torch.no_grad(), _slow_attention():
        straight, loss, counts = run(rows, lambda value, _: value)
        reverse, _, _ = run(rows, lambda value, place: value.flip(place))
        try:
            fewer, first_loss, first_counts = run(rows - 1, lambda value, place: value.narrow(place, 0, rows - 1))
            _, last_loss, last_counts = run(1, lambda value, place: value.narrow(place, rows - 1, 1))
        except Exception:  # a model may be made for one size of batch
            fewer, first_loss, last_loss = straight, None, None
    if len(fewer.given) != len(straight.given):
        fewer = straight  # a path through the model that hangs on the data
    tied = False
    if loss is not None and first_loss is not None and last_loss is not None:
        tied = not any(
            counts[unit]
            and abs(loss * counts[unit] - first_loss * first_counts[unit] - last_loss * last_counts[unit])
            <= _ADDS_UP * abs(loss * counts[unit])
            for unit in range(3)
        )
    return Look(_layouts(straight, reverse, fewer), tied)


def _layouts(straight: Watch, reverse: Watch, fewer: Watch) -> dict[str, Layout | None]:
    found: dict[str, list[Layout]] = {}
    passes = zip(straight.given, reverse.given, fewer.given, strict=False)
    for (name, _, before), (_, _, after), (_, shape, _) in passes:
        likely = [layout for layout in before if layout in after and layout.fits(shape, fewer.rows)]
        alike = [layout for layout in likely if _turned_alike(before[layout], after[layout])]
        found[name] = [layout for layout in found.get(name, alike) if layout in alike]
    return {name: layouts[0] if layouts else None for name, layouts in found.items()}


def _batch_axis(value: Any, rows: int, axis: int) -> int | None:
    if not isinstance(value, torch.Tensor):
        return None
    places = (axis, 0) if axis else (0,)
    return next((place for place in places if value.ndim > place and value.shape[place] == rows), None)


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
