"""The forward side: who is in the batch that runs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from timstore.database.store import Store
from timstore.errors import InvalidInputError
from timstore.model.sample_ids import content_rows, row_hash, sample_of
from timstore.recording.batches import Ids, MicroBatch, check_length, have_tokens, sample_ids, sizes_of, token_counts
from timstore.recording.capture import Capture
from timstore.recording.chosen import Chosen
from timstore.recording.packing import contents_of, ids_of_tokens, pieces_of
from timstore.recording.pending import Pending
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
        reservoir: Reservoir | None,
    ) -> None:
        self._store = store
        self._model = model
        self._samples = samples
        self._axis = axis
        self._keys = keys
        self._by_content = by_content
        self._reservoir = reservoir
        self._masked = "MaskedLM" in type(model).__name__
        self.held = False
        self._current: MicroBatch | None = None
        self._is_proof = True
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
        capture.since_proof = self._since_proof
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
        batch = self._current
        if batch is not None and self.held and torch.is_grad_enabled() and not self._awaits(batch):
            # The block goes on after a step: what it runs from here on is for the next one.
            self._begin(Ids(batch.ids, batch.rows_given, batch.layout))
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
        """Prove again, with the next batch, where modules have the samples."""
        self._is_proof = True
        if self._reservoir is not None:
            self._reservoir.loss.look_again()

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
        if self.is_looking:
            return None
        ids = kwargs.pop("sample_ids", None)
        if not torch.is_grad_enabled():
            return args, kwargs
        for still in self._stills:
            still.look()
        if ids is not None:
            self.begin(ids)
        elif self.current is None and self._by_content:
            self._begin(self._content_ids(args, kwargs))
        if self._current is None:
            if module.training:
                raise InvalidInputError(
                    "a training forward without sample ids: pass sample_ids=... (one integer per row) to the model, or "
                    "call recorder.batch(ids) before it; wrap evaluation in torch.no_grad()",
                    kind="no-ids",
                )
            return args, kwargs
        batch = self._of_pieces(self._current, kwargs)
        try:
            check_length(batch.rows_given, self._axis, args, kwargs)
        except InvalidInputError:
            self._drop(batch)
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
        batch.has_tokens = have_tokens(args, kwargs, len(batch.ids), self._axis)
        if self._is_proof and len(batch.ids) > 1 and not batch.empty:
            self._is_proof, batch.proving = False, True
        return args, kwargs

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.is_looking or not torch.is_grad_enabled():
            return
        batch = self._current
        if batch is not None and output is not None:
            self._passes.watch(output, batch)
            if self._reservoir is not None:
                labelled = batch.tokens is not None
                self._reservoir.loss.watch(output, labelled=labelled, aside=lambda: self._capture.is_replaying)
        if self.held:
            return
        if output is None and batch is not None:
            self._drop(batch)  # the forward pass failed
        self._current = None

    def _since_proof(self) -> str:
        return min(self._awaiting, key=lambda one: one.proven or (-1, -1)).since_proof()

    @property
    def is_looking(self) -> bool:
        """Whether the model runs to be looked at."""
        return self._capture.is_replaying

    def _begin(self, given: Ids) -> None:
        # In a step that proves that the parts add up, all of them are needed.
        proved = all(one.proved for one in self._awaiting)
        chosen = Chosen(given.samples, self._samples if proved else None)
        self._current = MicroBatch(given.samples, chosen, given.rows, given.layout)
        self._current.block = self.held
        for one in self._awaiting:
            one.begin(self._current)

    def _awaits(self, batch: MicroBatch) -> bool:
        """Say whether every optimizer has yet to consume a micro-batch."""
        return all(batch in one.batches for one in self._awaiting)

    def _drop(self, batch: MicroBatch) -> None:
        for one in self._awaiting:
            one.drop(batch)
        self._current = None

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
        self._drop(batch)
        self._begin(Ids.of_tokens(ids_of_tokens(batch.ids, pieces)))
        assert self._current is not None
        return self._current

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
        self._store.append_hashes({sample: found.pop() for sample, found in hashes.items() if len(found) == 1})
