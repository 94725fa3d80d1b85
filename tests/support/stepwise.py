"""Loops of steps that differ from each other, recorded and held to autograd one sample at a time."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from coverage_models import Applied
from references import Batch, Gradients, Loss, bound, largest_error, one_by_one
from torch import nn

import timstore
from timstore.errors import CoverageError

FLOAT32, HALF = 1e-5, 1e-2
BY_SAMPLE = {"capture": "per-sample"}
MODULES = {"capture": "modules"}
BOTH = pytest.mark.parametrize("options", [{}, BY_SAMPLE], ids=["auto", "per-sample"])
IDS = [11, 5, 8, 2]


class Model(Applied):
    """Modules and what is done with them, of any arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._applied(self, *args, **kwargs)


def lstm() -> nn.LSTM:
    return nn.LSTM(6, 6, batch_first=True)


PRICED = pytest.mark.filterwarnings("ignore:no module shows")


def skip_without_bfloat16_lstm() -> None:
    """Skip a test where this processor has no LSTM in bfloat16: oneDNN makes one of instructions that not all have."""
    layer = lstm()
    try:
        with torch.autocast(layer.weight_hh_l0.device.type, dtype=torch.bfloat16):
            layer(torch.zeros(1, 1, 6))[0].sum().backward()
    except RuntimeError as error:
        if "could not create a primitive" not in str(error):
            raise
        pytest.skip(f"no LSTM in bfloat16 on this processor: {error}")


def rows(output: torch.Tensor) -> torch.Tensor:
    """Return a loss for each row, of which no norm of the model makes a constant."""
    return (2 * output).sin().flatten(1).sum(1) + output.square().flatten(1).mean(1)


def weighted(each: Callable[[Any], torch.Tensor]) -> Loss:
    return lambda model, batch, weights: (each(model(**batch)) * weights).mean()


EACH = weighted(rows)


@dataclass
class Step:
    """One optimizer step.

    Attributes:
        ids: of the rows of each micro-batch; of packed rows, of the samples in the order in which they come.
        named: what the model is given as `sample_ids`, where that is not `ids`.
        prepare: makes of the model what it is in this step.
    """

    batches: list[Batch]
    ids: list[list[int]] = field(default_factory=lambda: [IDS])
    loss: Loss = EACH
    named: list[Any] | None = None
    prepare: Callable[[Any], None] = lambda model: None
    limit: float = FLOAT32


def of(*shape: int, **options: Any) -> Step:
    """A step on four samples of this shape."""
    return Step([{"x": torch.randn(4, *shape)}], **options)


def sized(*sizes: tuple[int, int]) -> Step:
    """A step of a micro-batch for each (samples, tokens)."""
    return Step([{"x": torch.randn(*size, 6)} for size in sizes], [list(range(7, 7 + count)) for count, _ in sizes])


def record(path: Path, model: nn.Module, steps: list[Step], *, block: bool = False, **options: Any) -> None:
    """Record steps that change nothing; whatever ends it, the records that the store holds then are right."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wanted = []
    for step in steps:
        step.prepare(model)
        wanted.append(one_by_one(model, step.batches, step.ids, step.loss))
    with timstore.open(path) as store:
        try:
            with store.record(model, optimizer, **options) as recorder:
                for step in steps:
                    step.prepare(model)
                    for batch, ids, named in zip(step.batches, step.ids, step.named or step.ids, strict=True):
                        given = batch if block else {**batch, "sample_ids": named}
                        with recorder.batch(named) if block else nullcontext():
                            loss = step.loss(model, given, torch.ones(len(ids)))
                        (loss / len(step.batches)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        finally:
            check(store, wanted, [step.limit for step in steps], options.get("samples"))


def check(store: timstore.Store, wanted: list[Gradients], limits: list[float], chosen: Any = None) -> None:
    found: dict[int, tuple[Gradients, dict[tuple[int, str], float]]] = {}
    for one in store.read():
        got, bounds = found.setdefault(one.step, ({}, {}))
        got[one.sample] = {name: one.dense(name) for name in one.gradients}
        bounds.update({(one.sample, name): sum(map(bound, parts)) for name, parts in one.gradients.items()})
        unknown = got[one.sample].keys() - wanted[one.step][one.sample].keys()
        assert not any(got[one.sample][name].any() for name in unknown)
    for number, (got, bounds) in found.items():
        samples = [one for one in wanted[number] if chosen is None or one in chosen]
        assert largest_error(got, wanted[number], bounds, samples) <= limits[number], f"step {number}"


def record_or_refuse(path: Path, model: nn.Module, steps: list[Step], what: str) -> None:
    """Record what is refused, by name, without a pass of each sample, and right with it; by default with its price."""
    record(path / "by sample", model, steps, **BY_SAMPLE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no module shows", timstore.TimstoreWarning)
        record(path / "by default", model, steps)
    with pytest.raises(CoverageError, match=what + ".*capture='per-sample'"):
        record(path / "by module", model, steps, capture="modules")
