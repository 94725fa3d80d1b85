"""The forward side: who is in the batch that runs, and which batches await their step."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from timstore.content import content_rows, row_hash, sample_of
from timstore.errors import CoverageError, InvalidInputError, TimstoreWarning
from timstore.recording.accumulation import Accumulation
from timstore.recording.batches import Ids, MicroBatch, check_length, sample_ids, token_counts
from timstore.recording.capture import Capture
from timstore.recording.chosen import Chosen
from timstore.recording.looking import Trial, sizes_of
from timstore.recording.packing import contents_of, ids_of_tokens, mixes, pieces_of
from timstore.recording.passes import Passes
from timstore.store import Store


class Forwards:
    """Watches the model's forward passes and keeps their micro-batches until the step that consumes them.

    Args:
        samples: the ids to record, None for all.
        axis: of the batch in the model's arguments.
        keys: the user's own names of samples, None where they have none.
        by_content: a batch without ids is known by what its rows consist of.
        keeps_gradients: whole gradients are kept of every step, recorded samples in it or not.

    Attributes:
        pending: micro-batches since the last step.
        skipped: steps that were skipped since the last one.
        proven: (epoch, step) of the latest step whose parts were seen to add up.
        proved: parts were seen to add up, so that only the chosen samples are captured until `prove` is called.
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
        keeps_gradients: bool,
    ) -> None:
        self._store = store
        self._model = model
        self._samples = samples
        self._axis = axis
        self._keys = keys
        self._by_content = by_content
        self._keeps_gradients = keeps_gradients
        self._masked = "MaskedLM" in type(model).__name__
        self.pending: list[MicroBatch] = []
        self.skipped = 0
        self.proved = False
        self.proven: tuple[int, int] | None = None
        self.held = False
        self._current: MicroBatch | None = None
        self._again: Ids | None = None  # of a block that a step was taken in
        self._earlier = 0  # how many of them had their forward pass before the latest backward pass was over
        self._looked = False
        self._told = False
        self._hashed: set[int] = set()

    def attach(self, capture: Capture, accumulation: Accumulation, passes: Passes, keep: Callable[[Any], Any]) -> None:
        """Put hooks on the model; `keep` is given each of their handles."""
        self._capture, self._accumulation, self._passes = capture, accumulation, passes
        keep(self._model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True))
        keep(self._model.register_forward_hook(self._after, always_call=True))

    @property
    def current(self) -> MicroBatch | None:
        """The micro-batch of the forward pass that runs."""
        if self._current is None and self._again is not None and torch.is_grad_enabled():
            self._begin(self._again)
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
        self._current = self._again = None

    def skip(self) -> None:
        """The gradients accumulated so far were zeroed without a step."""
        self.skipped += 1
        self.discard(self._earlier)

    def prove(self) -> None:
        """Look at the next batch again, and hold all of the next step's parts to what is accumulated."""
        self.proved = self._looked = False
        self._passes.look_again()
        self._accumulation.keep_local()

    def since_proof(self) -> str:
        """Return what to say, in the error that a later proof is, of the records since the latest one that held."""
        if self.proven is None:
            return ""
        epoch, step = self.proven
        return (
            f". All was right at epoch {epoch}, step {step}; what was recorded since may not be. Go on from a "
            f"checkpoint of that step with resume_from=({epoch}, {step + 1}), which supersedes it"
        )

    def wait(self) -> None:
        """Return when all that was captured is on the host."""
        self._capture.buffers.wait()

    def settle(self, parameter: nn.Parameter) -> None:
        """A backward pass has accumulated into a parameter."""
        for batch in self.pending:
            batch.settle(parameter)

    def discard(self, count: int | None = None) -> None:
        """Drop the first micro-batches, or all: the step that they were for is over, or was skipped."""
        dropped = self.pending[:count]
        for batch in dropped:
            batch.release()
        del self.pending[:count]
        self._earlier = 0
        self._accumulation.clear()
        if self.held and self._current in dropped:
            # The block may go on: what it runs from here on is for the next step.
            self._again = Ids(self._current.ids, self._current.rows_given, self._current.layout)
            self._current = None

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.is_looking:
            return None
        ids = kwargs.pop("sample_ids", None)
        if not torch.is_grad_enabled():
            return args, kwargs
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
            self.pending.remove(batch)
            self._current = None
            raise
        batch.tokens = token_counts(module, kwargs, batch.rows_given, batch.layout)
        if batch.layout is None:
            self._keep_hashes(batch.ids, content_rows(args, kwargs, len(batch.ids), masked=self._masked))
        else:
            self._keep_hashes(batch.ids, contents_of(batch.layout, kwargs))
        batch.sizes = sizes_of(args, kwargs, len(batch.ids), self._axis)
        if not self._looked and len(batch.ids) > 1:
            self._look(args, kwargs, batch)
        return args, kwargs

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.is_looking or not torch.is_grad_enabled():
            return
        batch = self._current
        if batch is not None and output is not None:
            self._passes.watch(output, batch)
        if self.held:
            return
        if output is None and batch in self.pending:
            self.pending.remove(batch)  # the forward pass failed
        self._current = None

    @property
    def is_looking(self) -> bool:
        """Whether the model runs to be looked at."""
        return self._capture.watch is not None or self._capture.is_replaying

    def _begin(self, given: Ids) -> None:
        self._again = None
        if self._accumulation.begun:
            self._earlier = len(self.pending)
            if self._accumulation.lost():
                self.skip()
        # In a step that proves that the parts add up, all of them are needed.
        chosen = Chosen(given.samples, self._samples if self.proved else None)
        self._current = MicroBatch(given.samples, chosen, given.rows, given.layout)
        self._current.block = self.held
        self.pending.append(self._current)
        self._accumulation.extremes = self._keeps_gradients or not all(one.empty for one in self.pending)

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
        self.pending.remove(batch)
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

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: MicroBatch) -> None:
        self._looked = True
        if batch.layout is not None:
            with self._capture.replaying():
                mixed = mixes(self._model, args, kwargs, batch.layout)
            if mixed:
                self._warn_of_coupling(
                    "lets the samples that are packed into a row see each other (what it returns for one depends on "
                    "the tokens of others): its attention has to keep them apart, as transformers' does from "
                    "position_ids without an attention_mask and with use_cache=False"
                )
            return
        before = self._capture.seen
        seen = Trial(self._model, args, kwargs, len(batch.ids), self._capture, self._axis, before).look()
        if before is not None:
            moved = before.moved(seen)
            if moved:
                raise CoverageError(
                    f"module {moved[0]} has the samples on another axis than when it was looked at before: keep the "
                    "batch on one axis, axis 0 at best; or record with capture='per-sample'" + self.since_proof(),
                    kind="order-check",
                    module=moved[0],
                )
            seen = before.and_then(seen)
        self._capture.seen = seen
        if seen.tied and not self._capture.warns_of_coupling:
            self._warn_of_coupling(
                "ties the samples of a batch together (what it returns for one depends on the others, or its loss is "
                "no mean or sum over them: statistics over the batch, contrastive losses, the balance of experts)"
            )

    def _warn_of_coupling(self, how: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                f"{type(self._model).__name__} {how}: a record holds what came through its sample's row, a part of "
                "which other samples caused, and what it did to theirs stays when it is rolled back",
                TimstoreWarning,
                stacklevel=2,
            )
