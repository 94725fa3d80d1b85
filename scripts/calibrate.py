"""The meter's constants: what a rollback tells of itself, fitted to how far from the retrained model it ended.

Each number is a product of powers, by least squares on the logarithms; what stands beside it is judged with the one
training left out that it is for. What comes out stands in `timstore/rollbacks/expectation.py`. Trainings that are set
aside there are not fitted on: with --aside FILE they are judged by the constants that stand.

Run: python scripts/bench_workloads.py --json FILE; python scripts/calibrate.py FILE (seconds)
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from timstore.rollbacks.expectation import expected_kl

# What is fitted: its name, whose KL, on which data, by what, and what it is simply proportional to.
FITS = (
    ("forgotten", "rollback", ("forget",), ("rise", "faded"), ()),
    ("staying", "rollback", ("held-out", "retain"), ("seen", "noise"), ()),
    ("noise, forgotten", "another order", ("forget",), ("faded",), ("noise",)),
    ("noise, staying", "another order", ("held-out", "retain"), (), ("noise",)),
)
Figures = dict[str, dict[str, float]]


def true(figures: Sequence[Figures], row: str, kinds: Sequence[str]) -> np.ndarray:
    """Return the logarithm of a KL, the mean over kinds of data, (trainings,)."""
    return np.mean([[math.log(one[row][kind]) for kind in kinds] for one in figures], axis=1)


def told(figures: Sequence[Figures], names: Sequence[str]) -> np.ndarray:
    """Return logarithms of what the rollbacks told, (trainings, names)."""
    return np.array([[math.log(one["rollback"][name]) for name in names] for one in figures]).reshape(len(figures), -1)


def fitted(of: np.ndarray, by: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (the coefficients, a constant first; the prediction of each by all others)."""
    columns = np.column_stack([np.ones(len(of)), by])
    left_out = np.empty(len(of))
    for one in range(len(of)):
        others = np.arange(len(of)) != one
        left_out[one] = columns[one] @ np.linalg.lstsq(columns[others], of[others], rcond=None)[0]
    return np.linalg.lstsq(columns, of, rcond=None)[0], left_out


def fit(figures: Sequence[Figures]) -> Table:
    table = Table(title=f"fitted on {len(figures)} trainings, judged with each left out", title_justify="left")
    for column in ("", "factor", "powers", "spread", "Spearman"):
        table.add_column(column)
    for name, row, kinds, by, proportional in FITS:
        of, known = true(figures, row, kinds), told(figures, proportional).sum(1)
        (constant, *powers), predicted = fitted(of - known, told(figures, by))
        off = of - predicted - known
        shown = ", ".join([*(f"{one} {power:.2f}" for one, power in zip(by, powers, strict=True)), *proportional])
        order = spearmanr(predicted + known, of).statistic
        table.add_row(name, f"{math.exp(constant):.3g}", shown, f"{math.exp(off.std()):.2f}", f"{order:.2f}")
    return table


def judge(figures: Sequence[Figures], title: str) -> Table:
    """Hold what the library expects against what came."""
    found = [expected_kl(*(one["rollback"][name] for name in ("rise", "faded", "seen", "noise"))) for one in figures]
    table = Table(title=f"{title}: the constants that stand, {len(figures)} trainings", title_justify="left")
    for column in ("", "Spearman", "spread", "over noise", "told", "told without need", "of"):
        table.add_column(column)
    pairs = ("forgotten", "forgotten", "forget"), ("staying", "other", "held-out"), ("staying", "other", "retain")
    everything: list[tuple[float, float]] = []
    for name, doubted, kind in pairs:
        of, noise = true(figures, "rollback", [kind]), true(figures, "another order", [kind])
        expected = np.log([getattr(one, name).value for one in found])
        warned = np.array([any(f"on {doubted} data" in doubt for doubt in one.doubts) for one in found])
        over = of > noise
        everything += zip(expected.tolist(), of.tolist(), strict=True)
        table.add_row(
            kind,
            f"{spearmanr(expected, of).statistic:.2f}",
            f"{math.exp((of - expected).std()):.2f}",
            f"{over.sum()}",
            f"{(warned & over).sum()}",
            f"{(warned & ~over).sum()}",
            f"{(~over).sum()}",
        )
    table.add_row("all", f"{spearmanr(*zip(*everything, strict=True)).statistic:.2f}", "", "", "", "", "")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, help="what bench_workloads.py --json wrote")
    parser.add_argument("--aside", type=Path, help="the same of trainings that nothing was fitted on")
    given, console = parser.parse_args(), Console(width=140, highlight=False)
    figures = list(json.loads(given.figures.read_text()).values())
    console.print(fit(figures), judge(figures, "fitted on"))
    if given.aside:
        console.print(judge(list(json.loads(given.aside.read_text()).values()), "set aside"))


if __name__ == "__main__":
    main()
