"""What a verb of the store may be told beside what it is about: one class for each verb, checked when it is made."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from timstore.arguments import (
    byte_count,
    choice,
    counting_number,
    flag,
    flags,
    listed,
    moment,
    plain_name,
    positive_number,
    rank_number,
    text,
    whole_number,
)
from timstore.errors import InvalidInputError, shown

if TYPE_CHECKING:
    import torch

OptimizerHistory = Literal["final", "gradients"]
Capture = Literal["auto", "modules", "per-sample"]
MeanOver = Literal["samples", "tokens"]
Method = Literal["auto", "closed form", "exact replay", "final moment"]
Denominator = Literal["kept", "renormalised"]
Loss = Literal["cross_entropy", "mse"]
Accumulate = Literal["float32", "float64"]
Missing = Literal["error", "skip"]


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

    capture: Capture = "auto"
    """`auto`, gradients as modules show them in the ordinary backward pass, and those that no module shows (an LSTM, a
    weight used directly) by one more backward pass for each recorded sample, to these parameters alone, with one
    warning that names them; `per-sample`, the same without a warning; `modules`, such parameters are refused."""

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


@dataclass(frozen=True, kw_only=True, eq=False)
class RollbackOptions:
    """How a rollback is done; the defaults are right for most.

    Raises:
        InvalidInputError: naming the option that cannot be right.
    """

    where: str | None = None
    """An SQL condition on the `records` table, in place of ids."""
    strength: float = 1.0
    """Between 0 and 1: the share that is removed."""
    epochs: Iterable[int] | None = None
    """Only what was recorded in these."""
    parameters: Iterable[str] | None = None
    """Only these are changed."""
    method: Method = "auto"
    """How the first-order change is computed; `auto` takes the best that the records allow."""
    denominator: Denominator = "kept"
    """Means divide by what they did, or by the samples (tokens) that stay."""
    optimizer: "torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None" = None
    """Those that trained the model; their state is corrected as far as the records determine it."""
    probe: Iterable[Any] | Literal["auto", False] | None = None
    """Batches that the model is asked about; `auto` for those that the store keeps, False for none, None for `auto`
    unless a checkpoint would have to be loaded."""
    bins: int = 4
    """Time bins of the probe filter."""
    outputs: Callable[[Any], Any] | None = None
    """Takes the logits out of what the model returns; by default the tensor itself, or `.logits`."""
    loss: Loss | None = None
    """What the training minimised, a mean; None for what is kept with the probe, else `cross_entropy`."""
    memory_limit: int | str = "512MB"
    """Bytes for everything but the model and its own passes."""
    accumulate: Accumulate = "float32"
    """The precision of the sums."""
    missing: Missing = "error"
    """What to do about samples that were never recorded."""
    keep_delta: bool = False
    """Keep the parameters as they are in the store first, for `undo`."""
    dry_run: bool = False
    """Compute and report, change nothing."""
    force: bool = False
    """Subtract also what was removed from this model before."""
    progress: bool | None = None
    """True for bars, or lines where there is no terminal; None for bars on a terminal."""
    output: str | os.PathLike[str] | None = None
    """Where a changed checkpoint goes."""
    in_place: bool = False
    """Put the changed checkpoint in the old one's place."""
    model: "torch.nn.Module | None" = None
    """What a probe asks in place of the model that transformers loads from a checkpoint."""

    def __post_init__(self) -> None:
        flags(keep_delta=self.keep_delta, dry_run=self.dry_run, force=self.force, in_place=self.in_place)
        if self.where is not None:
            text(self.where, "where")
        if not (isinstance(self.strength, float | int) and 0 <= self.strength <= 1):
            raise InvalidInputError(f"strength lies between 0 and 1, not {shown(self.strength)}")
        words = {"method": Method, "denominator": Denominator, "accumulate": Accumulate, "missing": Missing}
        for name, literal in words.items():
            choice(getattr(self, name), get_args(literal), name)
        if self.loss is not None:
            choice(self.loss, get_args(Loss), "loss")
        if not (self.outputs is None or callable(self.outputs)):
            raise InvalidInputError(f"outputs is a function of what the model returns, not {shown(self.outputs)}")
        if not (self.progress is None or isinstance(self.progress, bool)):
            raise InvalidInputError(f"progress is True, False or None, not {shown(self.progress)}")
        checked: dict[str, Any] = {
            "strength": float(self.strength),
            "bins": positive_number(self.bins, "bins"),
            "memory_limit": byte_count(self.memory_limit, "memory_limit"),
        }
        if self.epochs is not None:
            epochs = listed(self.epochs, "epochs", "a list of integers")
            checked["epochs"] = tuple(dict.fromkeys(whole_number(epoch, "epochs") for epoch in epochs))
        if self.parameters is not None:
            names = listed(self.parameters, "parameters")
            checked["parameters"] = frozenset(plain_name(name, "a parameter's name") for name in names)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def memory_limit_bytes(self) -> int:
        """The memory limit as a number."""
        return byte_count(self.memory_limit, "memory_limit")

    @property
    def removes_everything(self) -> bool:
        """Whether all that the samples did is to be removed, in every epoch and from every parameter."""
        return self.strength == 1 and self.parameters is None and self.epochs is None
