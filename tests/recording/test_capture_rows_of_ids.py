"""Tables that are looked up by one row of ids, (1, T), for all samples of a batch."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import timstore
from timstore.errors import CoverageError

ROWS = 4


def first_row(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x @ table[0].T


def squeezed(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x @ table.squeeze(0).mT


def mean_of_rows(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x @ table.mean(0).T


def largest_of_rows(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x @ table.amax(0).T


def broadcast(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """As positions are: a row for each sample would do the same."""
    return (table * x[:, None]).sum(2)


class Net(nn.Module):
    def __init__(self, use: Any) -> None:
        super().__init__()
        self.use, self.body, self.classes = use, nn.Linear(8, 16), nn.Embedding(3, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.use(self.classes(torch.arange(3)[None]), self.body(x).tanh())
        return logits


class Loss(Net):
    """Returns its loss alone; samples with the label -100 do not count."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return cross_entropy(super().forward(x), y)


class Checkpointed(Loss):
    """As gradient_checkpointing_enable makes it of older models: not where the model does not train."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x, y)
        found: torch.Tensor = checkpoint(super().forward, x.requires_grad_(), y, use_reentrant=True)
        return found


def wanted(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[np.ndarray]:
    found = []
    for row in range(len(x)):
        model.zero_grad()
        (cross_entropy(model(x), y, reduction="none")[row] / len(x)).backward()
        found.append(model.classes.weight.grad.numpy().copy())  # type: ignore[union-attr]
    model.zero_grad()
    return found


def recorded(path: Path, model: nn.Module, x: torch.Tensor, y: torch.Tensor, **options: Any) -> list[np.ndarray]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with timstore.open(path / "s") as store:
        with store.record(model, optimizer, **options) as recorder:
            for _ in range(3):
                recorder.batch(range(len(x)))
                cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        return [record.dense("classes.weight") for record in store.read("step = 2")]


@pytest.mark.parametrize("capture", ["auto", "per-sample"])
@pytest.mark.parametrize("use", [first_row, squeezed, mean_of_rows, largest_of_rows, broadcast])
def test_each_sample_has_its_own_gradient_of_the_table(tmp_path: Path, use: Any, capture: str) -> None:
    torch.manual_seed(0)
    x, y, model = torch.randn(ROWS, 8), torch.tensor([0, 1, 2, 1]), Net(use)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = recorded(tmp_path, model, x, y, capture=capture)
    told = [one for one in seen if "no module shows" in str(one.message)]
    assert len(told) == (capture == "auto")
    for given, right in zip(found, wanted(model, x, y), strict=True):
        np.testing.assert_allclose(given, right, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*BatchNorm.*mixes the samples")
@pytest.mark.filterwarnings("ignore:no module shows")
def test_samples_that_are_tied_together_hide_no_row(tmp_path: Path) -> None:
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__(broadcast)
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            normed: torch.Tensor = self.norm(super().forward(x))
            return normed

    torch.manual_seed(0)
    x, y, model = torch.randn(ROWS, 8), torch.tensor([0, 1, 2, 1]), Normed()
    assert len(recorded(tmp_path, model, x, y)) == ROWS


@pytest.mark.parametrize("capture", ["auto", "modules", "per-sample"])
@pytest.mark.parametrize("use", [first_row, squeezed, mean_of_rows, largest_of_rows, broadcast])
def test_of_a_loss_alone_it_cannot_be_told_apart(tmp_path: Path, use: Any, capture: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(CoverageError, match="classes"):
        recorded_losses(tmp_path, Loss(use), [0, 1, 2, 1], capture=capture)


@pytest.mark.parametrize("use", [first_row, mean_of_rows])
def test_nor_where_a_checkpoint_cannot_be_asked(tmp_path: Path, use: Any) -> None:
    torch.manual_seed(0)
    with pytest.raises(CoverageError):
        recorded_losses(tmp_path, Checkpointed(use), [0, 1, 2, 1])


def recorded_losses(path: Path, model: Loss, y: list[int], **options: Any) -> tuple[torch.Tensor, list[np.ndarray]]:
    x, labels, optimizer = torch.randn(ROWS, 8), torch.tensor(y), torch.optim.SGD(model.parameters(), lr=0.0)
    with timstore.open(path / "s") as store:
        with store.record(model, optimizer, allow_zero=True, **options):
            for _ in range(3):
                model(x, labels, sample_ids=range(ROWS)).backward()
                optimizer.step()
                optimizer.zero_grad()
        return x, [record.dense("classes.weight") for record in store.read("step = 2")]
