"""The forecast against the bytes that recording really writes, and the budget."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import timstore


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def train(store: timstore.Store, model: LlamaForCausalLM, history: str, **options: object) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(1)
    text = torch.randint(0, 300, (24, 32), generator=draw)
    with store.record(model, optimizer, samples=range(12), optimizer_history=history, **options) as recorder:
        for epoch in range(2):
            recorder.epoch = epoch
            for ids in torch.randperm(24, generator=draw).split(4):
                model(input_ids=text[ids], labels=text[ids], sample_ids=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("precision", ["exact", "int8"])
@pytest.mark.parametrize("history", ["final", "gradients"])
def test_the_forecast_is_within_a_tenth_of_what_is_written(tmp_path: Path, history: str, precision: str) -> None:
    model = llama()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with timstore.open(tmp_path / "s", precision=precision) as store:
        told = store.forecast(model, samples=12, steps=12, epochs=2, tokens=32, optimizer_history=history)
        assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
        assert model.training == llama().training
        assert all(one.grad is None for one in model.parameters())
        train(store, model, history)
    written = sum(file.stat().st_size for file in (tmp_path / "s").rglob("*") if file.is_file())
    assert told.total_bytes == pytest.approx(written, rel=0.1)
    assert "24 records" in str(told)


def test_a_batch_of_one_s_own_is_measured(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3))
    with timstore.open(tmp_path / "s") as store:
        told = store.forecast(model, samples=10, steps=5, batch=torch.randn(2, 40))
        assert told.records == 10
        # A layer's gradient for one row is two vectors.
        assert told.record_bytes < 4 * sum(one.numel() for one in model.parameters()) / 4
        with pytest.raises(timstore.InvalidInputError, match="batch="):
            store.forecast(model, samples=10, steps=5)
        with pytest.raises(timstore.InvalidInputError, match="steps"):
            store.forecast(model, samples=10, steps=0, batch=torch.randn(2, 40))
        with pytest.raises(timstore.InvalidInputError, match="positions that this model has"):
            store.forecast(llama(), samples=10, steps=5, tokens=2**62)


def test_a_recording_over_its_budget_is_refused_with_what_would_fit(tmp_path: Path) -> None:
    with timstore.open(tmp_path / "s") as store:
        with pytest.raises(timstore.StateError, match=r"the budget is 8\.0 MB") as error:
            train(store, llama(), "gradients", budget="8MB", steps=12, epochs=2)
        assert "optimizer_history='final'" in str(error.value)
        assert store.sql("SELECT count(*) FROM records").fetchall() == [(0,)]
    with timstore.open(tmp_path / "t") as store:
        train(store, llama(), "gradients", budget="1GB", steps=12, epochs=2)
        assert store.sql("SELECT count(*) FROM records").fetchall() == [(24,)]
