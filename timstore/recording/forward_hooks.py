"""The forward side: who is in the batch that runs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from timstore.errors import InvalidInputError
from timstore.model.sample_ids import content_rows, row_hash, sample_of
from timstore.recording.batches import (
    Ids,
    MicroBatch,
    axes_of,
    check_length,
    have_tokens,
    sample_ids,
    sizes_of,
    token_counts,
)
from timstore.recording.capture import Capture
from timstore.recording.packing import contents_of, ids_of_tokens, pieces_of
from timstore.recording.pending import Running
from timstore.recording.per_sample_backward import Passes
from timstore.recording.reservoir import Reservoir
from timstore.recording.standstill import Standstill


class Forwards:
    """Watches the model's forward passes, and makes the micro-batches that await the optimizers' steps.

    Args:
        samples: the ids to record, None for all.
        axis: of the batch in the model's arguments.
        keys: the user's own names of samples, None where they have none.
        by_content: a batch without ids is known by what its rows consist of.
        reservoir: takes rows that are kept for rollbacks; None where none are.
        keep_hashes: is given what samples consist of, as hashes.
        stills: told when a forward pass begins.
    """

    def __init__(
        self,
        model: nn.Module,
        running: Running,
        capture: Capture,
        passes: Passes,
        *,
        samples: frozenset[int] | None,
        axis: int,
        keys: Mapping[str, int] | None,
        by_content: bool,
        reservoir: Reservoir | None,
        keep_hashes: Callable[[Mapping[int, str]], None],
        stills: Sequence[Standstill],
    ) -> None:
        self._running = running
        self._capture = capture
        self._passes = passes
        self._model = model
        self._samples = samples
        self._axis = axis
        self._keys = keys
        self._by_content = by_content
        self._reservoir = reservoir
        self._hashes_to = keep_hashes
        self._stills = stills
        self._masked = "MaskedLM" in type(model).__name__
        self._is_proof, self._has_proved = True, False
        self._hashed: set[int] = set()
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def begin(self, ids: Any) -> None:
        """Name the samples of the next forward pass."""
        self._running.begin(sample_ids(ids, self._keys))

    def remove(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()

    def look_again(self) -> None:
        """Prove again, with the batches of the next step, where modules have the samples."""
        self._is_proof, self._has_proved = True, False
        if self._reservoir is not None:
            self._reservoir.loss.look_again()

    def step_taken(self) -> None:
        """End a proof with the step that it was for: each micro-batch of that step has been proved."""
        self._is_proof = self._is_proof and not self._has_proved

    def wait(self) -> None:
        """Return when all that was captured is on the host."""
        self._capture.buffers.wait()

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.is_looking:
            return None
        ids = kwargs.pop("sample_ids", None)
        if not torch.is_grad_enabled():
            return args, kwargs
        for still in self._stills:
            still.look()
        if ids is not None:
            self.begin(ids)
        elif self._running.current is None and self._by_content:
            self._running.begin(self._content_ids(args, kwargs))
        current = self._running.current
        if current is None:
            if module.training:
                raise InvalidInputError(
                    "a training forward without sample ids: pass sample_ids=... (one integer per row) to the model, or "
                    "call recorder.batch(ids) before it; wrap evaluation in torch.no_grad()",
                    kind="no-ids",
                )
            return args, kwargs
        batch = self._of_pieces(current, kwargs)
        try:
            check_length(batch.rows_given, self._axis, args, kwargs)
        except InvalidInputError:
            self._running.drop(batch)
            raise
        batch.tokens = token_counts(module, kwargs, batch.rows_given, batch.layout)
        if batch.layout is None:
            contents = content_rows(args, kwargs, len(batch.ids), masked=self._masked)
        else:
            contents = contents_of(batch.layout, kwargs)
        self._keep_hashes(batch.ids, contents)
        if self._reservoir is not None:
            self._reservoir.offer(batch, args, kwargs, contents)
        batch.called = True
        batch.sizes = sizes_of(args, kwargs, len(batch.ids), self._axis)
        batch.argument_axes = axes_of(args, kwargs, len(batch.ids), self._axis)
        batch.has_tokens = have_tokens(args, kwargs, len(batch.ids), self._axis)
        if self._is_proof and len(batch.ids) > 1 and not batch.empty:
            self._has_proved = batch.proving = True
        return args, kwargs

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.is_looking or not torch.is_grad_enabled():
            return
        batch = self._running.current
        if batch is not None and output is not None:
            self._passes.watch(output, batch)
            if self._reservoir is not None:
                labelled = batch.tokens is not None
                self._reservoir.loss.watch(output, labelled=labelled, aside=lambda: self._capture.is_replaying)
        if output is None and batch is not None and not self._running.held:
            self._running.drop(batch)  # the forward pass failed
        self._running.over()

    @property
    def is_looking(self) -> bool:
        """Whether the model runs to be looked at."""
        return self._capture.is_replaying

    def _content_ids(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ids:
        pieces = pieces_of(kwargs)
        rows = content_rows(args, kwargs, masked=self._masked, pieces=pieces)
        if rows is None or any(row.is_floating_point() for row in rows):
            raise InvalidInputError(
                "the rows of this batch are no tokens to be known by: name the column that holds their ids "
                "(id_column=...), or pass sample_ids=... to the model",
                kind="no-ids",
            )
        samples = [sample_of(row_hash(row)) for row in rows]
        if pieces is None:
            return Ids(samples, len(rows))
        self._keep_hashes(samples, rows)
        return Ids.of_tokens(ids_of_tokens(samples, pieces))

    def _of_pieces(self, batch: MicroBatch, kwargs: dict[str, Any]) -> MicroBatch:
        """Return the batch with an id for each token, where it has one for each piece of packed rows."""
        pieces = pieces_of(kwargs) if batch.layout is None else None
        if pieces is None or len(batch.ids) == len(pieces) or len(batch.ids) != int(pieces.max()) + 1:
            return batch
        self._running.drop(batch)
        return self._running.begin(Ids.of_tokens(ids_of_tokens(batch.ids, pieces)))

    def _keep_hashes(self, ids: list[int], contents: list[torch.Tensor] | None) -> None:
        """Keep what the recorded samples consist of, as a hash: a probe that holds one of them can be told."""
        if contents is None:
            return
        hashes: dict[int, set[str]] = {}
        for sample, content in zip(ids, contents, strict=True):
            if sample not in self._hashed and (self._samples is None or sample in self._samples):
                hashes.setdefault(sample, set()).add(row_hash(content))
        self._hashed.update(hashes)
        # A sample of several rows, as a preference pair is, has no one content.
        self._hashes_to({sample: found.pop() for sample, found in hashes.items() if len(found) == 1})
