"""KLoM (KL of margins) on handwritten digits: a rollback and its rivals, held against retraining from many seeds.

For each of ten forget sets N models are trained with it and made to forget, and N oracles are trained without it, from
other starts and in other orders. Of every row the margins (the label's logit less the log-sum-exp of the others) are
compared by KL over models (20 bins, smoothing 1e-5); a figure is the 95th percentile over rows. The floor is that of N
further oracles. Protocol: arXiv 2602.16400 and 2410.23232; what came out: docs/design/klom.md.

Rollbacks are as they are without arguments, each from a training that recorded its forget set. The rivals' settings
were picked on one forget set, with models of other seeds (--choose); what each does is in scripts/rivals.py. A share of
a retrain is a whole schedule over that share of the epochs. What was trained is kept in a folder: the script goes on
where it was stopped.

Run: python scripts/bench_klom.py (--net conv, --optimizer adamw, --models 20, --processes 2, --sets "random 50")
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from klom import (
    EPOCHS,
    FURTHER,
    KINDS,
    NETS,
    ORACLES,
    PICKED,
    Ensemble,
    Forget,
    forget_sets,
    judged,
    margins,
    record,
    train,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rivals import CHOSEN, GRIDS, RIVALS, linear_response

import timstore

NOTHING, ROLLBACK, RESPONSE, FLOOR = "nothing removed", "rollback", "linear response", "other oracles (floor)"
SHARES = (0.2, 0.4, 0.6, 0.8)
# At most so many times the floor.
GOALS = {"forget": 2.0, "retained": 1.2, "held-out": 1.2}
Figures = dict[str, dict[str, float]]
console = Console(width=180, highlight=False)


def roll_back(task: tuple[Forget, int], folder: Path) -> None:
    """Train one model with the recorder, roll a forget set back, and keep both."""
    forget, seed = task
    path = _rolled_back(folder, forget, seed)
    if path.exists():
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", timstore.TimstoreWarning)
    with tempfile.TemporaryDirectory() as place, timstore.open(Path(place, "run.tim")) as store:
        model = record(forget.training, seed, forget.ids, store)
        rolled = copy.deepcopy(model)
        store.rollback(rolled, forget.ids, progress=False)
    _keep({NOTHING: model.state_dict(), ROLLBACK: rolled.state_dict()}, path)


def _rolled_back(folder: Path, forget: Forget, seed: int) -> Path:
    return folder / f"{forget.training.name} {forget.name}, seed {seed}.pt"


def _keep(found: object, path: Path) -> None:
    torch.save(found, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def compare(forget: Forget, models: int, folder: Path) -> None:
    """Make the models forget in every other way, retrain, and keep the margins of all."""
    path = _compared(folder, forget, models)
    if path.exists():
        return
    torch.set_num_threads(1)
    training, seeds = forget.training, range(models)
    start = _recorded(folder, forget, models, NOTHING)
    ways: dict[str, Callable[[], Ensemble]] = {
        name: partial(rival, forget, start, seeds, **CHOSEN[name]) for name, rival in RIVALS.items()
    }
    ways[RESPONSE] = partial(linear_response, forget, start, seeds)
    for share in SHARES:
        ways[f"{share:.0%} of a retrain"] = partial(_retrain, forget, seeds, FURTHER, round(share * EPOCHS))
    ways[FLOOR] = partial(_retrain, forget, seeds, FURTHER)
    ways["oracles"] = partial(_retrain, forget, seeds, ORACLES)
    _keep({name: margins(training, way()).float() for name, way in ways.items()}, path)


def _compared(folder: Path, forget: Forget, models: int) -> Path:
    return folder / f"{forget.training.name} {forget.name}, {models} models.pt"


def _recorded(folder: Path, forget: Forget, models: int, name: str) -> Ensemble:
    states = [torch.load(_rolled_back(folder, forget, seed))[name] for seed in range(models)]
    return {parameter: torch.stack([one[parameter] for one in states]) for parameter in states[0]}


def _retrain(forget: Forget, seeds: Iterable[int], first: int, epochs: int = EPOCHS) -> Ensemble:
    return train(forget.training, [first + seed for seed in seeds], forget.ids, epochs)


def figures(forget: Forget, models: int, folder: Path) -> Figures:
    """Return way to 95th percentiles, of what was kept."""
    found = torch.load(_compared(folder, forget, models))
    oracles = found.pop("oracles").double()
    recorded = {way: margins(forget.training, _recorded(folder, forget, models, way)) for way in (NOTHING, ROLLBACK)}
    return {way: judged(one.double(), oracles, forget) for way, one in {**recorded, **found}.items()}


# --- tables -----------------------------------------------------------------------------------------------------


def show(results: dict[str, Figures], title: str) -> None:
    """Print, for each way, the distance to the oracles on each forget set, and over the floor on all of them."""
    each = Table(title=f"{title}: 95th percentile of KLoM, forgotten rows", title_justify="left")
    summary = Table(title="over the floor: median (worst) of all forget sets", title_justify="left")
    for table, columns in ((each, results), (summary, [*GOALS, "within the goal"])):
        table.add_column("", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right")
    for way in next(iter(results.values())):
        each.add_row(way, *(f"{one[way]['forget']:.2f}" for one in results.values()))
        over = {kind: [one[way][kind] / one[FLOOR][kind] for one in results.values()] for kind in GOALS}
        cells = [f"{statistics.median(numbers):.2f} ({max(numbers):.2f})" for numbers in over.values()]
        within = sum(all(over[kind][place] <= most for kind, most in GOALS.items()) for place in range(len(results)))
        summary.add_row(way, *cells, f"{within} of {len(results)}")
    console.print(each, summary)


def choose(forget: Forget, models: int) -> None:
    """Print what each setting of each rival gives on one forget set."""
    seeds = range(PICKED, PICKED + models)
    oracles = margins(forget.training, _retrain(forget, seeds, ORACLES))
    start = train(forget.training, seeds)
    table = Table(
        title=f"{forget.training.name}, {forget.name}, {models} models: 95th percentile of KLoM", title_justify="left"
    )
    for column in ("", "settings", *GOALS, "sum"):
        table.add_column(column, justify="left" if column in ("", "settings") else "right")

    def add(name: str, settings: dict[str, Any], weights: Ensemble) -> None:
        found = judged(margins(forget.training, weights), oracles, forget)
        table.add_row(name, str(settings or ""), *(f"{one:.2f}" for one in (*found.values(), sum(found.values()))))

    add(NOTHING, {}, start)
    for name, grid in GRIDS.items():
        for settings in grid:
            add(name, settings, RIVALS[name](forget, start, seeds, **settings))
    add(FLOOR, {}, _retrain(forget, seeds, FURTHER))
    console.print(table)


# --- running ----------------------------------------------------------------------------------------------------


def _each(work: Callable[[Any], None], tasks: Sequence[Any], what: str, processes: int) -> None:
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            list(track(pool.map(work, tasks), what, len(tasks), transient=True, console=console))
    else:
        for task in track(tasks, what, transient=True, console=console):
            work(task)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, default="mlp")
    parser.add_argument("--optimizer", choices=KINDS, default="sgd")
    parser.add_argument("--models", type=int, default=100, metavar="N")
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="forget sets; by default all ten")
    parser.add_argument("--folder", type=Path, default=Path("klom"), help="where models and margins are kept")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--choose", action="store_true", help="only: the rivals' settings on one forget set")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    sets = forget_sets(given.net, given.optimizer)
    chosen = [one for one in sets if not given.sets or one.name in given.sets]
    if not chosen or given.models < 2:
        parser.error(f"two models or more, and some of the forget sets {', '.join(one.name for one in sets)}")
    if given.choose:
        choose(chosen[0], given.models)
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    tasks = [(forget, seed) for seed in range(given.models) for forget in chosen]
    _each(partial(roll_back, folder=given.folder), tasks, "recorded trainings", given.processes)
    _each(partial(compare, models=given.models, folder=given.folder), chosen, "forget sets", given.processes)
    results = {one.name: figures(one, given.models, given.folder) for one in chosen}
    show(results, f"{given.net}, {given.optimizer}, {given.models} models")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
