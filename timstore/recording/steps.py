"""One optimizer step, looked at right before it is taken: its scalars, its records, what it consumes."""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from timstore.database.validation import Owned
from timstore.recording.batches import MicroBatch, apart, records_of
from timstore.recording.gradient_dots import inner_products
from timstore.recording.optimizer import amp_scales, norm_of_gradients, step_groups
from timstore.records import Gradient, StepGroup


@dataclass(frozen=True, eq=False, slots=True)
class Ahead:
    """What a step is about to do.

    Attributes:
        scalars: the fields of `records.Step` beside its groups.
        records: sample to parameter to parts.
        dots, tokens: of each record; empty where no products are taken, or the batch names no tokens.
    """

    groups: list[StepGroup]
    scalars: dict[str, Any]
    records: Mapping[int, Mapping[str, Sequence[Gradient]]]
    dots: dict[int, float]
    tokens: dict[int, int]


def look_ahead(
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    batches: Sequence[MicroBatch],
    gradients: Mapping[str, torch.Tensor],
    *,
    ratio: float,
    clip_value: float | None,
    mean_over: str | None,
    products: bool,
    samples: Container[int] | None,
    names: Mapping[int, str],
    first_group: int,
) -> Ahead:
    """Return what the step will do.

    Args:
        batches: the micro-batches whose backward passes the step consumes.
        gradients: of each parameter, as they are now; before clipping by value.
        ratio: of these over the accumulated ones.
        products: take each record's inner product with the whole gradient.
        samples: the ids to record, None for all.
        names: parameter (by identity) to its name, of the optimizer's.
        first_group: the number of its first group.
    """
    inside, scale = amp_scales(optimizer, scaler)
    records = records_of(batches, samples, names)
    if samples is not None and any(one not in samples for batch in batches for one in batch.chosen.samples):
        records = apart(records)
    # The products are with what is there now; the records are parts of what was accumulated.
    wanted = records if products and ratio else {}
    dots = {sample: dot / ratio for sample, dot in inner_products(wanted, gradients).items()}
    drawn = [one for batch in batches for one in batch.ids]
    known = [batch.tokens.tolist() for batch in batches if batch.tokens is not None]
    counts = [count for counts in known for count in counts] if len(known) == len(batches) else []
    tokens: dict[int, int] = {}
    for sample, count in zip(drawn, counts, strict=False):
        tokens[sample] = tokens.get(sample, 0) + count
    norm = norm_of_gradients(gradients.values())
    kept: Mapping[int, Mapping[str, Sequence[Gradient]]] = records
    if math.isfinite(norm):
        # A number that is not finite in any part would be in the sum as well: nothing needs to look for it again.
        kept = {one: Owned((name, tuple(parts)) for name, parts in held.items()) for one, held in records.items()}
    scalars = {
        "consumed_ratio": ratio / inside,
        "sample_ids": drawn,
        "grad_norm": norm / ratio if ratio else 0.0,
        "amp_scale": scale,
        "clip_value": clip_value,
        "tokens": sum(counts) if counts else None,
        "mean_over": mean_over or ("tokens" if counts else "samples"),
        "micro_batches": [len(batch.ids) for batch in batches],
    }
    return Ahead(step_groups(optimizer, names, first_group), scalars, kept, dots, tokens)
