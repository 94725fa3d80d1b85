"""A rollback's size, judged on many workloads: KL to the retrained model, over its noise and over doing nothing.

`scripts/workloads.py` has the trainings, two seeds of each kind. Half of the kinds were set aside: nobody looked at
them while the method was made. What a workload gives is kept in a folder: the script goes on where it was stopped, and
a change of the method is judged again without training (--again).

Rows: the rollback as it is without arguments, by the 128 rows of the training that the store keeps; half of its change;
with 64 retained rows as its probe, with 64 rows of what was trained on before, without a probe; rules of others, from
the same records; and another order of the batches, which is retraining's own noise (the floor).

Run: python scripts/bench_workloads.py (--processes 2: half an hour on two cores, ten minutes with --again; --explored,
--aside: one half; --json FILE, --plot FILE.svg; --open-unlearning CHECKOUT --python PYTHON: and those of
`scripts/tofu.py`, by a checkout of OpenUnlearning, whose own methods are rows then, and an environment that it runs in
and has timstore)
"""

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import tofu
import torch
from judging import PLAIN, TIM, moved, sums_of_gradients
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from workloads import ASIDE, EXPLORED, MODELS, Trained, Workload, divergence, trained

import timstore

KINDS = ("forget", "held-out", "retain")
NOTHING, FLOOR, ROLLBACK, HALF, RETAINED, PUBLIC, FIRST = (
    "nothing removed",
    "another order",
    "rollback",
    "half of it",
    "64 retained rows",
    "64 public rows",
    "no probe",
)
Figures = dict[str, dict[str, float]]
console = Console(width=180, highlight=False)


def judged(workload: Workload, folder: Path, again: bool, checkout: tofu.Checkout | None) -> Figures:
    """Return row to figures of one workload, from the folder if they are there."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", timstore.TimstoreWarning)
    make = partial(tofu.trained, checkout=checkout) if checkout and workload.data == "tofu" else trained
    found = make(workload, folder)
    kept = found.store.parent / "figures.json"
    if kept.exists() and not again:
        figures: Figures = json.loads(kept.read_text())
        return figures
    retrained, start = found.models["retrained"], found.models["trained"]
    draw, data = torch.Generator().manual_seed(0), found.data
    retained = torch.tensor(data.retained)[torch.randperm(len(data.retained), generator=draw)[:64]].tolist()
    probes = {ROLLBACK: None, RETAINED: data.probe(retained), PUBLIC: data.earlier_probe(64), FIRST: False}
    figures = {NOTHING: _kl(start, retrained, found), FLOOR: _kl(found.models["other order"], retrained, found)}
    for name, probe in probes.items():
        if probe == []:  # nothing was trained on before
            continue
        rolled, told = _rolled_back(found, probe)
        figures[name] = _kl(rolled, retrained, found) | told
        if name == ROLLBACK:
            figures[HALF] = _kl(_halved(rolled, start), retrained, found)
    figures |= {name: _kl(model, retrained, found) for name, model in _of_others(found).items()}
    kept.write_text(json.dumps(figures))
    return figures


def _kl(model: nn.Module, reference: nn.Module, found: Trained) -> dict[str, float]:
    return divergence(model, reference, found.data)


def _of_others(found: Trained) -> dict[str, nn.Module]:
    """Return what other rules make of the trained model: from the records, and by methods that came with it."""
    start = found.models["trained"]
    with timstore.open(found.store, "r") as store:
        plain, weighted = sums_of_gradients(store, start)
    methods = {name: model for name, model in found.models.items() if name not in MODELS}
    return {TIM: moved(start, -plain), PLAIN: moved(start, weighted), **methods}


def _rolled_back(found: Trained, probe: Any) -> tuple[nn.Module, dict[str, float]]:
    model, begun = copy.deepcopy(found.models["trained"]), time.perf_counter()
    with timstore.open(found.store) as store:
        report = store.rollback(model, found.ids, probe=probe, force=True, progress=False)
    told = {"seconds": time.perf_counter() - begun, "warnings": float(len(report.warnings))}
    if report.probe is not None:
        numbers = ("damping", "expected", "seen", "moved", "apart", "loss_before", "loss_after", "products")
        told |= {name: float(getattr(report.probe, name)) for name in numbers}
        told["misfit"] = report.probe.misfit or 0.0
    if report.probe is not None and report.expected_kl is not None:
        told |= {"rise": report.expected_kl.rise, "faded": report.expected_kl.faded, "noise": report.probe.noise or 0.0}
    return model, told


def _halved(rolled: nn.Module, start: nn.Module) -> nn.Module:
    half = copy.deepcopy(rolled)
    with torch.no_grad():
        for parameter, other in zip(half.parameters(), start.parameters(), strict=True):
            parameter.lerp_(other, 0.5)
    return half


def show(results: dict[Workload, Figures]) -> None:
    table = Table(title="KL(retrained || rolled back), forget / held-out", title_justify="left")
    for column in ("workload", "", "nothing", "floor", "rollback", "over floor", "over nothing", "half", "no probe"):
        table.add_column(column, justify="left" if column == "workload" else "right", no_wrap=True)
    for workload, figures in results.items():
        both = [figures[row] for row in (NOTHING, FLOOR, ROLLBACK, HALF, FIRST)]
        nothing, floor, rolled, half, first = (f"{one['forget']:.1e} / {one['held-out']:.1e}" for one in both)
        over = [_over(figures, row, below) for row, below in ((ROLLBACK, FLOOR), (ROLLBACK, NOTHING))]
        table.add_row(
            workload.name, "aside" if workload.aside else "", nothing, floor, rolled, *map(_pair, over), half, first
        )
    console.print(table)
    for title, chosen in (("explored", False), ("set aside", True)):
        part = [figures for workload, figures in results.items() if workload.aside is chosen]
        if part:
            _summary(title, part)
    _summary("all", list(results.values()))


def _over(figures: Figures, row: str, below: str) -> dict[str, float]:
    return {kind: figures[row][kind] / figures[below][kind] for kind in KINDS}


def _pair(one: dict[str, float]) -> str:
    return f"{one['forget']:.2f} / {one['held-out']:.2f}"


def _summary(title: str, part: Sequence[Figures]) -> None:
    table = Table(title=f"{title}: {len(part)} workloads; median (90th percentile)", title_justify="left")
    table.add_column("")
    for below in ("floor", "nothing"):
        for kind in KINDS:
            table.add_column(f"{kind} over {below}", justify="right")
    table.add_column("seconds", justify="right")
    for row in (ROLLBACK, HALF, RETAINED, PUBLIC, FIRST, TIM, PLAIN, *tofu.METHODS, NOTHING, FLOOR):
        having = [figures for figures in part if row in figures]
        if not having:
            continue
        cells = []
        for below in (FLOOR, NOTHING):
            for kind in KINDS:
                numbers = sorted(_over(figures, row, below)[kind] for figures in having)
                cells.append(f"{statistics.median(numbers):.2f} ({numbers[round(0.9 * (len(numbers) - 1))]:.2f})")
        seconds = [figures[row]["seconds"] for figures in having if "seconds" in figures[row]]
        label = row if len(having) == len(part) else f"{row}, {len(having)} of them"
        table.add_row(label, *cells, f"{statistics.median(seconds):.1f}" if seconds else "")
    console.print(table)


def plot(results: dict[Workload, Figures], path: Path) -> None:
    """Draw, for each workload, KL over the floor and over doing nothing, in order of size."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for axis, below, label in zip(axes, (FLOOR, NOTHING), ("another order's", "doing nothing's"), strict=True):
        for kind, marker in (("forget", "o"), ("held-out", "s")):
            numbers = sorted((_over(figures, ROLLBACK, below)[kind], one.aside) for one, figures in results.items())
            for aside, face in ((False, "none"), (True, None)):
                places = [place for place, (_, mine) in enumerate(numbers) if mine is aside]
                axis.plot(
                    [numbers[place][0] for place in places],
                    [place / max(1, len(numbers) - 1) for place in places],
                    marker,
                    color="tab:red" if kind == "forget" else "tab:blue",
                    markerfacecolor=face,
                    label=f"{'forgotten' if kind == 'forget' else kind} data, {'set aside' if aside else 'explored'}",
                )
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel=f"KL to the retrained model over {label}")
    axes[0].set(ylabel="share of the workloads below")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("workloads"), help="where trainings are kept")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--seeds", type=int, default=2, help="trainings of each kind, with other data and another start"
    )
    parser.add_argument("--explored", action="store_true", help="only what the method was made on")
    parser.add_argument("--aside", action="store_true", help="only what was set aside")
    parser.add_argument("--again", action="store_true", help="roll back anew")
    parser.add_argument("--open-unlearning", type=Path, metavar="CHECKOUT", help="and workloads that it trains")
    parser.add_argument("--python", default=sys.executable, help="that runs its src/train.py, with timstore")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    kinds = [*EXPLORED, *ASIDE] if given.explored == given.aside else list(EXPLORED if given.explored else ASIDE)
    checkout = tofu.Checkout(given.open_unlearning, given.python) if given.open_unlearning else None
    if checkout and (given.aside or not given.explored):
        kinds += tofu.WORKLOADS
    chosen = [seeded for one in kinds for seeded in one.seeds(given.seeds)]
    work = partial(judged, folder=given.folder, again=given.again, checkout=checkout)
    if given.processes > 1:
        with ProcessPoolExecutor(given.processes) as pool:
            found = list(track(pool.map(work, chosen), "workloads", len(chosen), transient=True))
    else:
        found = [work(one) for one in track(chosen, "workloads", transient=True)]
    results = dict(zip(chosen, found, strict=True))
    show(results)
    if given.json:
        given.json.write_text(json.dumps({one.name: figures for one, figures in results.items()}, indent=1))
    if given.plot:
        plot(results, given.plot)


if __name__ == "__main__":
    main()
