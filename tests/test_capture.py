"""Recorded gradients against autograd, one sample at a time, in the batch they were trained in."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import timstore

SAMPLES = [11, 5, 8]
Loss = Callable[[nn.Module, dict[str, torch.Tensor], torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


class Net(nn.Module):
    """Any layers, called as the recorder's users call models."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


def squares(model: nn.Module, batch: dict[str, torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """A mean loss in which each sample has a weight of its own."""
    outputs = model(**batch)
    return (outputs.flatten(1).square().sum(1) * weights).mean()


def language(model: nn.Module, batch: dict[str, torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """The token mean of a causal language model, labels moved by one, -100 left out."""
    batch = dict(batch)
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    return (losses * weights[:, None]).sum() / (labels[:, 1:] != -100).sum()


def one_by_one(
    model: nn.Module, batches: list[dict[str, torch.Tensor]], ids: list[list[int]], loss: Loss, seed: int
) -> dict[int, dict[str, np.ndarray]]:
    """Each sample's summand of the gradient: the same batch, every other sample's loss weighted zero."""
    found: dict[int, dict[str, np.ndarray]] = {}
    for number, (batch, samples) in enumerate(zip(batches, ids, strict=True)):
        for row, sample in enumerate(samples):
            model.zero_grad()
            torch.manual_seed(seed + number)
            weights = torch.zeros(len(samples))
            weights[row] = 1
            (loss(model, batch, weights) / len(batches)).backward()
            gradients = found.setdefault(sample, {})
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    gradients[name] = gradients.get(name, 0) + parameter.grad.double().numpy()
    model.zero_grad()
    return found


def recorded(
    path: Path, model: nn.Module, batches: list[dict[str, torch.Tensor]], ids: list[list[int]], loss: Loss, seed: int
) -> dict[int, dict[str, np.ndarray]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with timstore.open(path) as store:
        with store.record(model, optimizer, samples=SAMPLES):
            for number, (batch, samples) in enumerate(zip(batches, ids, strict=True)):
                # The order check runs the model too, and leaves the random state alone.
                torch.manual_seed(seed + number)
                ones = torch.ones(len(samples))
                (loss(model, {**batch, "sample_ids": torch.tensor(samples)}, ones) / len(batches)).backward()
            optimizer.step()
        return {record.sample: {name: record.dense(name) for name in record.gradients} for record in store.read()}


def compare(got: dict[int, dict[str, np.ndarray]], want: dict[int, dict[str, np.ndarray]]) -> None:
    assert sorted(got) == sorted(SAMPLES)
    for sample in SAMPLES:
        # Relative to the record: single gradients can be pure rounding noise (a key's bias in attention).
        scale = np.sqrt(sum(float(np.square(one).sum()) for one in want[sample].values()))
        for name, gradient in want[sample].items():
            if not gradient.any() and name not in got[sample]:
                continue
            error = float(np.linalg.norm(got[sample][name] - gradient))
            assert error <= 1e-5 * max(float(np.linalg.norm(gradient)), 1e-2 * scale), (sample, name, error)


def check(tmp_path: Path, model: nn.Module, batches: list[dict[str, Any]], ids: list[list[int]], loss: Loss) -> None:
    want = one_by_one(model, batches, ids, loss, seed=3)
    got = recorded(tmp_path / "s", model, batches, ids, loss, seed=3)
    compare(got, want)


IDS = [[11, 2, 5, 7], [4, 8, 11, 0]]


def vectors(*shape: int) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"x": torch.randn(4, *shape)} for _ in range(2)]


def tokens(vocabulary: int, length: int) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    batches = []
    for _ in range(2):
        ids = torch.randint(0, vocabulary, (4, length))
        labels = ids.clone()
        labels[0, : length // 2] = -100
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def test_an_mlp_with_dropout_and_in_place_activations(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net(
        nn.Linear(9, 16), nn.ReLU(inplace=True), nn.LayerNorm(16), nn.Dropout(0.3), nn.Linear(16, 4, bias=False)
    )
    check(tmp_path, model, vectors(9), IDS, squares)


def test_three_axes_and_an_in_place_operation_on_a_linears_output(tmp_path: Path) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            hidden += 1
            out: torch.Tensor = self.second(hidden.relu_())
            return out

    torch.manual_seed(0)
    check(tmp_path, InPlace(), vectors(5, 6), IDS, squares)


def test_a_small_cnn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.GELU(),
        nn.Conv2d(8, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(36, 5),
    )
    check(tmp_path, model, vectors(3, 8, 8), IDS, squares)


def test_a_module_called_twice_and_a_tied_weight(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(7, 7)
            self.outer = nn.Linear(7, 7)
            self.outer.weight = self.inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.outer(self.inner(self.inner(x).tanh()).tanh())
            return out

    torch.manual_seed(0)
    check(tmp_path, Twice(), vectors(7), IDS, squares)


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_with_masked_prompt_tokens_and_accumulation(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
        attention_dropout=0.1,
    )
    check(tmp_path, LlamaForCausalLM(config).train(), tokens(60, 12), IDS, language)


def test_a_gpt2_with_tied_embeddings_conv1d_and_dropout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    check(tmp_path, GPT2LMHeadModel(config).train(), tokens(60, 12), IDS, language)


def test_padding_tokens_have_no_row_in_an_embeddings_gradient(tmp_path: Path) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 6, padding_idx=0)
            self.out = nn.Linear(6, 2)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.out(self.table(input_ids).sum(1))
            return out

    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 4, (4, 6))} for _ in range(2)]
    check(tmp_path, Bag(), batches, IDS, squares)


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


def test_a_recorded_run_is_bit_for_bit_the_run_without_recording(tmp_path: Path) -> None:
    def train(record: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = Net(nn.Linear(9, 16), nn.Dropout(0.2), nn.GELU(), nn.Linear(16, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        batches = vectors(9) * 3
        if not record:
            for batch in batches:
                squares(model, batch, torch.ones(4)).backward()
                optimizer.step()
                optimizer.zero_grad()
            return [parameter.detach() for parameter in model.parameters()]
        with timstore.open(tmp_path / "s") as store, store.record(model, optimizer, samples=[2]):
            for batch in batches:
                squares(model, {**batch, "sample_ids": torch.arange(4)}, torch.ones(4)).backward()
                optimizer.step()
                optimizer.zero_grad()
        return [parameter.detach() for parameter in model.parameters()]

    for plain, with_record in zip(train(False), train(True), strict=True):
        assert torch.equal(plain, with_record)
