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
from timstore.recording.layouts import CANDIDATES, Folded, Layout
from timstore.undisturbed import undisturbed

# Samples, tokens, and one: what a loss may have been divided by.
Counts = tuple[int, int, int]
# Of a loss, that rounding may make of its parts.
_ADDS_UP = 1e-2


class Watch:
    """What every module is given in one forward pass.

    Attributes:
        rows: of the batch.
        calls: of each module, for each layout that fits what it was given: a sample's shape, and a summary of each.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.calls: dict[str, list[dict[Layout, tuple[torch.Size, torch.Tensor]]]] = {}

    def note(self, name: str, tensor: torch.Tensor) -> None:
        """Note what a module is given."""
        fitting = [layout for layout in CANDIDATES if tensor.numel() and layout.fits(tensor.shape, self.rows)]
        parts = {layout: layout.parts(tensor.detach(), self.rows) for layout in fitting}
        self.calls.setdefault(name, []).append({one: (part.shape[1:], _summary(part)) for one, part in parts.items()})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module has the samples.

    Attributes:
        tokens: of a sample, where batch and tokens are one axis.
    """

    layout: Layout
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen.

    Attributes:
        places: where each module has the samples, None where they are nowhere to be seen.
        sizes: shapes of the model's arguments for one sample.
        tied: the model's loss is not a mean or a sum over samples.
    """

    places: dict[str, Place | None]
    sizes: list[tuple[int, ...]]
    tied: bool

    def layout(self, name: str, shape: torch.Size, rows: int, sizes: list[tuple[int, ...]]) -> Layout | None:
        """Return where a module that is given a tensor of this shape has the samples, None where that is not known.

        A module that was not seen is not known: it may have its input from anywhere.
        """
        place = self.places.get(name)
        if place is None or not place.tokens:
            return None if place is None else place.layout
        count, rest = divmod(shape[0], rows)
        # Of other lengths than those that were seen: some argument must have them too. Where tokens are chosen by what
        # they hold, as for an expert, their number fits only by chance.
        expected = {place.tokens} if sizes == self.sizes else {size[0] for size in sizes if size}
        return place.layout if not rest and count in expected else None


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
    tied = False
    if loss is not None and first_loss is not None and last_loss is not None:
        tied = not any(
            counts[unit]
            and abs(loss * counts[unit] - first_loss * first_counts[unit] - last_loss * last_counts[unit])
            <= _ADDS_UP * abs(loss * counts[unit])
            for unit in range(3)
        )
    return Look(_places(straight, reverse, fewer), sizes_of(args, kwargs, rows, axis), tied)


def sizes_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int, axis: int) -> list[tuple[int, ...]]:
    """Return the shapes of the model's arguments for one sample."""
    found = []
    for value in (*args, *kwargs.values()):
        place = _batch_axis(value, rows, axis)
        if place is not None:
            found.append((*value.shape[:place], *value.shape[place + 1 :]))
    return found


def _places(straight: Watch, reverse: Watch, fewer: Watch) -> dict[str, Place | None]:
    found: dict[str, Place | None] = {}
    for name, calls in straight.calls.items():
        others = reverse.calls.get(name, []), fewer.calls.get(name, [])
        places: list[Place] | None = None if len(calls) == len(others[0]) == len(others[1]) else []
        for before, after, less in zip(calls, *others, strict=False):
            alike = []
            for layout, (sample, summary) in before.items():
                shrunk = layout in less and less[layout][0] == sample
                if shrunk and layout in after and _turned_alike(summary, after[layout][1]):
                    alike.append(Place(layout, sample[0] if isinstance(layout, Folded) else 0))
            places = [place for place in (alike if places is None else places) if place in alike]
        found[name] = places[0] if places else None
    return found


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
