"""What recording does beside the gradients themselves, which test_coverage_table holds to autograd."""

from pathlib import Path

import pytest
import torch
from networks import Net
from references import squares, vectors
from torch import nn

import timstore


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_weights_is_the_dtype_of_the_record(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Net(nn.Linear(6, 4), nn.LayerNorm(4)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer):
            model(x=torch.randn(1, 2, 6, dtype=dtype), sample_ids=[0]).float().pow(3).mean().backward()
            optimizer.step()
        found = dict(store.sql("SELECT parameter, bytes FROM gradients").fetchall())
    numbers = {"layers.0.weight": 2 * (6 + 4), "layers.0.bias": 4, "layers.1.weight": 4, "layers.1.bias": 4}
    assert found == {name: count * dtype.itemsize for name, count in numbers.items()}


def test_layers_that_share_an_input_share_its_storage(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(24, 24, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) * self.k(x) * self.v(x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Attention()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer):
            model(x=torch.randn(2, 5, 24), sample_ids=[0, 1]).square().mean().backward()
            optimizer.step()
        stored = dict(store.sql("SELECT parameter, sum(bytes) FROM gradients GROUP BY parameter").fetchall())
    assert sorted(stored.values()) == [2 * 5 * 24 * 4, 2 * 5 * 24 * 4, 2 * 2 * 5 * 24 * 4]


def test_padding_tokens_have_no_row_in_an_embeddings_gradient(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Embedding(20, 6, padding_idx=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer):
            model(torch.tensor([[3, 1, 0], [0, 0, 2]]), sample_ids=[0, 1]).square().sum().backward()
            optimizer.step()
        found = {record.sample: record.gradients["weight"][0].indices.tolist() for record in store.read()}
    assert found == {0: [1, 3], 1: [2]}


@pytest.mark.parametrize("capture", ["modules", "per-sample"])
def test_a_recorded_run_is_bit_for_bit_the_run_without_recording(tmp_path: Path, capture: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.lstm, self.out = nn.Linear(9, 16), nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 4)
            self.dropout = nn.Dropout(0.2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.out(self.lstm(self.dropout(self.first(x))[:, None])[0])
            return out

    def train(record: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        plain = Net(nn.Linear(9, 16), nn.Dropout(0.2), nn.GELU(), nn.Linear(16, 4))
        model = Model() if capture == "per-sample" else plain
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        batches = vectors(9)() * 3
        if not record:
            for batch in batches:
                squares(model, batch, torch.ones(4)).backward()
                optimizer.step()
                optimizer.zero_grad()
            return [parameter.detach() for parameter in model.parameters()]
        with timstore.open(tmp_path / "s") as store, store.record(model, optimizer, samples=[2], capture=capture):
            for batch in batches:
                squares(model, {**batch, "sample_ids": torch.arange(4)}, torch.ones(4)).backward()
                optimizer.step()
                optimizer.zero_grad()
        return [parameter.detach() for parameter in model.parameters()]

    for plain, with_record in zip(train(False), train(True), strict=True):
        assert torch.equal(plain, with_record)


def test_a_proof_with_the_first_batch_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.dropout, self.frozen = nn.Linear(6, 2), nn.Dropout(0.5), nn.Dropout(0.5).eval()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("replaced", torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            # Longer with every forward pass, in eval mode too; and a buffer that is not there before.
            self.replaced = torch.ones(len(self.replaced) + 1)
            self.register_buffer("made", torch.full((1,), float(len(x))), persistent=False)
            out: torch.Tensor = self.dropout(self.layer(x))
            return out

    def left(record: bool) -> tuple[list[torch.Tensor], list[bool]]:
        torch.manual_seed(0)
        model = Counting()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if record:
            with timstore.open(tmp_path / "s") as store, store.record(model, optimizer):
                output = model(torch.randn(4, 6), sample_ids=[0, 1, 2, 3])
        else:
            output = model(torch.randn(4, 6))
        assert [name for name, _ in model.named_buffers()] == ["calls", "replaced", "made"]
        modes = [module.training for module in (model, model.dropout, model.frozen)]
        return [output.detach(), torch.rand(1), *model.buffers()], modes

    (tensors, modes), (recorded_tensors, recorded_modes) = left(False), left(True)
    assert modes == recorded_modes == [True, True, False]
    assert all(torch.equal(one, other) for one, other in zip(tensors, recorded_tensors, strict=True))
