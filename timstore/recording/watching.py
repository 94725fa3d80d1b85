"""What every module is given and returns in a forward pass, and what two passes say of where the samples are."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from timstore.recording.layouts import CANDIDATES, Axis, Folded, Layout

Sizes = tuple[tuple[int, ...], ...]

# What stands for infinity, and for numbers that would add up to it.
_LARGE = 1e6
# Of the size of numbers, what rounding may make of them at another place of a batch: in single and half precision.
_ROUNDING, _HALF_ROUNDING = 1e-4, 1e-2


@dataclass(frozen=True, eq=False, slots=True)
class Summary:
    """A few numbers of each sample's part of a tensor.

    Attributes:
        numbers: (samples, numbers).
        noise: what rounding may make of them.
    """

    numbers: torch.Tensor
    noise: float

    @property
    def says_nothing(self) -> bool:
        """Whether there were numbers that are none."""
        return bool(self.numbers.isnan().any())

    def in_order(self, order: torch.Tensor) -> "Summary":
        return Summary(self.numbers[order], self.noise)

    def differs_from(self, other: "Summary") -> bool:
        """Say whether two are not the same, beside rounding; what all samples have in common counts for nothing."""
        common = self.numbers.mean(0)
        one, two = self.numbers - common, other.numbers - common
        allowed = 1e-2 * one.abs() + 1e-3 * one.abs().max() + self.noise
        return not bool(((one - two).abs() <= allowed).all())

    def is_another(self, other: "Summary") -> bool:
        """Say whether the same, run twice, gave something else: no more than the order of sums may change there."""
        return not bool(((self.numbers - other.numbers).abs() <= 1e-2 * self.noise).all())


# For each layout that fits: a sample's shape, and a summary of what a module was given, and of what it returned.
Seen = dict[Layout, tuple[torch.Size, tuple[Summary, ...]]]


class Watch:
    """What every module is given and returns in one forward pass, and what the model returns.

    Attributes:
        rows: of the batch.
        spread: names of tables that are given one row of ids, (1, T), and get the batch's rows of it instead.
        calls: of each module, what was seen in each call.
        tables: of each table that was given one row of ids, what it returned in each call.
    """

    def __init__(self, rows: int, spread: Container[str] = ()) -> None:
        self.rows = rows
        self.spread = spread
        self.calls: dict[str, list[Seen]] = {}
        self.tables: dict[str, list[torch.Tensor]] = {}

    def note(self, name: str, *tensors: Any) -> None:
        """Note what a module is given and returns."""
        if name in self.tables:
            self.tables[name].append(tensors[-1])
        found: Seen | None = None
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                seen = self._seen(tensor.detach())
                found = seen if found is None else _both(found, seen)
        self.calls.setdefault(name, []).append(found or {})

    def _seen(self, tensor: torch.Tensor) -> Seen:
        fitting = [layout for layout in CANDIDATES if tensor.numel() and _may_be(layout, tensor.shape, self.rows)]
        with torch.autocast(tensor.device.type, enabled=False):
            parts = {layout: layout.parts(tensor, self.rows) for layout in fitting}
            return {one: (part.shape[1:], (_summary(part),)) for one, part in parts.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module has the samples.

    Attributes:
        tokens: of a sample, where batch and tokens are one axis.
        sizes: shapes of the model's arguments for one sample, then.
    """

    layout: Layout
    tokens: int = 0
    sizes: Sizes = ()


def places_of(
    straight: Watch,
    mixed: Watch,
    fewer: Watch,
    order: torch.Tensor,
    known: Mapping[str, Place | None],
    sizes: Sizes,
) -> dict[str, Place | None]:
    """Return where the samples are: what changed order with the batch's rows, and shrank with them.

    Args:
        straight, mixed, fewer: passes of the batch, of its rows in `order`, and of fewer of them.
        known: where they were seen before, which they are again where several places are possible, and where numbers
            that are none can tell nothing.
        sizes: shapes of the model's arguments for one sample.
    """
    found: dict[str, Place | None] = {}
    for name, calls in straight.calls.items():
        others = mixed.calls.get(name, []), fewer.calls.get(name, [])
        if name in known and any(_says_nothing(seen) for seen in (*calls, *others[0])):
            found[name] = known[name]
            continue
        places: list[Place] | None = None if len(calls) == len(others[0]) == len(others[1]) else []
        for before, after, less in zip(calls, *others, strict=False):
            fitting = []
            for layout, (sample, summaries) in before.items():
                shrunk = layout in less and less[layout][0] == sample
                if shrunk and layout in after and not _differ(summaries, after[layout][1], order):
                    fitting.append(Place(layout, sample[0] if isinstance(layout, Folded) else 0, sizes))
            places = [place for place in (fitting if places is None else places) if place in fitting]
        was = known.get(name)
        same = [place for place in places or [] if was is not None and place.layout == was.layout]
        found[name] = next(iter(same or places or []), None)
    return found


def unlike(one: Watch, other: Watch) -> set[str]:
    """Return the names of what was given something else in another run of the same."""
    return {
        name
        for name, calls in one.calls.items()
        if len(calls) != len(other.calls.get(name, []))
        or any(
            layout not in after or any(map(Summary.is_another, summaries, after[layout][1]))
            for before, after in zip(calls, other.calls[name], strict=True)
            for layout, (_, summaries) in before.items()
        )
    }


def _says_nothing(seen: Seen) -> bool:
    return any(summary.says_nothing for _, summaries in seen.values() for summary in summaries)


def _differ(ones: tuple[Summary, ...], others: tuple[Summary, ...], order: torch.Tensor) -> bool:
    pairs = zip(ones, others, strict=False)
    return len(ones) != len(others) or any(one.in_order(order).differs_from(other) for one, other in pairs)


def _may_be(layout: Layout, shape: torch.Size, rows: int) -> bool:
    # Of one token each, a folded axis is the batch itself.
    return layout.fits(shape, rows) and not (isinstance(layout, Folded) and shape[0] == rows)


def _both(one: Seen, other: Seen) -> Seen:
    """Return what is seen of an input and an output in one: they have the samples in the same place, or none has."""
    found: Seen = {}
    for layout, (sample, summaries) in one.items():
        match = other.get(layout)
        if match is None and isinstance(layout, Folded):
            match = other.get(Axis(0))  # one row for each sample's tokens
        if match is not None:
            found[layout] = sample, summaries + match[1]
    return found


def _summary(parts: Any) -> Summary:
    """Return three numbers of each sample, enough to tell them apart."""
    rows = parts.reshape(len(parts), -1)
    half = rows.dtype in (torch.float16, torch.bfloat16)
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    numbers = _numbers(rows)
    if not bool(numbers.isfinite().all()):
        numbers = _numbers(rows.nan_to_num(torch.nan, _LARGE, -_LARGE).clamp(-_LARGE, _LARGE))
    level = float(numbers.abs().max())
    return Summary(numbers, level * (_HALF_ROUNDING if half else _ROUNDING))


def _numbers(rows: torch.Tensor) -> torch.Tensor:
    ramp = torch.linspace(0, 1, rows.shape[1], dtype=rows.dtype, device=rows.device)
    return torch.stack([rows.sum(1), rows @ ramp, torch.linalg.vector_norm(rows, 1, dim=1)], dim=1).double().cpu()
