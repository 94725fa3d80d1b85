"""Rollback against retraining: how close, beside retraining's own noise (another batch order) and other rules.

Recorded trainings of a logistic regression and an MLP on digits and of a small Llama, samples removed from the end
result, medians over the seeds. Columns: mean KL(retrained || model) per answer; |model - retrained| / |trained -
retrained|; cosine of the two changes; for digits the held-out accuracy, and the gaps of accuracies to the retrained
model's; for the Llama losses over its losses, minus one; the loss attack's AUC (forgotten against held-out) minus its
AUC; seconds; megabytes kept. Retraining leaves the forgotten samples' places in the batches empty.

Run: python scripts/bench_unlearning.py (an hour on two cores; --quick: a minute; --json FILE keeps the figures)
Parts: --only digits llama-adamw ..., --starts 150, --forget document ..., --seeds 0 1 2
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import digits
import goals
import llama
from judging import KEPT, Case, Row, run
from rich.console import Console
from rich.table import Table

SEEDS, STARTS = (0, 1, 2), (150, 400)
PARTS = ("digits-lr", "digits-mlp", "llama-adamw", "llama-lora", "llama-sgd")
FORGETS = (*llama.FORGETS, *digits.FORGETS[1:])
# A filter over 64 sequences takes half a minute: only a document, from the first start, with the first seed, has
# every row.
FEW_ROWS = ("first order", f"first order + {KEPT}", "first order + 64 public")
ALL_ROWS = (
    "first order",
    f"first order + {KEPT}",
    *(f"first order + {name}" for name in llama.PROBES),
    "exact replay",
    "exact replay + 64 public",
)
# The plain filter, for SGD alone, tells what later work on the filter is worth.
NONSENSE_ROWS = (
    "prototype + 32 public",
    "first order",
    f"first order + {KEPT}",
    "first order + 32 public",
    "exact replay",
    "exact replay + 32 public",
)
FORMATS = {
    "distance": ".3g",
    "cosine": ".2f",
    "seconds": ".1f",
    "MB": ".1f",
    "KL": ".1e",
    "loss": "+.2%",
    "accuracy": ".3f",
}
console = Console(width=160, highlight=False)


@dataclass(frozen=True)
class Comparison:
    """One table: a case for every seed, the rows that each seed adds to it, and what is asked of the medians."""

    title: str
    seeds: Sequence[int]
    case: Callable[[int], Case]
    rows: Callable[[int], Sequence[str]]
    goal: goals.Goal | None

    @property
    def name(self) -> str:
        return f"{self.title}; " + (f"median of {len(self.seeds)} seeds" if len(self.seeds) > 1 else "one seed")

    def run(self) -> dict[str, Row]:
        """Return the median of each figure over the seeds that have the row."""
        runs = [run(self.case(seed), seed, self.rows(seed)) for seed in self.seeds]
        names = max(runs, key=len)
        found = {name: [one[name] for one in runs if name in one] for name in names}
        medians = {
            name: {column: statistics.median(row[column] for row in rows) for column in rows[0]}
            for name, rows in found.items()
        }
        self._show(medians, {name: len(rows) for name, rows in found.items()})
        return medians

    def _show(self, medians: dict[str, Row], counts: dict[str, int]) -> None:
        table = Table(title=self.name, title_justify="left")
        table.add_column("", no_wrap=True)
        for column in next(iter(medians.values())):
            table.add_column(column, justify="right")
        for name, row in medians.items():
            label = name if counts[name] == len(self.seeds) else f"{name} (one seed)"
            table.add_row(label, *(format(value, FORMATS.get(one.split()[0], "+.3f")) for one, value in row.items()))
        console.print(table)


def comparisons(given: argparse.Namespace) -> Iterable[Comparison]:
    """Yield the tables that were asked for, the cheapest first."""
    for name in digits.MODELS:
        part = f"digits-{name.lower()}"
        # The convex model is the easy one: a single seed shows it.
        seeds = given.seeds or (SEEDS if name == "MLP" else SEEDS[:1])
        for regime in digits.REGIMES:
            for forgotten in digits.FORGETS:
                for optimizer in digits.OPTIMIZERS:
                    if chosen(given, part, forgotten):
                        yield digits_comparison(name, optimizer, regime, forgotten, seeds)
    for steps in given.starts:
        for forgotten in llama.FORGETS:
            for kind in llama.KINDS:
                part, several = f"llama-{kind.lower()}", forgotten == "document"
                if not chosen(given, part, forgotten) or (forgotten in ("outliers", "memorised") and kind == "LoRA"):
                    continue
                if several or steps == STARTS[0] or given.forget:
                    seeds = given.seeds or (SEEDS if several else SEEDS[:1])
                    yield llama_comparison(kind, steps, forgotten, seeds)


def chosen(given: argparse.Namespace, part: str, forgotten: str) -> bool:
    return any(part.startswith(one) for one in given.only) and forgotten in (given.forget or FORGETS)


def digits_comparison(model: str, optimizer: str, regime: str, forgotten: str, seeds: Sequence[int]) -> Comparison:
    probes = ["", f" + {KEPT}", " + 64 held-out", *[" + 64 held-out, no threes"] * (forgotten == "class")]
    what = {"random": "random images", "mislabelled": "mislabelled images", "class": "all threes"}[forgotten]
    return Comparison(
        f"digits, {model}, {optimizer}, {regime}, {what} forgotten",
        seeds,
        lambda seed: digits.Digits(model, optimizer, regime, forgotten, seed),
        lambda seed: [f"{method}{probe}" for method in ("first order", "exact replay") for probe in probes],
        goals.of_digits(model, optimizer, regime, forgotten),
    )


def llama_comparison(kind: str, steps: int, forgotten: str, seeds: Sequence[int]) -> Comparison:
    what = {"memorised": "memorised nonsense", "random": "random sequences", "document": "one document"}

    def rows(seed: int) -> Sequence[str]:
        if forgotten in ("outliers", "memorised"):
            return NONSENSE_ROWS if kind == "SGD" else NONSENSE_ROWS[1:]
        return ALL_ROWS if forgotten == "document" and seed == seeds[0] and steps == STARTS[0] else FEW_ROWS

    return Comparison(
        f"small Llama, {kind}, {steps} pre-training steps, {what.get(forgotten, forgotten)} forgotten",
        seeds,
        lambda seed: llama.Language(kind, steps, forgotten, seed),
        rows,
        goals.of_llama(kind, forgotten),
    )


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few cases")
    parser.add_argument(
        "--only", nargs="+", default=PARTS, metavar="PART", help=f"{', '.join(PARTS)}, or how they begin"
    )
    parser.add_argument("--forget", nargs="+", choices=FORGETS, help="by default all that are listed for the part")
    parser.add_argument("--starts", nargs="+", type=int, default=STARTS, help="pre-training steps of the Llama")
    parser.add_argument("--seeds", nargs="+", type=int, help="for every table; by default up to three")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    for one in given.only:
        if not any(part.startswith(one) for part in PARTS):
            parser.error(f"no part begins with {one}: {', '.join(PARTS)}")
    begun, found, findings = time.perf_counter(), {}, []
    for comparison in quick() if given.quick else comparisons(given):
        rows = found[comparison.name] = comparison.run()
        findings += [(comparison.name, one) for one in (comparison.goal(rows) if comparison.goal else ())]
        console.print(f"{time.perf_counter() - begun:.0f} s so far\n")
        if given.json:
            given.json.write_text(json.dumps(found, indent=1))
    console.print(goals.table(findings))


def quick() -> Iterable[Comparison]:
    for optimizer in ("momentum", "AdamW + clip"):
        for regime, forgotten in (("fine-tuning", "mislabelled"), ("from scratch", "class")):
            yield digits_comparison("MLP", optimizer, regime, forgotten, SEEDS[:1])
    few = llama_comparison("AdamW", 40, "document", SEEDS[:1])
    yield replace(few, rows=lambda seed: ("first order", "first order + 8 public"))


if __name__ == "__main__":
    main()
