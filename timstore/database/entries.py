"""What a call hands to a store, checked and taken in, all of it, before any of it is accepted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from timstore.arguments import (
    choice,
    counting_number,
    flag,
    flags,
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
from timstore.database.ledger import Ledger, Moment, parameter_rows
from timstore.database.writer import Item, rows_items
from timstore.errors import InvalidInputError, shown
from timstore.format.log import Scope
from timstore.records import (
    Factors,
    Gradient,
    Parameter,
    Record,
    Rows,
    Step,
    StepGroup,
    as_array,
    dtype_name,
    widen,
)

_SCALARS = frozenset(field.name for field in fields(Step)) - {"epoch", "step", "groups", "rank"}


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
    new: Sequence[Parameter] = ()

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
    """Return the records of one `append` call; arguments and errors as there.

    Args:
        checked: the gradients, of one sample, are parts of known parameters, finite, and in nobody else's hands.
    """
    flags(allow_zero=allow_zero, allow_nonfinite=allow_nonfinite, copy=copy)
    at, rank = moment(epoch, step), rank_number(rank)
    single = not isinstance(sample, list | tuple) and getattr(sample, "ndim", 0) == 0
    samples = [sample_id(each) for each in ([sample] if single else listed(sample, "sample"))]
    if not samples:
        raise InvalidInputError(f"epoch {at[0]}, step {at[1]}: no sample ids")
    known = ledger.parameters()
    if checked:
        columns = {name: [tuple(parts)] for name, parts in gradients.items()}
        parameters = {name: known[name] for name in gradients}
    else:
        columns, parameters = _columns(at, samples, single, gradients, known, copy)
    losses = _per_sample(loss, len(samples), single, "loss")
    counts = _per_sample(tokens, len(samples), single, "tokens")
    dots = _per_sample(dot, len(samples), single, "dot")
    records = []
    for place, sample in enumerate(samples):
        parts = {name: rows[place] for name, rows in columns.items()}
        record = Record(*at, sample, parts, rank, losses[place], counts[place], dot=dots[place])
        arrays = arrays_of(parts)
        finite = checked or is_finite(arrays)
        _check_numbers(record, finite or allow_nonfinite, allow_zero)
        size_bytes = sum(array.nbytes for array in arrays)
        records.append(Item(size_bytes, record=record, parameters=parameters, finite=finite, moment=at))
    ledger.check_new(at, rank, samples, frozenset(parameters))
    group = () if lr is None else (StepGroup(lr=number(lr, "lr")),)
    steps = ledger.new_steps(Step(*at, group, rank))
    new = [parameter for name, parameter in parameters.items() if name not in known]
    first = rows_items("parameters", parameter_rows(new, ledger.attempt)) + rows_items("steps", steps, at)
    return Entry([*first, *records], at, rank, samples, frozenset(parameters), steps, new)


def _columns(
    at: Moment, samples: Sequence[int], single: bool, gradients: Any, known: Mapping[str, Parameter], copy: bool
) -> tuple[dict[str, list[tuple[Gradient, ...]]], dict[str, Parameter]]:
    """Return, by parameter, the parts of each sample's gradient, and what is known of the parameter."""
    more = "" if single else f" and {len(samples) - 1} more"
    where = f"epoch {at[0]}, step {at[1]}, sample {samples[0]}{more}"
    if not isinstance(gradients, Mapping) or not gradients:
        raise InvalidInputError(f"{where}: gradients maps parameter names to gradients, and is not empty")
    owned = OwnedParts(where, copy=copy)
    columns, parameters = {}, {}
    for given, value in gradients.items():
        # Of a known parameter the name was checked when it came.
        name = given if given.__class__ is str and given in known else plain_name(given, f"{where}: parameter names")
        columns[name] = rows = owned.of(name, value, None if single else len(samples))
        try:
            parameters[name] = parameter_of(name, rows[0], known.get(name))
        except InvalidInputError as error:
            raise InvalidInputError(f"{where}, parameter {name}: {error}", parameter=name) from None
    return columns, parameters


def _check_numbers(record: Record, may_be_any: bool, allow_zero: bool) -> None:
    """Refuse a record that holds NaN or Inf, or is zero throughout, where that is not allowed."""
    what = f"epoch {record.epoch}, step {record.step}, sample {record.sample}"
    if not may_be_any:
        raise InvalidInputError(
            f"{what}: a gradient holds NaN or Inf; pass allow_nonfinite=True to keep it all the same",
            kind="not-finite",
            sample=record.sample,
        )
    if not allow_zero and is_zero(record.gradients):
        raise InvalidInputError(
            f"{what}: every gradient is zero, as when backward never reached the model; pass allow_zero=True "
            "if that is what happened",
            kind="all-zero",
            sample=record.sample,
        )


def _per_sample(value: Any, count: int, single: bool, what: str) -> list[Any]:
    if value is None:
        return [None] * count
    values = [value] if single else listed(value, what)
    if len(values) != count:
        raise InvalidInputError(f"{what} has {len(values)} values for {count} samples")
    check = whole_number if what == "tokens" else number
    return [check(each, what) for each in values]


def arrays_of(gradients: Mapping[str, Sequence[Gradient]]) -> list[np.ndarray]:
    """Return every array of a record once, shared ones too."""
    by_id: dict[int, np.ndarray] = {}
    for parts in gradients.values():
        for part in parts:
            if isinstance(part, Factors):
                arrays = [part.inputs, part.output_gradients]
            else:
                arrays = [part.values if isinstance(part, Rows) else part]
            by_id.update((id(array), array) for array in arrays)
    return list(by_id.values())


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
    at = moment(epoch, step)
    where = f"epoch {at[0]}, step {at[1]}"
    unknown = sorted(scalars.keys() - _SCALARS)
    if unknown:
        raise InvalidInputError(
            f"{where}: a step has the fields {', '.join(sorted(_SCALARS))}; got {shown(unknown[0])}"
        )
    checked: dict[str, Any] = {}
    for name, value in scalars.items():
        if value is None:
            checked[name] = None
        elif name == "mean_over":
            checked[name] = choice(value, ("samples", "tokens"), f"{where}: mean_over")
        elif name in ("sample_ids", "micro_batches"):
            what = "sample id" if name == "sample_ids" else name
            checked[name] = tuple(counting_number(each, what) for each in listed(value, f"{where}: {name}"))
        elif name in ("tokens", "skipped"):
            checked[name] = whole_number(value, f"{where}: {name}")
        else:
            checked[name] = number(value, f"{where}: {name}")
    taken = tuple(step_group(group, where) for group in listed(groups, f"{where}: groups"))
    rank = rank_number(rank)
    rows = ledger.new_steps(Step(*at, taken, rank, **checked))
    return Entry(rows_items("steps", rows, at), at, rank, steps=rows)


def scope(given: Any) -> Scope:
    """Return which samples an attempt records: `all`, their ids in order, or None when unknown."""
    if given is None:
        return None
    if isinstance(given, str) and given == "all":
        return "all"
    return tuple(sorted({sample_id(sample) for sample in listed(given, "scope is 'all', None or sample ids; it")}))


def parameter(given: Any) -> Parameter:
    """Return a parameter as `declare` takes it; one with an empty axis may be declared, and has nothing to record."""
    if not isinstance(given, Parameter):
        raise InvalidInputError(f"a parameter is declared as records.Parameter, not {shown(given)}")
    name = plain_name(given.name, "a parameter's name")
    shape = tuple(counting_number(axis, f"an axis of {name}") for axis in listed(given.shape, f"shape of {name}"))
    dtype = plain_name(given.dtype, f"dtype of {name}")
    checked = Parameter(name, shape, dtype, counting_number(given.group_id, f"group_id of {name}"))
    counting_number(checked.numel, f"the size of {name}")
    return checked


def digests(given: Any) -> dict[str, str]:
    """Return parameter names to digests, as `append_fingerprints` takes them."""
    pairs = mapped(given, "digests maps parameter names to text").items()
    return {plain_name(name, "a parameter's name"): plain_name(digest, f"digest of {name}") for name, digest in pairs}


def _names(values: Any, what: str) -> tuple[str, ...]:
    return tuple(plain_name(name, what) for name in listed(values, what))


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


class OwnedParts:
    """Turns one call's gradients into parts with owned arrays.

    Arrays that several parameters share are taken over once, so that sharing survives the copy.

    Args:
        where: "epoch 0, step 3, sample 7", for messages.
        copy: False when the caller hands the arrays over and never changes them again.
    """

    def __init__(self, where: str, *, copy: bool) -> None:
        self._where = where
        self._copy = copy
        self._taken: dict[int, tuple[Any, np.ndarray]] = {}
        self._rows: dict[tuple[int, int], np.ndarray] = {}

    def of(self, name: str, value: Any, batch: int | None) -> list[tuple[Gradient, ...]]:
        """Return, for each sample of the batch (one when None), the parts of one parameter's gradient."""
        given = value if isinstance(value, list | tuple) else [value]
        if not given:
            raise self._error(name, "its gradient is an empty list of parts")
        numbers: Sequence[int | None] = [None] if batch is None else range(batch)
        return [tuple(self._part(name, part, batch, number) for part in given) for number in numbers]

    def _part(self, name: str, part: Any, batch: int | None, number: int | None) -> Gradient:
        if isinstance(part, Factors):
            inputs = self._array(name, part.inputs, batch, number)
            outputs = self._array(name, part.output_gradients, batch, number)
            if inputs.ndim != 2 or outputs.ndim != 2 or len(inputs) != len(outputs):
                raise self._error(
                    name,
                    "factors are inputs (T, d_in) and output_gradients (T, d_out) of the same T, not "
                    f"{inputs.shape} and {outputs.shape}",
                )
            return Factors(inputs, outputs)
        if isinstance(part, Rows):
            return self._rows_part(name, part, batch, number)
        return self._array(name, part, batch, number)

    def _rows_part(self, name: str, part: Rows, batch: int | None, number: int | None) -> Rows:
        try:
            indices = part.indices
            indices = indices.detach().cpu().numpy() if hasattr(indices, "detach") else np.asarray(indices)
            if indices.dtype.kind not in "iu":
                raise TypeError(f"row indices are integers, not {indices.dtype}")
            shape = tuple(int(axis) for axis in part.shape)
        except Exception as error:  # whatever such an object raises
            raise self._error(name, f"rows are indices, values and a shape (rows, d): {error}") from error
        indices = self._row(name, indices, batch, number).astype(np.int64)
        values = self._array(name, part.values, batch, number)
        if len(shape) != 2 or indices.ndim != 1 or values.shape != (len(indices), shape[-1]):
            raise self._error(
                name,
                "rows are indices (n,) and values (n, d) of a (rows, d) shape, not "
                f"{indices.shape}, {values.shape} and {shown(shape)}",
            )
        if len(indices) and (indices.min() < 0 or indices.max() >= shape[0]):
            raise self._error(name, f"row indices must lie in 0-{shown(shape[0] - 1)}")
        return Rows(indices, values, shape)

    def _array(self, name: str, value: Any, batch: int | None, number: int | None) -> np.ndarray:
        if id(value) not in self._taken:
            try:
                array = as_array(value)
            except InvalidInputError as error:
                raise self._error(name, str(error)) from error
            # The value is kept beside its copy: its id stays its own for as long as this call lasts.
            self._taken[id(value)] = value, np.array(array, order="C") if self._copy else array
        array = self._taken[id(value)][1]
        if number is None:
            return array
        key = id(value), number
        if key not in self._rows:
            self._rows[key] = self._row(name, array, batch, number)
        return self._rows[key]

    def _row(self, name: str, array: np.ndarray, batch: int | None, number: int | None) -> np.ndarray:
        if number is None:
            return array
        if array.ndim == 0 or len(array) != batch:
            raise self._error(
                name, f"with {batch} samples every array has a leading axis of {batch}, not shape {array.shape}"
            )
        row: np.ndarray = array[number]
        return row

    def _error(self, name: str, message: str) -> InvalidInputError:
        return InvalidInputError(f"{self._where}, parameter {name}: {message}", parameter=name)


def gradient_shape(parts: Sequence[Gradient], known: Parameter | None) -> tuple[int, ...]:
    """Return the parameter's shape that these parts say, or the known one if they fit it."""
    shapes = []
    for part in parts:
        if isinstance(part, Factors):
            shape: tuple[int, ...] = (part.output_gradients.shape[1], part.inputs.shape[1])
        else:
            shape = part.shape
        if isinstance(part, Factors) and known is not None and known.matrix_shape == shape:
            shape = known.shape  # a convolution's factors: the trailing axes are one
        shapes.append(shape)
    if 0 in shapes[0]:
        raise InvalidInputError(f"its shape {shapes[0]} has an empty axis: there is nothing to record, leave it out")
    wrong = [shape for shape in shapes if shape != (known.shape if known else shapes[0])]
    if wrong:
        expected = known.shape if known else shapes[0]
        raise InvalidInputError(f"its shape is {expected}, not {wrong[0]}", expected=expected, got=wrong[0])
    return shapes[0]


def parameter_of(name: str, parts: Sequence[Gradient], known: Parameter | None) -> Parameter:
    """Return what is known of the parameter, or what these parts of a new one say."""
    shape = gradient_shape(parts, known)
    if known is not None:
        return known
    first = parts[0]
    values = (
        first.output_gradients if isinstance(first, Factors) else first.values if isinstance(first, Rows) else first
    )
    return Parameter(name, shape, dtype_name(values.dtype))


def is_finite(arrays: Sequence[np.ndarray]) -> bool:
    """Say whether no number is NaN or infinite."""
    return all(bool(np.isfinite(widen(array)).all()) for array in arrays)


def is_zero(gradients: Mapping[str, Sequence[Gradient]]) -> bool:
    """Say whether every gradient of the record is zero."""
    return not any(_any(part) for parts in gradients.values() for part in parts)


def _any(part: Gradient) -> bool:
    if isinstance(part, Factors):
        outputs, inputs = widen(part.output_gradients), widen(part.inputs)
        if len(outputs) and outputs[0].any() and inputs[0].any():
            return True
        return bool((outputs.any(axis=1) & inputs.any(axis=1)).any())
    return bool(widen(part.values if isinstance(part, Rows) else part).any())
