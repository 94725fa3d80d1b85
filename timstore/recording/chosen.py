"""Which rows of a batch are captured: those of one sample are one piece from here on, however many rows it has."""

from collections.abc import Container, Sequence

import numpy as np
import torch

from timstore.recording.batch_axis import Layout, Parts


class Chosen:
    """The samples of a batch that are captured.

    Args:
        ids: the sample of every row.
        wanted: the samples to capture, None for all.

    Attributes:
        batch: rows of the whole batch.
        samples: ids, each once.
        rows: of each sample, the places of its rows in the batch.
    """

    def __init__(self, ids: Sequence[int], wanted: Container[int] | None = None) -> None:
        places: dict[int, list[int]] = {}
        for place, one in enumerate(ids):
            if wanted is None or one in wanted:
                places.setdefault(one, []).append(place)
        self.batch = len(ids)
        self.samples = list(places)
        self.rows = list(places.values())
        self._counts = [len(rows) for rows in self.rows]
        # Rows of every sample; None where they have differently many.
        self._each = self._counts[0] if len(set(self._counts)) == 1 else None
        self._flat = [place for rows in self.rows for place in rows]
        self._in_order = self._flat == list(range(len(ids)))
        self._order: torch.Tensor | None = None

    def order(self, device: torch.device) -> torch.Tensor | None:
        """Return the places of all captured rows, sample after sample; None where that is the whole batch as it is."""
        if self._in_order:
            return None
        if self._order is None or self._order.device != device:
            places = torch.tensor(self._flat, device="cpu")
            # From page-locked memory, so that the host need not wait for what the device has to do before.
            self._order = (places.pin_memory() if device.type == "cuda" else places).to(device, non_blocking=True)
        return self._order

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the captured ones of the batch's rows, (rows, ...), sample after sample."""
        order = self.order(rows.device)
        return rows if order is None else rows.index_select(0, order)

    def by_sample(self, rows: torch.Tensor) -> Parts:
        """Return what `take` returned as (samples, rows, ...), or (rows, ...) each where they have differently many."""
        if self._each is not None:
            return rows.reshape(len(self.rows), self._each, *rows.shape[1:])
        return list(torch.split(rows, self._counts))

    def parts(self, tensor: torch.Tensor, layout: Layout) -> Parts:
        """Return each captured sample's part of a tensor, as `by_sample` does."""
        parts = layout.parts(tensor, self.batch)
        if isinstance(parts, list):
            return [parts[place][None] for (place,) in self.rows]
        return self.by_sample(self.take(parts))

    def joined(self, copied: np.ndarray) -> np.ndarray | list[np.ndarray]:
        """Return (samples, tokens, d) of the captured rows' (rows, T, d), or (tokens, d) each; nothing is copied."""
        width = copied.shape[-1]
        if self._each is not None:
            return copied.reshape(len(self.rows), self._each * copied.shape[1], width)
        ends = np.cumsum(self._counts)
        return [copied[end - count : end].reshape(-1, width) for end, count in zip(ends, self._counts, strict=True)]
