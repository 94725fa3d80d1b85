"""What the recorder refuses, before hours are wasted."""

from typing import Any

import pytest
import torch
from networks import backward, moments, network, sgd, train

import timstore
from timstore.errors import CoverageError, InvalidInputError, StateError
from timstore.model.fingerprints import digests


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_forward_pass_without_ids_is_refused(store: timstore.Store, mode: str) -> None:
    model = network()
    with store.record(model, sgd(model)), pytest.raises(InvalidInputError, match="sample_ids") as caught:
        getattr(model, mode)()(torch.randn(2, 4))
    assert caught.value.kind == "no-ids"


@pytest.mark.parametrize(
    "ids",
    [
        [1],
        [1, 2, 3],
        [],
        7,
        "ab",
        [1.0, 2.0],
        ["a", "b"],
        [True, False],
        [None, 1],
        torch.tensor([0.5, 1.0]),
        [2**70, 1],
    ],
    ids=repr,
)
def test_ids_that_cannot_be_right_are_refused_at_once(store: timstore.Store, ids: Any) -> None:
    model = network()
    with store.record(model, sgd(model)), pytest.raises(InvalidInputError, match=r"sample.id"):
        model(torch.randn(2, 4), sample_ids=ids)


def test_ids_of_the_wrong_length_are_refused_where_the_model_is_not_called_itself(store: timstore.Store) -> None:
    model = network()
    with (
        store.record(model, sgd(model)) as recorder,
        pytest.raises(CoverageError, match="3 sample ids"),
        recorder.batch([1, 2, 3]),
    ):
        model[0](torch.randn(2, 4))


def test_recording_a_model_twice_at_once_is_refused(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer):
        with pytest.raises(StateError, match="being recorded already"), store.record(model, optimizer):
            pass
        train(model, optimizer, [1, 2])
    assert [sample for *_, sample in moments(store)] == [1, 2]


def test_arguments_that_cannot_be_right_are_refused(store: timstore.Store) -> None:
    model = network()
    with pytest.raises(InvalidInputError, match="none of the model's parameters"):
        store.record(model, sgd(network()))
    with pytest.raises(InvalidInputError, match=r"torch\.optim\.Optimizer"):
        store.record(model, object())  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="samples is empty"):
        store.record(model, sgd(model), samples=[])
    with pytest.raises(InvalidInputError, match="integer"):
        store.record(model, sgd(model), samples=["a"])  # type: ignore[list-item]
    with pytest.raises(InvalidInputError, match="pair"):
        store.record(model, sgd(model), resume_from=3)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="probe"):
        store.record(model, sgd(model), probe=[3])


def test_gradients_that_are_changed_by_more_than_one_factor_are_refused(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    before = digests(model)
    with store.record(model, optimizer):
        backward(model, [1, 2])
        model[0].weight.grad *= 0.5
        with pytest.raises(StateError, match="more than one factor") as caught:
            optimizer.step()
    assert caught.value.kind == "gradient-changed"
    assert digests(model) == before


def test_a_gradient_that_is_not_finite_is_refused_before_the_step(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    before = digests(model)
    with store.record(model, optimizer):
        (model(torch.randn(2, 4), sample_ids=[1, 2]) * torch.nan).sum().backward()
        with pytest.raises(StateError, match="not finite"):
            optimizer.step()
    assert digests(model) == before


def test_gradients_that_would_be_consumed_twice_are_refused(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer):
        backward(model, [1, 2])
        optimizer.step()
        with pytest.raises(StateError, match="zero_grad"):
            optimizer.step()
        backward(model, [3, 4])
        with pytest.raises(StateError, match="zero_grad"):
            optimizer.step()
        optimizer.zero_grad()
        train(model, optimizer, [5, 6])
    assert moments(store) == [(0, 0, 1), (0, 0, 2), (0, 1, 5), (0, 1, 6)]


def test_a_parameter_that_is_unfrozen_on_the_way_is_refused(store: timstore.Store) -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    with store.record(model, optimizer):
        train(model, optimizer, [1, 2])
        model[0].requires_grad_(True)
        with pytest.raises(CoverageError, match=r"0\.weight.*was frozen"):
            train(model, optimizer, [3, 4])
    optimizer.zero_grad()
    with store.record(model, optimizer):
        train(model, optimizer, [3, 4])
    assert moments(store) == [(0, 0, 1), (0, 0, 2), (0, 1, 3), (0, 1, 4)]
    names = {name for (name,) in store.sql("SELECT DISTINCT parameter FROM gradients WHERE step = 1").fetchall()}
    assert names == {name for name, _ in model.named_parameters()}
