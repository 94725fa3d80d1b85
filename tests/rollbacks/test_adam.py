"""Rollback of Adam's runs against a forward simulation of its moments, with the second moment as it is at the end."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import timstore

ROWS, STEPS, BATCH, FORGET, LIMIT = 12, 14, 4, (3, 8), 0.5


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="first order only", category=timstore.TimstoreWarning)
        yield


class Network(nn.Module):
    """A table that only even steps use, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, dtype=torch.float64)
        self.inner = nn.Linear(7, 6, dtype=torch.float64)
        self.out = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, ids: torch.Tensor, x: torch.Tensor, look: bool) -> torch.Tensor:
        hidden = torch.tanh(self.inner(x))
        if look:
            hidden = hidden + self.table(ids).mean(1)
        outputs: torch.Tensor = self.out(hidden)
        return outputs


def losses(model: nn.Module, step: int, ids: list[int], **extra: Any) -> torch.Tensor:
    data = torch.Generator().manual_seed(7)
    tokens, numbers = torch.randint(0, 9, (ROWS, 3), generator=data), torch.randn(ROWS, 7, generator=data)
    outputs = model(ids=tokens[ids], x=numbers[ids].double(), look=step % 2 == 0, **extra)
    return outputs.square().sum(1) / BATCH


class Simulated:
    """The run's linear response to the forgotten samples, forwards in time, one parameter at a time."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.steps: list[tuple[dict[str, torch.Tensor], float, float, float]] = []

    def see(self, step: int, ids: Sequence[int], ratio: float) -> None:
        forgotten = [one for one in ids if one in FORGET]
        # A model without the recorder's hooks.
        twin = Network()
        twin.load_state_dict(self.model.state_dict())
        active = {name for name, one in self.model.named_parameters() if one.grad is not None}
        wanted = {name: one for name, one in twin.named_parameters() if name in active}
        loss = losses(twin, step, forgotten).sum() if forgotten else sum(one.sum() * 0 for one in wanted.values())
        grads = torch.autograd.grad(loss, list(wanted.values()))
        share = 1 - len(forgotten) / len(ids)
        consumed = {name: one.grad for name, one in self.model.named_parameters() if name in active}
        rest = {name: consumed[name] / ratio - grad for name, grad in zip(wanted, grads, strict=True)}
        norm = float(sum(one.square().sum() for one in rest.values()) ** 0.5)
        without = min(1.0, LIMIT / (norm + 1e-6))
        changed = {name: consumed[name] - without * rest[name] for name in rest}
        self.steps.append((changed, ratio, share, self.optimizer.param_groups[0]["lr"]))

    def change(self) -> dict[str, torch.Tensor]:
        group = self.optimizer.param_groups[0]
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        sign = -1 if group["maximize"] else 1
        changes = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            moment = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
            count = int(state["step"])
            kept = moment.float().bfloat16().double() / (1 - beta2**count)
            factor = torch.where(moment > 0, 1 / (kept.sqrt() + group["eps"]), 0.0)
            delta, average = torch.zeros_like(parameter), torch.zeros_like(parameter)
            seen = count - sum(name in grads for grads, *_ in self.steps)
            length = 0.0
            for grads, ratio, share, lr in self.steps:
                if name not in grads:
                    continue
                seen += 1
                length += lr * share * ratio
                average = beta1 * average + (1 - beta1) * grads[name] * sign
                if group["decoupled_weight_decay"]:
                    delta = delta * (1 - lr * decay)
                delta = delta + lr / (1 - beta1**seen) * average * factor
            if decay and not group["decoupled_weight_decay"]:
                bent = length * factor * decay
                delta = delta * torch.where(bent > 0, -torch.expm1(-bent) / bent.clamp(min=1e-300), 1.0)
            changes[name] = delta.detach()
        return changes


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: range = range(STEPS),
    recorder: Any = None,
    simulated: Simulated | None = None,
) -> None:
    for step in steps:
        if recorder is not None:
            recorder.epoch = step // 7
        optimizer.param_groups[0]["lr"] = 0.02 * min(1, (step + 1) / 4) * 0.95**step
        ids = [(step * 5 + row * 3) % ROWS for row in range(BATCH)]
        extra = {"sample_ids": ids} if recorder is not None else {}
        losses(model, step, ids, **extra).sum().backward()
        before = torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        if simulated is not None:
            simulated.see(step, ids, float(min(1, LIMIT / (before + 1e-6))))
        optimizer.step()
        optimizer.zero_grad()


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    off = sum(float((left[name] - right[name]).square().sum()) for name in left) ** 0.5
    return off / sum(float(one.square().sum()) for one in right.values()) ** 0.5


FAMILY: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"maximize": True, "betas": (0.8, 0.95), "eps": 1e-3}),
    (torch.optim.Adam, {"weight_decay": 0.3}),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.AdamW, {"weight_decay": 0.5}),
    (torch.optim.AdamW, {"amsgrad": True, "foreach": True}),
]


@pytest.mark.parametrize("earlier", [0, 5], ids=["from the first step", "later"])
@pytest.mark.parametrize(
    ("kind", "options"), FAMILY, ids=lambda value: "-".join(value) if isinstance(value, dict) else value.__name__
)
def test_the_change_is_what_the_moments_made_of_the_samples(
    tmp_path: Path, kind: type[torch.optim.Optimizer], options: dict[str, Any], earlier: int
) -> None:
    torch.manual_seed(0)
    model = Network()
    optimizer = kind(model.parameters(), lr=0.02, **options)
    # Steps before recording began: every parameter takes part, so that their counters agree.
    for step in range(earlier):
        run(model, optimizer, steps=range(2 * step, 2 * step + 1))
    with timstore.open(tmp_path / "s") as store:
        simulated = Simulated(model, optimizer)
        with store.record(model, optimizer) as recorder:
            run(model, optimizer, recorder=recorder, simulated=simulated)
        before = {name: one.detach().clone() for name, one in model.named_parameters()}
        report = store.rollback(model, list(FORGET), accumulate="float64")
    expected = simulated.change()
    changed = {name: one.detach() - before[name] for name, one in model.named_parameters()}
    assert report.method == "final moment"
    assert min(float(one.norm()) for one in expected.values()) > 1e-3
    assert distance(changed, expected) < 1e-9


def recorded(path: Path) -> tuple[timstore.Store, nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    store = timstore.open(path)
    with store.record(model, optimizer) as recorder:
        run(model, optimizer, steps=range(7), recorder=recorder)
        recorder.save_point()
        checkpoint = copy.deepcopy(model.state_dict())
        run(model, optimizer, steps=range(7, 14), recorder=recorder)
    return store, model, optimizer, checkpoint


def test_the_second_moment_costs_two_bytes_per_parameter_and_checkpoint(tmp_path: Path) -> None:
    store, model, _, _ = recorded(tmp_path / "s")
    with store:
        numel = sum(one.numel() for one in model.parameters())
        second_moments = "SELECT * FROM states WHERE role = 'exp_avg_sq'"
        rows = store.sql(
            f"SELECT epoch, step, sum(bytes), max(rel_error) FROM ({second_moments}) GROUP BY ALL ORDER BY ALL"
        )
        found = rows.fetchall()
    assert [(epoch, step, size) for epoch, step, size, _ in found] == [(0, 6, 2 * numel), (1, 13, 2 * numel)]
    assert all(0 < error < 2**-8 for *_, error in found)


def test_a_checkpoint_is_rolled_back_with_its_own_second_moment(tmp_path: Path) -> None:
    store, model, _, checkpoint = recorded(tmp_path / "s")
    model.load_state_dict(checkpoint)
    with store:
        report = store.rollback(model, list(FORGET), accumulate="float64")
    assert "epoch 0, step 6" in report.model
    torch.manual_seed(0)
    other = Network()
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.02)
    with timstore.open(tmp_path / "short") as short:
        with short.record(other, optimizer) as recorder:
            run(other, optimizer, steps=range(7), recorder=recorder)
        short.rollback(other, list(FORGET), accumulate="float64")
    for one, same in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, same, rtol=1e-6, atol=1e-7)


def test_without_the_second_moment_adam_is_refused(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        adam = {"optimizer": "Adam", "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
        store.append_step(0, 0, [adam])
        store.append(0, 0, 1, {"weight": torch.ones(2, 3)})
        store.commit()
        model = nn.Linear(3, 2, bias=False)
        kept = model.weight.detach().clone()
        with pytest.raises(timstore.CoverageError, match="second moment"):
            store.rollback(model, [1])
        assert torch.equal(model.weight, kept)
        store.append_states(0, 0, "exp_avg_sq", {"weight": torch.full((2, 3), 0.01)})
        store.commit()
        store.rollback(model, [1], accumulate="float64")
    # One step: m = 0.1 g over 1 - 0.9; v = 0.01 over 1 - 0.99.
    torch.testing.assert_close(model.weight.detach(), kept + 0.1 / (1.0 + 1e-8), rtol=5e-3, atol=0)


def test_what_the_step_of_adam_needs_must_be_there(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        store.append_step(0, 0, [{"optimizer": "Adam", "lr": 0.1}])
        store.append(0, 0, 1, {"weight": torch.ones(2, 3)})
        store.commit()
        with pytest.raises(timstore.CoverageError, match="beta1"):
            store.rollback(nn.Linear(3, 2, bias=False), [1])


def test_a_parameter_whose_steps_were_not_counted_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    run(model, optimizer, steps=range(3))  # the table took two of these steps, the others three
    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer) as recorder:
            run(model, optimizer, recorder=recorder)
        with pytest.raises(timstore.CoverageError, match="counter"):
            store.rollback(model, [3])
