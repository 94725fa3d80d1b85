"""Recorded gradients against autograd, one sample at a time, in the batch they were trained in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from networks import Net, squares, vectors
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import timstore

SAMPLES = [11, 5, 8]
Loss = Callable[[nn.Module, dict[str, torch.Tensor], torch.Tensor], torch.Tensor]


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
) -> list[dict[int, dict[str, np.ndarray]]]:
    """Two steps that change nothing: in the first all rows are captured, in the second only the chosen ones."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with timstore.open(path) as store:
        with store.record(model, optimizer, samples=SAMPLES):
            for _ in range(2):
                for number, (batch, samples) in enumerate(zip(batches, ids, strict=True)):
                    # The order check runs the model too, and leaves the random state alone.
                    torch.manual_seed(seed + number)
                    ones = torch.ones(len(samples))
                    (loss(model, {**batch, "sample_ids": torch.tensor(samples)}, ones) / len(batches)).backward()
                optimizer.step()
                optimizer.zero_grad()
        steps: list[dict[int, dict[str, np.ndarray]]] = [{}, {}]
        for record in store.read():
            steps[record.step][record.sample] = {name: record.dense(name) for name in record.gradients}
        return steps


def compare(got: dict[int, dict[str, np.ndarray]], want: dict[int, dict[str, np.ndarray]]) -> None:
    assert sorted(got) == sorted(SAMPLES)
    for sample in SAMPLES:
        # Some gradients are pure rounding noise (a key's bias in attention): 1e-7 of the record is none.
        scale = np.sqrt(sum(float(np.square(one).sum()) for one in want[sample].values()))
        for name, gradient in want[sample].items():
            if not gradient.any() and name not in got[sample]:
                continue
            error = float(np.linalg.norm(got[sample][name] - gradient))
            assert error <= max(1e-5 * float(np.linalg.norm(gradient)), 1e-7 * scale), (sample, name, error)


def check(tmp_path: Path, model: nn.Module, batches: list[dict[str, Any]], ids: list[list[int]], loss: Loss) -> None:
    want = one_by_one(model, batches, ids, loss, seed=3)
    for got in recorded(tmp_path / "s", model, batches, ids, loss, seed=3):
        compare(got, want)


IDS = [[11, 2, 5, 7], [4, 8, 11, 0]]


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


class Attention(nn.Module):
    """Its key bias has a gradient of rounding noise alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [layer(x).unflatten(2, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        out: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class ChannelNorm(nn.LayerNorm):
    """Returns a permuted view, as ConvNeXt's does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ScaledEmbedding(nn.Embedding):
    """A subclass with another forward, as Gemma's."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * 3


class Scale(nn.Module):
    """Two parameters, one of which is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.used


class OneRow(nn.Module):
    """Adds a bias: one sample's gradient is a view of what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.rand(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: nn.Sequential(nn.Linear(6, 8), Attention()),
    "rms norm": lambda: nn.Sequential(nn.Linear(6, 7), nn.RMSNorm(7)),
    "a permuted view": lambda: nn.Sequential(nn.Unflatten(2, (6, 1)), nn.Conv2d(5, 4, 1), ChannelNorm(4)),
    "conv1d": lambda: nn.Sequential(nn.Conv1d(5, 3, 2), nn.ReLU(inplace=True), nn.Conv1d(3, 2, 3)),
    "an unused parameter": lambda: nn.Sequential(Scale(), nn.Linear(6, 2)),
    "a bias of its own": lambda: nn.Sequential(nn.Linear(6, 6), OneRow(), OneRow(), nn.Linear(6, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_many_kinds(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    check(tmp_path, Net(LAYERS[name]()), vectors(5, 6), IDS, squares)


def test_a_subclass_with_another_forward_is_not_taken_for_its_parent(tmp_path: Path) -> None:
    torch.manual_seed(0)
    doubled = nn.Linear(6, 5)
    plain = doubled.forward
    doubled.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]
    model = Net(doubled, nn.Linear(5, 2))
    check(tmp_path / "a", model, vectors(6), IDS, squares)

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = ScaledEmbedding(20, 6), nn.Linear(6, 2)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.out(self.table(input_ids))
            return out

    check(tmp_path / "b", Table(), [{"input_ids": torch.randint(0, 20, (4, 6))} for _ in range(2)], IDS, squares)


def test_a_checkpointed_part_that_is_computed_twice_is_recorded_once(tmp_path: Path) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8)), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)
            out: torch.Tensor = self.out(hidden)
            return out

    torch.manual_seed(0)
    check(tmp_path, Checkpointed(), vectors(5, 6), IDS, squares)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_weights_is_the_dtype_of_the_record(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Net(nn.Linear(9, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)).to(dtype)
    batches = [{"x": batch["x"].to(dtype)} for batch in vectors(9)]
    want = one_by_one(model, batches, IDS, squares, seed=3)
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for got in recorded(tmp_path / "s", model, batches, IDS, squares, seed=3):
        assert sorted(got) == sorted(SAMPLES)
        for sample, gradients in got.items():
            for name, gradient in gradients.items():
                error = np.linalg.norm(gradient - want[sample][name])
                assert error <= tolerance * np.linalg.norm(want[sample][name]), (sample, name)


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
