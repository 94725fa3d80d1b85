"""Rollback against retraining, on the small Llama: how close, beside retraining's own noise and other rules.

The median over the seeds of a recorded fine-tuning, from two starts: AdamW, LoRA (rank 8 on every Linear layer, the
base frozen) and SGD with momentum. Columns: mean KL(retrained || model) per token; held-out loss over the retrained
one's; |model - retrained| / |trained - retrained|; cosine of the two changes; gap of the loss attack's AUC (forgotten
against held-out sequences) to the retrained model's; megabytes stored; seconds.

Run: python scripts/bench_unlearning.py (35 minutes on two cores; --quick: one seed, one start, AdamW; --json FILE)
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from language import FORGET, FORGOTTEN, Text, fine_tune, log_chances, new_model, pre_train
from rich.console import Console
from rich.table import Table
from torch import nn

import timstore

SEEDS, STARTS, RANK = (0, 1, 2), (150, 400), 8
PROBES = {"8 public": 8, "32 public": 32, "64 public": 64, "64 retained": 64}
console = Console(width=140, highlight=False)


class Lora(nn.Module):
    """A frozen Linear layer and a low-rank change of it, written as two Linear layers."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def with_lora(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Lora(child))
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [one for one in model.parameters() if one.requires_grad]


KINDS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "AdamW": (lambda model: model, lambda model: torch.optim.AdamW(trained(model), lr=2e-4, weight_decay=0.01)),
    "LoRA": (with_lora, lambda model: torch.optim.AdamW(trained(model), lr=1e-3, weight_decay=0.01)),
    "SGD": (lambda model: model, lambda model: torch.optim.SGD(trained(model), lr=0.02, momentum=0.9)),
}


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().reshape(-1) for one in trained(model)])


def moved(model: nn.Module, change: torch.Tensor) -> nn.Module:
    """Return a copy of the model with its trained parameters changed."""
    other, done = copy.deepcopy(model), 0
    with torch.no_grad():
        for parameter in trained(other):
            parameter += change[done : done + parameter.numel()].view(parameter.shape)
            done += parameter.numel()
    return other


def sum_of_gradients(store: timstore.Store, model: nn.Module, weigh: Callable[[float, float], float]) -> torch.Tensor:
    """Return the weighted sum of all records, densely; the weight is a function of a step's rate and clip factor."""
    rows = store.sql("SELECT epoch, step, lr, consumed_ratio FROM steps").fetchall()
    weights = {(epoch, step): weigh(lr, ratio) for epoch, step, lr, ratio in rows}
    names = [name for name, one in model.named_parameters() if one.requires_grad]
    total = torch.zeros(flat(model).numel())
    for record in store.read():
        dense = torch.cat([torch.from_numpy(record.dense(name)).reshape(-1) for name in names])
        total += weights[record.epoch, record.step] * dense
    return total


def attack(chances: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return -chances.gather(-1, tokens[:, 1:, None])[..., 0].mean(1)


def judge(models: dict[str, nn.Module], text: Text) -> dict[str, dict[str, float]]:
    reference, judged = log_chances(models["retrained"], text), text.judged()
    start, goal = flat(models["no rollback"]), flat(models["retrained"])

    def auc(chances: dict[str, torch.Tensor]) -> float:
        members = attack(chances["forget"], judged["forget"])
        others = attack(chances["held-out"], judged["held-out"])
        return float((members[:, None] < others[None, :]).double().mean())

    result = {}
    for name, model in models.items():
        own, place = log_chances(model, text), flat(model)
        row = {
            f"KL {one}": F.kl_div(own[one], reference[one], log_target=True, reduction="sum").item()
            / own[one][..., 0].numel()
            for one in judged
        }
        ratio = (
            attack(own["held-out"], judged["held-out"]).mean()
            / attack(reference["held-out"], judged["held-out"]).mean()
        )
        row["loss held-out"] = float(ratio) - 1
        row["distance"] = float((place - goal).norm() / (start - goal).norm())
        row["cosine"] = float(F.cosine_similarity(place - start, goal - start, dim=0)) if name != "no rollback" else 0.0
        row["AUC gap"] = auc(own) - auc(reference)
        result[name] = row
    return result


def run(start: nn.Module, kind: str, text: Text, seed: int) -> dict[str, dict[str, float]]:
    """Return the rows of one recorded fine-tuning."""
    wrap, optimizer_of = KINDS[kind]
    torch.manual_seed(seed)
    begin = wrap(copy.deepcopy(start))
    forget, undone = torch.tensor(text.forget_ids), torch.zeros(flat(begin).numel())
    models = {name: copy.deepcopy(begin) for name in ("no rollback", "retrained", "other order")}
    seconds, stored = {}, 0.0
    for name, order in (("retrained", seed), ("other order", seed + 1000)):
        begun = time.perf_counter()
        fine_tune(models[name], text, optimizer_of(models[name]), order, without=text.forget_ids)
        seconds[name] = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder, timstore.open(Path(folder, "run.tim")) as store:
        model = models["no rollback"]
        last = flat(model)

        def remember(ids: torch.Tensor) -> None:
            nonlocal last
            now = flat(model)
            if torch.isin(ids, forget).any():
                undone.add_(now - last)
            last = now

        fine_tune(model, text, optimizer_of(model), seed, store, after_step=remember)
        stored = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file()) / 1e6
        models["TIM rule (theta -= gradient)"] = moved(model, -sum_of_gradients(store, model, lambda lr, ratio: 1.0))
        models["Amnesiac (undo steps)"] = moved(model, -undone)
        models["lr x gradient"] = moved(model, sum_of_gradients(store, model, lambda lr, ratio: lr * ratio))
        draw = torch.Generator().manual_seed(seed + 7)
        public = text.pre[torch.randperm(len(text.pre), generator=draw)]
        kept = text.tuning[:-FORGET][torch.randperm(len(text.tuning) - FORGET, generator=draw)]
        for name, count in {"": 0, **PROBES}.items():
            sequences = (kept if "retained" in name else public)[:count]
            probe = [{"input_ids": tokens} for tokens in sequences.split(16)] if count else None
            rolled = copy.deepcopy(model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", timstore.TimstoreWarning)
                report = store.rollback(rolled, text.forget_ids, probe=probe, progress=False)
            label = f"first order + {name}" if name else "first order"
            models[label], seconds[label] = rolled, report.seconds
    rows = judge(models, text)
    for name, row in rows.items():
        row["MB"] = 0.0 if name in ("retrained", "other order", "no rollback") else stored
        row["seconds"] = seconds.get(name, 0.0)
    return rows


def show(title: str, runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    medians = {
        name: {column: statistics.median(one[name][column] for one in runs) for column in row}
        for name, row in runs[0].items()
    }
    table = Table("", title=title, title_justify="left")
    for column in next(iter(medians.values())):
        table.add_column(column, justify="right")
    formats = {
        "loss held-out": "+.2%",
        "distance": ".3g",
        "cosine": ".2f",
        "AUC gap": "+.3f",
        "MB": ".1f",
        "seconds": ".1f",
    }
    for name, row in medians.items():
        table.add_row(name, *(format(value, formats.get(column, ".1e")) for column, value in row.items()))
    console.print(table)
    ours, floor = medians["first order + 64 public"], medians["other order"]
    shares = ", ".join(f"{one} {ours[f'KL {one}'] / floor[f'KL {one}']:.2f}" for one in ("forget", "held-out"))
    console.print(f"with 64 public sequences, KL over the floor's (another batch order): {shares}\n", markup=False)
    return medians


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--forget", nargs="+", choices=("document", "random"), default=["document"])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    kinds, starts, seeds = (["AdamW"], STARTS[:1], SEEDS[:1]) if given.quick else (given.kinds, STARTS, SEEDS)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for steps in starts:
        runs: dict[tuple[str, str], list[dict[str, dict[str, float]]]] = {}
        for seed in seeds:
            torch.manual_seed(seed)
            start = new_model()
            pre_train(start, Text.read(seed).pre, seed, steps)
            for forgotten in given.forget:
                text = Text.read(seed, FORGOTTEN if forgotten == "document" else "")
                for kind in kinds:
                    runs.setdefault((kind, forgotten), []).append(run(start, kind, text, seed))
        for (kind, forgotten), several in runs.items():
            title = f"{kind}, {steps} pre-training steps, one {forgotten} set forgotten, median of {len(several)}"
            found[title] = show(title, several)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
