"""A probe: batches of any data like the training data, and how to ask the model about them."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from timstore.arguments import choice, listed
from timstore.errors import InvalidInputError, shown
from timstore.model.eval_guard import given, undisturbed
from timstore.model.sample_ids import content_rows, row_hash

LOSSES = ("cross_entropy", "mse")
_IGNORED = -100


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
        self.loss = choice(loss, LOSSES, "loss")
        if isinstance(batches, torch.Tensor | np.ndarray | Mapping | str):
            raise InvalidInputError("probe is an iterable of batches; put a single batch into a list")
        if not (outputs is None or callable(outputs)):
            raise InvalidInputError(f"outputs is a function of what the model returns, not {shown(outputs)}")
        self._model = model
        self._outputs = _logits if outputs is None else outputs
        self._device = next(model.parameters()).device
        taken = listed(batches, "probe", "an iterable of batches")
        self._batches = [_normalised(batch, number) for number, batch in enumerate(taken)]
        if not self._batches:
            raise InvalidInputError("the probe is empty: give it 8 to 64 examples of data like the training data")

    @property
    def sequences(self) -> int:
        """The number of rows in all batches."""
        return sum(_rows(args, kwargs) for args, kwargs in self._batches)

    def parts(self, count: int) -> list["Probe"]:
        """Return so many probes that share out this one's batches; its rows, where there are fewer batches than that.

        Of fewer rows, every one of them is this probe.
        """
        if self.sequences < count:
            return [self] * count
        found = []
        for number in range(count):
            part = copy.copy(self)
            by_batch = len(self._batches) >= count
            part._batches = self._batches[number::count] if by_batch else self._rows_from(number, count)
            found.append(part)
        return found

    def _rows_from(self, first: int, every: int) -> list[Any]:
        """Return the batches with every so many rows, counted over all of them."""
        found = []
        for batch in self._batches:
            rows = _rows(*batch)
            if first < rows:
                found.append(_cut(batch, rows, slice(first, None, every)))
            first = (first - rows) % every
        return found

    def row_hashes(self) -> set[str]:
        """Return a hash of what each row of the batches consists of, as the recorder keeps one of each sample."""
        found: set[str] = set()
        for args, kwargs in self._batches:
            found.update(row_hash(row) for row in content_rows(args, kwargs) or ())
        return found

    def answers(self, tensors: Mapping[str, torch.Tensor], first: int = 0) -> Iterator[Answer]:
        """Yield the model's answer to each batch from the first on, computed with these parameters and buffers."""
        for number, (args, kwargs) in enumerate(self._batches[first:], first):
            args = tuple(_moved(value, self._device) for value in args)
            kwargs = {name: _moved(value, self._device) for name, value in kwargs.items()}
            labels = kwargs.pop("labels", None)
            with given(f"batch {number} of the probe"):
                returned = functional_call(self._model, dict(tensors), args, kwargs)
            outputs = self._outputs(returned)
            if not isinstance(outputs, torch.Tensor) or outputs.ndim < 2:
                raise InvalidInputError(
                    "outputs= must return the logits as a tensor (batch, ..., values); it returned "
                    f"{type(outputs).__name__}"
                )
            tokens = kwargs.get("input_ids", args[0] if args else None)
            yield self._counted(outputs, labels, tokens, kwargs.get("attention_mask"))

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


def _normalised(batch: Any, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), {name: _tensor(value) for name, value in batch.items() if name != "sample_ids"}
    if isinstance(batch, tuple | list):
        return tuple(_tensor(value) for value in batch), {}
    if isinstance(batch, torch.Tensor | np.ndarray):
        return (_tensor(batch),), {}
    raise InvalidInputError(
        f"probe batch {number} is a {type(batch).__name__}; a batch is a mapping, a tuple or a tensor, as the model "
        "takes it"
    )


def _cut(batch: tuple[tuple[Any, ...], dict[str, Any]], rows: int, chosen: slice) -> Any:
    """Return some of a batch's rows."""

    def one(value: Any) -> Any:
        return value[chosen] if isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) else value

    args, kwargs = batch
    return tuple(one(value) for value in args), {name: one(value) for name, value in kwargs.items()}


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
    return 0 if first is None or first.ndim == 0 else len(first)
