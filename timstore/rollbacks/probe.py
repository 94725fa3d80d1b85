"""A probe: batches of any data like the training data, which one a rollback asks, and what the model says about it."""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from timstore.arguments import choice, listed
from timstore.database.kept_rows import KEPT, asks_kept
from timstore.database.snapshot import Snapshot
from timstore.errors import CorruptionError, InvalidInputError
from timstore.model.eval_guard import given, undisturbed
from timstore.model.sample_ids import content_rows, row_hash
from timstore.options import Loss, RollbackOptions
from timstore.rollbacks.targets import Target
from timstore.rollbacks.vectors import Vector

_IGNORED = -100
# What the model is called with, by position or name.
_Batch = dict[Any, Any]


class Room:
    """Bytes for answers and graphs that need not be asked for again: whoever comes first takes of them.

    The first that does not fit ends it for all, so that what is kept is always the first batches.
    """

    def __init__(self, size_bytes: int = 0) -> None:
        self._free_bytes = size_bytes

    @property
    def is_left(self) -> bool:
        """Whether anything may still fit."""
        return self._free_bytes > 0

    def take(self, size_bytes: int) -> bool:
        """Say whether so many bytes fit, and take them."""
        self._free_bytes -= size_bytes
        return self._free_bytes >= 0


@dataclass(frozen=True, eq=False, slots=True)
class Answer:
    """What the model says about one batch.

    Attributes:
        outputs: (positions, values), only positions that count.
        targets: (positions,) labels or (positions, values) numbers, None when the batch names none.
    """

    outputs: torch.Tensor
    targets: torch.Tensor | None


class Probe:
    """Batches, moved to the model's device one at a time, and the training loss's kind.

    A mapping is what `model(**batch)` takes, a tuple or list what `model(*batch)` takes, a tensor what
    `model(batch)` takes. `labels` in a mapping are not shown to the model. Which positions count, and what
    the probe's own loss is measured against:

    * with `labels`: those that are not -100. If `input_ids` of the same shape are there, the model predicts
      the next token, and the labels are moved by one as transformers does.
    * without, but with token ids whose shape is that of the outputs' positions: the next token, where
      `attention_mask` is not 0.
    * otherwise every position, and the loss is measured against the model's own outputs before the change.

    Args:
        outputs: takes the logits out of what the model returns; by default the tensor itself or `.logits`.
        loss: `cross_entropy` or `mse`, a mean over positions (and values, for mse).

    Raises:
        InvalidInputError: no batch, a batch of another kind, or an unknown loss.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batches: Iterable[Any],
        *,
        outputs: Callable[[Any], Any] | None = None,
        loss: str = "cross_entropy",
    ) -> None:
        self.loss = choice(loss, get_args(Loss), "loss")
        if isinstance(batches, torch.Tensor | np.ndarray | Mapping | str):
            raise InvalidInputError("probe is an iterable of batches; put a single batch into a list")
        self._model = model
        self._outputs = _logits if outputs is None else outputs
        self._device = next(model.parameters()).device
        taken = listed(batches, "probe", "an iterable of batches")
        self._batches = [_batch(values, number) for number, values in enumerate(taken)]
        if not self._batches:
            raise InvalidInputError("the probe is empty: give it 8 to 64 examples of data like the training data")

    @property
    def sequences(self) -> int:
        """The number of rows in all batches."""
        return sum(map(_rows, self._batches))

    def parts(self, count: int) -> list["Probe"]:
        """Return so many probes that share out this one's batches; its rows, where there are fewer batches than that.

        Of fewer rows, every one of them is this probe.
        """
        # Every other batch, since neighbours may be alike: rows lie in batches by their length, or as they were drawn.
        if self.sequences < count:
            return [self] * count
        parts = [copy.copy(self) for _ in range(count)]
        for number, part in enumerate(parts):
            by_batch = len(self._batches) >= count
            part._batches = self._batches[number::count] if by_batch else list(self._rows_from(number, count))
        return parts

    def _rows_from(self, first: int, every: int) -> Iterator[_Batch]:
        """Yield the batches with every so many rows, counted over all of them."""
        for batch in self._batches:
            rows = _rows(batch)
            if first < rows:
                by_row = {key for key, value in batch.items() if torch.is_tensor(value) and value.shape[:1] == (rows,)}
                yield {key: value[first::every] if key in by_row else value for key, value in batch.items()}
            first = (first - rows) % every

    def row_hashes(self) -> set[str]:
        """Return a hash of what each row of the batches consists of, as the recorder keeps one of each sample."""
        rows = (content_rows(*_called_with(batch)) or () for batch in self._batches)
        return {row_hash(row) for rows_of_batch in rows for row in rows_of_batch}

    def answers(self, tensors: Mapping[str, torch.Tensor], first: int = 0) -> Iterator[Answer]:
        """Yield the model's answer to each batch from the first on, computed with these parameters and buffers."""
        for number, batch in enumerate(self._batches[first:], first):
            moved = {
                key: value.to(self._device) if isinstance(value, torch.Tensor) else value
                for key, value in batch.items()
            }
            labels = moved.pop("labels", None)
            with given(f"batch {number} of the probe"):
                returned = functional_call(self._model, dict(tensors), *_called_with(moved))
            outputs = self._outputs(returned)
            if not isinstance(outputs, torch.Tensor) or outputs.ndim < 2:
                raise InvalidInputError(
                    "outputs= must return the logits as a tensor (batch, ..., values); it returned "
                    f"{type(outputs).__name__}"
                )
            yield self._counted(outputs, labels, moved.get("input_ids", moved.get(0)), moved.get("attention_mask"))

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Ask in eval mode, and leave mode, buffers and random state as they were."""
        # Attention's fused kernels cannot be differentiated twice; the plain one can.
        with undisturbed(self._model), sdpa_kernel(SDPBackend.MATH):
            yield

    def _counted(
        self, outputs: torch.Tensor, labels: torch.Tensor | None, tokens: Any, mask: torch.Tensor | None
    ) -> Answer:
        positions = outputs.shape[:-1]
        is_tokens = (
            isinstance(tokens, torch.Tensor) and not tokens.is_floating_point() and tokens.shape == positions
        ) and len(positions) == 2
        targets = labels
        if targets is None and is_tokens and self.loss == "cross_entropy":
            targets = tokens if mask is None else tokens.masked_fill(mask == 0, _IGNORED)
        if targets is None:
            return Answer(outputs.flatten(0, -2), None)
        # A language model's output at a token speaks of the next one: the last output and the first token have no
        # partner.
        if is_tokens and targets.shape == positions:
            outputs, targets = outputs[:, :-1], targets[:, 1:]
        if targets.shape != (outputs.shape if self.loss == "mse" else outputs.shape[:-1]):
            raise InvalidInputError(
                f"the probe's labels have shape {tuple(targets.shape)}, the outputs {tuple(outputs.shape)}; "
                "cross_entropy takes one label per position, mse one number per value"
            )
        if self.loss == "mse":
            return Answer(outputs.flatten(0, -2), targets.flatten(0, -2))
        flat = targets.flatten()
        counts = flat != _IGNORED
        return Answer(outputs.flatten(0, -2)[counts], flat[counts])


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's parameters and buffers to compute with: detached, float32 where they are halves."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: tensor.detach().float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.detach()
        for name, tensor in named.items()
    }


def _logits(returned: Any) -> Any:
    return getattr(returned, "logits", returned)


def _batch(values: Any, number: int) -> _Batch:
    if isinstance(values, Mapping):
        batch = {key: value for key, value in values.items() if key != "sample_ids"}
    elif isinstance(values, tuple | list):
        batch = dict(enumerate(values))
    elif isinstance(values, torch.Tensor | np.ndarray):
        batch = {0: values}
    else:
        raise InvalidInputError(
            f"probe batch {number} is a {type(values).__name__}; a batch is a mapping, a tuple or a tensor, as the "
            "model takes it"
        )
    return {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in batch.items()}


def _called_with(batch: _Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a batch as positional and named arguments."""
    positional = tuple(value for key, value in batch.items() if isinstance(key, int))
    return positional, {str(key): value for key, value in batch.items() if not isinstance(key, int)}


def _rows(batch: _Batch) -> int:
    first = next((value for value in batch.values() if isinstance(value, torch.Tensor)), None)
    return 0 if first is None or first.ndim == 0 else len(first)


class Outcome:
    """A model and a probe, asked before a change and after it.

    Args:
        room: for answers before a change, which another change is held against as well; batches whose answers do not
            fit are asked again.
    """

    def __init__(self, model: torch.nn.Module, probe: Probe, *, room: Room | None = None) -> None:
        self._model, self._probe = model, probe
        self._room = room or Room()
        self._answered: list[Answer] = []

    def divergence(self, delta: Vector) -> float:
        """Return the mean over positions of KL(before || after), or of the mean squared difference for mse."""
        # In float64: small changes move probabilities by less than float32 tells from 0.
        total, positions = 0.0, 0
        for old, new in self._answers(delta):
            if self._probe.loss == "mse":
                total += float(F.mse_loss(new.outputs, old.outputs)) * len(old.outputs)
            else:
                before, after = (answer.outputs.double().log_softmax(-1) for answer in (old, new))
                total += float(F.kl_div(after, before, log_target=True, reduction="sum"))
            positions += len(old.outputs)
        return total / positions

    def losses(self, delta: Vector) -> tuple[float, float]:
        """Return the probe's own mean loss before and after the change.

        Where a batch names no targets, the model's outputs before the change are the targets.
        """
        totals, positions = torch.zeros(2, dtype=torch.float64, device="cpu"), 0
        for old, new in self._answers(delta):
            losses = [_loss(self._probe.loss, answer.outputs, old) for answer in (old, new)]
            totals += torch.tensor(losses, dtype=torch.float64)
            positions += len(old.outputs)
        return totals[0].item() / positions, totals[1].item() / positions

    def _answers(self, delta: Vector) -> Iterator[tuple[Answer, Answer]]:
        """Yield the answers to each batch before and after a change."""
        before = tensors_of(self._model)
        after = dict(before)
        for name in delta.workspace.sizes:
            after[name] = before[name] + delta.read(name).to(before[name]).view(before[name].shape)
        with torch.no_grad(), self._probe.undisturbed():
            yield from zip(self._before(before), self._probe.answers(after), strict=True)

    def _before(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[Answer]:
        """Yield the answers before a change; keep the first ones for another, as many as fit."""
        answered = list(self._answered)
        yield from answered
        for answer in self._probe.answers(tensors, first=len(answered)):
            if self._room.is_left and self._room.take(answer.outputs.nbytes):
                self._answered.append(answer)
            yield answer


def _loss(kind: str, outputs: torch.Tensor, old: Answer) -> float:
    # Against its own answers before, the loss is the least that it can be there; what a change adds is divergence.
    if kind == "mse":
        targets = old.outputs if old.targets is None else old.targets
        return float(F.mse_loss(outputs, targets.to(outputs.dtype)) * len(outputs))
    targets = old.outputs.softmax(-1) if old.targets is None else old.targets
    return float(F.cross_entropy(outputs, targets, reduction="sum"))


@dataclass(frozen=True, eq=False, slots=True)
class Asked:
    """The probe that a rollback asks, and where it comes from.

    Attributes:
        probe: None for none.
        rows: how many rows of the training the store keeps, where the probe is of them.
        left_out: how many of those are to be forgotten, or alike.
        training: rows of the training to hold a probe against that somebody chose; None where there are none.
        overlap: samples to be forgotten that it holds.
        advice: what could be asked instead of nothing.
    """

    probe: Probe | None
    rows: int | None = None
    left_out: int = 0
    training: Probe | None = None
    overlap: tuple[int, ...] = ()
    advice: str = ""

    @property
    def knows_training(self) -> bool:
        """Whether a change is held against rows of the training."""
        return self.rows is not None or self.training is not None


def probe_to_ask(snapshot: Snapshot, target: Target, options: RollbackOptions, forgotten: Collection[int]) -> Asked:
    """Return the probe that is given, the one that the store keeps, rows of the training, or none.

    Args:
        forgotten: samples that leave, or left before.
    """
    if options.probe is False:
        return Asked(None)
    contents = _contents(snapshot, forgotten)

    def of(batches: Iterable[Any], loss: str | None) -> Asked:
        probe = Probe(target.model(), batches, outputs=options.outputs, loss=loss or "cross_entropy")
        hashes = probe.row_hashes()
        return Asked(probe, overlap=tuple(sorted(sample for content, sample in contents.items() if content in hashes)))

    def of_training() -> Asked:
        rows = snapshot.kept_rows()
        left = rows.without(frozenset(forgotten), contents.keys())
        if not left:
            return Asked(None)
        loss = options.loss or rows.loss
        if loss is None:
            return Asked(
                None,
                advice=f". The store keeps {len(rows)} rows of the training itself, which are asked where loss= says "
                f"what its loss is: that was not recognised ({rows.reason or 'no gradient came to the outputs'})",
            )
        probe = Probe(target.model(), left.batches(), outputs=options.outputs, loss=loss)
        return Asked(probe, len(rows), len(rows) - len(left))

    if options.probe is not None and not asks_kept(options.probe):
        asked = of(options.probe, options.loss)
        with suppress(CorruptionError):  # `verify` tells; a probe of one's own needs none of them
            asked = replace(asked, training=of_training().probe)
        return asked
    recorded = snapshot.probe()
    if options.probe is None and not target.is_loaded:
        there = recorded or snapshot.kept_rows()
        return Asked(None, advice=f', or probe="{KEPT}", what the store keeps' if there else "")
    return of_training() if recorded is None else of(recorded[0], options.loss or recorded[1])


def keeps_probe(snapshot: Snapshot, forgotten: Collection[int]) -> bool:
    """Say whether a store keeps what can be asked when these samples leave: batches, or rows whose loss is known."""
    rows = snapshot.kept_rows()
    left = rows.loss is not None and rows.without(frozenset(forgotten), _contents(snapshot, forgotten).keys())
    return snapshot.probe() is not None or bool(left)


def _contents(snapshot: Snapshot, samples: Collection[int]) -> dict[str, int]:
    """Return the content hashes of samples, and whose they are."""
    if "content_hash" not in snapshot.catalog.rows("SELECT * FROM samples LIMIT 0").column_names:
        return {}
    rows = snapshot.catalog.fetch(
        "SELECT content_hash, sample FROM samples WHERE content_hash IS NOT NULL AND sample IN "
        "(SELECT unnest(?::BIGINT[])) ORDER BY sample DESC",
        [list(samples)],
    )
    return dict(rows)
