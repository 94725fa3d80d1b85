"""What cannot be recorded says so before the first step has changed anything."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from networks import Net, vectors
from torch import nn

import timstore


def refused(tmp_path: Path, model: nn.Module, **batch: Any) -> str:
    """Return why a first step is refused; the model must not have changed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with timstore.open(tmp_path / "s") as store:
        with pytest.raises(timstore.CoverageError) as caught, store.record(model, optimizer):
            batch = batch or vectors(5, 6)[0]
            outputs = model(**batch, sample_ids=list(range(4)))
            outputs.square().sum().backward()
            optimizer.step()
        assert store.sql("SELECT count(*) FROM steps").fetchall() == [(0,)]
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    return str(caught.value)


class Direct(nn.Module):
    """Uses a layer's weight behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) @ self.layer.weight


class Bare(nn.Module):
    """A parameter beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x) * self.scale
        return out


class Reentrant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.utils.checkpoint.checkpoint(self.layer, self.first(x), use_reentrant=True)
        return out


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.weight = 0.5, nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x * self.weight, self.dropout, self.training)


class Exponential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp() * self.weight


class Overwritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Exponential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moved = x.clone()
        out: torch.Tensor = self.inner(moved)
        moved.mul_(2)
        return out + moved


class Transposed(nn.Module):
    """The batch on axis 1, where an LSTM's or an old Transformer's is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x.transpose(0, 1)).transpose(0, 1)
        return out


class Flattened(Transposed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x.flatten(0, 1))
        return out.view_as(x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: Net(nn.BatchNorm1d(5)), r"layers\.0 \(BatchNorm1d\).*eval mode"),
    "dropout inside": (lambda: Net(Noisy()), r"layers\.0 \(Noisy\) has dropout inside.*set its dropout to 0"),
    "an lstm": (lambda: Net(nn.LSTM(6, 6, batch_first=True)), r"layers\.0 \(LSTM\).*one tensor"),
    "a packed projection": (
        lambda: Net(nn.TransformerEncoderLayer(6, 2, 8, dropout=0, batch_first=True)),
        r"self_attn\.in_proj_weight .*module layers\.0\.self_attn \(MultiheadAttention\).*Linear",
    ),
    "a bare parameter": (Bare, r"parameter scale .*module at the top \(Bare\).*Freeze"),
    "a weight used directly": (Direct, r"layer\.weight.*add up to something else"),
    "a reentrant checkpoint": (Reentrant, r"parameter layer\.weight.*use_reentrant"),
    "an input changed in place": (Overwritten, r"inner \(Exponential\).*changed in place"),
    "the batch on axis 1": (Transposed, r"layer maps \(5, 4, 6\).*axis 0"),
    "tokens and batch in one axis": (Flattened, r"layer maps \(20, 6\).*axis 0"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_hooks_cannot_tell_apart_is_refused(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    torch.manual_seed(0)
    assert re.search(message, refused(tmp_path, make()))


def test_a_batch_on_axis_1_is_refused_even_where_the_sum_cannot_see_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    message = refused(tmp_path, Transposed(), **vectors(4, 6)[0])
    assert "layer: its input does not follow the order" in message


@pytest.mark.parametrize("option", [{"scale_grad_by_freq": True}, {"sparse": True}, {"max_norm": 1.0}], ids=repr)
def test_an_embedding_that_does_not_only_look_up_is_refused_at_enter(tmp_path: Path, option: dict[str, Any]) -> None:
    model = Net(nn.Embedding(5, 3, **option))
    with timstore.open(tmp_path / "s") as store:
        recorder = store.record(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(timstore.CoverageError, match=rf"layers\.0.*{next(iter(option))}"), recorder:
            pass
    assert not any(module._forward_hooks for module in model.modules())


def test_the_check_of_the_order_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.dropout, self.frozen = nn.Linear(6, 2), nn.Dropout(0.5), nn.Dropout(0.5).eval()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("replaced", torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.replaced = torch.ones(3)
            self.register_buffer("made", torch.ones(1), persistent=False)
            out: torch.Tensor = self.dropout(self.layer(x))
            return out

    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with timstore.open(tmp_path / "s") as store, store.record(model, optimizer) as recorder:
        torch.manual_seed(7)
        expected = torch.rand(1)
        torch.manual_seed(7)
        recorder._check_order((torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),), {}, 4)
        assert torch.equal(torch.rand(1), expected)
    assert {name: tuple(buffer.shape) for name, buffer in model.named_buffers()} == {"calls": (), "replaced": (2,)}
    assert model.calls == 0
    assert [module.training for module in (model, model.dropout, model.frozen)] == [True, True, False]
