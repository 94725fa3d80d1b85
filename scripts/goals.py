"""The goals of the unlearning benchmark: each says of a comparison's rows what was found, and whether it is enough."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from judging import KEPT, Row
from rich.table import Table

FLOOR_SHARE, LOSS_GAP, ACCURACY_GAP = 0.2, 0.005, 0.01
DISTANCES = {"momentum": 0.13, "AdamW + clip": 0.06}
# What was measured with the plain filter on other memorised nonsense (rollback-math, 2.8): KL on both texts.
PUBLISHED = {"forget": 0.24, "retain": 5.5e-2}

Rows = Mapping[str, Row]
# What is asked, what was found, whether that holds.
Finding = tuple[str, str, bool]
Goal = Callable[[Rows], Iterable[Finding]]


def of_digits(model: str, optimizer: str, regime: str, forgotten: str) -> Goal | None:
    if model == "MLP" and regime == "fine-tuning" and forgotten == "mislabelled" and optimizer in DISTANCES:
        return partial(_distance, DISTANCES[optimizer])
    return _accuracy if regime == "from scratch" and forgotten == "class" else None


def of_llama(kind: str, forgotten: str) -> Goal | None:
    if forgotten == "document" and kind != "SGD":
        return _floor
    return _memorised if forgotten == "memorised" and kind == "SGD" else None


def table(findings: Iterable[tuple[str, Finding]]) -> Table:
    """Return a table of (title of the comparison, finding)."""
    result = Table("comparison", "goal", "found", "", title="Goals", title_justify="left")
    above = ""
    for title, (asked, found, holds) in findings:
        result.add_row("" if title == above else title, asked, found, "held" if holds else "falls short")
        above = title
    return result


def _with_probe(rows: Rows) -> Iterable[tuple[str, Row]]:
    return ((name, row) for name, row in rows.items() if " + " in name)


def _distance(limit: float, rows: Rows) -> Iterable[Finding]:
    for name, row in _with_probe(rows):
        yield f"{name}, distance at most {limit}", f"{row['distance']:.3f}", row["distance"] <= limit


def _accuracy(rows: Rows) -> Iterable[Finding]:
    for name, row in _with_probe(rows):
        gap = row["gap retain"]
        # What is kept of the class says whether good accuracy on the rest was bought with not forgetting.
        found = f"{gap:+.4f} (on threes {row['gap forget']:+.2f})"
        yield f"{name}, retain accuracy within {ACCURACY_GAP}", found, abs(gap) <= ACCURACY_GAP


def _floor(rows: Rows) -> Iterable[Finding]:
    for name in (f"first order + {KEPT}", "first order + 64 public"):
        if name in rows:
            yield from _within_the_floor(rows, name)


def _within_the_floor(rows: Rows, name: str) -> Iterable[Finding]:
    for one in ("forget", "held-out"):
        share = rows[name][f"KL {one}"] / rows["other order"][f"KL {one}"]
        yield f"{name}, KL {one} at most {FLOOR_SHARE} of the floor's", f"{share:.3f}", share <= FLOOR_SHARE
    gap = rows[name]["loss gap held-out"]
    yield f"{name}, held-out loss within {LOSS_GAP:.1%}", f"{gap:+.2%}", abs(gap) <= LOSS_GAP


def _memorised(rows: Rows) -> Iterable[Finding]:
    here = {one: row[f"KL {one}"] for name, row in rows.items() if name.startswith("prototype") for one in PUBLISHED}
    for name, row in _with_probe(rows):
        if name.startswith("prototype"):
            continue
        found = " / ".join(f"{row[f'KL {one}']:.2g}" for one in PUBLISHED)
        for whose, limits in (("on this run", here), ("as published", PUBLISHED)):
            asked = " / ".join(f"{limit:.2g}" for limit in limits.values())
            holds = all(row[f"KL {one}"] < limit for one, limit in limits.items())
            yield f"{name}, KL forget / retain below the plain filter's {whose}, {asked}", found, holds
