"""Parameters that change between two steps by something else than the optimizer: refused, or harmless."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import backward, moments, network, sgd, train
from torch import nn

import timstore
from timstore.errors import StateError, TimstoreWarning

Outside = Callable[[nn.Module], None]


@torch.no_grad()
def clamp(model: nn.Module) -> None:
    for one in model.parameters():
        one.clamp_(-0.2, 0.2)


def clamp_data(model: nn.Module) -> None:
    for one in model.parameters():
        one.data.clamp_(-0.2, 0.2)


@torch.no_grad()
def max_norm(model: nn.Module) -> None:
    for one in model.parameters():
        if one.ndim == 2:
            one.copy_(torch.renorm(one, 2, 0, 0.3))


@torch.no_grad()
def decay(model: nn.Module) -> None:
    for one in model.parameters():
        one.mul_(1 - 1e-3)


@torch.no_grad()
def one_element(model: nn.Module) -> None:
    model.get_parameter("0.weight")[3, 1] += 1e-3


class Lookahead:
    """Every second step the weights go half of the way back to where they were."""

    def __init__(self) -> None:
        self.steps = 0
        self.slow: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        self.steps += 1
        if self.steps % 2:
            self.slow = [one.clone() for one in model.parameters()]
        else:
            for fast, slow in zip(model.parameters(), self.slow, strict=True):
                fast.lerp_(slow, 0.5)


def loaded(model: nn.Module) -> None:
    model.load_state_dict(network(seed=7).state_dict())


def reassigned(model: nn.Module) -> None:
    for one in model.parameters():
        one.data = one.data * 0.9


CHANGES: dict[str, Callable[[], Outside]] = {
    "clamp_": lambda: clamp,
    "data.clamp_": lambda: clamp_data,
    "max-norm": lambda: max_norm,
    "decay by hand": lambda: decay,
    "a single element": lambda: one_element,
    "lookahead": Lookahead,
    "a state dict": lambda: loaded,
    ".data assigned": lambda: reassigned,
}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_parameters_between_steps_is_refused_before_the_next_one(
    store: timstore.Store, name: str, kind: Any
) -> None:
    model, outside = network(), CHANGES[name]()
    optimizer = kind(model.parameters(), lr=0.1)
    with pytest.raises(StateError, match="something else than its optimizer") as caught, store.record(model, optimizer):
        for ids in [1, 2], [3, 4], [5, 6]:
            backward(model, ids)
            before = copy.deepcopy(model.state_dict())
            optimizer.step()
            optimizer.zero_grad()
            outside(model)
    assert caught.value.kind == "changed-outside"
    assert caught.value.fields["parameter"] in str(caught.value)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    steps = 2 if name == "lookahead" else 1
    assert f"before epoch 0, step {steps}" in str(caught.value)
    assert [step for _, step, _ in moments(store)] == [step for step in range(steps) for _ in range(2)]


@pytest.mark.parametrize("after", [4, 10, 12])
def test_a_change_late_in_the_run_is_refused_too(store: timstore.Store, after: int) -> None:
    model = network()
    optimizer = sgd(model, lr=0.01)
    said = f"before epoch 0, step {after},"
    with pytest.raises(StateError, match=said), store.record(model, optimizer, samples=[1]):
        train(model, optimizer, *[[1, 2]] * after)
        clamp_data(model)
        train(model, optimizer, [1, 2])
    assert len(moments(store)) == after


def test_weights_are_what_they_were_since_the_block_began(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with pytest.raises(StateError, match="before epoch 0, step 0"), store.record(model, optimizer):
        loaded(model)
        train(model, optimizer, [1, 2])


def test_a_model_that_was_changed_after_its_last_step_is_not_taken_for_the_recorded_one(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    with pytest.raises(StateError, match="after epoch 0, step 0"), store.record(model, optimizer):
        train(model, optimizer, [1, 2])
        decay(model)
    assert moments(store) == [(0, 0, 1), (0, 0, 2)]
    assert store.sql("SELECT count(*) FROM fingerprints").fetchall() == [(0,)]


# --- harmless ----------------------------------------------------------------------------------------------


class Averaged:
    """Evaluates with averaged weights, and puts the others back."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.average: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        now = {name: one.detach().clone() for name, one in model.named_parameters()}
        self.average = {name: 0.5 * self.average.get(name, one) + 0.5 * one for name, one in now.items()}
        self.put(model, self.average)
        model(torch.randn(2, 4))
        self.put(model, now)

    def put(self, model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        if self.how == "load_state_dict":
            model.load_state_dict(weights)
        for name, one in model.named_parameters():
            if self.how == "copy_":
                one.copy_(weights[name])
            elif self.how == ".data":
                one.data = weights[name]


@torch.no_grad()
def perturbed(model: nn.Module) -> None:
    """Go some way and back again, as sharpness-aware optimizers do: to rounding the weights are what they were."""
    pushes = [torch.randn_like(one) for one in model.parameters()]
    for one, push in zip(model.parameters(), pushes, strict=True):
        one.add_(push)
    with torch.enable_grad():
        loss = model(torch.randn(2, 4), sample_ids=[11, 12]).square().mean()
        torch.autograd.grad(loss, list(model.parameters()))
    for one, push in zip(model.parameters(), pushes, strict=True):
        one.sub_(push)


HARMLESS: dict[str, Callable[[], Outside]] = {
    "averaged weights, copied": lambda: Averaged("copy_"),
    "averaged weights, loaded": lambda: Averaged("load_state_dict"),
    "averaged weights, assigned": lambda: Averaged(".data"),
    "there and back": lambda: perturbed,
    "evaluation": lambda: lambda model: model.eval().train() and None,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_weights_that_are_put_back_go_through_and_the_rollback_is_right(store: timstore.Store, name: str) -> None:
    model, outside = network(), HARMLESS[name]()
    first = [one.detach().clone() for one in model.parameters()]
    optimizer = sgd(model, momentum=0.5)
    with store.record(model, optimizer):
        for number in range(12):
            train(model, optimizer, [2 * number, 2 * number + 1])
            outside(model)
    with pytest.warns(TimstoreWarning, match="first order"):
        store.rollback(model, range(24))
    for one, began in zip(model.parameters(), first, strict=True):
        assert torch.allclose(one, began, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_another_dtype_a_swap_goes_through_and_one_changed_element_does_not(
    store: timstore.Store, dtype: torch.dtype
) -> None:
    model = nn.Linear(300, 200).to(dtype)
    optimizer = sgd(model)
    swap = Averaged(".data")

    def step() -> None:
        recorder.batch([1, 2])
        model(torch.randn(2, 300, dtype=dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    said = "weight was changed before epoch 0, step 3"
    with pytest.raises(StateError, match=said), store.record(model, optimizer) as recorder:
        for _ in range(3):
            step()
            kept = {name: one.detach().clone() for name, one in model.named_parameters()}
            decay(model)
            with torch.no_grad():
                swap.put(model, kept)
        with torch.no_grad():
            model.weight[150, 200] += 0.01
        step()


def test_a_step_that_a_grad_scaler_skips_is_no_change(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with store.record(model, optimizer, scaler=scaler):
        for number in range(4):
            loss = model(torch.randn(2, 4), sample_ids=[1, 2]).square().mean()
            scaler.scale(loss * (float("inf") if number == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert [step for _, step, sample in moments(store) if sample == 1] == [0, 1, 2]


# --- where every gradient is kept --------------------------------------------------------------------------


def test_with_every_gradient_the_replay_decides(tmp_path: Path) -> None:
    for outside, refused in (clamp, True), (Averaged("copy_"), False):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        with timstore.open(tmp_path / f"{refused}.tim") as store:
            with store.record(model, optimizer, optimizer_history="gradients"):
                for ids in [1, 2], [3, 4], [5, 6]:
                    train(model, optimizer, ids)
                    outside(model)
            if refused:
                with pytest.raises(StateError, match="away from the model"):
                    store.rollback(model, [1])
            else:
                with pytest.warns(TimstoreWarning, match="first order"):
                    assert store.rollback(model, [1]).method == "exact replay"


def test_sgd_is_held_to_its_steps_whatever_is_kept(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    recorder = store.record(model, optimizer, optimizer_history="gradients")
    with pytest.raises(StateError, match="something else than its optimizer"), recorder:
        for ids in [1, 2], [3, 4]:
            train(model, optimizer, ids)
            clamp(model)


def test_another_hook_on_the_optimizer_is_seen_whenever_it_was_registered(store: timstore.Store) -> None:
    model = network()
    optimizer = sgd(model)
    optimizer.register_step_post_hook(lambda *_: clamp(model))
    with pytest.raises(StateError, match="something else than its optimizer"), store.record(model, optimizer):
        train(model, optimizer, [1, 2], [3, 4])
