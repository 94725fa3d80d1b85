"""Options of what a store does, each with its default; checked once, when they are made."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from timstore.arguments import (
    byte_count,
    choice,
    counting_number,
    flag,
    listed,
    moment,
    plain_name,
    positive_number,
    rank_number,
)
from timstore.errors import InvalidInputError, shown

OptimizerHistory = Literal["final", "gradients"]
Capture = Literal["modules", "per-sample"]
MeanOver = Literal["samples", "tokens"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordOptions:
    """How `Store.record` records.

    Raises:
        InvalidInputError: an option that cannot be right, by name.
    """

    resume_from: tuple[int, int] | None = None
    """(epoch, step) at which a resumed run goes on; begins a new attempt, which supersedes everything recorded from
    there on. Not needed where recording stopped, nor after a rollback."""

    probe: Iterable[Any] | Literal["auto", False] | None = "auto"
    """What `rollback` asks the model about, kept in the store: `auto`, up to 256 rows (64 MB) of the training itself,
    drawn from the samples that are not recorded, or from all where all are; or batches of any data like the training
    data; False or None for nothing. Rows are written where the recorder commits."""

    optimizer_history: OptimizerHistory = "final"
    """`final` keeps, beside every step's scalars, the second moment at the end (2 bytes per parameter); `gradients`
    also every step's whole gradient, which makes exact replay possible, of any optimizer, at the price of a model's
    size per step."""

    waypoints: bool = True
    """Keep the trained parameters after 8, 16, 32, ... steps (2 bytes per parameter each), so that a rollback asks for
    the curvature that there was on the way, not at the end alone."""

    scaler: Any = None
    """The `torch.amp.GradScaler`, where there is one; without it only clip / scale is visible."""

    mean_over: MeanOver | None = None
    """What the loss's mean divides by; found when None: tokens if the model is given `labels`."""

    budget: int | str | None = None
    """Bytes, or text like "20GB", that recording may take; refused at the first recorded step, by what that step's
    records take, if `steps` optimizer steps (in which each sample is drawn `epochs` times) would take more."""

    steps: int | None = None
    """Optimizer steps to come, for `budget`."""

    epochs: int = 1
    """How often each sample is drawn in them, for `budget`."""

    rank: int | None = None
    """Of this process; found when None."""

    allow_zero: bool = False
    """Accept a step in which no sample has any gradient; one sample without any is recorded as zero."""

    capture: Capture = "modules"
    """`modules`, gradients as modules show them in the ordinary backward pass; `per-sample` also what no module shows
    (an LSTM, a weight used directly), by one more backward pass for each recorded sample."""

    batch_axis: int = 0
    """Of the tensors that the model is given and returns."""

    id_column: str | None = None
    """Of `samples`, by which ids that are text are looked up."""

    by_content: bool = False
    """Know the rows of a batch without `sample_ids` by their tokens: the id is the first 63 bits of their hash, column
    `content_hash` of `samples`."""

    process_group: Any = None
    """Of processes that average their gradients, unless the model is DistributedDataParallel."""

    def __post_init__(self) -> None:
        checked = {
            "resume_from": None if self.resume_from is None else _moment(self.resume_from),
            "probe": _probe(self.probe),
            "optimizer_history": choice(self.optimizer_history, get_args(OptimizerHistory), "optimizer_history"),
            "waypoints": flag(self.waypoints, "waypoints"),
            "mean_over": None if self.mean_over is None else choice(self.mean_over, get_args(MeanOver), "mean_over"),
            "budget": None if self.budget is None else byte_count(self.budget, "budget"),
            "steps": None if self.steps is None else positive_number(self.steps, "steps"),
            "epochs": positive_number(self.epochs, "epochs"),
            "rank": None if self.rank is None else rank_number(self.rank),
            "allow_zero": flag(self.allow_zero, "allow_zero"),
            "capture": choice(self.capture, get_args(Capture), "capture"),
            "batch_axis": counting_number(self.batch_axis, "batch_axis"),
            "id_column": None if self.id_column is None else plain_name(self.id_column, "id_column"),
            "by_content": flag(self.by_content, "by_content"),
        }
        if self.budget is not None and self.steps is None:
            raise InvalidInputError("budget= needs steps=, the number of optimizer steps to come (and epochs=)")
        if self.scaler is not None and not callable(getattr(self.scaler, "get_scale", None)):
            raise InvalidInputError(f"scaler is the GradScaler around the optimizer, not {shown(self.scaler)}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def _moment(pair: Any) -> tuple[int, int]:
    values = listed(pair, "resume_from", "a pair (epoch, step)")
    if len(values) != 2:
        raise InvalidInputError(f"resume_from is a pair (epoch, step), not {shown(pair)}")
    return moment(*values)


def _probe(probe: Any) -> list[Any] | str | None:
    """Return batches as a list, `auto`, or None for nothing to be kept."""
    if probe is None or probe is False or (isinstance(probe, str) and probe == "auto"):
        return probe or None
    return listed(probe, "probe, unless it is 'auto' or False,")
