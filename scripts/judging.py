"""What the unlearning benchmark's workloads share: rival rules, rows, and the metrics against retraining."""

import copy
import inspect
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from prototype import prototype_change
from torch import nn

import timstore

Row = dict[str, float]
TIM, AMNESIAC, PLAIN = "TIM rule (theta -= gradient)", "Amnesiac (undo whole steps)", "lr x gradient"
# The rows of the training that the store keeps by itself.
KEPT = "kept rows"
AfterStep = Callable[[torch.Tensor], None]


class Case(ABC):
    """One training, and what is forgotten of it.

    Attributes:
        begin: the model before the recorded training; it is copied, never changed.
        forget: the ids of the samples that are removed.
        probes: what a row's name says after the plus sign, to batches.
        targets: `forget`, `retain`, `held-out` to what should be answered, (samples, positions).
    """

    begin: nn.Module
    forget: Sequence[int]
    probes: dict[str, list[Any]]
    targets: dict[str, torch.Tensor]

    @abstractmethod
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
        """Train in place; samples left out keep their places in the batches and in the loss's denominator."""

    @abstractmethod
    def log_chances(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return the model's log-probabilities for each of `targets`, (samples, positions, values)."""

    @abstractmethod
    def gaps(self, own: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> Row:
        """Return what is off in accuracy or loss, of a model's answers beside the retrained one's."""

    def losses(self, answers: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        """Return each sample's mean loss."""
        return -answers[name].gather(-1, self.targets[name][..., None])[..., 0].mean(1)


def replay_is_there() -> bool:
    """Whether this timstore keeps whole gradients and replays them."""
    return "method" in inspect.signature(timstore.Store.rollback).parameters


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [one for one in model.parameters() if one.requires_grad]


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().reshape(-1) for one in trained(model)])


def moved(model: nn.Module, change: torch.Tensor) -> nn.Module:
    """Return a copy of the model with its trained parameters changed."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        parts = change.split([one.numel() for one in trained(other)])
        for parameter, part in zip(trained(other), parts, strict=True):
            parameter += part.view(parameter.shape)
    return other


def sums_of_gradients(store: timstore.Store, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of all records, and their sum weighted with rate and clip factor as the steps had them."""
    rows = store.sql("SELECT epoch, step, lr, consumed_ratio FROM steps").fetchall()
    weights = {(epoch, step): lr * ratio for epoch, step, lr, ratio in rows}
    names = [name for name, one in model.named_parameters() if one.requires_grad]
    plain, weighted = torch.zeros(2, flat(model).numel())
    for record in store.read():
        dense = torch.cat([torch.from_numpy(record.dense(name)).reshape(-1) for name in names])
        plain += dense
        weighted += weights[record.epoch, record.step] * dense
    return plain, weighted


def run(case: Case, seed: int, names: Sequence[str]) -> dict[str, Row]:
    """Train with, without and in another order, roll back in every way, and judge all models.

    Args:
        names: the rollbacks to do: `first order`, `exact replay` or `prototype`, and `+` one of the case's probes.
    """
    models: dict[str, nn.Module] = {}
    costs: dict[str, tuple[float, float]] = {}  # seconds, megabytes
    for name, order in (("retrained", seed), ("other order", seed + 1000)):
        models[name], begun = copy.deepcopy(case.begin), time.perf_counter()
        case.train(models[name], order, without=case.forget)
        costs[name] = time.perf_counter() - begun, 0.0

    def roll_back(store: timstore.Store, model: nn.Module, kind: str) -> None:
        stored = megabytes(store)
        for name in names:
            method, _, probe = name.partition(" + ")
            if method == kind:
                begun = time.perf_counter()
                models[name] = METHODS[method](store, model, case, probe)
                costs[name] = time.perf_counter() - begun, stored

    with tempfile.TemporaryDirectory() as folder, timstore.open(Path(folder, "run.tim")) as store:
        model = copy.deepcopy(case.begin)
        undone, steps = _record(case, model, seed, store)
        stored, begun = megabytes(store), time.perf_counter()
        plain, weighted = sums_of_gradients(store, model)
        seconds = time.perf_counter() - begun
        models |= {TIM: moved(model, -plain), AMNESIAC: moved(model, -undone), PLAIN: moved(model, weighted)}
        costs |= {TIM: (seconds, stored), PLAIN: (seconds, stored), AMNESIAC: (0.0, steps * undone.nbytes / 1e6)}
        for kind in ("first order", "prototype"):
            roll_back(store, model, kind)
    if replay_is_there() and any(name.startswith("exact replay") for name in names):
        with tempfile.TemporaryDirectory() as folder, timstore.open(Path(folder, "run.tim")) as store:
            again = copy.deepcopy(case.begin)
            case.train(again, seed, store, history="gradients")
            roll_back(store, again, "exact replay")
    rows = judge(case, {"no rollback": model, **models})
    for name, row in rows.items():
        row["seconds"], row["MB"] = costs.get(name, (0.0, 0.0))
    ordered = ("no rollback", "retrained", "other order", TIM, AMNESIAC, PLAIN, *names)
    return {name: rows[name] for name in ordered if name in rows}


def _record(case: Case, model: nn.Module, order: int, store: timstore.Store) -> tuple[torch.Tensor, int]:
    """Train and record; return the sum of the updates of all steps that saw a forgotten sample, and their number."""
    forget, last = torch.tensor(case.forget), flat(model)
    undone, steps = torch.zeros_like(last), 0

    def remember(ids: torch.Tensor) -> None:
        nonlocal last, steps
        now = flat(model)
        if torch.isin(ids, forget).any():
            undone.add_(now - last)
            steps += 1
        last = now

    case.train(model, order, store, after_step=remember)
    return undone, steps


def _first_order(store: timstore.Store, model: nn.Module, case: Case, probe: str, **options: Any) -> nn.Module:
    rolled, asked = copy.deepcopy(model), {"": False, KEPT: "auto"} | case.probes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", timstore.TimstoreWarning)
        store.rollback(rolled, case.forget, probe=asked[probe], progress=False, **options)
    return rolled


def _exact_replay(store: timstore.Store, model: nn.Module, case: Case, probe: str) -> nn.Module:
    return _first_order(store, model, case, probe, method="exact replay")


def _prototype(store: timstore.Store, model: nn.Module, case: Case, probe: str) -> nn.Module:
    return moved(model, prototype_change(store, model, case.probes[probe]))


METHODS = {"first order": _first_order, "exact replay": _exact_replay, "prototype": _prototype}


def megabytes(store: timstore.Store) -> float:
    return sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file()) / 1e6


@torch.no_grad()
def judge(case: Case, models: dict[str, nn.Module]) -> dict[str, Row]:
    """Return every model's columns; the reference is `retrained`, the way there starts at `no rollback`."""
    reference = case.log_chances(models["retrained"])
    start, goal = flat(models["no rollback"]), flat(models["retrained"])

    def auc(answers: dict[str, torch.Tensor]) -> float:
        """The loss attack: how often a forgotten sample's loss is below a held-out one's."""
        members, others = case.losses(answers, "forget")[:, None], case.losses(answers, "held-out")
        return float(((members < others).double() + 0.5 * (members == others).double()).mean())

    result = {}
    for name, model in models.items():
        own, place = case.log_chances(model), flat(model)
        row = {
            f"KL {one}": F.kl_div(own[one], reference[one], log_target=True, reduction="sum").item()
            / own[one][..., 0].numel()
            for one in case.targets
        }
        row["distance"] = float((place - goal).norm() / (start - goal).norm())
        row["cosine"] = 0.0 if model is models["no rollback"] else _cosine(place - start, goal - start)
        result[name] = row | case.gaps(own, reference) | {"AUC gap": auc(own) - auc(reference)}
    return result


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(F.cosine_similarity(one, other, dim=0))
