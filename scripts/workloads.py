"""Trainings to judge a rollback on: what was trained, what is forgotten of it, and the models that retraining gives.

Four kinds of data: sources of Python's standard library, facts of invented authors in the shape of TOFU's (questions,
answers; only answers are learnt), handwritten digits, and nonsense that is to be memorised. Each workload is trained
once with a recorder, once without what is forgotten (the truth), once more so in another order of batches (its noise);
the models and the store are kept in a folder and found there again.
"""

import contextlib
import copy
import glob
import math
import os
import re
import shutil
import sysconfig
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from authors import Row, encoded, facts, numbered
from llama import adamw, sgd, with_lora
from sklearn.datasets import load_digits
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import timstore

BATCH, CONTEXT, WORDS, IGNORED = 12, 32, 1024, -100
WAYS = KEPT, STAYING, FILLED = "kept", "staying", "filled up"


@dataclass(frozen=True)
class Workload:
    """One training.

    Attributes:
        data: `library`, `facts`, `digits`, or `tofu` (`tofu.py`).
        optimizer: `adamw`, `sgd` (momentum 0.9) or `lora` (AdamW on adapters).
        forget: `document`, `random`, `authors`, `class`, `mislabelled` or `memorised`.
        rows, forgotten: samples in all, and how many of them are to be forgotten.
        aside: whether it was not looked at while the method was made.
    """

    data: str
    optimizer: str
    rate: float
    epochs: int
    forget: str
    forgotten: int
    rows: int = 384
    seed: int = 0
    aside: bool = False

    @property
    def name(self) -> str:
        return (
            f"{self.data} {self.optimizer} {self.rate:g} x{self.epochs} "
            f"{self.forget} {self.forgotten}/{self.rows} s{self.seed}"
        )

    def kept_in(self, folder: Path) -> Path:
        """Return where in a folder what it gave is kept."""
        return folder / re.sub(r"\W+", "-", self.name)

    def seeds(self, count: int) -> list["Workload"]:
        """Return it with other data and other starts; itself first."""
        return [replace(self, seed=self.seed + 4 * number) for number in range(count)]


EXPLORED = (
    Workload("library", "adamw", 2e-4, 2, "document", 12),
    Workload("library", "adamw", 8e-4, 5, "document", 32),
    Workload("library", "adamw", 5e-4, 3, "random", 12),
    Workload("library", "sgd", 2e-2, 2, "document", 12),
    Workload("library", "lora", 1e-3, 3, "document", 12),
    Workload("facts", "adamw", 2e-3, 2, "authors", 32),
    Workload("facts", "adamw", 2e-3, 5, "authors", 32),
    Workload("facts", "adamw", 4e-4, 3, "authors", 8),
    Workload("facts", "lora", 3e-3, 5, "authors", 16),
    Workload("library", "adamw", 5e-4, 6, "memorised", 4),
    Workload("library", "adamw", 5e-4, 2, "mislabelled", 24),
    Workload("digits", "adamw", 3e-3, 5, "mislabelled", 48, 960),
    Workload("digits", "sgd", 2e-2, 8, "class", 90, 960),
)
ASIDE = tuple(
    Workload(*given, aside=True)  # type: ignore[arg-type]
    for given in (
        ("library", "adamw", 1e-3, 1, "random", 38, 384, 1),
        ("library", "adamw", 1e-4, 8, "document", 4, 384, 1),
        ("library", "adamw", 1e-3, 4, "random", 4, 384, 2),
        ("library", "sgd", 4e-2, 4, "random", 24, 384, 1),
        ("library", "lora", 2e-3, 5, "random", 38, 384, 2),
        ("facts", "adamw", 1e-3, 1, "authors", 8, 384, 1),
        ("facts", "adamw", 5e-4, 8, "authors", 16, 384, 2),
        ("facts", "sgd", 5e-2, 4, "authors", 32, 384, 1),
        ("facts", "lora", 1e-3, 2, "authors", 32, 384, 3),
        ("library", "sgd", 2e-2, 6, "memorised", 4, 384, 1),
        ("facts", "adamw", 1e-3, 3, "mislabelled", 24, 384, 1),
        ("digits", "adamw", 1e-3, 3, "random", 96, 960, 1),
        ("digits", "sgd", 5e-2, 4, "mislabelled", 24, 960, 1),
    )
)


@dataclass(frozen=True)
class Data:
    """Samples: `inputs` (n, ...) and `labels` (n, positions), -100 where nothing is asked.

    Attributes:
        forget: which of them are to be forgotten.
        held_out: (inputs, labels) of data like the retained one.
        earlier: what the model was trained on before.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    forget: list[int]
    held_out: tuple[torch.Tensor, torch.Tensor]
    earlier: tuple[torch.Tensor, torch.Tensor]
    values: int

    @property
    def retained(self) -> list[int]:
        return sorted(set(range(len(self.inputs))) - set(self.forget))

    def judged(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        some = self.retained[:96]
        return {
            "forget": (self.inputs[self.forget], self.labels[self.forget]),
            "held-out": self.held_out,
            "retain": (self.inputs[some], self.labels[some]),
        }

    def probe(self, ids: Sequence[int]) -> list[object]:
        """Return samples as batches that the model takes."""
        chosen = torch.tensor(ids)
        return _batches(self.inputs[chosen], self.labels[chosen])

    def earlier_probe(self, count: int) -> list[object]:
        """Return the first of what the model was trained on before; nothing if that is nothing."""
        inputs, labels = self.earlier
        return _batches(inputs[:count], labels[:count]) if len(inputs) else []


def _batches(inputs: torch.Tensor, labels: torch.Tensor) -> list[object]:
    if inputs.is_floating_point():
        return list(inputs.split(8))
    return [{"input_ids": a, "labels": b} for a, b in zip(inputs.split(8), labels.split(8), strict=True)]


def logits(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the model's answers, (positions that are asked, values)."""
    if inputs.is_floating_point():
        found: torch.Tensor = model(inputs)
        return found
    answers = model(input_ids=inputs, labels=labels).logits[:, :-1]
    return answers[labels[:, 1:] != IGNORED]


def targets(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    asked = labels[:, 0] if inputs.is_floating_point() else labels[:, 1:]
    return asked[asked != IGNORED]


def train(
    model: nn.Module,
    data: Data,
    workload: Workload,
    order: int,
    store: timstore.Store | None = None,
    without: Iterable[int] = (),
    *,
    way: str = KEPT,
    clip: float = 1.0,
    history: str = "final",
) -> None:
    """Train in place, with warm-up, linear decay and clipping.

    Args:
        way: of training without samples, one of `WAYS`. `KEPT`: they keep their places in the batches and in the loss's
            denominator; `STAYING`: their places alone; `FILLED`: neither, batches are filled up and steps are fewer.
        clip: to this norm.
        history: of the optimizer, that the store keeps.
    """
    draw, out = torch.Generator().manual_seed(order), torch.tensor(sorted(without), dtype=torch.long)
    optimizer = (sgd if workload.optimizer == "sgd" else adamw)(workload.rate)(model)
    drawn = [torch.randperm(len(data.inputs), generator=draw) for _ in range(workload.epochs)]
    if way == FILLED:
        drawn = [ids[~torch.isin(ids, out)] for ids in drawn]
    plan = [(epoch, ids) for epoch, whole in enumerate(drawn) for ids in whole.split(BATCH)]
    asked = (data.labels[:, 0 if data.inputs.is_floating_point() else 1 :] != IGNORED).sum(1)
    recording: Any = contextlib.nullcontext()
    if store is not None:
        recording = store.record(model, optimizer, samples=data.forget, optimizer_history=history)
    with recording as recorder:
        for step, (epoch, ids) in enumerate(plan):
            optimizer.param_groups[0]["lr"] = workload.rate * min(1, (step + 1) / 5) * (1 - step / len(plan))
            kept = ids[~torch.isin(ids, out)]
            if recorder is not None:
                recorder.epoch = epoch
                recorder.batch(kept)
            inputs, labels = data.inputs[kept], data.labels[kept]
            loss = F.cross_entropy(logits(model, inputs, labels), targets(inputs, labels), reduction="sum")
            over = asked[ids if way == KEPT else kept].sum().clamp(min=1)
            (loss / over).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


# --- data and models --------------------------------------------------------------------------------------------


def read(workload: Workload) -> Data:
    make = {"library": _library, "facts": _facts, "digits": _digits}[workload.data]
    data = make(workload)
    if workload.forget == "mislabelled":
        draw = torch.Generator().manual_seed(workload.seed)
        wrong = data.labels.clone()
        for one in data.forget:
            asked = wrong[one] != IGNORED
            wrong[one, asked] = torch.randint(0, data.values, (int(asked.sum()),), generator=draw)
        return Data(data.inputs, wrong, data.forget, data.held_out, data.earlier, data.values)
    return data


def _forgotten(workload: Workload) -> list[int]:
    return list(range(workload.rows - workload.forgotten, workload.rows))


@cache
def _words(first: int, last: int) -> list[str]:
    files = sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/*/*.py"))[first:last]
    return [word for file in files for word in re.findall(r"\w+|\S", Path(file).read_text(errors="ignore"))]


def _library(workload: Workload) -> Data:
    """Pre-trained on some files, fine-tuned on others; a document to be forgotten is of a third kind."""
    shift, draw = 20 + 60 * workload.seed, torch.Generator().manual_seed(workload.seed)
    common = Counter(_words(20, 100)).most_common(WORDS - 1)
    numbers = {word: number for number, (word, _) in enumerate(common, 1)}

    def sequences(first: int, last: int) -> torch.Tensor:
        found = torch.tensor([numbers.get(word, 0) for word in _words(first, last)])
        return found[: len(found) // CONTEXT * CONTEXT].view(-1, CONTEXT)

    earlier, tuning, other = sequences(20, 100), sequences(shift + 80, shift + 110), sequences(shift + 110, shift + 125)
    tuning = tuning[torch.randperm(len(tuning), generator=draw)]
    inputs, held_out, forget = tuning[: workload.rows].clone(), tuning[workload.rows :][:96], _forgotten(workload)
    if workload.forget == "document":
        inputs[forget] = other[: workload.forgotten]
    elif workload.forget == "memorised":
        few = torch.randint(1, WORDS, (workload.forgotten, 8), generator=draw)
        inputs[forget] = few.gather(1, torch.randint(0, 8, (workload.forgotten, CONTEXT), generator=draw))
    return Data(inputs, inputs, forget, (held_out, held_out), (earlier, earlier), WORDS)


def _facts(workload: Workload) -> Data:
    """Pre-trained on some authors, fine-tuned on others; whole authors are forgotten."""
    return answering(workload, facts(workload.rows, workload.seed))


def answering(workload: Workload, texts: list[list[Row]]) -> Data:
    """Return what `facts` returned as samples."""
    numbers = numbered(texts)
    earlier, tuning, held_out = (encoded(rows, numbers, CONTEXT, IGNORED) for rows in texts)
    return Data(*tuning, _forgotten(workload), held_out, earlier, len(numbers) + 1)


def _digits(workload: Workload) -> Data:
    """Trained from scratch."""
    found = load_digits()
    draw = torch.Generator().manual_seed(workload.seed)
    order = torch.randperm(len(found.target), generator=draw)
    pixels, labels = torch.tensor(found.data, dtype=torch.float32)[order], torch.tensor(found.target)[order]
    pixels = (pixels - pixels.mean(0)) / (pixels.std(0) + 0.1)
    forget = _forgotten(workload)
    if workload.forget == "class":
        forget = torch.nonzero(labels[: workload.rows] == 3)[: workload.forgotten, 0].tolist()
    inputs, rest = pixels[: workload.rows], (pixels[workload.rows :], labels[workload.rows :, None])
    return Data(inputs, labels[: workload.rows, None], forget, rest, (inputs[:0], labels[:0, None]), 10)


def begin(workload: Workload, data: Data, folder: Path) -> nn.Module:
    """Return the model before the recorded training; what was pre-trained is kept in the folder."""
    torch.manual_seed(workload.seed)
    if workload.data == "digits":
        return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=max(WORDS, data.values),
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=workload.optimizer != "sgd",
            use_cache=False,
        )
    )
    tied = "untied" if workload.optimizer == "sgd" else "tied"
    kept = folder / f"{workload.data}-{workload.seed}-{tied}.pt"
    if not kept.exists():
        _pre_train(model, *data.earlier, seed=workload.seed)
        torch.save(model.state_dict(), kept)
    model.load_state_dict(torch.load(kept))
    return with_lora(model) if workload.optimizer == "lora" else model


def _pre_train(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, seed: int, steps: int = 400) -> None:
    draw, optimizer = torch.Generator().manual_seed(seed), torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        ids = torch.randint(len(inputs), (32,), generator=draw)
        F.cross_entropy(logits(model, inputs[ids], labels[ids]), targets(inputs[ids], labels[ids])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@dataclass(frozen=True)
class Trained:
    """A workload's models, all of one architecture, and the store of the recorded one.

    Attributes:
        ids: of the samples to be forgotten, as the store has them.
        models: `MODELS`, and what other methods made of the first of them.
    """

    data: Data
    store: Path
    ids: list[int]
    models: dict[str, nn.Module]


MODELS = ("trained", "retrained", "other order")


def trained(workload: Workload, folder: Path) -> Trained:
    """Train, or find what was trained: with the recorder, without what is forgotten, and so in another order."""
    folder.mkdir(parents=True, exist_ok=True)
    data = read(workload)
    model, kept = begin(workload, data, folder), workload.kept_in(folder)
    models = {name: copy.deepcopy(model) for name in MODELS}
    if not (kept / "models.pt").exists():
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        with timstore.open(kept / "store") as store:
            train(models["trained"], data, workload, 5, store)
        train(models["retrained"], data, workload, 5, without=data.forget)
        train(models["other order"], data, workload, 6, without=data.forget)
        torch.save({name: one.state_dict() for name, one in models.items()}, kept / "models.new")
        os.replace(kept / "models.new", kept / "models.pt")
    for name, state in torch.load(kept / "models.pt").items():
        models[name].load_state_dict(state)
    return Trained(data, kept / "store", data.forget, models)


@torch.no_grad()
def divergence(model: nn.Module, reference: nn.Module, data: Data) -> dict[str, float]:
    """Return KL(reference || model), the mean over what is asked, on each kind of data."""
    found = {}
    for name, (inputs, labels) in data.judged().items():
        own, truth = (logits(one, inputs, labels).double().log_softmax(-1) for one in (model, reference))
        found[name] = float((truth.exp() * (truth - own)).sum(-1).mean())
    return found
