"""Bytes on disk, everything counted, against the same gradients as dense float32."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import timstore


def test_a_record_of_a_width_512_llama_with_64_tokens_takes_a_seventh_of_dense_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=6,
            num_attention_heads=8,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ids = torch.randint(0, 8192, (2, 64))
    with timstore.open(tmp_path / "s") as store:
        with store.record(model, optimizer):
            model(input_ids=ids, labels=ids, sample_ids=[3, 4]).loss.backward()
            optimizer.step()
        records = store.sql("SELECT count(*) FROM records").fetchall()[0][0]
    on_disk = sum(path.stat().st_size for path in (tmp_path / "s").rglob("*") if path.is_file())
    dense = records * sum(parameter.numel() * 4 for parameter in model.parameters())
    assert records == 2
    assert on_disk <= dense / 7
