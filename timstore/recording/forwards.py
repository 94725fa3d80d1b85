"""The forward side: who is in the batch that runs."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from timstore.content import content_rows, row_hash, sample_of
from timstore.errors import CoverageError, InvalidInputError, TimstoreWarning
from timstore.recording.batches import Ids, MicroBatch, check_length, sample_ids, token_counts
from timstore.recording.capture import Capture
from timstore.recording.chosen import Chosen
from timstore.recording.looking import Trial, sizes_of
from timstore.recording.passes import Passes
from timstore.recording.pending import Pending
from timstore.recording.standstill import Standstill
from timstore.store import Store


class Forwards:
    """Watches the model's forward passes, and makes the micro-batches that await the optimizers' steps.

    Args:
        samples: the ids to record, None for all.
        axis: of the batch in the model's arguments.
        keys: the user's own names of samples, None where they have none.
        by_content: a batch without ids is known by what its rows consist of.

    Attributes:
        held: a block names the batch of several forward passes.
    """

    def __init__(
        self,
        store: Store,
        model: nn.Module,
        *,
        samples: frozenset[int] | None,
        axis: int,
        keys: Mapping[str, int] | None,
        by_content: bool,
    ) -> None:
        self._store = store
        self._model = model
        self._samples = samples
        self._axis = axis
        self._keys = keys
        self._by_content = by_content
        self._masked = "MaskedLM" in type(model).__name__
        self.held = False
        self._current: MicroBatch | None = None
        self._looked = False
        self._told = False
        self._hashed: set[int] = set()

    def attach(
        self,
        capture: Capture,
        awaiting: Sequence[Pending],
        passes: Passes,
        stills: Sequence[Standstill],
        keep: Callable[[Any], Any],
    ) -> None:
        """Put hooks on the model; `keep` is given each of their handles.

        Args:
            awaiting: what each of the optimizers has pending.
            stills: told when a forward pass begins.
        """
        self._capture, self._awaiting, self._passes, self._stills = capture, awaiting, passes, stills
        keep(self._model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True))
        keep(self._model.register_forward_hook(self._after, always_call=True))

    @property
    def pending(self) -> list[MicroBatch]:
        """The micro-batches that some optimizer has yet to consume."""
        return list(dict.fromkeys(batch for one in self._awaiting for batch in one.batches))

    @property
    def current(self) -> MicroBatch | None:
        """The micro-batch of the forward pass that runs."""
        return self._current

    def begin(self, ids: Any) -> None:
        """Name the samples of the next forward pass."""
        self._begin(sample_ids(ids, self._keys))

    def hold(self) -> None:
        """Keep these samples for every forward pass until `end`."""
        self.held = True
        if self._current is not None:
            self._current.block = True

    def end(self) -> None:
        """Name no samples any more."""
        self.held = False
        self._current = None

    def look_again(self) -> None:
        """Look at the next batch again."""
        self._looked = False
        self._passes.look_again()

    def wait(self) -> None:
        """Return when all that was captured is on the host."""
        self._capture.buffers.wait()

    def discard(self) -> None:
        """Drop all micro-batches."""
        for one in self._awaiting:
            one.discard()

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._idle:
            return None
        ids = kwargs.pop("sample_ids", None)
        if not torch.is_grad_enabled():
            return args, kwargs
        for still in self._stills:
            still.look()
        if ids is not None:
            self.begin(ids)
        elif self._current is None and self._by_content:
            self._begin(self._content_ids(args, kwargs))
        if self._current is None:
            if module.training:
                raise InvalidInputError(
                    "a training forward without sample ids: pass sample_ids=... (one integer per row) to the model, or "
                    "call recorder.batch(ids) before it; wrap evaluation in torch.no_grad()",
                    kind="no-ids",
                )
            return args, kwargs
        batch = self._current
        try:
            check_length(batch.rows_given, self._axis, args, kwargs)
        except InvalidInputError:
            self._drop(batch)
            raise
        if batch.layout is None:
            batch.tokens = token_counts(module, kwargs, len(batch.ids))
            self._keep_hashes(batch.ids, args, kwargs)
        batch.sizes = sizes_of(args, kwargs, len(batch.ids), self._axis)
        if not self._looked and len(batch.ids) > 1 and batch.layout is None:
            self._look(args, kwargs, len(batch.ids))
        return args, kwargs

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._idle or not torch.is_grad_enabled():
            return
        batch = self._current
        if batch is not None and output is not None:
            self._passes.watch(output, batch)
        if self.held:
            return
        if output is None and batch is not None:
            self._drop(batch)  # the forward pass failed
        self._current = None

    @property
    def is_looking(self) -> bool:
        """Whether the model runs to be looked at."""
        return self._capture.watch is not None

    @property
    def _idle(self) -> bool:
        return self.is_looking or self._capture.is_replaying

    def _begin(self, given: Ids) -> None:
        # In a step that proves that the parts add up, all of them are needed.
        proved = all(one.proved for one in self._awaiting)
        chosen = Chosen(given.samples, self._samples if proved else None)
        self._current = MicroBatch(given.samples, chosen, given.rows, given.layout)
        for one in self._awaiting:
            one.begin(self._current)

    def _drop(self, batch: MicroBatch) -> None:
        for one in self._awaiting:
            one.drop(batch)
        self._current = None

    def _content_ids(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ids:
        rows = content_rows(args, kwargs, masked=self._masked)
        if rows is None or any(row.is_floating_point() for row in rows):
            raise InvalidInputError(
                "the rows of this batch are no tokens to be known by: name the column that holds their ids "
                "(id_column=...), or pass sample_ids=... to the model",
                kind="no-ids",
            )
        return Ids([sample_of(row_hash(row)) for row in rows], len(rows))

    def _keep_hashes(self, ids: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the recorded samples consist of, as a hash: a probe that holds one of them can be told."""
        new = {
            sample: position
            for position, sample in enumerate(ids)
            if sample not in self._hashed and (self._samples is None or sample in self._samples)
        }
        rows = content_rows(args, kwargs, len(ids), masked=self._masked) if new else None
        if rows is not None:
            self._hashed.update(new)
            self._store.append_hashes({sample: row_hash(rows[position]) for sample, position in new.items()})

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> None:
        before = self._capture.seen
        seen = Trial(self._model, args, kwargs, rows, self._capture, self._axis, before).look()
        self._looked = True
        if before is not None:
            moved = before.moved(seen)
            if moved:
                earliest = min(self._awaiting, key=lambda one: one.proven or (-1, -1))
                raise CoverageError(
                    f"module {moved[0]} has the samples on another axis than when it was looked at before: keep the "
                    "batch on one axis, axis 0 at best; or record with capture='per-sample'" + earliest.since_proof(),
                    kind="order-check",
                    module=moved[0],
                )
            seen = before.and_then(seen)
        self._capture.seen = seen
        if seen.tied and not self._told and not self._capture.warns_of_coupling:
            self._told = True
            warnings.warn(
                f"{type(self._model).__name__} ties the samples of a batch together (what it returns for one depends "
                "on the others, or its loss is no mean or sum over them: statistics over the batch, contrastive "
                "losses, the balance of experts): a record holds what came through its sample's row, a part of which "
                "other samples caused, and what it did to theirs stays when it is rolled back",
                TimstoreWarning,
                stacklevel=2,
            )
