"""An attention that takes another axis than the batch for samples is never recorded as if it did not."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from references import largest_error, one_by_one, recorded, squares
from torch import nn

import timstore
from timstore.errors import TimstoreWarning

IDS = [[11, 2, 5, 7], [4, 8, 11, 0]]
SAMPLES = [11, 5, 8]


class Misled(nn.Module):
    def __init__(self, call: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.attention, self.head, self._call = nn.MultiheadAttention(6, 2), nn.Linear(6, 3), call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self._call(self.attention, x))
        return out


def forgotten(attention: Any, x: torch.Tensor) -> torch.Tensor:
    """Without batch_first: samples attend to each other's places."""
    out: torch.Tensor = attention(x, x, x)[0]
    return out


def one_at_a_time(attention: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([attention(row, row, row)[0] for row in x])


@pytest.mark.parametrize("tokens", [3, 4, 5])
@pytest.mark.parametrize("call", [forgotten, one_at_a_time])
def test_an_attention_on_another_axis_is_refused_without_a_pass_of_each_sample(
    call: Callable[[nn.Module, torch.Tensor], torch.Tensor], tokens: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, batches = Misled(call), [{"x": torch.randn(4, tokens, 6)} for _ in range(2)]
    with pytest.raises(timstore.CoverageError, match=r"attention \(MultiheadAttention\).*capture='per-sample'"):
        recorded(tmp_path / "s", model, batches, IDS, squares, SAMPLES, capture="modules")
    model.zero_grad()
    want = one_by_one(model, batches, IDS, squares)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TimstoreWarning)
        for got, bounds in recorded(tmp_path / "t", model, batches, IDS, squares, SAMPLES):
            assert largest_error(got, want, bounds, SAMPLES) <= 1e-5
