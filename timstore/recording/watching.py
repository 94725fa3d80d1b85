"""What every module is given and returns in a forward pass, and what two passes say of where the samples are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from timstore.recording.layouts import CANDIDATES, Folded, Layout

# For each layout that fits: a sample's shape, and a summary of each sample.
Seen = dict[Layout, tuple[torch.Size, torch.Tensor]]


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
            fitting = [layout for layout in CANDIDATES if tensor.numel() and _may_be(layout, tensor.shape, self.rows)]
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


def places_of(
    straight: Watch, mixed: Watch, fewer: Watch, order: torch.Tensor, known: Mapping[str, Place | None]
) -> dict[str, Place | None]:
    """Return where the samples are: what changed order with the batch's rows, and shrank with them.

    Args:
        straight, mixed, fewer: passes of the batch, of its rows in `order`, and of fewer of them.
        known: where they were seen before, which they are again where several places are possible.
    """
    found: dict[str, Place | None] = {}
    for name, calls in straight.calls.items():
        others = mixed.calls.get(name, []), fewer.calls.get(name, [])
        places: list[Place] | None = None if len(calls) == len(others[0]) == len(others[1]) else []
        for before, after, less in zip(calls, *others, strict=False):
            fitting = []
            for layout, (sample, summary) in before.items():
                shrunk = layout in less and less[layout][0] == sample
                if shrunk and layout in after and alike(summary[order], after[layout][1]):
                    fitting.append(Place(layout, sample[0] if isinstance(layout, Folded) else 0))
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
        or not all(
            layout in after and alike(summary, after[layout][1])
            for before, after in zip(calls, other.calls[name], strict=True)
            for layout, (_, summary) in before.items()
        )
    }


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two summaries are the same but for rounding."""
    scale = float(one.abs().max()) or 1.0
    return torch.allclose(one / scale, other / scale, rtol=1e-2, atol=1e-3)


def _may_be(layout: Layout, shape: torch.Size, rows: int) -> bool:
    # Of one token each, a folded axis is the batch itself.
    return layout.fits(shape, rows) and not (isinstance(layout, Folded) and shape[0] == rows)


def _summary(parts: Any) -> torch.Tensor:
    """Return three numbers per sample, (n, 3), enough to tell them apart."""
    rows = parts.reshape(len(parts), -1)
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    ramp = torch.linspace(0, 1, rows.shape[1], dtype=rows.dtype, device=rows.device)
    return torch.stack([rows.sum(1), rows @ ramp, torch.linalg.vector_norm(rows, 1, dim=1)], dim=1).double().cpu()


def _both(one: tuple[torch.Size, torch.Tensor], other: tuple[torch.Size, torch.Tensor]) -> Any:
    """Return what is seen of an input and an output in one: the input's shape, and each one's summary, scaled alike."""
    return one[0], torch.cat([one[1] / (one[1].abs().max() or 1.0), other[1] / (other[1].abs().max() or 1.0)], dim=1)
