"""Handwritten digits: a logistic regression and a small MLP, trained from scratch or fine-tuned."""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from judging import AfterStep, Case, Row
from sklearn.datasets import load_digits
from torch import nn

import timstore

TRAIN, EARLIER, POOL, PROBE, BATCH, CLIP, DECAY = 1437, 720, 80, 64, 32, 1.0, 1e-3
RANDOM, MISLABELLED, FORGOTTEN_CLASS = 14, 72, 3
FORGETS = ("random", "mislabelled", "class")
REGIMES = {"from scratch": 3, "fine-tuning": 2}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "LR": lambda: nn.Sequential(nn.Linear(64, 10)),
    "MLP": lambda: nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)),
}
Parameters = list[nn.Parameter]
OPTIMIZERS: dict[str, Callable[[Parameters, float], torch.optim.Optimizer]] = {
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr),
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9),
    "Nesterov + L2": lambda parameters, lr: torch.optim.SGD(
        parameters, lr, momentum=0.9, nesterov=True, weight_decay=DECAY
    ),
    "AdamW + clip": lambda parameters, lr: torch.optim.AdamW(parameters, lr, weight_decay=0.01),
}
# Rates at which three epochs bring the test accuracy to nine of ten, without coming near instability.
RATES = {
    "LR": {"SGD": 0.05, "momentum": 0.01, "Nesterov + L2": 0.01, "AdamW + clip": 5e-3},
    "MLP": {"SGD": 0.2, "momentum": 0.05, "Nesterov + L2": 0.05, "AdamW + clip": 3e-3},
}


@cache
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Return (images, labels) in the split's order, the same in every run: train, probes, test; pixels standardised."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(found.data, dtype=torch.float32)[order]
    seen = pixels[:TRAIN]
    return (pixels - seen.mean(0)) / (seen.std(0) + 0.1), torch.tensor(found.target)[order]


class Digits(Case):
    """A run of a model, an optimizer and a regime; the ids are places in the split's order.

    From scratch, 3 epochs over 1437 images are recorded. In fine-tuning, 10 epochs over 720 come first; then 2
    epochs at a tenth of the rate over the 717 others, the forgotten among them, are recorded.
    """

    def __init__(self, model: str, optimizer: str, regime: str, forgotten: str, seed: int) -> None:
        self._optimizer, self._rate = OPTIMIZERS[optimizer], RATES[model][optimizer]
        self._clips, self._epochs = optimizer.endswith("clip"), REGIMES[regime]
        self._images, labels = images()
        self._labels = labels.clone()
        tuned = regime == "fine-tuning"
        self._ids = torch.arange(EARLIER if tuned else 0, TRAIN)
        draw = torch.Generator().manual_seed(seed)
        shuffled = self._ids[torch.randperm(len(self._ids), generator=draw)]
        if forgotten == "class":
            forget = self._ids[labels[self._ids] == FORGOTTEN_CLASS]
        else:
            forget = shuffled[: RANDOM if forgotten == "random" else MISLABELLED].sort().values
        if forgotten == "mislabelled":
            self._labels[forget] = (labels[forget] + torch.randint(1, 10, forget.shape, generator=draw)) % 10
        self.forget = forget.tolist()
        test, probe = torch.arange(TRAIN + POOL, len(labels)), torch.arange(TRAIN, TRAIN + POOL)
        kept = shuffled[~torch.isin(shuffled, forget)]
        self._judged = {"forget": forget, "retain": kept, "held-out": test}
        self.targets = {name: self._labels[ids, None] for name, ids in self._judged.items()}
        chosen = {f"{PROBE} held-out": probe[:PROBE]}
        if forgotten == "class":
            # Threes in the probe would hold on to what is to be forgotten.
            chosen[f"{PROBE} held-out, no threes"] = probe[labels[probe] != FORGOTTEN_CLASS][:PROBE]
        self.probes = {name: [{"input": self._images[ids], "labels": labels[ids]}] for name, ids in chosen.items()}
        torch.manual_seed(seed)
        self.begin = MODELS[model]()
        if tuned:
            self._loop(self.begin, torch.arange(EARLIER), 10, self._rate, seed)
            self._rate /= 10

    def train(
        self,
        model: nn.Module,
        order: int,
        store: timstore.Store | None = None,
        *,
        history: str = "final",
        without: Sequence[int] = (),
        after_step: AfterStep = lambda ids: None,
    ) -> None:
        self._loop(model, self._ids, self._epochs, self._rate, order, store, history, without, after_step)

    def _loop(
        self,
        model: nn.Module,
        ids: torch.Tensor,
        epochs: int,
        rate: float,
        order: int,
        store: timstore.Store | None = None,
        history: str = "final",
        without: Sequence[int] = (),
        after_step: AfterStep = lambda ids: None,
    ) -> None:
        """Train with warm-up and cosine."""
        optimizer = self._optimizer(list(model.parameters()), rate)
        draw, left_out = torch.Generator().manual_seed(order), torch.tensor(without, dtype=torch.long)
        steps, step = epochs * math.ceil(len(ids) / BATCH), 0
        with (
            store.record(model, optimizer, samples=self.forget, optimizer_history=history)
            if store is not None
            else contextlib.nullcontext()
        ) as recorder:
            for epoch in range(epochs):
                if recorder is not None:
                    recorder.epoch = epoch
                for batch in ids[torch.randperm(len(ids), generator=draw)].split(BATCH):
                    kept = batch[~torch.isin(batch, left_out)]
                    share = min(1, (step + 1) / (steps / 10)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
                    optimizer.param_groups[0]["lr"] = rate * share
                    step += 1
                    if recorder is not None:
                        recorder.batch(kept)
                    loss = F.cross_entropy(model(self._images[kept]), self._labels[kept], reduction="sum") / len(batch)
                    loss.backward()
                    if self._clips:
                        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                    optimizer.step()
                    optimizer.zero_grad()
                    after_step(kept)

    def log_chances(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: model(self._images[ids]).log_softmax(-1)[:, None] for name, ids in self._judged.items()}

    def gaps(self, own: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> Row:
        """Return the held-out accuracy, and accuracies minus the retrained model's, by the labels trained on."""

        def right(answers: dict[str, torch.Tensor], name: str) -> float:
            return float((answers[name].argmax(-1) == self.targets[name]).double().mean())

        gaps = {f"gap {name}": right(own, name) - right(reference, name) for name in self.targets}
        return {"accuracy": right(own, "held-out"), **gaps}
