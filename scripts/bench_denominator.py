"""Which denominator a rollback should take: each held against three ways of training again without the samples.

The ways, all in the recorded order: `kept`, samples keep their places in the batches and in the means' denominator;
`staying`, they keep their places alone, and means are over what stays; `filled up`, which is what running the same
script on the remaining rows does: rows move up, and there are fewer steps. Filled-up batches in another order say how
far apart two such trainings are by themselves.

A gradient that is clipped to a norm is the same whatever its mean divides by, and Adam divides by its size. So the
trainings run as those of `scripts/workloads.py` do, clipped to 1, and without clipping, SGD at a third of the rate.

Run: python scripts/bench_denominator.py (--folder: of bench_workloads.py, for the models that are pre-trained)
"""

import argparse
import copy
import math
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from workloads import FILLED, WAYS, Workload, begin, divergence, read, train

import timstore

DENOMINATORS = ("kept", "renormalised")
WORKLOADS = (
    Workload("library", "sgd", 2e-2, 2, "document", 12),
    Workload("library", "sgd", 2e-2, 2, "random", 38),
    Workload("facts", "sgd", 5e-2, 2, "authors", 32),
    Workload("digits", "sgd", 2e-2, 6, "random", 96, 960),
    Workload("digits", "sgd", 2e-2, 6, "class", 90, 960),
    Workload("library", "adamw", 5e-4, 2, "random", 38),
    Workload("facts", "adamw", 2e-3, 2, "authors", 32),
    Workload("digits", "adamw", 1e-3, 3, "random", 96, 960),
    Workload("facts", "lora", 3e-3, 2, "authors", 32),
)
Figures = dict[str, dict[str, dict[str, float]]]
console = Console(width=160, highlight=False)


def judged(workload: Workload, clip: float, folder: Path) -> Figures:
    """Return way of training again, model and kind of data to KL(trained again || model)."""
    data = read(workload)
    start = begin(workload, data, folder)

    def again(way: str, order: int = 5) -> nn.Module:
        model = copy.deepcopy(start)
        train(model, data, workload, order, without=data.forget, way=way, clip=clip)
        return model

    models = {"nothing": copy.deepcopy(start), "another order": again(FILLED, 6)}
    with tempfile.TemporaryDirectory() as scratch, timstore.open(Path(scratch, "store"), durability="os") as store:
        train(models["nothing"], data, workload, 5, store, clip=clip, history="gradients")
        for denominator in DENOMINATORS:
            models[denominator] = copy.deepcopy(models["nothing"])
            store.rollback(models[denominator], data.forget, denominator=denominator, force=True, progress=False)
    references = {way: again(way) for way in WAYS}
    return {
        way: {name: divergence(model, reference, data) for name, model in models.items()}
        for way, reference in references.items()
    }


def show(title: str, results: Mapping[Workload, Figures]) -> None:
    for kind in ("forget", "held-out"):
        table = Table(title=f"{title}: KL on {kind} data, denominator kept -> renormalised", title_justify="left")
        for column in ("workload", *(f"to {way}" for way in WAYS), "nothing", "another order"):
            table.add_column(column, justify="left" if column == "workload" else "right", no_wrap=True)
        for workload, figures in results.items():
            cells = [f"{of['kept'][kind]:.2e} -> {of['renormalised'][kind]:.2e}" for of in figures.values()]
            others = (f"{figures[FILLED][name][kind]:.1e}" for name in ("nothing", "another order"))
            table.add_row(workload.name, *cells, *others)
        both = [
            [math.log(of["renormalised"][kind] / of["kept"][kind]) for of in figures.values()]
            for figures in results.values()
        ]
        means = (f"x {math.exp(sum(one) / len(one)):.3f}" for one in zip(*both, strict=True))
        table.add_row("geometric mean", *means, "", "")
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("workloads"), help="where pre-trained models are kept")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", timstore.TimstoreWarning)
    gentler = [replace(one, rate=one.rate / 3) if one.optimizer == "sgd" else one for one in WORKLOADS]
    for title, chosen, clip in (("clipped", WORKLOADS, 1.0), ("not clipped", gentler, math.inf)):
        show(title, {one: judged(one, clip, folder) for one in track(chosen, title, transient=True)})


if __name__ == "__main__":
    main()
