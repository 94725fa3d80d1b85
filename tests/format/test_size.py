"""Bytes on disk, everything counted, against the same gradients as dense float32."""

import argparse
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import timstore

# Times smaller than dense float32, and the median relative error.
LIMITS = {"exact": (7.5, 0), "bfloat16": (18, 0.004), "int8": (28, 0.01)}


def text(samples: int, tokens: int) -> torch.Tensor:
    """Return words of a source file, numbered by how common they are: random ids would repeat less than text."""
    words = re.findall(r"\w+|\s+|.", inspect.getsource(argparse))
    numbers = {word: number for number, (word, _) in enumerate(Counter(words).most_common())}
    return torch.tensor([numbers[word] for word in words[: samples * tokens]]).view(samples, tokens)


@pytest.mark.parametrize("precision", LIMITS)
def test_a_record_of_a_width_512_llama_with_64_tokens_is_as_small_as_promised(tmp_path: Path, precision: str) -> None:
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
    ids = text(6, 64)
    with timstore.open(tmp_path / "s", precision=precision) as store:
        with store.record(model, optimizer):
            model(input_ids=ids, labels=ids, sample_ids=range(6)).loss.backward()
            optimizer.step()
        records = store.sql("SELECT count(*) FROM records").fetchall()[0][0]
        median, largest = store.sql("SELECT median(rel_error), max(rel_error) FROM gradients").fetchall()[0]
    on_disk = sum(path.stat().st_size for path in (tmp_path / "s").rglob("*") if path.is_file())
    dense = records * sum(parameter.numel() * 4 for parameter in model.parameters())
    smaller, error = LIMITS[precision]
    assert records == 6
    assert on_disk <= dense / smaller
    assert median <= error
    assert largest <= 0.02
