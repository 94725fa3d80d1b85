"""Recorded gradients beside an independent computation: autograd, one sample at a time, in the batch it was in.

First the losses, in which each sample has a weight of its own, and the batches.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import timstore
from timstore.records import Factors, Rows, widen

Batch = dict[str, Any]
Gradients = dict[int, dict[str, np.ndarray]]
Loss = Callable[[nn.Module, Batch, torch.Tensor], torch.Tensor]
Around = Callable[[], AbstractContextManager[Any]]


def squares(model: nn.Module, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
    """A mean loss over samples on axis 0, in which each has a weight of its own."""
    return (_output(model(**batch)).float().flatten(1).square().sum(1) * weights).mean()


def language(model: nn.Module, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
    """The token mean of a causal language model, labels moved by one, -100 left out."""
    batch = dict(batch)
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    return (losses * weights[:, None]).sum() / (labels[:, 1:] != -100).sum()


def masked(model: nn.Module, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
    """The token mean of a masked or a sequence-to-sequence language model."""
    batch = dict(batch)
    labels = batch.pop("labels")
    losses = nn.functional.cross_entropy(model(**batch).logits.transpose(1, 2).float(), labels, reduction="none")
    return (losses * weights[:, None]).sum() / (labels != -100).sum()


def squares_on_axis_1(model: nn.Module, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
    outputs: torch.Tensor = model(**batch)
    return (outputs.square().sum((0, 2)) * weights).mean()


LENGTHS = (3, 5, 2, 4)


def packed_ids(samples: Sequence[int]) -> torch.Tensor:
    return torch.tensor([[one for one, length in zip(samples, LENGTHS, strict=True) for _ in range(length)]])


def squares_of_packed(model: nn.Module, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
    outputs: torch.Tensor = model(**batch)
    each = weights.repeat_interleave(torch.tensor(LENGTHS))
    return (outputs[0].square().sum(1) * each).sum() / len(weights)


def counted(labels: torch.Tensor) -> torch.Tensor:
    return (labels != -100).sum()


def own(count: Callable[[torch.Tensor], Any]) -> Loss:
    """The loss that a model computes itself, a mean over what `count` counts of its labels."""

    def loss(model: nn.Module, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
        labels = batch["labels"].clone()
        labels[weights == 0] = -100
        value: torch.Tensor = model(**{**batch, "labels": labels}).loss
        return value * count(labels) / count(batch["labels"])

    return loss


def pairs_found(model: nn.Module, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
    """A contrastive loss: the others of the batch are what a sample is not."""
    logits = model(**batch).logits
    losses = nn.functional.cross_entropy(logits, torch.arange(len(logits)), reduction="none")
    return (losses * weights).mean()


def vectors(*shape: int) -> Callable[[], list[Batch]]:
    return lambda: [{"x": torch.randn(4, *shape)} for _ in range(2)]


def tokens(vocabulary: int, length: int, *, padded: bool = False) -> Callable[[], list[Batch]]:
    def make() -> list[Batch]:
        batches = []
        for _ in range(2):
            ids = torch.randint(2, vocabulary, (4, length))
            labels = ids.clone()
            labels[0, : length // 2] = -100
            batch = {"input_ids": ids, "labels": labels}
            if padded:
                batch["attention_mask"] = torch.ones_like(ids)
                batch["attention_mask"][1, length - 3 :] = 0
                ids[1, length - 3 :] = 0
                labels[1, length - 3 :] = -100
            batches.append(batch)
        return batches

    return make


def seq2seq() -> list[Batch]:
    return [
        {
            "input_ids": torch.randint(2, 60, (4, 9)),
            "decoder_input_ids": torch.randint(2, 60, (4, 7)),
            "labels": torch.randint(2, 60, (4, 7)),
        }
        for _ in range(2)
    ]


def prompts(model: nn.Module, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
    """The token mean of a language model that puts prompts of its own before the tokens."""
    batch = dict(batch)
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, -labels.shape[1] : -1].float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    return (losses * weights[:, None]).sum() / (labels[:, 1:] != -100).sum()


def speech() -> list[Batch]:
    return [
        {
            "input_features": torch.randn(4, 6, 16),
            "decoder_input_ids": torch.randint(2, 60, (4, 7)),
            "labels": torch.randint(2, 60, (4, 7)),
        }
        for _ in range(2)
    ]


def sounds() -> list[Batch]:
    return [{"input_values": torch.randn(4, 120)} for _ in range(2)]


def sentences() -> list[Batch]:
    return [{"input_ids": torch.randint(2, 60, (4, 9))} for _ in range(2)]


def images() -> list[Batch]:
    return [{"pixel_values": torch.randn(4, 3, 8, 8)} for _ in range(2)]


def words() -> list[Batch]:
    return [{"input_ids": torch.randint(0, 4, (4, 6))} for _ in range(2)]


def packed() -> list[Batch]:
    """Four samples in a row of tokens, of 3, 5, 2 and 4."""
    return [{"x": torch.randn(1, 14, 6)} for _ in range(2)]


def labelled(*shape: int, ignored: bool = False) -> Callable[[], list[Batch]]:
    def make() -> list[Batch]:
        batches = [{"x": torch.randn(4, *shape, 6), "labels": torch.randint(0, 5, (4, *shape))} for _ in range(2)]
        for batch in batches if ignored else ():
            batch["labels"][0, 1:] = -100
        return batches

    return make


def pairs() -> list[Batch]:
    return [{"x": torch.randn(4, 6), "y": torch.randn(4, 6)} for _ in range(2)]


def one_by_one(
    model: nn.Module,
    batches: Sequence[Batch],
    ids: Sequence[Sequence[int]],
    loss: Loss,
    *,
    seed: int = 3,
    around: Around = nullcontext,
    scale: float = 1.0,
) -> Gradients:
    """Each sample's summand of the gradient: the same batch, every other sample's loss weighted zero."""
    found: Gradients = {}
    for number, (batch, samples) in enumerate(zip(batches, ids, strict=True)):
        for row, sample in enumerate(samples):
            model.zero_grad()
            torch.manual_seed(seed + number)
            weights = torch.zeros(len(samples))
            weights[row] = 1
            with around():
                value = loss(model, batch, weights) / len(batches)
            (value * scale).backward()
            gradients = found.setdefault(sample, {})
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    gradients[name] = gradients.get(name, 0) + parameter.grad.double().cpu().numpy() / scale
    model.zero_grad()
    return found


def recorded(
    path: Path,
    model: nn.Module,
    batches: Sequence[Batch],
    ids: Sequence[Sequence[int]],
    loss: Loss,
    samples: Sequence[int],
    *,
    seed: int = 3,
    around: Around = nullcontext,
    scaler: Any = None,
    packed: Sequence[Any] | None = None,
    between: Callable[[nn.Module], None] = lambda model: None,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] = lambda parameters: torch.optim.SGD(parameters, lr=0.0),
    **options: Any,
) -> list[tuple[Gradients, dict[tuple[int, str], float]]]:
    """Two steps that change nothing: in the first all rows are captured, in the second only the chosen ones.

    Returns:
        For each step the recorded gradients and, of each, the sum over tokens of the norms' products: what rounding
        in it is to be measured by.
    """
    optimizer = make_optimizer([one for one in model.parameters() if one.requires_grad])
    with timstore.open(path) as store:
        with store.record(model, optimizer, samples=samples, scaler=scaler, **options):
            for _ in range(2):
                for number, (batch, named) in enumerate(zip(batches, packed or ids, strict=True)):
                    # Looking at the first batch runs the model too, and leaves the random state alone.
                    torch.manual_seed(seed + number)
                    with around():
                        value = loss(model, {**batch, "sample_ids": named}, torch.ones(len(ids[number]))) / len(batches)
                    (scaler.scale(value) if scaler is not None else value).backward()
                    between(model)
                if scaler is not None:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
                optimizer.zero_grad()
        scales = dict(store.sql("SELECT step, max(amp_scale) FROM steps GROUP BY step").fetchall())
        steps: list[tuple[Gradients, dict[tuple[int, str], float]]] = [({}, {}), ({}, {})]
        for record in store.read():
            gradients, bounds = steps[record.step]
            scale = scales[record.step]
            gradients[record.sample] = {name: record.dense(name) / scale for name in record.gradients}
            for name, parts in record.gradients.items():
                bounds[record.sample, name] = sum(map(bound, parts)) / scale
        return steps


def bound(part: Any) -> float:
    """Return the sum over tokens of what each adds to the gradient, in norm."""
    if isinstance(part, Factors):
        norms = np.linalg.norm(widen(part.output_gradients), axis=1) * np.linalg.norm(widen(part.inputs), axis=1)
        return float(norms.sum())
    values = widen(part.values if isinstance(part, Rows) else part)
    return float(
        np.linalg.norm(np.atleast_2d(values.reshape(len(values), -1) if values.ndim else values), axis=1).sum()
    )


def largest_error(
    got: Gradients, want: Gradients, bounds: Mapping[tuple[int, str], float], samples: Sequence[int]
) -> float:
    """Return the largest error of any gradient, over what rounding in it is measured by.

    Some gradients are nothing but rounding (the bias of an attention's keys): no gradient is measured by less than a
    hundredth of its sample's whole record.
    """
    assert sorted(got) == sorted(samples)
    largest = 0.0
    for sample in samples:
        whole = np.sqrt(sum(float(np.square(one).sum()) for one in want[sample].values()))
        for name, gradient in want[sample].items():
            if not gradient.any() and name not in got[sample]:
                continue
            size = max(bounds[sample, name], float(np.linalg.norm(gradient)), 1e-2 * float(whole))
            largest = max(largest, float(np.linalg.norm(got[sample][name] - gradient)) / size)
    return largest


def _output(returned: Any) -> torch.Tensor:
    """Return a model's tensor: itself, its logits, or its last hidden state."""
    if isinstance(returned, torch.Tensor):
        return returned
    found = getattr(returned, "logits", None)
    return returned.last_hidden_state if found is None else found
