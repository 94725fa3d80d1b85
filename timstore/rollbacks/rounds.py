"""Rounds: steps of several optimizers that consumed one backward pass, clipped by one norm over all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

# Clip factors of one round differ by rounding alone.
_ALIKE = 1e-3


def clipped_together(
    by_group: Mapping[int, Sequence[Mapping[str, Any]]],
) -> dict[tuple[int, int], tuple[tuple[int, int], float]]:
    """Return, for each step of a round, (the round's first step, the norm over all of the round's gradients).

    Nobody wrote down over which parameters a norm was taken. By one norm over all of them every step of a round gets
    the same factor; where that is not so in some round, each optimizer is taken to have been clipped alone, and the
    result is empty.

    Args:
        by_group: rows of the `steps` table in order of time, with `batch`, a hash of the step's samples.
    """
    rows: dict[tuple[int, int], Mapping[str, Any]] = {}
    groups: dict[tuple[int, int], set[int]] = {}
    for group, mine in by_group.items():
        for row in mine:
            moment = row["epoch"], row["step"]
            rows.setdefault(moment, row)
            groups.setdefault(moment, set()).add(group)
    rounds: list[list[tuple[int, int]]] = []
    for moment in sorted(rows):
        batch, last = rows[moment]["batch"], rounds[-1] if rounds else []
        same = bool(last) and batch is not None and batch == rows[last[0]]["batch"]
        if same and all(groups[moment].isdisjoint(groups[one]) for one in last):
            last.append(moment)
        else:
            rounds.append([moment])
    several = [[(one, rows[one]) for one in steps] for steps in rounds if len(steps) > 1]
    factors = [[_factor(row) for _, row in steps] for steps in several]
    one_norm = all(max(found) - min(found) <= _ALIKE * max(found) for found in factors)
    if not one_norm or not any(min(found) < 1 - 1e-6 for found in factors):
        return {}
    return {
        moment: (steps[0][0], sum((row["grad_norm"] or 0.0) ** 2 for _, row in steps) ** 0.5)
        for steps in several
        for moment, _ in steps
    }


def _factor(row: Mapping[str, Any]) -> float:
    return float(row["consumed_ratio"] * (row["amp_scale"] or 1.0))
