"""Undo: the parameters before a rollback, to the last bit, or a refusal that changes nothing."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import networks
import pytest
import torch
from torch import nn

import timstore

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="first order only", category=timstore.TimstoreWarning)
        yield


def recorded(store: timstore.Store, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = networks.network().to(dtype)
    optimizer = networks.sgd(model, momentum=0.9)
    with store.record(model, optimizer):
        for ids in ([1, 2], [3, 4], [1, 4]):
            model(torch.randn(len(ids), 4).to(dtype), sample_ids=ids).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def bits(model: nn.Module) -> list[bytes]:
    return [one.detach().view(torch.uint8).numpy().tobytes() for one in model.parameters()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_undo_restores_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    with timstore.open(tmp_path / "s") as store:
        model = recorded(store, dtype)
        before = bits(model)
        report = store.rollback(model, [1], keep_delta=True)
        assert bits(model) != before
    with timstore.open(tmp_path / "s") as store:
        store.undo(model, report.rollback_id)
        assert bits(model) == before
        methods = store.sql("SELECT method, digest_before FROM rollbacks").fetchall()
        assert [method for method, _ in methods] == ["closed form", "undo"]
        assert methods[1][1] == report.rollback_id


def test_rollbacks_are_undone_in_turn_and_may_be_made_again(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        model = recorded(store)
        start = bits(model)
        first = store.rollback(model, [1], keep_delta=True)
        middle = bits(model)
        second = store.rollback(model, [3], keep_delta=True, parameters=["0.weight", "3.bias"])
        after = bits(model)
        with pytest.raises(timstore.StateError, match="in turn"):
            store.undo(model, first.rollback_id)
        assert bits(model) == after
        store.undo(model, second.rollback_id)
        assert bits(model) == middle
        with pytest.raises(timstore.StateError, match="removed from this model before"):
            store.rollback(model, [1])
        store.undo(model, first.rollback_id)
        assert bits(model) == start
        store.rollback(model, [1], keep_delta=True)
        assert bits(model) == middle
        store.undo(model, first.rollback_id)
        assert bits(model) == start


def test_undo_is_refused_where_it_could_not_be_right(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        model = recorded(store)
        with pytest.raises(timstore.NotFoundError, match="digest_after"):
            store.undo(model, "nothing")
        report = store.rollback(model, [1])
        with pytest.raises(timstore.CoverageError, match="keep_delta"):
            store.undo(model, report.rollback_id)
        report = store.rollback(model, [3], keep_delta=True)
        with torch.no_grad():
            next(model.parameters()).add_(1)
        changed = bits(model)
        with pytest.raises(timstore.ModelMismatchError):
            store.undo(model, report.rollback_id)
        assert bits(model) == changed
    with timstore.open(tmp_path / "s", "r") as store, pytest.raises(timstore.ReadOnlyError, match="mode 'a'"):
        store.undo(model, report.rollback_id)
