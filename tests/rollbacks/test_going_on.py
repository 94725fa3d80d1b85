"""Training that goes on after a rollback: where it begins, what later rollbacks take, and what is said of the rest.

The loss is linear in the parameters, so that training once more without a sample is what a rollback must come to.
"""

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import timstore
from timstore.errors import CoverageError, InvalidInputError, StateError

BATCHES = ([1, 2], [1, 3], [2, 3], [1, 4], [3, 4], [1, 2], [2, 4], [1, 4])
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, momentum=0.5),
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[timstore.Store]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="first order only", category=timstore.TimstoreWarning)
        with timstore.open(tmp_path / "s") as store:
            yield store


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2, dtype=torch.float64)


def made(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    return OPTIMIZERS[kind](model.parameters())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, end: int, without: Any = ()) -> None:
    """Take steps [start, end) of the run; without some samples, on the sum over the others."""
    for step in range(start, end):
        inputs = torch.randn(2, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        ids = BATCHES[step]
        rows = [row for row, one in enumerate(ids) if one not in without]
        named = {} if without else {"sample_ids": ids}
        (model(inputs[rows], **named) * torch.tensor([1.0, -2.0], dtype=torch.float64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def retrained(kind: str, *without: int, end: int = len(BATCHES)) -> nn.Module:
    model = linear()
    train(model, made(kind, model), 0, end, without)
    return model


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for one, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-6)


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in model.state_dict().items()}


def history(kind: str) -> dict[str, Any]:
    return {"optimizer_history": "final" if kind in ("sgd", "momentum") else "gradients"}


def rolled_back(store: timstore.Store, kind: str, **how: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Record the first half of a run, and roll sample 1 back."""
    model = linear()
    optimizer = made(kind, model)
    with store.record(model, optimizer, **history(kind)):
        train(model, optimizer, 0, 4)
    store.rollback(model, [1], **{"accumulate": "float64", "optimizer": optimizer, **how})
    return model, optimizer


# --- only what came since ------------------------------------------------------------------------------------


@pytest.mark.parametrize("says_where", [True, False], ids=["resume_from", "by itself"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_was_removed_is_not_removed_again_after_training_went_on(
    store: timstore.Store, kind: str, says_where: bool
) -> None:
    model, optimizer = rolled_back(store, kind)
    assert_same(model, retrained(kind, 1, end=4))
    with store.record(model, optimizer, resume_from=(0, 4) if says_where else None, **history(kind)) as recorder:
        assert (store.attempt, recorder.step) == (1, 4)
        train(model, optimizer, 4, 8)
    with pytest.raises(StateError, match="removed from this model before"):
        store.rollback(model, where="sample = 1 AND step < 4")
    report = store.rollback(model, [1], accumulate="float64", optimizer=optimizer)
    assert (report.samples, report.records, report.left_out) == ((1,), 2, 3)
    assert_same(model, retrained(kind, 1))
    with pytest.raises(StateError, match="removed from this model before"):
        store.rollback(model, [1])


@pytest.mark.parametrize("kind", ["sgd", "momentum"])
def test_beside_another_sample_what_was_removed_is_left_out(store: timstore.Store, kind: str) -> None:
    model, optimizer = rolled_back(store, kind)
    with store.record(model, optimizer):
        train(model, optimizer, 4, 8)
    with pytest.warns(timstore.TimstoreWarning, match="removed from this model before"):
        report = store.rollback(model, [1, 2], accumulate="float64")
    assert (report.samples, report.records, report.left_out) == ((1, 2), 2 + 4, 3)
    assert "3 records that earlier rollbacks took out" in str(report)
    assert_same(model, retrained(kind, 1, 2))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_checkpoint_from_before_the_rollback_holds_everything(store: timstore.Store, kind: str) -> None:
    model = linear()
    optimizer = made(kind, model)
    with store.record(model, optimizer, **history(kind)) as recorder:
        train(model, optimizer, 0, 2)
        recorder.save_point()
        saved, state = copied(model), deepcopy(optimizer.state_dict())
        train(model, optimizer, 2, 4)
    store.rollback(model, [1])
    model.load_state_dict(saved)
    optimizer.load_state_dict(state)
    with store.record(model, optimizer, resume_from=(0, 2), **history(kind)):
        train(model, optimizer, 2, 8)
    report = store.rollback(model, [1], accumulate="float64")
    assert (report.records, report.left_out) == (5, 0)
    assert_same(model, retrained(kind, 1))


def test_what_is_undone_is_removed_again(store: timstore.Store) -> None:
    model, optimizer = rolled_back(store, "sgd", keep_delta=True)
    (first,) = store.sql("SELECT digest_after FROM rollbacks").fetchall()[0]
    store.undo(model, first)
    with store.record(model, optimizer) as recorder:
        assert (store.attempt, recorder.step) == (0, 4)
        train(model, optimizer, 4, 8)
    report = store.rollback(model, [1], accumulate="float64")
    assert (report.records, report.left_out) == (5, 0)
    assert_same(model, retrained("sgd", 1))


# --- where recording begins ----------------------------------------------------------------------------------


def test_recording_a_rolled_back_model_says_where_it_begins(
    store: timstore.Store, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = rolled_back(store, "sgd")
    with caplog.at_level(logging.INFO, "timstore"), store.record(model, optimizer, samples=[3, 4]) as recorder:
        assert (store.attempt, recorder.step) == (1, 4)
        train(model, optimizer, 4, 5)
    assert "what a rollback, or its undoing, left of the run at epoch 0, step 3" in caplog.text


def test_recording_a_rolled_back_model_from_before_warns_of_what_it_supersedes(store: timstore.Store) -> None:
    model, optimizer = rolled_back(store, "sgd")
    saved = copied(model)
    with store.record(model, optimizer):
        train(model, optimizer, 4, 8)
    model.load_state_dict(saved)
    superseded = r"what was recorded from epoch 0, step 4 on \(up to epoch 0, step 7\) is superseded"
    with pytest.warns(timstore.TimstoreWarning, match=superseded), store.record(model, optimizer) as recorder:
        assert (store.attempt, recorder.step) == (2, 4)
        train(model, optimizer, 4, 6)
    report = store.rollback(model, [1], accumulate="float64")
    assert (report.records, report.left_out) == (1, 3)
    assert_same(model, retrained("sgd", 1, end=6))


def test_a_model_that_was_only_loaded_still_has_to_say_where_it_is(store: timstore.Store) -> None:
    model = linear()
    optimizer = made("sgd", model)
    with store.record(model, optimizer) as recorder:
        train(model, optimizer, 0, 2)
        recorder.save_point()
        saved = copied(model)
        train(model, optimizer, 2, 4)
    model.load_state_dict(saved)
    said = r"this is the model after epoch 0, step 1: pass resume_from=\(0, 2\)"
    with pytest.raises(StateError, match=said), store.record(model, optimizer):
        pass


def test_steps_that_the_model_has_not_seen_are_not_passed_over(store: timstore.Store) -> None:
    model, optimizer = rolled_back(store, "sgd")
    saved = copied(model)
    with store.record(model, optimizer):
        train(model, optimizer, 4, 6)
    model.load_state_dict(saved)
    with (
        pytest.raises(StateError, match=r"has not seen the step of epoch 0, step 4.*resume_from=\(0, 4\)"),
        store.record(model, optimizer, resume_from=(0, 6)),
    ):
        pass
    assert store.sql("SELECT count(*) FROM attempts").fetchall() == [(2,)]


def test_steps_that_are_superseded_in_the_model_are_warned_of(store: timstore.Store) -> None:
    model, optimizer = rolled_back(store, "sgd")
    superseded = "steps that resume_from=.* supersedes"
    with pytest.warns(timstore.TimstoreWarning, match=superseded), store.record(model, optimizer, resume_from=(0, 3)):
        train(model, optimizer, 3, 5)
    with pytest.warns(timstore.TimstoreWarning, match="stays in the model, and is not removed"):
        report = store.rollback(model, [1, 4])
    assert (report.samples, report.left_out) == ((1, 4), 2)


def test_what_a_model_was_begun_with_is_a_digest(store: timstore.Store) -> None:
    with pytest.raises(InvalidInputError, match="64 hexadecimal digits"):
        store.begin_attempt(0, 0, digest_before="what?")
    store.begin_attempt(0, 1, digest_before=64 * "0")
    assert store.sql("SELECT digest_before FROM attempts ORDER BY attempt").fetchall() == [(None,), (64 * "0",)]


# --- what no record tells ------------------------------------------------------------------------------------


def test_momentum_that_was_not_rolled_back_is_warned_of(store: timstore.Store) -> None:
    model, optimizer = rolled_back(store, "momentum", optimizer=None)
    with (
        pytest.warns(timstore.TimstoreWarning, match="still holds momentum of the 1 samples"),
        store.record(model, optimizer),
    ):
        train(model, optimizer, 4, 8)
    with pytest.warns(timstore.TimstoreWarning, match="kept its momentum from before the rollback of 1 samples"):
        store.rollback(model, [1])


def test_momentum_of_an_optimizer_that_steps_second_is_warned_of(store: timstore.Store) -> None:
    model = linear()
    plain, heavy = torch.optim.SGD([model.weight], lr=0.1), torch.optim.SGD([model.bias], lr=0.1, momentum=0.9)

    def go_on() -> None:
        with store.record(model, [plain, heavy]):
            for ids in BATCHES[:2]:
                model(torch.ones(2, 3, dtype=torch.float64), sample_ids=ids).sum().backward()
                for one in (plain, heavy):
                    one.step()
                    one.zero_grad()

    go_on()
    store.rollback(model, [1])
    with pytest.warns(timstore.TimstoreWarning, match="still holds momentum of the 1 samples"):
        go_on()
    with pytest.warns(timstore.TimstoreWarning, match="kept its momentum from before the rollback of 1 samples"):
        store.rollback(model, [2])


def test_a_new_optimizer_holds_no_momentum(store: timstore.Store) -> None:
    model, _ = rolled_back(store, "momentum", optimizer=None)
    optimizer = made("momentum", model)
    with store.record(model, optimizer):
        train(model, optimizer, 4, 8)
    assert not any("momentum" in warning for warning in store.rollback(model, [1]).warnings)


def test_what_was_removed_in_part_is_left_as_it_is(store: timstore.Store) -> None:
    model = linear()
    optimizer = made("sgd", model)
    with store.record(model, optimizer):
        train(model, optimizer, 0, 4)
    store.rollback(model, [1], strength=0.5)
    with store.record(model, optimizer):
        train(model, optimizer, 4, 8)
    with pytest.warns(timstore.TimstoreWarning, match="3 records were left out.*with strength 0.5"):
        report = store.rollback(model, [1])
    assert (report.records, report.left_out) == (2, 3)


def test_a_replay_does_not_cross_a_rollback(store: timstore.Store) -> None:
    model, optimizer = rolled_back(store, "rmsprop")
    with store.record(model, optimizer, optimizer_history="gradients"):
        train(model, optimizer, 4, 8)
    before = [one.detach().clone() for one in model.parameters()]
    with pytest.raises(CoverageError, match="went on from a rolled-back model at epoch 0, step 4"):
        store.rollback(model, [2])
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("are_rows_old", [False, True], ids=["attempts", "attempts and rollbacks"])
def test_a_store_that_does_not_say_what_its_attempts_began_with(
    store: timstore.Store, are_rows_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if are_rows_old:
        append = type(store).append_rollback
        new = ("removed", "parameters", "optimizer_states")
        monkeypatch.setattr(
            type(store),
            "append_rollback",
            lambda self, row, *kept: append(self, {key: row[key] for key in row if key not in new}, *kept),
        )
    model, optimizer = rolled_back(store, "sgd")
    with store.record(model, optimizer):
        train(model, optimizer, 4, 8)
    path = Path(store.path)
    store.close()
    for file in (path / "runs").iterdir():
        _without_digest(file)
    with timstore.open(path) as older:
        with pytest.warns(timstore.TimstoreWarning, match="cannot be told, since the store does not know"):
            report = older.rollback(model, [1])
        assert report.records == 5
        with pytest.raises(StateError, match="removed from this model before"):
            older.rollback(model, [1])


def _without_digest(file: Path) -> None:
    fields = json.loads(file.read_bytes().splitlines()[0])
    assert re.fullmatch("[0-9a-f]{64}", fields.pop("digest_before"))
    line = json.dumps(fields).encode()
    file.write_bytes(line + b"\nsha256:" + hashlib.sha256(line).hexdigest().encode() + b"\n")
