"""Recording: torch hooks to records, optimizer state to steps."""

from collections.abc import Iterable
from typing import Any

import torch

from timstore.recording.recorder import Recorder
from timstore.store import Store

__all__ = ["Recorder", "record"]


def record(
    store: Store,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Iterable[int] | None = None,
    *,
    resume_from: tuple[int, int] | None = None,
    probe: Iterable[Any] | None = None,
    optimizer_history: str = "final",
    scaler: Any = None,
    mean_over: str | None = None,
    rank: int = 0,
    allow_zero: bool = False,
) -> Recorder:
    """Return a recorder, to be used in a `with` statement; see `timstore.Store.record`."""
    return Recorder(
        store,
        model,
        optimizer,
        samples,
        resume_from=resume_from,
        probe=probe,
        optimizer_history=optimizer_history,
        scaler=scaler,
        mean_over=mean_over,
        rank=rank,
        allow_zero=allow_zero,
    )
