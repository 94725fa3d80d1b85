"""The answer of a run to pushes, against training loops in one dimension, and the multiplier that follows from it."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from timstore.rollbacks.coefficients import Schedule
from timstore.rollbacks.matching import multiplier
from timstore.rollbacks.response import Response
from timstore.rollbacks.timeline import Timeline
from timstore.rollbacks.vectors import Workspace

STEPS = 40


def timeline(optimizer: str, lr: np.ndarray, **columns: float) -> Timeline:
    given = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "beta1": 0.0, "beta2": 0.0, "eps": 0.0, **columns}
    arrays: dict[str, Any] = {name: np.full(len(lr), value) for name, value in given.items()}
    flags = {name: np.zeros(len(lr), bool) for name in ("nesterov", "decoupled", "maximize")}
    schedule = Schedule(lr=lr, counter=np.arange(1, len(lr) + 1), **arrays, **flags)
    nothing = np.full(len(lr), np.nan)
    ratio = 0.5 + 0.5 * np.cos(np.arange(len(lr))) ** 2
    return Timeline(
        keys=np.arange(len(lr)),
        rounds=np.arange(len(lr)),
        optimizer=optimizer,
        schedule=schedule,
        ratio=ratio,
        kept=np.full(len(lr), 0.9),
        idle=[frozenset()] * len(lr),
        fresh=[frozenset(["w"])] + [frozenset()] * (len(lr) - 1),
        grad_norm=nothing,
        amp_scale=np.ones(len(lr)),
        samples=nothing,
        tokens=nothing,
        clip_value=nothing,
        amsgrad=np.zeros(len(lr), bool),
        mean_over=[None] * len(lr),
        options=[None] * len(lr),
        micro_batches=1,
    )


def left_of(line: Timeline, push_at: int, curvature: float) -> float:
    """Train two copies on curvature / 2 * x^2, one of them pushed once; return how far apart they end."""
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    schedule = line.schedule
    if line.optimizer == "SGD":
        optimizer: torch.optim.Optimizer = torch.optim.SGD([x], lr=1.0, momentum=float(schedule.momentum[0]))
    moment = torch.zeros(2, dtype=torch.float64)
    for step in range(len(schedule.lr)):
        kept = float(line.ratio[step] * line.kept[step])
        gradient = kept * curvature * x.detach()
        gradient[1] += step == push_at
        if line.optimizer == "SGD":
            optimizer.param_groups[0]["lr"] = float(schedule.lr[step])
            x.grad = gradient
            optimizer.step()
        else:
            # Adam in the coordinates in which its division is by one.
            beta1 = float(schedule.beta1[0])
            moment = beta1 * moment + (1 - beta1) * gradient
            with torch.no_grad():
                x -= schedule.lr[step] * moment / (1 - beta1 ** (step + 1))
    return float(x.detach()[0] - x.detach()[1])


@pytest.mark.parametrize(
    ("optimizer", "columns"), [("SGD", {}), ("SGD", {"momentum": 0.9}), ("AdamW", {"beta1": 0.9, "beta2": 0.99})]
)
def test_what_is_left_of_a_push_is_what_training_leaves(optimizer: str, columns: dict[str, float]) -> None:
    lr = 0.02 * (0.6 + 0.4 * np.cos(np.arange(STEPS) / 9))
    line = timeline(optimizer, lr, **columns)
    tau = float(line.lengths("w").sum())
    for push_at in (0, 11, 33):
        response = Response(line, "w", np.array([push_at]), np.ones(1), np.zeros(1, int), 1)
        lengths = torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64)
        flat = left_of(line, push_at, 0.0)
        wanted = [left_of(line, push_at, float(one) / tau) / flat for one in lengths]
        np.testing.assert_allclose(response.true(lengths).numpy(), wanted, rtol=1e-9, atol=1e-12)


def test_without_momentum_and_with_even_pushes_the_closed_form_is_the_true_answer() -> None:
    line = timeline("SGD", np.full(2000, 1e-3))
    line.ratio[:] = 1.0
    steps = np.arange(2000)
    response = Response(line, "w", steps, np.full(2000, 1 / 2000), steps // 500, 4)
    lengths = torch.tensor([0.0, 0.1, 1.0, 10.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(response.true(lengths), response.closed(lengths), rtol=2e-2, atol=1e-4)


def test_a_curvature_beyond_what_training_could_bear_does_not_blow_up() -> None:
    line = timeline("SGD", np.full(STEPS, 0.1), momentum=0.9)
    response = Response(line, "w", np.arange(STEPS), np.full(STEPS, 1 / STEPS), np.arange(STEPS) // 10, 4)
    assert float(response.true(torch.tensor([1e9], dtype=torch.float64)).abs()) <= 1


def matched(scales: tuple[float, float], columns: dict[str, float]) -> float:
    """Return the multiplier for two halves of a probe whose curvatures are multiples of one matrix."""
    line = timeline("SGD", np.full(2000, 1e-3), **columns)
    line.ratio[:] = 1.0
    steps = np.arange(2000)
    response = Response(line, "w", steps, np.full(2000, 1 / 2000), steps // 500, 4)
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(30, 30, generator=draw, dtype=torch.float64)
    matrix = root @ root.T / 10
    with Workspace({"w": 30}, dtype=torch.float64, memory_limit_bytes=2**20) as workspace:
        start = workspace.new()
        start.write("w", 0, torch.randn(30, generator=draw, dtype=torch.float64))
        halves = tuple(lambda vector, one=scale: {"w": one * (matrix @ vector.read("w"))} for scale in scales)
        return multiplier(start, halves, response, workspace, 12)  # type: ignore[arg-type]


def test_tau_is_left_alone_where_the_probe_shows_everything_and_nothing_lags() -> None:
    assert matched((1.0, 1.0), {}) == pytest.approx(1.0, rel=0.02)
    # One half that shows too much and one that shows too little make up for each other.
    assert matched((2.0, 0.5), {}) == pytest.approx(1.0, rel=0.02)


def test_momentum_that_lags_makes_tau_shorter() -> None:
    assert matched((1.0, 1.0), {"momentum": 0.995}) < 0.95


def test_a_flat_probe_measures_nothing() -> None:
    assert matched((0.0, 0.0), {}) == 1.0
    assert math.isfinite(matched((1e-12, 1e-12), {}))
