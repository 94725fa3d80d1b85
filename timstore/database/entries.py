"""What one call of `append` or `append_step` holds: checked and taken in, before any of it is accepted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from timstore import arguments
from timstore.database import validation
from timstore.database.batch import Item, rows_items
from timstore.database.ledger import Ledger, Moment, parameter_rows
from timstore.records import Parameter, Step, StepGroup


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """Something that can be accepted: nothing that it holds is a reason to refuse it any more.

    Attributes:
        items: for the writer.
        samples, names: of the records in it, and of their parameters; empty for a step's scalars.
        steps: rows of the `steps` table that were not known before.
        new: parameters that were not known before.
    """

    items: Sequence[Item]
    moment: Moment
    rank: int
    samples: Sequence[int] = ()
    names: frozenset[str] = frozenset()
    steps: Sequence[dict[str, Any]] = ()
    new: Sequence[Parameter] = field(default_factory=list)

    def accepted(self, ledger: Ledger) -> None:
        """Let the ledger know that the items were accepted for writing."""
        ledger.know(self.new)
        ledger.accept(self.moment, self.rank, samples=self.samples, names=self.names, steps=self.steps)


def record_entry(
    ledger: Ledger,
    epoch: int,
    step: int,
    sample: int | Sequence[int],
    gradients: Mapping[str, Any],
    *,
    lr: float | None = None,
    loss: float | Sequence[float] | None = None,
    tokens: int | Sequence[int] | None = None,
    dot: float | Sequence[float] | None = None,
    rank: int = 0,
    allow_zero: bool = False,
    allow_nonfinite: bool = False,
    copy: bool = True,
    checked: bool = False,
) -> Entry:
    """Return the records of one `append` call; arguments and errors as there, `checked` as `take_in` takes it."""
    arguments.flags(allow_zero=allow_zero, allow_nonfinite=allow_nonfinite, copy=copy)
    moment, rank = arguments.moment(epoch, step), arguments.rank_number(rank)
    taken = validation.take_in(
        *moment,
        sample,
        gradients,
        known=ledger.parameters(),
        rank=rank,
        loss=loss,
        tokens=tokens,
        dot=dot,
        allow_zero=allow_zero,
        allow_nonfinite=allow_nonfinite,
        copy=copy,
        checked=checked,
    )
    samples, names = [record.sample for record in taken.records], frozenset(taken.parameters)
    ledger.check_new(moment, rank, samples, names)
    group = () if lr is None else (StepGroup(lr=arguments.number(lr, "lr")),)
    steps = ledger.new_steps(Step(*moment, group, rank))
    records = [
        Item(
            sum(array.nbytes for array in validation.arrays_of(record.gradients)),
            record=record,
            parameters=taken.parameters,
            finite=finite,
            moment=moment,
        )
        for record, finite in zip(taken.records, taken.finite, strict=True)
    ]
    new = rows_items("parameters", parameter_rows(taken.new, ledger.attempt))
    items = [*new, *rows_items("steps", steps, moment), *records]
    return Entry(items, moment, rank, samples, names, steps, taken.new)


def step_entry(
    ledger: Ledger,
    epoch: int,
    step: int,
    groups: Sequence[Mapping[str, Any] | StepGroup],
    *,
    rank: int = 0,
    **scalars: Any,
) -> Entry:
    """Return the scalars of one `append_step` call; arguments and errors as there."""
    taken = validation.step(epoch, step, groups, rank, scalars)
    rows, moment = ledger.new_steps(taken), (taken.epoch, taken.step)
    return Entry(rows_items("steps", rows, moment), moment, taken.rank, steps=rows)
