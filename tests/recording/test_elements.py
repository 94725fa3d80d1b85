"""The elements by which changes of gradients and parameters are seen: on the host, and as on a CUDA device."""

import numpy as np
import pytest
import torch
from networks import backward, network, sgd, train
from torch import nn

import timstore
from timstore.errors import StateError
from timstore.recording import elements
from timstore.recording.elements import Elements


@pytest.fixture(params=["host", "device"], autouse=True)
def looked_up(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which way numbers are taken: as those of a CUDA device are, on the host as well."""
    if request.param == "device":
        monkeypatch.setattr(elements, "_is_looked_up", lambda tensor: False)


SHAPES = {"table": (700, 9), "weight": (8, 32), "bias": (8,), "scale": (3,), "one": ()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_multiple_of_all_is_that_multiple_of_the_elements(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    then = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    kept = Elements(then)
    now = Elements({name: 0.5 * one for name, one in then.items()}, like=kept)
    assert set(kept.names) == set(SHAPES) and kept.names == now.names
    np.testing.assert_array_equal(now.numbers, 0.5 * kept.numbers)
    for name, tensor in then.items():
        assert np.abs(kept.of(name)).max() == float(tensor.abs().max())
        assert set(np.abs(kept.of(name))) <= {0.0, *tensor.double().abs().flatten().tolist()}


def test_a_clipping_by_value_shows_in_the_largest_number_alone() -> None:
    then = {"weight": torch.linspace(-1, 1, 5001)}
    kept = Elements(then)
    assert not np.array_equal(
        Elements({"weight": then["weight"].clamp(-0.9999, 0.9999)}, like=kept).numbers, kept.numbers
    )


def test_a_table_of_which_one_row_has_a_gradient_is_seen_without_extremes_too() -> None:
    gradient = torch.zeros(4000, 3)
    gradient[1777, 1] = -2.0
    assert np.abs(Elements({"table": gradient}, extremes=False).numbers).max() == 2.0


@pytest.mark.parametrize("factor", [1.0, 0.125, 1e-3])
def test_the_ratio_is_the_clip_factor(store: timstore.Store, factor: float) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer):
        backward(model, [1, 2])
        norm = float(nn.utils.get_total_norm([one.grad for one in model.parameters() if one.grad is not None]))
        nn.utils.clip_grad_norm_(model.parameters(), factor * norm)
        optimizer.step()
    ((ratio,),) = store.sql("SELECT consumed_ratio FROM steps").fetchall()
    assert ratio == pytest.approx(factor, rel=1e-4)


def test_layers_that_are_clipped_each_are_refused(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer):
        backward(model, [1, 2])
        model.get_parameter("0.weight").grad *= 0.5  # type: ignore[operator]
        with pytest.raises(StateError, match="more than one factor"):
            optimizer.step()


def halve(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


def test_a_hook_that_changes_a_gradient_after_it_was_accumulated_is_refused(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with store.record(model, optimizer, samples=[1]):
        for _ in range(3):
            train(model, optimizer, [1, 2])  # from the third step on nothing is held against the sum
        model.get_parameter("3.weight").register_post_accumulate_grad_hook(halve)  # type: ignore[no-untyped-call]
        backward(model, [1, 2])
        with pytest.raises(StateError, match=r"3\.weight: between backward and step"):
            optimizer.step()
    assert store.sql("SELECT count(*) FROM steps").fetchall() == [(3,)]


def test_parameters_that_are_clamped_between_steps_are_refused(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with pytest.raises(StateError, match="something else than its optimizer"), store.record(model, optimizer):
        for _ in range(2):
            train(model, optimizer, [1, 2])
            for one in model.parameters():
                bound = 0.999 * float(one.detach().abs().max())
                one.data.clamp_(-bound, bound)
