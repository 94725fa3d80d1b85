"""What the loop does beside the model: hooks of the user's own, several backward passes, refusals."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from coverage_models import Applied
from networks import Net
from references import Batch, one_by_one
from stepwise import (
    BOTH,
    BY_SAMPLE,
    FLOAT32,
    IDS,
    Model,
    Step,
    check,
    lstm,
    of,
    record,
    record_or_refuse,
    rows,
)
from torch import nn
from torch.nn.utils import parametrizations

import timstore
from timstore.errors import CoverageError


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("taken", ["not returned", "summed over samples"])
def test_what_is_not_returned_by_sample_is_refused_in_the_first_loss(tmp_path: Path, taken: str) -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        hidden = self.lstm(x)[0]
        self.kept = [hidden]
        return SimpleNamespace(logits=self.head(hidden), total=rows(hidden).sum())

    def loss(model: Any, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
        output = model(**batch)
        if taken == "summed over samples":
            return (rows(output.logits) * weights).mean() + output.total
        return ((rows(output.logits) + rows(model.kept[0])) * weights).mean()

    model = Model(forward, lstm=lstm(), head=nn.Linear(6, 2))
    with pytest.raises(CoverageError, match="takes something from the model that it does not return"):
        record(tmp_path / "s", model, [of(5, 6, loss=loss)], **BY_SAMPLE)


@BOTH
def test_a_sequence_may_run_more_often_later(tmp_path: Path, options: Any) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(x.shape[1] - 2):
            x = self.block(x)
        return x

    model = Model(forward, block=nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6)))
    record(tmp_path / "s", model, [of(3, 6), of(5, 6), of(4, 6)], **options)


@BOTH
@pytest.mark.parametrize("first", [False, True])
def test_inputs_may_require_gradients_or_not(tmp_path: Path, first: bool, options: Any) -> None:
    steps = [of(5, 6) for _ in range(3)]
    for number, step in enumerate(steps):
        step.batches[0]["x"].requires_grad_(first == (number % 2 == 0))
    record(tmp_path / "s", Net(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)), steps, **options)


def steered(kind: str) -> tuple[nn.Module, Callable[[bool], Step]]:
    """A model with a hook that changes something while it is on."""
    switch = {"on": False}
    first, out = nn.Linear(6, 6), nn.Linear(6, 2)

    def thrice(gradients: Any) -> Any:
        return (gradients[0] * 3,) if switch["on"] and gradients[0] is not None else None

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        if kind == "of a tensor" and hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * 3 if switch["on"] else None)
        return self.out(hidden.tanh())  # type: ignore[no-any-return]

    if kind == "before a module":
        out.register_forward_pre_hook(lambda module, args: (args[0] * 3,) if switch["on"] else None)
    elif kind == "after a module":
        first.register_forward_hook(lambda module, args, output: output * 3 if switch["on"] else None)
    elif kind == "backward":
        out.register_full_backward_hook(lambda module, given, gradients: thrice(given))
    elif kind == "before backward":
        out.register_full_backward_pre_hook(lambda module, gradients: thrice(gradients))
    elif kind == "of a parameter":
        first.weight.register_hook(lambda gradient: gradient * 3 if switch["on"] else gradient)  # type: ignore[no-untyped-call]
    return Model(forward, first=first, out=out), lambda on: of(5, 6, prepare=lambda model: switch.update(on=on))


@BOTH
@pytest.mark.parametrize("kind", ["of a tensor", "before a module", "backward", "before backward"])
def test_hooks_of_the_users_own_may_begin_to_change_things_later(tmp_path: Path, kind: str, options: Any) -> None:
    model, step = steered(kind)
    record(tmp_path / "s", model, [step(False), step(True), step(False)], **options)


@pytest.mark.parametrize("kind", ["after a module", "of a parameter"])
def test_hooks_that_change_what_is_recorded_from_the_start_need_a_pass_of_each_sample(
    tmp_path: Path, kind: str
) -> None:
    model, step = steered(kind)
    record_or_refuse(tmp_path, model, [step(True), step(True)], r"first\.weight.*add up to something else")


def test_a_weight_that_is_computed_needs_a_pass_of_each_sample(tmp_path: Path) -> None:
    model = Net(parametrizations.weight_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 2))
    record_or_refuse(tmp_path, model, [of(5, 6), of(4, 6)], "parametrizations")


@BOTH
def test_one_forward_pass_may_have_several_backward_passes(tmp_path: Path, options: Any) -> None:
    model = Model(
        lambda self, x: self.norm(self.layer(x)[0] if options else self.layer(x)),
        layer=lstm() if options else nn.Linear(6, 6),
        norm=nn.LayerNorm(6),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    steps = [of(5, 6) for _ in range(2)]
    wanted = [one_by_one(model, step.batches, step.ids, step.loss) for step in steps]
    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer, **options):
            for parts, step in zip(((1.0,), (0.25, 0.75)), steps, strict=True):
                loss = step.loss(model, {**step.batches[0], "sample_ids": IDS}, torch.ones(4))
                for part in parts:
                    (part * loss).backward(retain_graph=True)
                optimizer.step()
                optimizer.zero_grad()
        check(store, wanted, [FLOAT32] * 2)


@BOTH
def test_gradients_that_are_asked_for_and_not_accumulated_are_not_counted(tmp_path: Path, options: Any) -> None:
    forward = lambda self, x: self.head(self.lstm(x)[0] if options else self.norm(self.layer(x)))  # noqa: E731
    inner = {"lstm": lstm()} if options else {"layer": nn.Linear(6, 6), "norm": nn.LayerNorm(6)}
    model = Model(forward, head=nn.Linear(6, 2), **inner)

    def logged(model: Any, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
        loss = (rows(model(**batch)) * weights).mean()
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        return loss

    record(tmp_path / "s", model, [of(5, 6, loss=logged) for _ in range(3)], **options)


def only_steps_are_recorded(
    path: Path, model: nn.Module, optimizer: Any, steps: list[Step], after: Callable[[int], None]
) -> None:
    """Record steps, with something else after each, of which no record may hold anything."""
    wanted = [one_by_one(model, step.batches, step.ids, step.loss) for step in steps]
    with timstore.open(path) as store:
        with store.record(model, optimizer, capture="modules"):
            for number, step in enumerate(steps):
                step.loss(model, {**step.batches[0], "sample_ids": IDS}, torch.ones(4)).backward()
                optimizer.step()
                optimizer.zero_grad()
                after(number)
        check(store, wanted, [FLOAT32] * len(steps))
        assert store.sql("SELECT DISTINCT sample_ids FROM steps").fetchall() == [(IDS,)]


def test_a_batch_whose_backward_pass_broke_off_is_in_no_step(tmp_path: Path) -> None:
    model = Net(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def broken(_: torch.Tensor) -> None:
        raise ArithmeticError("of the user's")

    def break_off(_: int) -> None:
        output = model(x=torch.randn(4, 6), sample_ids=[21, 22, 23, 24])
        output.register_hook(broken)
        with pytest.raises(ArithmeticError):
            output.sum().backward()
        optimizer.zero_grad()

    only_steps_are_recorded(tmp_path / "s", model, optimizer, [of(6) for _ in range(2)], break_off)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_backward_pass_for_each_of_two_outputs_counts_each_once(tmp_path: Path, order: tuple[int, int]) -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        hidden = self.lstm(x)[0]
        return hidden, self.head(hidden)

    model = Model(forward, lstm=lstm(), head=nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = [{"x": torch.randn(4, 5, 6)} for _ in range(2)]
    both = lambda model, batch, weights: (sum(map(rows, model(**batch))) * weights).mean()  # noqa: E731
    wanted = [one_by_one(model, [batch], [IDS], both) for batch in batches]
    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer, **BY_SAMPLE):
            for batch in batches:
                outputs = model(**batch, sample_ids=IDS)
                rows(outputs[order[0]]).mean().backward(retain_graph=True)
                rows(outputs[order[1]]).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        check(store, wanted, [FLOAT32] * 2)


@BOTH
def test_of_a_weight_that_is_frozen_on_the_way_nothing_is_recorded(tmp_path: Path, options: Any) -> None:
    model = Model(lambda self, x: self.out(self.inner(x).tanh()), inner=nn.Linear(6, 6), out=nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer, **options):
            for trained in (True, False, True):
                model.out.weight.requires_grad_(trained)
                rows(model(torch.randn(4, 5, 6), sample_ids=IDS)).mean().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        found = [{name for one in store.read() if one.step == step for name in one.gradients} for step in range(3)]
    assert found[0] == found[2] == {"inner.weight", "inner.bias", "out.weight", "out.bias"}
    assert found[1] == found[0] - {"out.weight"}


def test_a_batch_that_was_refused_leaves_no_trace_in_the_next_step(tmp_path: Path) -> None:
    forward = lambda self, x: self.always(x).tanh() + (self.late(x)[0] if x.shape[1] < 5 else 0)  # noqa: E731
    model = Applied(forward, always=nn.Linear(6, 6), late=lstm())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def be_refused(number: int) -> None:
        if number:
            with pytest.raises(CoverageError, match="late"):
                model(x=torch.randn(4, 4, 6), sample_ids=[1, 2, 3, 4])

    only_steps_are_recorded(tmp_path / "s", model, optimizer, [of(5, 6) for _ in range(3)], be_refused)
