"""Check what one call hands to a store, all of it, before any of it is accepted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from timstore.arguments import (
    choice,
    counting_number,
    flag,
    listed,
    mapped,
    moment,
    number,
    plain_name,
    rank_number,
    sample_id,
    text,
    whole_number,
)
from timstore.database.parts import OwnedParts, is_finite, is_zero, parameter_of
from timstore.errors import InvalidInputError, shown
from timstore.format.log import Scope
from timstore.records import Factors, Gradient, Parameter, Record, Rows, Step, StepGroup

_SCALARS = frozenset(field.name for field in fields(Step)) - {"epoch", "step", "groups", "rank"}


def scope(given: Any) -> Scope:
    """Return which samples an attempt records: `all`, their ids in order, or None when unknown."""
    if given is None:
        return None
    if isinstance(given, str) and given == "all":
        return "all"
    return tuple(sorted({sample_id(one) for one in listed(given, "scope is 'all', None or sample ids; it")}))


def parameter(given: Any) -> Parameter:
    """Return a parameter as `declare` takes it; one with an empty axis may be declared, and has nothing to record."""
    if not isinstance(given, Parameter):
        raise InvalidInputError(f"a parameter is declared as records.Parameter, not {shown(given)}")
    called = plain_name(given.name, "a parameter's name")
    shape = tuple(counting_number(axis, f"an axis of {called}") for axis in listed(given.shape, f"shape of {called}"))
    checked = Parameter(
        called,
        shape,
        plain_name(given.dtype, f"dtype of {called}"),
        counting_number(given.group_id, f"group_id of {called}"),
    )
    counting_number(checked.numel, f"the size of {called}")
    return checked


def digests(given: Any) -> dict[str, str]:
    """Return parameter names to digests, as `append_fingerprints` takes them."""
    pairs = mapped(given, "digests maps parameter names to text").items()
    return {plain_name(one, "a parameter's name"): plain_name(digest, f"digest of {one}") for one, digest in pairs}


def _names(values: Any, what: str) -> tuple[str, ...]:
    return tuple(plain_name(one, what) for one in listed(values, what))


_OF_TYPE: dict[type, Callable[[Any, str], Any]] = {
    int: whole_number,
    float: number,
    bool: flag,
    str: text,
    tuple: _names,
}
_GROUP_TYPES = {
    **{field.name: float for field in fields(StepGroup)},
    **dict.fromkeys(("group_id", "counter"), int),
    **dict.fromkeys(("nesterov", "decoupled", "maximize", "amsgrad"), bool),
    **dict.fromkeys(("optimizer", "options"), str),
    **dict.fromkeys(("idle", "fresh"), tuple),
}
_NULLABLE = frozenset(field.name for field in fields(StepGroup) if "None" in str(field.type))


def step_group(group: Any, where: str) -> StepGroup:
    """Return one optimizer group's scalars from a mapping of them.

    Raises:
        InvalidInputError: for a field that does not exist, or one that holds something else.
    """
    taken: StepGroup
    if isinstance(group, StepGroup):
        taken = group
    else:
        try:
            taken = StepGroup(**group)
        except Exception:  # whatever such an object raises
            known = ", ".join(field.name for field in fields(StepGroup))
            raise InvalidInputError(f"{where}: a group has the fields {known}; got {shown(group)}") from None
    changed: dict[str, Any] = {}
    for field, kind in _GROUP_TYPES.items():
        value = getattr(taken, field)
        if not (value is None and field in _NULLABLE):
            checked = _OF_TYPE[kind](value, f"{where}: {field}")
            if checked is not value:
                changed[field] = checked
    return replace(taken, **changed) if changed else taken


def mean_unit(value: Any, where: str) -> str | None:
    """Return what a loss's mean divides by: `samples`, `tokens`, or None where that is not known."""
    return None if value is None else choice(value, ("samples", "tokens"), f"{where}: mean_over")


def step(epoch: Any, number_: Any, groups: Any, rank: Any, scalars: Mapping[str, Any]) -> Step:
    """Return one optimizer step from what `append_step` was given.

    Raises:
        InvalidInputError: naming the step and the field.
    """
    at = moment(epoch, number_)
    where = f"epoch {at[0]}, step {at[1]}"
    unknown = sorted(scalars.keys() - _SCALARS)
    if unknown:
        raise InvalidInputError(
            f"{where}: a step has the fields {', '.join(sorted(_SCALARS))}; got {shown(unknown[0])}"
        )
    mean_unit(scalars.get("mean_over"), where)
    checked: dict[str, Any] = {}
    for name, value in scalars.items():
        if value is None or name == "mean_over":
            checked[name] = value
        elif name in ("sample_ids", "micro_batches"):
            what = "sample id" if name == "sample_ids" else name
            checked[name] = tuple(counting_number(one, what) for one in listed(value, f"{where}: {name}"))
        elif name in ("tokens", "skipped"):
            checked[name] = whole_number(value, f"{where}: {name}")
        else:
            checked[name] = number(value, f"{where}: {name}")
    named = tuple(step_group(group, where) for group in listed(groups, f"{where}: groups"))
    return Step(*at, named, rank_number(rank), **checked)


@dataclass(frozen=True, slots=True)
class Taken:
    """What one `append` call holds, checked and owned.

    Attributes:
        records: one per sample.
        finite: whether the numbers of each record are all finite.
        new: parameters that were not known before.
    """

    records: list[Record]
    finite: list[bool]
    parameters: dict[str, Parameter]
    new: list[Parameter]


def take_in(
    epoch: int,
    step: int,
    sample: Any,
    gradients: Any,
    *,
    known: Mapping[str, Parameter],
    rank: int,
    loss: Any,
    tokens: Any,
    dot: Any = None,
    allow_zero: bool,
    allow_nonfinite: bool,
    copy: bool,
    checked: bool = False,
) -> Taken:
    """Return the records of one `append` call.

    Args:
        sample: an integer id, or B of them with a leading axis of B on every array.
        known: the parameters of the store so far.
        checked: the gradients, of one sample, are parts of known parameters, finite, and in nobody else's hands.

    Raises:
        InvalidInputError: naming the step, the sample and the parameter.
    """
    single = not isinstance(sample, list | tuple) and getattr(sample, "ndim", 0) == 0
    samples = [sample_id(one) for one in ([sample] if single else listed(sample, "sample"))]
    if not samples:
        raise InvalidInputError(f"epoch {epoch}, step {step}: no sample ids")
    where = f"epoch {epoch}, step {step}, sample {samples[0]}" + ("" if single else f" and {len(samples) - 1} more")
    if checked:
        taken = {name: tuple(parts) for name, parts in gradients.items()}
        if not allow_zero and is_zero(taken):
            raise _all_zero(where, samples[0])
        record = Record(epoch, step, samples[0], taken, rank, loss, tokens, dot=dot)
        return Taken([record], [True], {name: known[name] for name in gradients}, [])
    if not isinstance(gradients, Mapping) or not gradients:
        raise InvalidInputError(f"{where}: gradients maps parameter names to gradients, and is not empty")
    owned = OwnedParts(where, copy=copy)
    columns, parameters = {}, {}
    for given, value in gradients.items():
        # Of a known parameter the name was checked when it came.
        called = given if given.__class__ is str and given in known else plain_name(given, f"{where}: parameter names")
        columns[called] = rows = owned.of(called, value, None if single else len(samples))
        try:
            parameters[called] = parameter_of(called, rows[0], known.get(called))
        except InvalidInputError as error:
            raise InvalidInputError(f"{where}, parameter {called}: {error}", parameter=called) from None
    losses = _per_sample(loss, len(samples), single, "loss")
    counts = _per_sample(tokens, len(samples), single, "tokens")
    dots = _per_sample(dot, len(samples), single, "dot")
    records, finite = [], []
    for place, one in enumerate(samples):
        parts = {name: rows[place] for name, rows in columns.items()}
        finite.append(is_finite(arrays_of(parts)))
        what = f"epoch {epoch}, step {step}, sample {one}"
        if not finite[-1] and not allow_nonfinite:
            raise InvalidInputError(
                f"{what}: a gradient holds NaN or Inf; pass allow_nonfinite=True to keep it all the same",
                kind="not-finite",
                sample=one,
            )
        if not allow_zero and is_zero(parts):
            raise _all_zero(what, one)
        records.append(Record(epoch, step, one, parts, rank, losses[place], counts[place], dot=dots[place]))
    return Taken(records, finite, parameters, [one for name, one in parameters.items() if name not in known])


def _all_zero(where: str, sample: int) -> InvalidInputError:
    return InvalidInputError(
        f"{where}: every gradient is zero, as when backward never reached the model; pass allow_zero=True "
        "if that is what happened",
        kind="all-zero",
        sample=sample,
    )


def _per_sample(value: Any, count: int, single: bool, what: str) -> list[Any]:
    if value is None:
        return [None] * count
    values = [value] if single else listed(value, what)
    if len(values) != count:
        raise InvalidInputError(f"{what} has {len(values)} values for {count} samples")
    check = whole_number if what == "tokens" else number
    return [check(one, what) for one in values]


def arrays_of(gradients: Mapping[str, Sequence[Gradient]]) -> list[np.ndarray]:
    """Return every array of a record once, shared ones too."""
    found: dict[int, np.ndarray] = {}
    for parts in gradients.values():
        for part in parts:
            if isinstance(part, Factors):
                arrays = [part.inputs, part.output_gradients]
            else:
                arrays = [part.values if isinstance(part, Rows) else part]
            found.update((id(array), array) for array in arrays)
    return list(found.values())
