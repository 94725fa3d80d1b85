"""Looking at a batch go through the model before it is recorded: where does each module have the samples?

The sum of all gradients cannot see a batch axis in the wrong place when there are as many tokens as rows. So the batch
is run again with its rows in another order, and with one row fewer: what each module is given, what it returns and what
the model returns must change order and shrink alike. What the model returns for the rows that are left, and its loss,
must be the same: else samples are tied together.

The model runs in its own mode, with gradients, as it is about to, but drops nothing out. Where chance has another part
in what a module is given, nothing can be compared: that module is looked at in eval mode.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from timstore.recording.batches import token_counts
from timstore.recording.layouts import CANDIDATES, Folded, Layout
from timstore.recording.outputs import outputs_of
from timstore.undisturbed import undisturbed

# Samples, tokens, and one: what a loss may have been divided by.
Counts = tuple[int, int, int]
# For each layout that fits: a sample's shape, and a summary of each sample.
Seen = dict[Layout, tuple[torch.Size, torch.Tensor]]
# What was seen of the modules, the loss, and what it may have been divided by.
Run = tuple["Watch", float | None, Counts]
# Of a loss, that rounding may make of its parts.
_ADDS_UP = 1e-2
_DROPOUTS = {f"{kind}dropout{end}" for kind in ("", "alpha_", "feature_", "feature_alpha_") for end in ("", "_")}
_DROPOUTS |= {"dropout1d", "dropout2d", "dropout3d"}


class Watch:
    """What every module is given and returns in one forward pass, and what the model returns.

    Attributes:
        rows: of the batch.
        calls: of each of them, what was seen in each call.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.calls: dict[str, list[Seen]] = {}

    def note(self, name: str, *tensors: Any) -> None:
        """Note what a module is given and returns."""
        found: Seen | None = None
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            fitting = [layout for layout in CANDIDATES if tensor.numel() and layout.fits(tensor.shape, self.rows)]
            parts = {layout: layout.parts(tensor.detach(), self.rows) for layout in fitting}
            seen: Seen = {one: (part.shape[1:], _summary(part)) for one, part in parts.items()}
            # Input and output in one: they have the samples in the same place, or none of them has.
            found = seen if found is None else {one: _both(found[one], seen[one]) for one in found if one in seen}
        self.calls.setdefault(name, []).append(found or {})


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
        places: where each module, and each of the model's outputs, has the samples; None where they cannot be seen.
        sizes: shapes of the model's arguments for one sample.
        tied: what the model returns for a sample depends on others, or its loss is not a mean or a sum over samples.
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

    def moved(self, later: "Look") -> list[str]:
        """Return the modules that have the samples elsewhere in a later look."""
        pairs = [(name, self.places.get(name), place) for name, place in later.places.items()]
        return [name for name, was, now in pairs if was is not None and now is not None and was.layout != now.layout]

    def and_then(self, later: "Look") -> "Look":
        """Return a later look, and this one of what was not seen in it; what was nowhere once stays so.

        An expert may get a token of each sample, in order, by chance.
        """
        nowhere = {name: None for name, place in self.places.items() if place is None}
        return replace(later, places={**self.places, **later.places, **nowhere})


def output_name(path: str) -> str:
    """Return the name in `Look.places` of one of the model's outputs."""
    return f"output {path}"


def look(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int, capture: Any, axis: int
) -> Look:
    """Run a batch through the model and see where the samples are.

    Cost: four forward passes, one of them of one row, and as many more where chance has a part in them; the model and
    the generators of random numbers are left as they were.

    Args:
        args, kwargs: of the model, for a batch of `rows` samples, 2 or more.
        capture: whose hooks tell.
        axis: of the batch in the model's arguments.
    """

    def run(count: int, turn: Callable[[torch.Tensor, int], torch.Tensor]) -> Run:
        def turned(value: Any) -> Any:
            place = _batch_axis(value, rows, axis)
            return value if place is None else turn(value, place)

        mine = {name: turned(value) for name, value in kwargs.items()}
        capture.watch = watch = Watch(count)
        try:
            returned = model(*(turned(value) for value in args), **mine)
        finally:
            capture.watch = None
        for path, tensor in outputs_of(returned).items():
            if tensor.ndim:
                watch.note(output_name(path), tensor)
        loss = getattr(returned, "loss", None)
        loss = float(loss.detach()) if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None
        return watch, loss, (count, sum(token_counts(model, mine, count) or [0]), 1)

    def part(first: int, count: int) -> Run | None:
        try:
            return run(count, lambda value, place: value.narrow(place, first, count))
        except Exception:  # a model may be made for one size of batch
            return None

    def seen(evaluate: bool) -> tuple[Look, Watch]:
        with undisturbed(model, evaluate=evaluate) as rewind, _calm(), torch.set_grad_enabled(not evaluate):
            whole = run(rows, lambda value, _: value)
            rewind()
            mixed = run(rows, lambda value, place: value.index_select(place, order.to(value.device)))
            rewind()
            fewer = part(0, rows - 1)
            rewind()
            last = part(rows - 1, 1)
        places = _places(whole[0], mixed[0], (fewer or whole)[0], order)
        tied = bool(fewer and last) and _tied(whole, [fewer, last], places)  # type: ignore[list-item]
        return Look(places, sizes_of(args, kwargs, rows, axis), tied), whole[0]

    order = _order(rows)
    found, straight = seen(evaluate=False)
    if not found.tied and None not in found.places.values():
        return found
    with undisturbed(model, evaluate=False), _calm():
        _other_numbers()
        chancy = _unlike(straight, run(rows, lambda value, _: value)[0])
    if not chancy:
        return found
    calm, _ = seen(evaluate=True)
    return replace(calm, places={**found.places, **{name: calm.places.get(name) for name in chancy}})


def sizes_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int, axis: int) -> list[tuple[int, ...]]:
    """Return the shapes of the model's arguments for one sample."""
    found = []
    for value in (*args, *kwargs.values()):
        place = _batch_axis(value, rows, axis)
        if place is not None:
            found.append((*value.shape[:place], *value.shape[place + 1 :]))
    return found


def _order(rows: int) -> torch.Tensor:
    """Return another order of the rows, always the same and of no pattern that a model may have as well."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
    return order.roll(1) if torch.equal(order, torch.arange(rows)) else order


def _places(straight: Watch, mixed: Watch, fewer: Watch, order: torch.Tensor) -> dict[str, Place | None]:
    found: dict[str, Place | None] = {}
    for name, calls in straight.calls.items():
        others = mixed.calls.get(name, []), fewer.calls.get(name, [])
        places: list[Place] | None = None if len(calls) == len(others[0]) == len(others[1]) else []
        for before, after, less in zip(calls, *others, strict=False):
            alike = []
            for layout, (sample, summary) in before.items():
                shrunk = layout in less and less[layout][0] == sample
                if shrunk and layout in after and _alike(summary[order], after[layout][1]):
                    alike.append(Place(layout, sample[0] if isinstance(layout, Folded) else 0))
            places = [place for place in (alike if places is None else places) if place in alike]
        found[name] = places[0] if places else None
    return found


def _tied(whole: Run, parts: Sequence[Run], places: Mapping[str, Place | None]) -> bool:
    """Say whether the model returns something else for a batch than for its parts, the first rows and the last one."""
    straight, loss, counts = whole
    losses = [one for _, one, _ in parts if one is not None]
    if loss is not None and len(losses) == len(parts):
        sums = [sum(one * other[unit] for one, (_, _, other) in zip(losses, parts, strict=True)) for unit in range(3)]
        off = [abs(loss * count - total) for count, total in zip(counts, sums, strict=True)]
        if not any(count and one <= _ADDS_UP * abs(loss * count) for count, one in zip(counts, off, strict=True)):
            return True
    for name, (call, *_) in straight.calls.items():
        place = places.get(name)
        if name.startswith(output_name("")) and place is not None:
            found = [part.calls.get(name, [{}])[0].get(place.layout) for part, _, _ in parts]
            summary = call[place.layout][1]
            if None not in found and not _alike(summary, torch.cat([one[1] for one in found if one is not None])):
                return True
    return False


def _unlike(one: Watch, other: Watch) -> set[str]:
    """Return the names of what was given something else in another run of the same."""
    return {
        name
        for name, calls in one.calls.items()
        if len(calls) != len(other.calls.get(name, []))
        or not all(
            layout in after and _alike(summary, after[layout][1])
            for before, after in zip(calls, other.calls[name], strict=True)
            for layout, (_, summary) in before.items()
        )
    }


def _batch_axis(value: Any, rows: int, axis: int) -> int | None:
    if not isinstance(value, torch.Tensor):
        return None
    places = (axis, 0) if axis else (0,)
    return next((place for place in places if value.ndim > place and value.shape[place] == rows), None)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    scale = float(one.abs().max()) or 1.0
    return torch.allclose(one / scale, other / scale, rtol=1e-2, atol=1e-3)


def _summary(parts: Any) -> torch.Tensor:
    """Return three numbers per sample, enough to tell them apart."""
    rows = parts.reshape(len(parts), -1).double()
    ramp = torch.linspace(0, 1, rows.shape[1], dtype=torch.float64, device=rows.device)
    return torch.stack([rows.sum(1), rows @ ramp, rows.abs().sum(1)], dim=1).cpu()


def _both(one: tuple[torch.Size, torch.Tensor], other: tuple[torch.Size, torch.Tensor]) -> Any:
    """Return what is seen of an input and an output in one: the input's shape, and each one's summary, scaled alike."""
    return one[0], torch.cat([one[1] / (one[1].abs().max() or 1.0), other[1] / (other[1].abs().max() or 1.0)], dim=1)


def _other_numbers() -> None:
    """Let every generator go on from elsewhere."""
    torch.manual_seed(torch.initial_seed() ^ 0x2545F491)
    random.random()
    np.random.random()


class _NothingDropped(torch.overrides.TorchFunctionMode):
    """Leaves out dropout, of whatever module or function: it has no order of rows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention":
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


@contextmanager
def _calm() -> Iterator[None]:
    """Run without dropout, and without the fast path of torch's own Transformer layers, which calls no children."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _NothingDropped():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
