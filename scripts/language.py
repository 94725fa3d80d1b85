"""A small Llama on sources of Python's standard library: its text, its pre-training, its fine-tuning."""

import math
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from transformers import LlamaConfig, LlamaForCausalLM

import timstore

# Names, not "the first twenty", so that every Python version reads the same files.
PRE_TRAINING = (
    "argparse ast calendar codecs configparser contextlib copy csv dataclasses datetime difflib dis doctest enum "
    "fractions ftplib functools gettext gzip heapq http/client inspect ipaddress"
)
FINE_TUNING = "mailbox optparse pathlib pickle platform plistlib random shutil statistics subprocess"
HELD_OUT = "tarfile tempfile"
FORGOTTEN = "html/entities"

CONTEXT, VOCABULARY = 64, 2048
SEQUENCES, FORGET, BATCH, EPOCHS = 496, 16, 16, 2
PRE_STEPS, PRE_BATCH, PRE_LR = 200, 32, 3e-3
WARM_UP, CLIP = 8, 1.0


class Tokenizer:
    """The commonest words of a text, one token each; other words byte by byte."""

    pattern = re.compile(r"[A-Za-z]+|[0-9]|\n *| +|[^A-Za-z0-9\s]|\s")

    def __init__(self, text: str, size: int) -> None:
        common = Counter(self.pattern.findall(text)).most_common(size - 256)
        self.words = [word for word, _ in common]
        self.numbers = {word: 256 + number for number, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = []
        for word in self.pattern.findall(text):
            tokens += [self.numbers[word]] if word in self.numbers else word.encode()
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        parts = (bytes([one]) if one < 256 else self.words[one - 256].encode() for one in tokens)
        return b"".join(parts).decode(errors="replace")


def source(names: str) -> str:
    library = Path(sysconfig.get_path("stdlib"))
    return "".join((library / f"{name}.py").read_text(encoding="utf-8") for name in names.split())


@dataclass(frozen=True)
class Text:
    """Sequences of CONTEXT tokens, (sequences, CONTEXT) each; the last FORGET of `tuning` are to be forgotten."""

    pre: torch.Tensor
    tuning: torch.Tensor
    held_out: torch.Tensor
    tokenizer: Tokenizer

    @classmethod
    def read(cls, seed: int, forgotten: str = FORGOTTEN) -> "Text":
        """Draw the text of a run; without a file to forget, FORGET sequences of the others are."""
        draw = torch.Generator().manual_seed(seed)
        tokenizer = Tokenizer(source(PRE_TRAINING), VOCABULARY)

        def sequences(names: str, count: int | None = None) -> torch.Tensor:
            tokens = torch.tensor(tokenizer.encode(source(names)))
            whole = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
            return whole if count is None else whole[torch.randperm(len(whole), generator=draw)[:count]]

        tuning = sequences(FINE_TUNING, SEQUENCES)
        if forgotten:
            tuning[-FORGET:] = sequences(forgotten)[:FORGET]
        return cls(sequences(PRE_TRAINING), tuning, sequences(HELD_OUT, 128), tokenizer)

    @property
    def forget_ids(self) -> list[int]:
        return list(range(len(self.tuning) - FORGET, len(self.tuning)))

    def forgetting(self, sequences: torch.Tensor) -> "Text":
        """Return the same text with other sequences to be forgotten."""
        return replace(self, tuning=torch.cat([self.tuning[:-FORGET], sequences]))

    def judged(self) -> dict[str, torch.Tensor]:
        return {"forget": self.tuning[-FORGET:], "retain": self.tuning[:128], "held-out": self.held_out}


def new_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def summed_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def pre_train(model: LlamaForCausalLM, text: torch.Tensor, seed: int, steps: int = PRE_STEPS) -> None:
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRE_LR, weight_decay=0.01)
    for step in track(range(steps), "pre-training", transient=True):
        share = min(1, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = PRE_LR * share
        tokens = text[torch.randint(len(text), (PRE_BATCH,), generator=draw)]
        loss = summed_loss(model(input_ids=tokens).logits, tokens) / (PRE_BATCH * (CONTEXT - 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def fine_tune(
    model: torch.nn.Module,
    text: Text,
    optimizer: torch.optim.Optimizer,
    order_seed: int,
    store: timstore.Store | None = None,
    *,
    epochs: int = EPOCHS,
    history: str = "final",
    without: Sequence[int] = (),
    after_step: Callable[[torch.Tensor], None] = lambda ids: None,
) -> None:
    """Fine-tune in place, with warm-up, cosine and clipping.

    Sequences left out keep their places in the batches and in the loss's denominator.

    Args:
        optimizer: its rate is the highest.
        history: what the store keeps of the optimizer, `final` or `gradients`.
        after_step: called with the ids of every step's batch.
    """
    draw = torch.Generator().manual_seed(order_seed)
    left_out = torch.tensor(without, dtype=torch.long)
    highest = optimizer.param_groups[0]["lr"]
    steps = epochs * math.ceil(len(text.tuning) / BATCH)

    def loop(recorder: object = None) -> None:
        step = 0
        for epoch in range(epochs):
            if recorder is not None:
                recorder.epoch = epoch
            batches = torch.randperm(len(text.tuning), generator=draw).split(BATCH)
            for ids in track(batches, f"epoch {epoch}", transient=True):
                ids = ids[~torch.isin(ids, left_out)]
                tokens = text.tuning[ids]
                share = min(1, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
                optimizer.param_groups[0]["lr"] = highest * share
                step += 1
                named = {} if recorder is None else {"sample_ids": ids}
                loss = summed_loss(model(input_ids=tokens, **named).logits, tokens) / (BATCH * (CONTEXT - 1))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
                after_step(ids)

    if store is None:
        loop()
    else:
        with store.record(model, optimizer, samples=text.forget_ids, optimizer_history=history) as recorder:
            loop(recorder)


@torch.no_grad()
def log_chances(model: LlamaForCausalLM, text: Text) -> dict[str, torch.Tensor]:
    return {name: model(input_ids=x).logits[:, :-1].log_softmax(-1) for name, x in text.judged().items()}
