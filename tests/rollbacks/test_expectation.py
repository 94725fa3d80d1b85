"""What a rollback expects of its distance to the retrained model, against retraining and autograd."""

import contextlib
import copy
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import timstore
from timstore.rollbacks.expectation import expected_kl

ROWS, EPOCHS, BATCH = 96, 4, 8


class Training:
    """Softmax regression whose labels are drawn by a model of its own kind, near which it begins."""

    def __init__(self, optimizer: type[torch.optim.Optimizer], lr: float) -> None:
        draw = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(ROWS, 6, generator=draw, dtype=torch.float64)
        self.truth = torch.randn(4, 6, generator=draw, dtype=torch.float64)
        chances = (self.inputs @ self.truth.T).softmax(-1)
        self.labels = torch.multinomial(chances, 1, generator=draw)[:, 0]
        self.optimizer, self.lr = optimizer, lr

    def run(self, order: int, store: timstore.Store | None = None) -> tuple[nn.Linear, dict[int, torch.Tensor]]:
        """Return the model, and each sample's gradient (of its own loss) in the step that used it first."""
        model = nn.Linear(6, 4, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(self.truth)
        optimizer = self.optimizer(model.parameters(), lr=self.lr)  # type: ignore[call-arg]
        draw, first = torch.Generator().manual_seed(order), {}
        recording = store.record(model, optimizer, samples=range(4)) if store else contextlib.nullcontext()
        with recording as recorder:
            for epoch in range(EPOCHS):
                for ids in torch.randperm(ROWS, generator=draw).split(BATCH):
                    for one in set(ids.tolist()) - first.keys():
                        loss = F.cross_entropy(self.inputs[one] @ model.weight.T, self.labels[one])
                        first[one] = torch.autograd.grad(loss, model.weight)[0]
                    if recorder is not None:
                        recorder.epoch = epoch
                        recorder.batch(ids)
                    F.cross_entropy(model(self.inputs[ids]), self.labels[ids]).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return model, first

    def divergence(self, model: nn.Module, other: nn.Module) -> float:
        with torch.no_grad():
            own, theirs = (one(self.inputs).log_softmax(-1) for one in (model, other))
        return float(F.kl_div(theirs, own, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize(
    ("optimizer", "lr", "within"),
    [(torch.optim.SGD, 0.3, 1.3), (torch.optim.SGD, 2.0, 4), (torch.optim.AdamW, 0.02, 3)],
)
def test_the_noise_is_that_of_retraining_in_other_orders(
    tmp_path: Path, optimizer: type[torch.optim.Optimizer], lr: float, within: float
) -> None:
    training = Training(optimizer, lr)
    with timstore.open(tmp_path / "s") as store:
        model, _ = training.run(0, store)
        report = store.rollback(model, [0], dry_run=True)
    models = [training.run(order)[0] for order in range(1, 25)]
    noise = fmean(training.divergence(a, b) for a, b in zip(models[::2], models[1::2], strict=True))
    assert report.probe is not None and report.probe.noise is not None
    assert noise / within < report.probe.noise < noise * within


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_rise_is_that_of_the_samples_losses_where_they_were_first_used(
    tmp_path: Path, optimizer: type[torch.optim.Optimizer]
) -> None:
    training, forget = Training(optimizer, 0.05), [0, 2, 3]
    with timstore.open(tmp_path / "s") as store:
        model, first = training.run(0, store)
        before = copy.deepcopy(model)
        report = store.rollback(model, forget)
    delta = (model.weight - before.weight).detach()
    assert report.expected_kl is not None
    assert report.expected_kl.rise == pytest.approx(
        fmean(float((first[one] * delta).sum()) for one in forget), rel=1e-5
    )


@pytest.mark.parametrize(
    ("rise", "faded", "seen", "doubted"),
    [
        (0.05, 0.9, 1e-4, []),
        (2.5, 0.4, 1e-4, ["forgotten"]),
        (2.5, 0.4, 2e-2, ["forgotten", "other"]),
        (-1.0, 1.0, 0.0, []),
    ],
)
def test_what_may_be_farther_than_another_retraining_is_doubted(
    rise: float, faded: float, seen: float, doubted: list[str]
) -> None:
    expected = expected_kl(rise, faded, seen, noise=4e-3)
    assert [doubt.split(" data ")[0] for doubt in expected.doubts] == [f"on {data}" for data in doubted]
    for one in (expected.forgotten, expected.staying, expected.noise_forgotten, expected.noise_staying):
        assert one.low <= one.value <= one.high


def test_the_doubts_are_warnings_of_the_rollback(tmp_path: Path) -> None:
    training = Training(torch.optim.SGD, 0.05)
    with timstore.open(tmp_path / "s") as store:
        model, _ = training.run(0, store)
        with pytest.warns(timstore.TimstoreWarning, match="on forgotten data the model may be farther"):
            report = store.rollback(model, [0, 2, 3])
    assert report.expected_kl is not None and report.expected_kl.doubts
    assert set(report.expected_kl.doubts) <= set(report.warnings)
    assert f"forgotten data {report.expected_kl.forgotten}" in str(report)
    assert report.to_dict()["expected_kl"]["forgotten"]["value"] == report.expected_kl.forgotten.value


@pytest.mark.filterwarnings("ignore:first order only")
@pytest.mark.parametrize("options", [{"strength": 0.5}, {"epochs": [0]}, {"parameters": ["weight"]}, {"probe": False}])
def test_of_a_part_and_without_rows_of_the_training_nothing_is_expected(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    training = Training(torch.optim.SGD, 0.05)
    with timstore.open(tmp_path / "s") as store:
        model, _ = training.run(0, store)
        assert store.rollback(model, [0], dry_run=True).expected_kl is not None
        assert store.rollback(model, [0], dry_run=True, **options).expected_kl is None
