"""Chance in a module that is computed again: its record is of the random numbers that training drew."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import timstore

STEPS, ROWS = 9, 4


def of_torch(rows: int) -> torch.Tensor:
    return torch.rand(rows, 1)


def of_python(rows: int) -> torch.Tensor:
    return torch.full((rows, 1), random.random())


def of_numpy(rows: int) -> torch.Tensor:
    return torch.from_numpy(np.random.rand(rows, 1)).float()


class Block(nn.Module):
    """A bare layer scale, and rows left out at random in the same module."""

    def __init__(self, rate: float, draw: Any, again: bool) -> None:
        super().__init__()
        self.rate, self.draw, self.again = rate, draw, again
        self.inner = nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.full((16,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added = checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x)
        added = added.tanh() * self.scale
        return x + added * (self.draw(len(x)) >= self.rate) / (1 - self.rate) if self.training else x + added


class Noise(nn.Module):
    """A scale of its own for noise, which is added to every number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((16,), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * torch.randn_like(x)


class Masked(nn.Embedding):
    """A table of which ids are masked at random, in a forward of its own."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids.masked_fill(torch.rand(ids.shape) < 0.3, 0)) * 2.0


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def held_to_autograd(path: Path, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Record every second sample, and compare with its own backward pass under the same random numbers."""

    def loss(step: int) -> torch.Tensor:
        seed(step)
        ids = drawn[step]
        return cross_entropy(model(x[ids]), y[ids], reduction="none") / ROWS

    drawn = [[(ROWS * step + row) % len(x) for row in range(ROWS)] for step in range(STEPS)]
    wanted: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for step, ids in enumerate(drawn):
        for row, sample in enumerate(ids):
            model.zero_grad()
            loss(step)[row].backward()
            wanted[step, sample] = {
                name: np.zeros(tuple(one.shape)) if one.grad is None else one.grad.numpy().copy()
                for name, one in model.named_parameters()
            }
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with timstore.open(path / "s") as store:
        with store.record(model, optimizer, samples=range(0, len(x), 2)) as recorder:
            for step, ids in enumerate(drawn):
                recorder.batch(ids)
                loss(step).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        records = list(store.read())
    assert len(records) == sum(sample % 2 == 0 for ids in drawn for sample in ids)
    for record in records:
        for name, gradient in wanted[record.step, record.sample].items():
            given = record.dense(name) if name in record.gradients else np.zeros_like(gradient)
            np.testing.assert_allclose(given, gradient, rtol=1e-4, atol=1e-6, err_msg=f"{record.step} {name}")


@pytest.mark.parametrize("rate", [0.02, 0.3])
@pytest.mark.parametrize(
    ("draw", "again"), [(of_torch, False), (of_torch, True), (of_python, False), (of_numpy, False)]
)
def test_rows_that_are_left_out_at_random_have_their_own_records(
    tmp_path: Path, rate: float, draw: Any, again: bool
) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), Block(rate, draw, again), nn.Linear(16, 3))
    held_to_autograd(tmp_path, model, torch.randn(16, 8), torch.randint(0, 3, (16,)))


@pytest.mark.parametrize("name", ["noise under a scale", "ids that are masked at random"])
def test_what_is_another_number_in_every_pass_has_its_own_records(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    if name == "noise under a scale":
        model, x = nn.Sequential(nn.Linear(8, 16), Noise(), nn.Linear(16, 3)), torch.randn(16, 8)
    else:
        model, x = nn.Sequential(Masked(12, 6), nn.Flatten(), nn.Linear(30, 3)), torch.randint(0, 12, (16, 5))
    held_to_autograd(tmp_path, model, x, torch.randint(0, 3, (16,)))


def test_layers_of_transformers_that_are_left_out_at_random_have_their_own_records(tmp_path: Path) -> None:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    torch.manual_seed(1)
    config = ConvNextConfig(
        hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, image_size=16, num_labels=3, drop_path_rate=0.4,
        layer_scale_init_value=0.5,
    )  # fmt: skip

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ConvNextForImageClassification(config)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.net(x).logits
            return logits

    held_to_autograd(tmp_path, Logits(), torch.randn(16, 3, 16, 16), torch.randint(0, 3, (16,)))
