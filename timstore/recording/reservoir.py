"""Rows of the training stream, taken while it passes, for rollbacks to ask the model about: of samples at random."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from timstore.database.kept_rows import ROWS, ROWS_BYTES, KeptRow, KeptRows, places_of, rows_table
from timstore.database.store import Store
from timstore.model.sample_ids import row_hash
from timstore.recording.batches import MicroBatch
from timstore.recording.losses import LossKind
from timstore.recording.pending import Clock

_NO_END = 2**64 - 1
# What transformers and TRL tell a model of how it makes its loss: no part of a row, and outputs are none of it.
_OF_THE_LOSS = ("num_items_in_batch", "fused_lm_head")


class Reservoir:
    """Takes rows of samples that are not recorded; of recorded ones where no others come.

    A step of which no row is taken costs its samples' places in an order, on the host. Rows stay on their device until
    they are kept in the store.

    Args:
        recorded: the samples to record, None for all.
        clock: when the next step is.

    Attributes:
        loss: what kind it is.
    """

    def __init__(self, model: nn.Module, recorded: frozenset[int] | None, clock: Clock) -> None:
        self.loss = LossKind()
        self._names = _names_of_places(model)
        self._recorded = recorded
        self._clock = clock
        # Whether a sample came that is not recorded.
        self._others = False
        self._rows: dict[int, KeptRow] = {}
        self._bytes = 0
        # The first place in the order of samples that there was no room for.
        self._end = _NO_END
        self._kept: set[int] = set()
        self._told: tuple[str | None, str | None] | None = None

    def go_on(self, kept: KeptRows) -> None:
        """Take the rows that earlier recordings kept."""
        self._see(row.sample for row in kept.rows)
        for row in kept.rows:
            if self._wants(row.sample) and row.sample not in self._rows:
                self._take(row)
        self._kept = {row.sample for row in kept.rows} & self._rows.keys()
        self._told = kept.loss, kept.reason
        self.loss.go_on(*self._told)

    def offer(
        self,
        batch: MicroBatch,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        contents: Sequence[torch.Tensor] | None,
    ) -> None:
        """Take the rows of a batch that there is room for.

        Args:
            args, kwargs: of the model.
            contents: what each sample consists of.
        """
        self._see(batch.ids)
        for number in np.flatnonzero(places_of(batch.ids) < np.uint64(self._end)).tolist():
            sample = batch.ids[number]
            if sample in self._rows or not self._wants(sample):
                continue
            values = self._values(batch, number, args, kwargs)
            if values is not None:
                content = None if contents is None else row_hash(contents[number])
                self._take(KeptRow(sample, self._clock.epoch, self._clock.step, content, batch.rows_given, *values))

    def keep(self, store: Store) -> None:
        """Keep in the store what is not yet in it; all rows again when more is known of the loss."""
        told = self.loss.known, self.loss.reason
        if told != self._told:
            self._kept.clear()
        fresh = [sample for sample in self._rows if sample not in self._kept]
        if not fresh:
            return
        for sample in fresh:
            row = self._rows[sample]
            by_row, shared = ({name: _on_host(one) for name, one in held.items()} for held in (row.by_row, row.shared))
            self._rows[sample] = replace(row, by_row=by_row, shared=shared)
        store.keep_rows(rows_table((self._rows[sample] for sample in fresh), *told))
        self._kept.update(fresh)
        self._told = told

    def _see(self, samples: Iterable[int]) -> None:
        """Let go of recorded samples' rows once there are others."""
        if self._recorded is not None and not self._others and not self._recorded.issuperset(samples):
            self._others = True
            self._rows.clear()
            self._kept.clear()
            self._bytes, self._end = 0, _NO_END

    def _wants(self, sample: int) -> bool:
        return self._recorded is None or (sample in self._recorded) != self._others

    def _take(self, row: KeptRow) -> None:
        self._rows[row.sample] = row
        self._bytes += _size(row)
        while len(self._rows) > ROWS or self._bytes > ROWS_BYTES:
            samples = list(self._rows)
            places = places_of(samples)
            last = samples[int(places.argmax())]
            self._end = int(places.max())
            self._bytes -= _size(self._rows.pop(last))
            self._kept.discard(last)

    def _values(
        self, batch: MicroBatch, number: int, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return what the model takes of one sample, and what it takes besides; None where that cannot be kept."""
        if not kwargs:
            given = {str(place): value for place, value in enumerate(args)}
        elif len(args) <= len(self._names):
            given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        else:
            return None
        by_row: dict[str, Any] = {}
        shared: dict[str, Any] = {}
        for name, value in given.items():
            if name in _OF_THE_LOSS:
                continue
            if isinstance(value, torch.Tensor) and _is_plain(value):
                if batch.layout is not None:
                    # Where pieces begin is told beside the tokens, and a piece alone needs none of it.
                    if batch.layout.fits(value.shape, 0):
                        by_row[name] = batch.layout.parts(value.detach(), 0)[number][None]
                elif value.ndim and len(value) == batch.rows_given:
                    by_row[name] = value.detach()[number : number + 1].clone()
                else:
                    shared[name] = value.detach().clone()
            elif value is None or isinstance(value, bool | str):
                shared[name] = value
            elif isinstance(value, int | float):
                if batch.layout is None:
                    shared[name] = value
            else:
                return None
        return by_row, shared


def _names_of_places(model: nn.Module) -> list[str]:
    """Return the names of what the model takes by place."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [one.name for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_complex()


def _on_host(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    # A probe is asked in float32, as numpy knows no bfloat16.
    return (value.float() if value.is_floating_point() and value.itemsize < 4 else value).cpu().numpy()


def _size(row: KeptRow) -> int:
    return sum(one.nbytes for held in (row.by_row, row.shared) for one in held.values() if hasattr(one, "nbytes"))
