"""Llama-shaped nets, trained and recorded on real text: the stores that the benchmarks of bytes weigh."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import zarr
from language import PRE_TRAINING, Tokenizer, source
from rich.progress import track
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import timstore

RATE, BATCH, PRE_BATCH_TOKENS = 6e-4, 8, 1024


@dataclass(frozen=True)
class Net:
    """A Llama's shape.

    Attributes:
        blocks_only: only the Linear layers of the blocks are trained and recorded, not embedding, head and norms.
    """

    name: str
    width: int
    inner: int
    depth: int
    heads: int
    vocabulary: int
    tied: bool
    blocks_only: bool = False

    def new(self) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            tie_word_embeddings=self.tied,
            use_cache=False,
        )
        model = LlamaForCausalLM(config)
        if self.blocks_only:
            model.requires_grad_(False)
            for module in model.model.layers.modules():
                if isinstance(module, nn.Linear):
                    module.requires_grad_(True)
        return model


TIED = Net("512 tied", 512, 1408, 6, 8, 8192, tied=True)
UNTIED = Net("512 untied", 512, 1408, 6, 8, 8192, tied=False)
# 655,360 weights: where gradients as factors save least.
BLOCKS = Net("128 blocks", 128, 256, 4, 4, 2048, tied=True, blocks_only=True)


@cache
def text(vocabulary: int, tokens: int) -> torch.Tensor:
    """Return sources of the standard library in sequences of so many tokens."""
    words = source(PRE_TRAINING)
    ids = torch.tensor(Tokenizer(words, vocabulary).encode(words))
    return ids[: len(ids) // tokens * tokens].view(-1, tokens)


@cache
def trained(net: Net, steps: int) -> LlamaForCausalLM:
    """Return the net after so many steps of AdamW on sequences of 64 tokens; not to be changed."""
    torch.manual_seed(0)
    model = net.new()
    everything = list(model.parameters())
    frozen = [one for one in everything if not one.requires_grad]
    for one in frozen:  # all of it learns first, whatever is recorded afterwards
        one.requires_grad_(True)
    optimizer = torch.optim.AdamW(everything, lr=RATE)
    corpus, draw = text(net.vocabulary, 64), torch.Generator().manual_seed(0)
    for _ in track(range(steps), f"training, {net.name}", transient=True):
        _step(model, optimizer, corpus[torch.randint(len(corpus), (PRE_BATCH_TOKENS // 64,), generator=draw)])
    for one in frozen:
        one.requires_grad_(False)
    return model


def record(net: Net, path: Path, *, precision: str, tokens: int, records: int, steps: int, masked: str = "") -> None:
    """Record the next steps of a training, BATCH samples each.

    Args:
        tokens: of a sequence.
        steps: of training before.
        masked: `prompt`: the first half of every sequence has no loss; `padded`: every sequence but the first of a
            batch ends early, at a length between a quarter and the whole drawn evenly.
    """
    model = net.new()
    model.load_state_dict(trained(net, steps).state_dict())
    # Not AdamW: its second moment is kept once in a run, and would count at a few records as if it were theirs.
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=RATE, momentum=0.9)
    corpus, draw = text(net.vocabulary, tokens), torch.Generator().manual_seed(1)
    chosen = torch.randperm(len(corpus), generator=draw)[:records]
    with timstore.open(path, precision=precision) as store, store.record(model, optimizer, probe=False):
        for ids in chosen.split(BATCH):
            _step(model, optimizer, corpus[ids], masked=masked, draw=draw, sample_ids=ids)


def seconds_per_sample(net: Net, tokens: int, steps: int) -> float:
    """Return what a training step without recording takes per sample, the fastest of three."""
    model = net.new()
    model.load_state_dict(trained(net, steps).state_dict())
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=RATE, momentum=0.9)
    batch, taken = text(net.vocabulary, tokens)[:BATCH], []
    for _ in range(3):
        begun = time.perf_counter()
        _step(model, optimizer, batch)
        taken.append(time.perf_counter() - begun)
    return min(taken) / BATCH


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: torch.Tensor,
    *,
    masked: str = "",
    draw: torch.Generator | None = None,
    **named: torch.Tensor,
) -> None:
    labels, mask = tokens.clone(), torch.ones_like(tokens)
    length = tokens.shape[1]
    if masked == "prompt":
        labels[:, : length // 2] = -100
    elif masked == "padded":
        lengths = torch.randint(length // 4, length + 1, (len(tokens), 1), generator=draw)
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()
        labels[mask == 0] = -100
    model(input_ids=tokens * mask, attention_mask=mask, labels=labels, **named).loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def matrices(path: Path, net: Net) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (what it is, rows) of every stored matrix, read with plain Zarr and Parquet; bfloat16 as its bits."""
    for slices in sorted(path.glob("data/*/*/slices.parquet")):
        group, seen = zarr.open_group(slices.parent / "z", mode="r"), set()
        arrays = {name: np.asarray(array[:]) for name, array in group.arrays()}
        for row in pq.read_table(slices, columns=["role", "array", "start", "rows"]).to_pylist():
            place = row["array"], row["start"]
            if place in seen:
                continue  # an input that layers share
            seen.add(place)
            kind, width = row["role"].replace("_", " "), arrays[row["array"]].shape[1]
            if kind.startswith("output gradients") and width in (net.vocabulary, -(-net.vocabulary // 64)):
                kind = f"head's {kind}"
            yield kind, arrays[row["array"]][row["start"] : row["start"] + row["rows"]]
