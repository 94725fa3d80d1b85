"""What a verb of the store may be told beside what it is about: one class for each verb, checked when it is made."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from timstore.database.arguments import (
    byte_count,
    choice,
    flags,
    listed,
    plain_name,
    positive_number,
    text,
    whole_number,
)
from timstore.errors import InvalidInputError, shown

if TYPE_CHECKING:
    import torch

Method = Literal["auto", "closed form", "exact replay", "final moment"]
Denominator = Literal["kept", "renormalised"]
Loss = Literal["cross_entropy", "mse"]
Accumulate = Literal["float32", "float64"]
Missing = Literal["error", "skip"]


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
