"""Recording: torch hooks to records, optimizer state to steps."""

from typing import Any

import torch

from timstore.arguments import byte_count, flags, listed, positive_number
from timstore.database.store import Store
from timstore.database.validation import mean_unit
from timstore.errors import InvalidInputError
from timstore.recording.forecast import Budget, Forecast
from timstore.recording.recorder import Options, Recorder
from timstore.recording.rehearsal import rehearse

__all__ = ["Forecast", "Recorder", "record", "rehearse"]


def record(
    store: Store,
    model: torch.nn.Module,
    optimizer: Any,
    *,
    samples: Any = None,
    mean_over: str | None = None,
    budget: int | str | None = None,
    steps: int | None = None,
    epochs: int = 1,
    **options: Any,
) -> Recorder:
    """Return a recorder, to be used in a `with` statement; see `timstore.Store.record`."""
    samples = None if samples is None else listed(samples, "samples")
    flags(**{name: options[name] for name in ("allow_zero", "by_content", "waypoints") if name in options})
    limit = None
    if budget is not None:
        if steps is None:
            raise InvalidInputError("budget= needs steps=, the number of optimizer steps to come (and epochs=)")
        count = None if samples is None else len(samples)
        kept = options.get("optimizer_history", "final"), options.get("waypoints", True)
        drawn = positive_number(steps, "steps"), positive_number(epochs, "epochs")
        limit = Budget(byte_count(budget, "budget"), *drawn, count, *kept)
    return Recorder(
        store,
        model,
        optimizer,
        Options(samples=samples, mean_over=mean_unit(mean_over, "record"), budget=limit, **options),
    )
