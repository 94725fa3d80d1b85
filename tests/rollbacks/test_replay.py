"""Rollback against two runs of torch's own optimizer on the recorded gradients, with the samples and without them."""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import timstore

ROWS, BATCH, TOKENS, FORGET, LIMIT = 12, 4, 3, (3, 8), 0.35
Stream = list[dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="first order only", category=timstore.TimstoreWarning)
        yield


class Net(nn.Module):
    """A table that only even steps use, and two layers over tokens."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, dtype=dtype)
        self.inner = nn.Linear(7, 6, dtype=dtype)
        self.out = nn.Linear(6, 4, dtype=dtype)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, look: bool, labels: torch.Tensor | None = None) -> Any:
        hidden = torch.tanh(self.inner(x))
        return self.out(hidden + self.table(ids) if look else hidden)


class Data:
    """Inputs and labels; some labels do not count."""

    def __init__(self, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(7)
        self.x = torch.randn(ROWS, TOKENS, 7, generator=draw, dtype=torch.float64).to(dtype)
        self.ids = torch.randint(0, 9, (ROWS, TOKENS), generator=draw)
        self.labels = torch.randint(0, 4, (ROWS, TOKENS), generator=draw)
        self.labels[torch.rand(ROWS, TOKENS, generator=draw) < 0.3] = -100
        self.labels[:, 0] = 1

    def losses(self, model: nn.Module, step: int, rows: Sequence[int], **extra: Any) -> torch.Tensor:
        """Return the sum of each row's token losses."""
        labels = self.labels[list(rows)]
        outputs = model(x=self.x[list(rows)], ids=self.ids[list(rows)], look=step % 2 == 0, **extra)
        flat = nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none")
        return flat.view(labels.shape).sum(1)

    def size(self, rows: Sequence[int], reduction: str) -> int:
        """Return what the loss divides by."""
        return {"sum": 1, "mean": len(rows), "token mean": int((self.labels[list(rows)] != -100).sum())}[reduction]


def rows_of(step: int) -> list[int]:
    return [(step * 5 + row * 3) % ROWS for row in range(BATCH)]


def make(kind: type[torch.optim.Optimizer], model: nn.Module, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    return kind(model.parameters(), **options)


class Recorded:
    """A recorded run; beside the records, its gradients as autograd gives them: whole ones, and of FORGET."""

    def __init__(
        self,
        store: timstore.Store,
        kind: type[torch.optim.Optimizer],
        options: Mapping[str, Any],
        *,
        reduction: str = "mean",
        clip: bool = True,
        dtype: torch.dtype = torch.float64,
        steps: int = 9,
        history: str = "gradients",
        samples: Sequence[int] | None = FORGET,
    ) -> None:
        torch.manual_seed(0)
        self.reduction, self.clip, self.kind, self.options, self.steps = reduction, clip, kind, dict(options), steps
        self.data = Data(dtype)
        self.model = Net(dtype)
        self.start = copy.deepcopy(self.model)
        self.optimizer = make(kind, self.model, options)
        self.whole: Stream = []
        self.consumed: Stream = []
        self.removed: Stream = []
        with store.record(
            self.model, self.optimizer, samples=samples, optimizer_history=history, probe=False
        ) as recorder:
            for step in range(steps):
                recorder.epoch = step // 5
                self.step(step)

    def step(self, step: int) -> None:
        rows, data = rows_of(step), self.data
        size = data.size(rows, self.reduction)
        named: dict[str, Any] = {"sample_ids": rows}
        if self.reduction == "token mean":
            named["labels"] = data.labels[rows]
        (data.losses(self.model, step, rows, **named).sum() / size).backward()
        twin = Net(next(self.model.parameters()).dtype)
        twin.load_state_dict(self.model.state_dict())
        leaving = [row for row in rows if row in FORGET]
        if leaving:
            (data.losses(twin, step, leaving).sum() / size).backward()
        self.whole.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
        self.removed.append({n: p.grad.clone() for n, p in twin.named_parameters() if p.grad is not None})
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), LIMIT)
        self.consumed.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run_again(self, *, without: bool, denominator: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Feed the gradients to torch's optimizer, in float64."""
        model = copy.deepcopy(self.start).double()
        optimizer = make(self.kind, model, self.options)
        for step in range(self.steps):
            rows = rows_of(step)
            staying = [row for row in rows if row not in FORGET]
            again = 1.0
            if denominator == "renormalised" and without:
                again = self.data.size(rows, self.reduction) / max(1, self.data.size(staying, self.reduction))
            changed = without and bool(self.removed[step])
            for name, parameter in model.named_parameters():
                parameter.grad = None
                if name in self.whole[step]:
                    stream = self.whole if changed else self.consumed
                    parameter.grad = stream[step][name].double().clone()
                    if changed and name in self.removed[step]:
                        # What only FORGET reached does not move; to Adam its rounding would be a gradient.
                        rest = parameter.grad - self.removed[step][name].double()
                        noise = 1e-6 if self.whole[step][name].dtype == torch.float32 else 1e-14
                        rest[rest.abs() < noise * (parameter.grad.abs() + self.removed[step][name].abs())] = 0
                        parameter.grad = rest * again
            if self.clip and changed:
                nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
            optimizer.step()
        return model, optimizer

    def change(self, denominator: str = "kept") -> tuple[torch.Tensor, torch.optim.Optimizer, nn.Module]:
        actual, _ = self.run_again(without=False, denominator=denominator)
        other, optimizer = self.run_again(without=True, denominator=denominator)
        return flat(other) - flat(actual), optimizer, other


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().double().flatten() for one in model.parameters()])


def rolled_back(
    store: timstore.Store, run: Recorded, **options: Any
) -> tuple[torch.Tensor, timstore.Store, torch.optim.Optimizer, Any]:
    """Roll a copy back, its optimizer with it; return the change."""
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    report = store.rollback(model, list(FORGET), optimizer=optimizer, accumulate="float64", force=True, **options)
    return flat(model) - flat(run.model), model, optimizer, report


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def states_off(found: torch.optim.Optimizer, wanted: torch.optim.Optimizer) -> float:
    worst = 0.0
    pairs = zip(found.param_groups[0]["params"], wanted.param_groups[0]["params"], strict=True)
    for one, other in pairs:
        for name, value in wanted.state[other].items():
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                size = float(value.double().norm())
                worst = max(worst, float((found.state[one][name].double() - value.double()).norm()) / max(size, 1e-12))
    return worst


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
FAMILY: list[tuple[str, type[torch.optim.Optimizer], dict[str, Any]]] = [
    ("sgd", SGD, {"lr": 0.2}),
    ("momentum", SGD, {"lr": 0.2, "momentum": 0.9}),
    ("dampening", SGD, {"lr": 0.2, "momentum": 0.9, "dampening": 0.3}),
    ("nesterov, L2", SGD, {"lr": 0.2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05}),
    ("adam", ADAM, {"lr": 0.02}),
    ("adam, L2", ADAM, {"lr": 0.02, "weight_decay": 0.1}),
    ("adam, decoupled", ADAM, {"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("adamw", ADAMW, {"lr": 0.02, "weight_decay": 0.3, "betas": (0.8, 0.95)}),
    ("amsgrad", ADAM, {"lr": 0.02, "amsgrad": True, "maximize": True}),
]


# What a step consumes depends on the mean and on clipping, not on the optimizer: each meets both, and two meet all.
CASES = [
    pytest.param(kind, options, reduction, clip, id=f"{name}, {reduction}, {'clipped' if clip else 'unclipped'}")
    for name, kind, options in FAMILY
    for reduction in ("mean", "sum", "token mean")
    for clip in (True, False)
    if name in ("momentum", "adamw") or (reduction, clip) in (("mean", False), ("token mean", True))
]


@pytest.mark.parametrize(("kind", "options", "reduction", "clip"), CASES)
def test_rollback_equals_two_runs_of_the_real_optimizer(
    tmp_path: Path, kind: type[torch.optim.Optimizer], options: dict[str, Any], reduction: str, clip: bool
) -> None:
    with timstore.open(tmp_path / "s", durability="os") as store:
        run = Recorded(store, kind, options, reduction=reduction, clip=clip)
        ratios = [one for (one,) in store.sql("SELECT consumed_ratio FROM steps").fetchall()]
        assert (min(ratios) < 0.9) == clip
        for denominator in ("kept", "renormalised") if reduction != "sum" else ("kept",):
            wanted, optimizer, _ = run.change(denominator)
            methods = ("closed form", "exact replay") if kind is SGD else ("exact replay",)
            for method in methods:
                found, _, corrected, report = rolled_back(store, run, method=method, denominator=denominator)
                assert off(found, wanted) < 1e-12, (denominator, method)
                assert states_off(corrected, optimizer) < 1e-12, (denominator, method)
                assert report.method == method
        assert rolled_back(store, run)[3].method == methods[0]


@pytest.mark.parametrize(("kind", "options"), [one[1:] for one in FAMILY], ids=[one[0] for one in FAMILY])
def test_with_float32_records_it_is_right_to_rounding(
    tmp_path: Path, kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    with timstore.open(tmp_path / "s", durability="os") as store:
        run = Recorded(store, kind, options, dtype=torch.float32)
        wanted, *_ = run.change()
        found, _, _, report = rolled_back(store, run)
    # Beside what the model's own float32 cannot take up.
    assert off(found, wanted) < 1e-6 + report.rounding
    assert report.rounding < 1e-5


@pytest.mark.parametrize("denominator", ["kept", "renormalised"])
def test_records_of_all_samples_stand_in_for_whole_gradients(tmp_path: Path, denominator: str) -> None:
    with timstore.open(tmp_path / "s", durability="os") as store:
        run = Recorded(store, *FAMILY[3][1:], history="final", samples=None)
        wanted, optimizer, _ = run.change(denominator)
        found, _, corrected, report = rolled_back(store, run, denominator=denominator)
    assert off(found, wanted) < 1e-12
    assert states_off(corrected, optimizer) < 1e-12
    assert report.clipping == "followed"


def test_where_the_whole_gradient_is_not_known_the_report_says_so(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s", durability="os") as store:
        run = Recorded(store, *FAMILY[1][1:], history="final")
        *_, report = rolled_back(store, run)
        assert "steps that held a removed sample" in report.clipping
        assert "whole gradient" in report.clipping
        with pytest.raises(timstore.CoverageError, match="optimizer_history='gradients'"):
            store.rollback(run.model, list(FORGET), denominator="renormalised")
        with pytest.raises(timstore.CoverageError, match="no step's whole gradient was kept"):
            store.rollback(run.model, list(FORGET), method="exact replay")
        with pytest.raises(timstore.CoverageError, match="'closed form'"):
            store.rollback(run.model, list(FORGET), method="final moment")


class Lion(torch.optim.Optimizer):
    """An optimizer of the user's own: the sign of an average."""

    def __init__(self, params: Any, lr: float = 1e-3, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                    average.mul_(group["beta"]).add_(parameter.grad, alpha=1 - group["beta"])
                    parameter.sub_(average.tanh(), alpha=group["lr"])


OTHERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.Adagrad, {"lr": 0.05, "lr_decay": 0.01}),
    (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    (torch.optim.Adafactor, {"lr": 0.02}),
    (torch.optim.NAdam, {"lr": 0.01}),
    (torch.optim.RAdam, {"lr": 0.01}),
    (torch.optim.Adadelta, {"lr": 1.0}),
    (torch.optim.Adamax, {"lr": 0.01}),
    (torch.optim.Rprop, {"lr": 0.01}),
    (torch.optim.ASGD, {"lr": 0.05}),
    (Lion, {"lr": 0.02}),
]


@pytest.mark.parametrize(("kind", "options"), OTHERS, ids=[kind.__name__ for kind, _ in OTHERS])
def test_any_other_optimizer_is_run_again(
    tmp_path: Path, kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    with timstore.open(tmp_path / "s", durability="os") as store:
        run = Recorded(store, kind, options)
        wanted, optimizer, _ = run.change()
        found, _, corrected, report = rolled_back(store, run)
    assert off(found, wanted) < 1e-11
    assert states_off(corrected, optimizer) < 1e-11
    assert report.replay_off < 1e-12


def test_muon_is_run_again_over_whole_matrices(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 5, bias=False, dtype=torch.float64)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.02)
    start, stream = copy.deepcopy(model), []
    with timstore.open(tmp_path / "s", durability="os") as store:
        with store.record(model, optimizer, optimizer_history="gradients") as recorder:
            for step in range(6):
                x = torch.randn(3, 6, dtype=torch.float64)
                recorder.batch([step % 4, 4, 5])
                model(x).square().sum().backward()
                parts = (
                    torch.autograd.grad(linear(x[:1], model.weight).square().sum(), model.weight)[0]
                    if step % 4 == 1
                    else 0
                )
                stream.append((model.weight.grad.clone(), parts))
                optimizer.step()
                optimizer.zero_grad()
        ends = []
        for without in (False, True):
            again = copy.deepcopy(start)
            rerun = torch.optim.Muon(again.parameters(), lr=0.02)
            for whole, removed in stream:
                again.weight.grad = whole - removed if without else whole.clone()
                rerun.step()
            ends.append(again.weight.detach())
        before = model.weight.detach().clone()
        store.rollback(model, [1], accumulate="float64", memory_limit="64MB")
    # Muon's own products are in bfloat16, so that a difference of rounding may become one of 2^-8.
    torch.testing.assert_close(model.weight.detach() - before, ends[1] - ends[0], rtol=0, atol=1e-6)


def test_a_coordinate_that_only_the_forgotten_reached_returns_to_where_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 1))
    start = model[0].weight.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with timstore.open(tmp_path / "s", durability="os") as store:
        with store.record(model, optimizer, samples=[9], optimizer_history="gradients") as recorder:
            for step in range(8):
                ids, tokens = [step % 3, 9], torch.tensor([[0, 1, step % 4], [7, 8, step % 4]])
                recorder.batch(ids)
                model(tokens).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        moved = model[0].weight.detach().clone()
        store.rollback(model, [9])
    assert float((moved - start)[7:9].abs().min()) > 1e-3
    torch.testing.assert_close(model[0].weight.detach()[7:9], start[7:9], rtol=0, atol=3e-7)


def test_training_goes_on_as_if_the_samples_had_never_been_there(tmp_path: Path) -> None:
    """On a loss that is linear in the parameters, whose gradients do not depend on them."""
    targets = torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def train(model: nn.Module, optimizer: Any, steps: range, *, without: Sequence[int], recorder: Any = None) -> None:
        for step in steps:
            rows = rows_of(step)
            if recorder is not None:
                recorder.batch(rows)
            kept = torch.tensor([row not in without for row in rows])
            (model(targets[rows]).sum(1) * kept).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            optimizer.zero_grad()

    ends = []
    for without in ((), FORGET):
        torch.manual_seed(0)
        model = nn.Linear(7, 3, dtype=torch.float64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
        if without:
            train(model, optimizer, range(9), without=without)
        else:
            with (
                timstore.open(tmp_path / "s", durability="os") as store,
                store.record(model, optimizer, samples=FORGET, optimizer_history="gradients") as recorder,
            ):
                train(model, optimizer, range(9), without=(), recorder=recorder)
            with timstore.open(tmp_path / "s") as store:
                report = store.rollback(model, list(FORGET), optimizer=optimizer, accumulate="float64")
            assert report.optimizer == "exp_avg, exp_avg_sq corrected"
        train(model, optimizer, range(9, 16), without=FORGET)
        ends.append(flat(model))
    assert off(*ends) < 1e-13


def test_in_blocks_of_rows_the_replay_is_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(700, 900, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with timstore.open(tmp_path / "s", durability="os") as store:
        with store.record(model, optimizer, samples=[1], optimizer_history="gradients") as recorder:
            for _ in range(3):
                recorder.batch([1, 2])
                model(torch.randn(2, 700, dtype=torch.float64)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        ends = []
        for limit in ("80MB", "2GB"):
            other = copy.deepcopy(model)
            store.rollback(other, [1], memory_limit=limit, accumulate="float64", force=True)
            ends.append(flat(other))
    assert off(*ends) < 1e-13
    assert float((ends[0] - flat(model)).norm()) > 0.1


def test_a_model_that_something_else_moved_is_not_replayed(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s", durability="os") as store:
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        with store.record(model, optimizer, optimizer_history="gradients") as recorder:
            for _ in range(4):
                recorder.batch([1, 2])
                model(torch.randn(2, 4)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    model.weight.mul_(0.8)  # such as a constraint on the weights
        with pytest.raises(timstore.StateError, match="something else changed the parameters"):
            store.rollback(model, [1])


def test_a_run_that_began_with_a_used_optimizer_is_replayed_from_its_state(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s", durability="os") as store:
        torch.manual_seed(0)
        model = nn.Linear(4, 2, dtype=torch.float64)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        data = [torch.randn(2, 4, dtype=torch.float64) for _ in range(8)]

        def train(steps: range, recorder: Any = None) -> None:
            for step in steps:
                if recorder is not None:
                    recorder.batch([step % 3, 7])
                model(data[step]).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()

        train(range(3))
        for stretch in (range(3, 5), range(5, 8)):  # the second goes on where the first ended
            with store.record(model, optimizer, optimizer_history="gradients") as recorder:
                train(stretch, recorder)
        starts = store.sql("SELECT DISTINCT step FROM states WHERE role = 'start_theta'").fetchall()
        assert starts == [(0,)]
        report = store.rollback(model, [1], accumulate="float64")
    assert report.replay_off < 1e-12


def test_clipping_by_value_is_followed_where_the_gradients_were_kept(tmp_path: Path) -> None:
    bound = 0.05
    torch.manual_seed(0)
    model = nn.Linear(6, 4, dtype=torch.float64)
    start, stream = copy.deepcopy(model), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    with timstore.open(tmp_path / "s", durability="os") as store:
        with store.record(model, optimizer, samples=[1], optimizer_history="gradients") as recorder:
            for step in range(6):
                x = torch.randn(3, 6, dtype=torch.float64)
                recorder.batch([1, 2, 3 + step])
                (model(x).square().sum() / 20).backward()
                alone = linear(x[:1], model.weight, model.bias).square().sum() / 20
                parts = torch.autograd.grad(alone, list(model.parameters()))
                stream.append(([one.grad.clone() for one in model.parameters()], parts))
                nn.utils.clip_grad_value_(model.parameters(), bound)
                optimizer.step()
                optimizer.zero_grad()
        assert np.isclose(store.sql("SELECT max(clip_value) FROM steps").fetchall()[0][0], bound)
        ends = []
        for without in (False, True):
            again = copy.deepcopy(start)
            rerun = torch.optim.SGD(again.parameters(), lr=0.3, momentum=0.9)
            for whole, parts in stream:
                for parameter, grad, part in zip(again.parameters(), whole, parts, strict=True):
                    parameter.grad = (grad - part if without else grad).clamp(-bound, bound)
                rerun.step()
            ends.append(flat(again))
        before = flat(model)
        report = store.rollback(model, [1], accumulate="float64")
    assert report.method == "exact replay"
    assert off(flat(model) - before, ends[1] - ends[0]) < 1e-12
