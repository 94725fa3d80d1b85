"""Steps that are given a closure: the same training and the same records as without."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Net
from torch import nn

import timstore
from timstore.errors import CoverageError, InvalidInputError


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return Net(nn.Linear(5, 4), nn.Linear(4, 2))


def data() -> list[tuple[list[int], torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [([1, 2], torch.randn(2, 5, generator=draw)), ([3, 4], torch.randn(2, 5, generator=draw))] * 2


def trained(
    path: Path, make: Callable[[Any], torch.optim.Optimizer], *, closes: bool, by_name: bool = False
) -> tuple[nn.Module, list[Any], list[float]]:
    """Train a model, a loss each step; return it, its records, and the losses that `step` returned."""
    model = new_model()
    optimizer = make(model.parameters())
    losses = []
    with timstore.open(path) as store:
        with store.record(model, optimizer, samples=[1, 4]):
            for ids, given in data():

                def closure(ids: list[int] = ids, given: torch.Tensor = given) -> torch.Tensor:
                    optimizer.zero_grad()
                    loss = model(given, sample_ids=ids).square().mean()
                    loss.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                    return loss.detach()

                if closes:
                    losses.append(float(optimizer.step(closure=closure) if by_name else optimizer.step(closure)))  # type: ignore[arg-type]
                else:
                    losses.append(float(closure()))
                    optimizer.step()
        records = [
            (one.step, one.sample, {name: one.dense(name).tobytes() for name in one.gradients}) for one in store.read()
        ]
        ratios = store.sql("SELECT step, consumed_ratio, sample_ids FROM steps ORDER BY step").fetchall()
    return model, [records, ratios], losses


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
}


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_with_a_closure_is_recorded_as_one_without(
    make: Callable[[Any], torch.optim.Optimizer], by_name: bool, tmp_path: Path
) -> None:
    model, records, losses = trained(tmp_path / "c", make, closes=True, by_name=by_name)
    other, others, wanted = trained(tmp_path / "p", make, closes=False)
    assert records == others
    assert losses == wanted
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


class Sharpness(torch.optim.Optimizer):
    """SAM as it is often written: goes uphill, and has the closure say what the gradient is there."""

    def __init__(self, parameters: Any, *, in_place: bool) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self._in_place = in_place

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        held = [one for group in self.param_groups for one in group["params"]]
        uphill = [0.05 * one.grad for one in held]
        for one, step in zip(held, uphill, strict=True):
            (one if self._in_place else one.data).add_(step)
            one.grad = None
        with torch.enable_grad():
            loss = closure()
        for one, step in zip(held, uphill, strict=True):
            one.sub_(step + 0.1 * one.grad)
        return loss


@pytest.mark.parametrize("in_place", [False, True])
def test_an_optimizer_that_moves_before_it_evaluates_is_refused(in_place: bool, tmp_path: Path) -> None:
    with pytest.raises(CoverageError, match="Sharpness evaluates its closure more than once in a step, or changes"):
        trained(tmp_path / "s", lambda parameters: Sharpness(parameters, in_place=in_place), closes=True)
    with timstore.open(tmp_path / "s") as store:
        assert store.sql("SELECT count(*) FROM steps").fetchall() == [(0,)]


def test_other_arguments_of_a_step_are_refused(tmp_path: Path) -> None:
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    with timstore.open(tmp_path / "s") as store, store.record(model, optimizer):
        model(torch.randn(2, 5), sample_ids=[1, 2]).sum().backward()
        with pytest.raises(InvalidInputError, match="a closure or nothing"):
            optimizer.step(3)  # type: ignore[call-overload]
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())


def test_an_error_in_a_closure_is_its_own_and_recording_goes_on(tmp_path: Path) -> None:
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def fails() -> torch.Tensor:
        model(torch.randn(2, 5), sample_ids=[1, 2])
        raise KeyError("of the loop's own")

    def works() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(torch.ones(2, 5), sample_ids=[3, 4]).sum()
        loss.backward()
        return loss

    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer):
            with pytest.raises(KeyError, match="of the loop's own"):
                optimizer.step(fails)  # type: ignore[arg-type]
            optimizer.step(works)  # type: ignore[arg-type]
        assert store.sql("SELECT sample FROM records ORDER BY sample").fetchall() == [(3,), (4,)]


def test_a_block_that_names_the_batch_goes_on_over_several_steps(tmp_path: Path) -> None:
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = torch.randn(2, 5, generator=torch.Generator().manual_seed(3))
    twin = copy.deepcopy(model)
    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer, samples=[1, 8]) as recorder:
            for ids in ([1, 2], [7, 8]):
                with recorder.batch(ids):
                    for _ in range(3):
                        optimizer.zero_grad()
                        model(given).square().mean().backward()
                        optimizer.step()
        drawn = store.sql("SELECT sample_ids FROM steps ORDER BY step").fetchall()
        assert drawn == [([1, 2],)] * 3 + [([7, 8],)] * 3
        kept = store.sql("SELECT step, sample FROM records ORDER BY step").fetchall()
        assert kept == [(0, 1), (1, 1), (2, 1), (3, 8), (4, 8), (5, 8)]
        # By autograd, from the parameters that the step before left.
        for step in range(3):
            twin.zero_grad()
            (twin(given)[0].square().sum() / 4).backward()
            (record,) = store.read(f"step = {step}")
            for name, one in twin.named_parameters():
                torch.testing.assert_close(torch.from_numpy(record.dense(name).copy()), one.grad, rtol=1e-5, atol=1e-7)
            twin.zero_grad()
            twin(given).square().mean().backward()
            with torch.no_grad():
                for one in twin.parameters():
                    one -= 0.1 * one.grad  # type: ignore[operator]
