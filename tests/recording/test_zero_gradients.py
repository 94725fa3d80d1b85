"""Samples that have no gradient in a step: records that say zero, and errors that come before the step is taken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import moments, network, sgd
from torch import nn

import timstore
from timstore.errors import InvalidInputError, TimstoreWarning

IDS = torch.arange(12)


def hinge(model: nn.Module, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """A loss without a gradient for samples beyond their margin."""
    return (1 - torch.sign(x[ids, 0]) * model(x[ids], sample_ids=ids)[:, 0]).clamp(min=0)


class Scores(nn.Module):
    """A linear score that takes sample ids as a recorded model does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, sample_ids: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


def flat(step: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a loss of two samples, the second of which has no gradient."""
    return lambda outputs: (outputs.square().sum(1) * torch.tensor([1.0, 0.0])).mean()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_samples_beyond_their_margin_are_recorded_as_zero(store: timstore.Store, kind: Any) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(12, 4), Scores()
    optimizer = kind(model.parameters(), lr=0.5)
    expected: dict[tuple[int, int], float] = {}
    with store.record(model, optimizer):
        for step, ids in enumerate(IDS.split(4)):
            for one in ids.tolist():
                with torch.no_grad():
                    margin = float(torch.sign(x[one, 0]) * model.layer(x[one])[0])
                expected[step, one] = 0.0 if margin > 1 else float(torch.cat([x[one], torch.ones(1)]).norm()) / 4
            hinge(model, x, ids).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    found = {
        (step, sample): norm for step, sample, norm in store.sql("SELECT step, sample, norm FROM records").fetchall()
    }
    assert 0.0 in expected.values()
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_step_without_any_gradient_is_refused_before_it_is_taken(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model, momentum=0.9)
    with store.record(model, optimizer) as recorder:
        model(torch.randn(2, 4), sample_ids=[1, 2]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        before = [one.detach().clone() for one in model.parameters()]
        (model(torch.randn(2, 4), sample_ids=[3, 4]) * 0).sum().backward()
        with pytest.raises(InvalidInputError, match=r"step 1.*sample 3.*zero"):
            optimizer.step()
        assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
        assert recorder.step == 1
        optimizer.zero_grad()
        model(torch.randn(2, 4), sample_ids=[5, 6]).square().mean().backward()
        optimizer.step()
    assert moments(store) == [(0, 0, 1), (0, 0, 2), (0, 1, 5), (0, 1, 6)]
    assert store.sql("SELECT step FROM steps ORDER BY step").fetchall() == [(0,), (1,)]


def test_a_step_without_any_gradient_may_be_allowed(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer, allow_zero=True):
        (model(torch.randn(2, 4), sample_ids=[3, 4]) * 0).sum().backward()
        optimizer.step()
    assert moments(store) == [(0, 0, 3), (0, 0, 4)]


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_another_micro_batch_or_sample_that_is_not_recorded_may_have_the_gradient(
    store: timstore.Store, first: float
) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer, samples=[1]):
        for _ in range(3):
            for ids, factor in ([1, 2], first), ([3, 4], 1.0):
                weights = torch.tensor([0.0, factor])
                (model(torch.randn(2, 4), sample_ids=ids).square().sum(1) * weights).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert store.sql("SELECT step, sample, norm FROM records ORDER BY step").fetchall() == [
        (0, 1, 0.0),
        (1, 1, 0.0),
        (2, 1, 0.0),
    ]


def test_a_step_clipped_to_nothing_is_no_step_without_gradients(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer):
        flat(0)(model(torch.randn(2, 4), sample_ids=[1, 2])).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        optimizer.step()
    assert moments(store) == [(0, 0, 1), (0, 0, 2)]
    assert store.sql("SELECT consumed_ratio FROM steps").fetchall() == [(0.0,)]


def test_rows_without_a_label_are_recorded_as_zero(store: timstore.Store) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9))
    optimizer = sgd(model)
    tokens = torch.randint(0, 9, (3, 5))
    labels = tokens.clone()
    labels[1] = -100
    with store.record(model, optimizer) as recorder:
        for _ in range(2):
            recorder.batch([7, 8, 9])
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    norms = store.sql("SELECT sample, bool_and(norm > 0) FROM records GROUP BY sample ORDER BY sample").fetchall()
    assert norms == [(7, True), (8, False), (9, True)]
    assert not store.gradient(0, 1, 8, "0.weight").any()


@pytest.mark.parametrize("history", ["final", "gradients"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_rollback_of_records_that_are_zero_changes_nothing_and_says_so(
    tmp_path: Path, kind: Any, history: str
) -> None:
    model = network().double()
    optimizer = kind(model.parameters(), lr=0.1)
    with timstore.open(tmp_path / "s.tim") as store:
        with store.record(model, optimizer, optimizer_history=history):
            for ids in ([1, 2], [3, 2], [4, 2]):
                flat(0)(model(torch.randn(2, 4).double(), sample_ids=ids)).backward()
                optimizer.step()
                optimizer.zero_grad()
        last = [one.detach().clone() for one in model.parameters()]
        with pytest.warns(TimstoreWarning, match="every gradient of these records is zero"):
            report = store.rollback(model, [2], keep_delta=True)
        assert report.records == 3 and report.delta_norm == 0
        assert all(torch.equal(one, other) for one, other in zip(last, model.parameters(), strict=True))
        store.undo(model, report.rollback_id)
        with pytest.warns(TimstoreWarning):
            both = store.rollback(model, [1, 2])
        assert both.delta_norm > 0
        assert store.verify().damage == ()


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_before_the_step(store: timstore.Store, wrong: float) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer):
        (model(torch.randn(2, 4), sample_ids=[1, 2]).sum() * wrong).backward()
        before = [one.detach().clone() for one in model.parameters()]
        with pytest.raises(timstore.TimstoreError, match="not finite"):
            optimizer.step()
        assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_a_sample_recorded_before_is_refused_before_the_step(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer):
        name = "0.weight"
        store.append(0, 0, 2, {name: np.ones(tuple(model.get_parameter(name).shape), np.float32)})
        before = [one.detach().clone() for one in model.parameters()]
        flat(0)(model(torch.randn(2, 4), sample_ids=[1, 2])).backward()
        with pytest.raises(InvalidInputError, match="recorded before"):
            optimizer.step()
        assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert moments(store) == [(0, 0, 2)]
