"""What the recorder keeps of the optimizer's side: inner products, scales, denominators, skipped steps, hashes."""

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from torch import nn

import timstore


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="first order only", category=timstore.TimstoreWarning)
        yield


class Mixed(nn.Module):
    """A table, a layer and a norm: rows, factors and dense gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 5)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.out(self.norm(self.table(ids)))
        return out


def values(store: timstore.Store, query: str) -> list[Any]:
    rows = store.sql(query).fetchall()
    return [row[0] if len(row) == 1 else row for row in rows]


def test_a_record_keeps_its_inner_product_with_the_whole_gradient_before_clipping(store: timstore.Store) -> None:
    torch.manual_seed(0)
    model, ids = Mixed(), torch.randint(0, 9, (4, 3))
    twin = copy.deepcopy(model)
    with store.record(model, networks.sgd(model), samples=[7, 8], optimizer_history="gradients") as recorder:
        for half in ([5, 7], [8, 6]):
            rows = ids[[one - 5 for one in half]]
            (model(rows, sample_ids=half).square().sum() / 4).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        recorder._optimizers[0].step()
    whole = torch.autograd.grad(twin(ids).square().sum() / 4, list(twin.parameters()))
    for sample, dot in store.sql("SELECT sample, dot FROM records ORDER BY sample").fetchall():
        own = torch.autograd.grad(twin(ids[[sample - 5]]).square().sum() / 4, list(twin.parameters()))
        wanted = sum(float((one.double() * other.double()).sum()) for one, other in zip(whole, own, strict=True))
        assert dot == pytest.approx(wanted, rel=1e-5)
    norm = sum(float(one.double().square().sum()) for one in whole) ** 0.5
    assert values(store, "SELECT grad_norm FROM steps") == [pytest.approx(norm, rel=1e-6)]
    assert values(store, "SELECT micro_batches FROM steps") == [[2, 2]]


def test_labels_say_how_many_tokens_a_mean_divides_by(store: timstore.Store) -> None:
    model = Mixed()
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    with store.record(model, networks.sgd(model)) as recorder:
        model(ids=torch.tensor([[1, 2, 3], [4, 5, 6]]), labels=labels, sample_ids=[3, 4]).sum().backward()
        recorder._optimizers[0].step()
    assert values(store, "SELECT tokens FROM records ORDER BY sample") == [2, 1]
    assert values(store, "SELECT (tokens, mean_over) FROM steps") == [(3, "tokens")]


def test_every_hyperparameter_is_kept(store: timstore.Store) -> None:
    model = networks.network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01), betas=(0.8, 0.9), foreach=False)
    with store.record(model, optimizer) as recorder:
        recorder.batch([1, 2])
        model(torch.randn(2, 4)).square().mean().backward()
        optimizer.step()
    options = json.loads(values(store, "SELECT options FROM steps")[0])
    assert options["betas"] == [0.8, 0.9]
    assert options["lr"] == pytest.approx(0.01)
    assert options["weight_decay"] == 0.01


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_gradscaler_s_scale_is_told_from_clipping(tmp_path: Path, fused: bool) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    start = [one.detach().clone() for one in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer, scaler=scaler) as recorder:
            for step in range(8):
                recorder.batch([step % 4, 9])
                loss = model(torch.randn(2, 6, dtype=torch.float64)).square().mean()
                if step == 5:
                    loss = loss * torch.inf  # an overflow: the scaler skips the step
                scaler.scale(loss).backward()
                if not fused:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), 0.2)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        scales = values(store, "SELECT amp_scale FROM steps ORDER BY step")
        assert scales == [1024.0] * 3 + [2048.0] * 2 + [1024.0] * 2
        assert values(store, "SELECT skipped FROM steps ORDER BY step") == [0, 0, 0, 0, 0, 1, 0]
        clipped = values(store, "SELECT consumed_ratio * amp_scale < 0.999 FROM steps")
        assert any(clipped) != fused
        report = store.rollback(model, where="true", accumulate="float64")
    assert report.clipping == ("none" if fused else "followed")
    for one, before in zip(model.parameters(), start, strict=True):
        torch.testing.assert_close(one.detach(), before, rtol=0, atol=1e-12)


def test_a_probe_that_holds_a_forgotten_sample_is_pointed_out(store: timstore.Store) -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(6, 4)
    with store.record(model, networks.sgd(model)) as recorder:
        for ids in ([0, 1, 2], [3, 4, 5]):
            recorder.batch(ids)
            nn.functional.cross_entropy(model(data[ids]), torch.zeros(3, dtype=torch.long)).backward()
            recorder._optimizers[0].step()
            recorder._optimizers[0].zero_grad()
    with pytest.warns(timstore.TimstoreWarning, match="holds 1 of the samples to be forgotten .*4"):
        store.rollback(model, [1, 4], probe=[torch.cat([torch.randn(5, 4), data[4:5]])], dry_run=True)
    report = store.rollback(model, [1, 4], probe=[data[[0, 2, 3]]], dry_run=True)
    assert not any("to be forgotten" in warning for warning in report.warnings)


def test_what_cannot_be_recorded_is_refused_at_once(store: timstore.Store) -> None:
    model = networks.network()
    with pytest.raises(timstore.InvalidInputError, match="LBFGS"):
        store.record(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(timstore.InvalidInputError, match="optimizer_history is 'final' or 'gradients'"):
        store.record(model, networks.sgd(model), optimizer_history="all")
    with pytest.raises(timstore.InvalidInputError, match="mean_over"):
        store.record(model, networks.sgd(model), mean_over="rows")
    with pytest.raises(timstore.InvalidInputError, match="steps="):
        store.record(model, networks.sgd(model), budget="1GB")
    complex_model = nn.Linear(3, 3, dtype=torch.complex64)
    with pytest.raises(timstore.InvalidInputError, match="complex"):
        store.record(complex_model, networks.sgd(complex_model))


def test_clipping_by_value_is_refused_where_only_the_final_moment_is_kept(store: timstore.Store) -> None:
    model = networks.network()
    with (
        pytest.raises(timstore.StateError, match="optimizer_history='gradients'"),
        store.record(model, networks.sgd(model)) as recorder,
    ):
        recorder.batch([1, 2])
        model(torch.randn(2, 4)).square().sum().backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.3)
        recorder._optimizers[0].step()


def test_a_parameter_that_is_frozen_and_thawed_keeps_its_own_history(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    start = [one.detach().clone() for one in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer, optimizer_history="gradients") as recorder:
            for step in range(6):
                model[0].requires_grad_(step not in (2, 3))
                recorder.batch([1, 2])
                model(torch.randn(2, 4, dtype=torch.float64)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        idle = values(store, "SELECT idle FROM steps ORDER BY step")
        assert idle[2] == idle[3] == ["0.weight", "0.bias"]
        report = store.rollback(model, [1, 2], accumulate="float64")
    assert report.method == "exact replay"
    # Without any sample every gradient is zero, and Adam stays where it is.
    for one, before in zip(model.parameters(), start, strict=True):
        torch.testing.assert_close(one.detach(), before, rtol=0, atol=1e-12)


def test_a_group_that_joins_later_is_recorded_from_its_first_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    model[0].requires_grad_(False)
    start = [one.detach().clone() for one in model.parameters()]

    def train(recorder: Any, steps: int) -> None:
        for _ in range(steps):
            recorder.batch([1, 2])
            model(torch.randn(2, 4, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    with timstore.open(tmp_path / "s") as store:
        with pytest.raises(timstore.CoverageError, match="enter it again"), store.record(model, optimizer) as recorder:
            train(recorder, 2)
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.05, "momentum": 0.5})
            train(recorder, 1)
        optimizer.zero_grad()
        with store.record(model, optimizer) as recorder:
            train(recorder, 3)
        store.rollback(model, [1, 2], accumulate="float64")
    for one, before in zip(model.parameters(), start, strict=True):
        torch.testing.assert_close(one.detach(), before, rtol=0, atol=1e-12)
