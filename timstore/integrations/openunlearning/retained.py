"""A probe of the retain split."""

from dataclasses import dataclass
from typing import Any

import torch

from timstore.errors import InvalidInputError
from timstore.integrations.openunlearning.rows import Collate, hash_of, inputs_of


@dataclass(frozen=True, slots=True)
class RetainProbe:
    """Batches as the model takes them, and the numbers of their rows in the retain split."""

    batches: list[dict[str, Any]]
    rows: list[int]


def probe_of(retain: Any, collate: Collate, count: int, forgotten: frozenset[str], batch_rows: int) -> RetainProbe:
    """Return a probe of rows drawn from the retain split, the same ones at every call.

    Args:
        forgotten: content hashes of rows that must not be in it.
        batch_rows: at most so many rows a batch.

    Raises:
        InvalidInputError: there is no retain split, or nothing in it that is not to be forgotten.
    """
    if retain is None or not len(retain):
        raise InvalidInputError(
            "the probe is taken from the retain split, and there is none: name one, or set probe: null"
        )
    drawn = torch.randperm(len(retain), generator=torch.Generator(device="cpu").manual_seed(0), device="cpu").tolist()
    known = set(forgotten)
    rows: list[Any] = []
    numbers: list[int] = []
    for number in drawn:
        if len(rows) == count:
            break
        row = retain[number]
        content = hash_of(row, collate, f"row {number} of the retain split")
        if content not in known:
            known.add(content)
            rows.append(row)
            numbers.append(number)
    if not rows:
        raise InvalidInputError("every row of the retain split is to be forgotten as well: no probe is left of it")
    starts = range(0, len(rows), batch_rows)
    batches = [inputs_of(collate(rows[start : start + batch_rows]), "a batch of the retain split") for start in starts]
    return RetainProbe(batches, numbers)
