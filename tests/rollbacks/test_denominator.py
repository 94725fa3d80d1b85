"""Means over what stays: rollback against a training whose losses are linear in the parameters.

Their gradients do not depend on the parameters, so that training again without the samples is the exact answer.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import timstore

ROWS, TOKENS, FORGET = 12, 5, (3, 8)
Steps = Sequence[Sequence[Sequence[int]]]
# Steps of micro-batches of rows: one loses all its rows, and a step loses all of its micro-batches.
UNEVEN: Steps = (
    ((0, 3), (1, 2, 4)),
    ((3, 8), (5,)),
    ((6, 7), (9, 10), (11, 8)),
    ((8,), (3,)),
    ((0, 1, 2), (4, 5)),
    ((8, 9, 3, 6), (7,)),
)
SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW

pytestmark = [
    pytest.mark.filterwarnings("ignore:first order only"),
    pytest.mark.filterwarnings("ignore:steps had several micro"),
]


class Scores(nn.Module):
    """Scores of every token; labels are taken as transformers' models take them, and ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4, dtype=torch.float64)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        found: torch.Tensor = self.inner(x)
        return found


class Training:
    """Rows of tokens, some of which count; `mean` is over `tokens` or `samples` of all micro-batches of a step."""

    def __init__(self, kind: Any, options: dict[str, Any], *, mean: str, clip: float | None, steps: Steps) -> None:
        draw = torch.Generator().manual_seed(7)
        self.x = torch.randn(ROWS, TOKENS, 6, generator=draw, dtype=torch.float64)
        self.pull = torch.randn(ROWS, TOKENS, 4, generator=draw, dtype=torch.float64)
        self.labels = torch.where(torch.rand(ROWS, TOKENS, generator=draw) < 0.5, -100, 1)
        self.labels[:, 0] = 1
        self.kind, self.options, self.mean, self.clip, self.steps = kind, options, mean, clip, steps
        torch.manual_seed(0)
        self.start = Scores()

    def run(self, *, without: Sequence[int] = (), kept: bool = False, recorder: Any = None) -> Scores:
        """Train from the start; `kept` divides by what is left out as well."""
        model = copy.deepcopy(self.start)
        optimizer = self.kind(model.parameters(), **self.options)
        self.train(model, optimizer, without=without, kept=kept)
        return model

    def recorded(self, store: timstore.Store, **options: Any) -> Scores:
        model = copy.deepcopy(self.start)
        optimizer = self.kind(model.parameters(), **self.options)
        with store.record(model, optimizer, probe=False, **options) as recorder:
            self.train(model, optimizer, recorder=recorder)
        return model

    def train(
        self, model: Scores, optimizer: Any, *, without: Sequence[int] = (), kept: bool = False, recorder: Any = None
    ) -> None:
        for step in self.steps:
            staying = [[row for row in rows if row not in without] for rows in step]
            over = self.size(step if kept else staying)
            for parameter in model.parameters():
                parameter.grad = None if any(staying) else torch.zeros_like(parameter)
            for rows in filter(None, staying):
                named = {"labels": self.labels[rows]} if self.mean == "tokens" else {}
                if recorder is not None:
                    recorder.batch(rows)
                counts = self.labels[rows, :, None] != -100
                ((model(self.x[rows], **named) * self.pull[rows] * counts).sum() / over).backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            optimizer.step()

    def size(self, step: Sequence[Sequence[int]]) -> int:
        rows = [row for micro in step for row in micro]
        return int((self.labels[rows] != -100).sum()) if self.mean == "tokens" else len(rows)

    def gradients(self, row: int, over: int) -> dict[str, torch.Tensor]:
        """Return one row's part of a step's gradient."""
        model, counts = copy.deepcopy(self.start), self.labels[row, :, None] != -100
        ((model(self.x[row]) * self.pull[row] * counts).sum() / over).backward()
        return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in model.parameters()])


def check(store: timstore.Store, model: Scores, training: Training, *methods: str) -> None:
    """Hold rollbacks by each denominator to training again without the samples."""
    moved = flat(model) - flat(training.start)
    for denominator in ("kept", "renormalised"):
        wanted = flat(training.run(without=FORGET, kept=denominator == "kept"))
        for method in methods:
            rolled = copy.deepcopy(model)
            store.rollback(
                rolled, list(FORGET), denominator=denominator, method=method, accumulate="float64", force=True
            )
            off = float((flat(rolled) - wanted).norm() / moved.norm())
            assert off < 1e-12, (denominator, method)


KINDS = {
    "sgd": (SGD, {"lr": 0.2}),
    "momentum": (SGD, {"lr": 0.2, "momentum": 0.9}),
    "nesterov, L2": (SGD, {"lr": 0.2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05}),
    "adamw": (ADAMW, {"lr": 0.02, "weight_decay": 0.3}),
}


# What the mean is over does not depend on the optimizer: one of them meets every case.
CASES = [
    (kind, mean, clip)
    for kind in KINDS
    for mean in ("tokens", "samples")
    for clip in (None, 0.35)
    if kind == "momentum" or (mean == "tokens") == (clip is not None)
]


@pytest.mark.parametrize(("kind", "mean", "clip"), CASES)
def test_the_mean_is_taken_again_over_what_stays_of_all_micro_batches(
    tmp_path: Path, kind: str, mean: str, clip: float | None
) -> None:
    training = Training(*KINDS[kind], mean=mean, clip=clip, steps=UNEVEN)
    with timstore.open(tmp_path / "s", durability="os") as store:
        model = training.recorded(store, samples=FORGET, optimizer_history="gradients")
        check(store, model, training, "exact replay", *(["closed form"] if kind != "adamw" else []))


@pytest.mark.parametrize("clip", [None, 0.35], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("mean", ["tokens", "samples"])
def test_records_of_all_samples_are_enough(tmp_path: Path, mean: str, clip: float | None) -> None:
    training = Training(*KINDS["momentum"], mean=mean, clip=clip, steps=UNEVEN)
    with timstore.open(tmp_path / "s", durability="os") as store:
        check(store, training.recorded(store), training, "closed form")


# A sample may come twice in a step: in several micro-batches, as the two rows of a pair, as padding of the last batch.
TWICE: Steps = (((3, 0), (3, 1)), ((8, 8, 2, 2), (4, 5)), ((3, 3), (3,)), ((1, 8, 8, 8, 6),))


@pytest.mark.parametrize(
    ("kind", "mean", "clip"),
    [
        ("momentum", "tokens", 0.35),
        ("momentum", "samples", None),
        ("adamw", "samples", 0.35),
        ("adamw", "tokens", None),
    ],
)
def test_a_sample_counts_as_often_as_it_came(tmp_path: Path, kind: str, mean: str, clip: float | None) -> None:
    training = Training(*KINDS[kind], mean=mean, clip=clip, steps=TWICE)
    with timstore.open(tmp_path / "s", durability="os") as store:
        model = training.recorded(store, samples=FORGET, optimizer_history="gradients")
        check(store, model, training, "exact replay", *(["closed form"] if kind != "adamw" else []))


def test_a_mean_over_few_tokens_may_be_clipped_where_the_step_was_not(tmp_path: Path) -> None:
    steps: Steps = (((0, 1), (2, 4)), ((3,), (8, 5)), ((0, 6), (9,)))
    training = Training(*KINDS["momentum"], mean="tokens", clip=0.5, steps=steps)
    # The forgotten have most of the tokens and hardly a gradient: without them it is many times longer.
    training.pull[list(FORGET)] *= 1e-3
    training.labels[list(FORGET)] = 1
    training.labels[5, 1:] = -100
    with timstore.open(tmp_path / "s", durability="os") as store:
        model = training.recorded(store)
        clipped = [ratio < 1 for (ratio,) in store.sql("SELECT consumed_ratio FROM steps ORDER BY step").fetchall()]
        assert clipped == [True, False, True]
        check(store, model, training, "closed form")


@pytest.mark.parametrize("mean", ["tokens", "samples"])
def test_the_mean_is_over_the_samples_of_all_processes(tmp_path: Path, mean: str) -> None:
    """Two processes at one model, of which the second draws a sample that the first one has too."""
    training = Training(*KINDS["momentum"], mean=mean, clip=None, steps=(((0, 3), (3, 1)), ((8, 2), (4, 5, 6))))
    model = training.run()
    with timstore.open(tmp_path / "s", durability="os") as store:
        for number, step in enumerate(training.steps):
            for rank, rows in enumerate(step):
                counts = [int((training.labels[row] != -100).sum()) for row in rows]
                scalars = {"sample_ids": rows, "tokens": sum(counts), "mean_over": mean}
                store.append_step(0, number, [{"optimizer": "SGD", **KINDS["momentum"][1]}], rank=rank, **scalars)
                for row, tokens in zip(rows, counts, strict=True):
                    gradients = training.gradients(row, training.size(step))
                    store.append(0, number, row, gradients, tokens=tokens, rank=rank)
        store.commit()
        check(store, model, training, "closed form")
        with pytest.warns(timstore.TimstoreWarning, match="or processes"):
            store.rollback(model, [3], denominator="renormalised", force=True)
