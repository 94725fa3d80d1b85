"""Check what a user appends, and take it over: copied, so that the caller's buffers may be reused at once."""

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from timstore.errors import InvalidInputError
from timstore.records import Factors, Gradient, Parameter, Record, Rows, Step, StepGroup, as_array, dtype_name, widen

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


_SCALARS = frozenset(field.name for field in fields(Step)) - {"epoch", "step", "groups", "rank"}


def whole_number(value: Any, what: str) -> int:
    """Return a Python int from any integer of 64 bits, numpy's and 0-d tensors' too; never from a bool or a float.

    Raises:
        InvalidInputError: naming `what`.
    """
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, bool):
        raise InvalidInputError(f"{what} must be an integer, not {value!r}", value=value)
    try:
        number = operator.index(value)
    except TypeError:
        raise InvalidInputError(f"{what} must be an integer, not {value!r}", value=value) from None
    if not -(2**63) <= number < 2**63:
        raise InvalidInputError(f"{what} must fit into 64 bits; got {number}", value=number)
    return number


def number(value: Any, what: str) -> float:
    """Return a float from any number.

    Raises:
        InvalidInputError: naming `what`.
    """
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInputError(f"{what} must be a number, not {value!r:.80}") from None


def byte_count(size: Any, what: str) -> int:
    """Return a number of bytes from an integer or from text such as "512MB" or "2 GiB".

    Raises:
        InvalidInputError: if it is neither, or not positive.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", size.upper())
        if match and match[2] in _UNITS:
            size = int(float(match[1]) * _UNITS[match[2]])
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise InvalidInputError(f'{what} is a number of bytes or text like "512MB", not {size!r}')
    return size


def flags(**given: Any) -> None:
    """Check that arguments are bools: any text is true, "no" as well.

    Raises:
        InvalidInputError: naming the argument.
    """
    for name, value in given.items():
        if not isinstance(value, bool):
            raise InvalidInputError(f"{name} is True or False, not {value!r:.80}")


def moment(epoch: Any, step: Any) -> tuple[int, int]:
    """Return (epoch, step) as non-negative integers."""
    checked = whole_number(epoch, "epoch"), whole_number(step, "step")
    if min(checked) < 0:
        raise InvalidInputError(f"epoch and step start at 0; got epoch {checked[0]}, step {checked[1]}")
    return checked


def rank_number(rank: Any) -> int:
    """Return a process's rank as a non-negative integer."""
    checked = whole_number(rank, "rank")
    if checked < 0:
        raise InvalidInputError(f"rank starts at 0; got {checked}")
    return checked


def step_group(group: Any, where: str) -> StepGroup:
    """Return one optimizer group's scalars from a mapping of them.

    Raises:
        InvalidInputError: for a field that does not exist.
    """
    if isinstance(group, StepGroup):
        return group
    try:
        return StepGroup(**group)
    except TypeError:
        known = ", ".join(field.name for field in fields(StepGroup))
        raise InvalidInputError(f"{where}: a group has the fields {known}; got {group}") from None


def mean_unit(value: Any, where: str) -> str | None:
    """Return what a loss's mean divides by: `samples`, `tokens`, or None where that is not known."""
    if value not in (None, "samples", "tokens"):
        raise InvalidInputError(f"{where}: mean_over is 'samples', 'tokens' or None, not {value!r}")
    return value  # type: ignore[no-any-return]


def step(epoch: Any, number_: Any, groups: Sequence[Any], rank: Any, scalars: Mapping[str, Any]) -> Step:
    """Return one optimizer step from what `append_step` was given.

    Raises:
        InvalidInputError: naming the step and the field.
    """
    at = moment(epoch, number_)
    where = f"epoch {at[0]}, step {at[1]}"
    unknown = sorted(scalars.keys() - _SCALARS)
    if unknown:
        raise InvalidInputError(f"{where}: a step has the fields {', '.join(sorted(_SCALARS))}; got {unknown[0]}")
    mean_unit(scalars.get("mean_over"), where)
    checked: dict[str, Any] = {}
    for name, value in scalars.items():
        if name in ("sample_ids", "micro_batches"):
            what = "sample id" if name == "sample_ids" else name
            checked[name] = None if value is None else tuple(whole_number(one, what) for one in value)
        elif name in ("tokens", "skipped"):
            checked[name] = None if value is None else whole_number(value, name)
        else:
            checked[name] = value if value is None or name == "mean_over" else number(value, name)
    return Step(*at, tuple(step_group(group, where) for group in groups), rank_number(rank), **checked)


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


class Owned(dict[str, tuple[Gradient, ...]]):
    """A record's gradients as the recorder made them: of declared parameters, finite, and in nobody else's hands."""


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
) -> Taken:
    """Return the records of one `append` call.

    Args:
        sample: an integer id, or B of them with a leading axis of B on every array.
        known: the parameters of the store so far.

    Raises:
        InvalidInputError: naming the step, the sample and the parameter.
    """
    single = not isinstance(sample, list | tuple) and np.ndim(sample) == 0
    samples = [whole_number(one, "sample") for one in ([sample] if single else sample)]
    if not samples:
        raise InvalidInputError(f"epoch {epoch}, step {step}: no sample ids")
    where = f"epoch {epoch}, step {step}, sample {samples[0]}" + ("" if single else f" and {len(samples) - 1} more")
    if isinstance(gradients, Owned) and single:
        if not allow_zero and is_zero(gradients):
            raise _all_zero(where, samples[0])
        record = Record(epoch, step, samples[0], gradients, rank, loss, tokens, dot=dot)
        return Taken([record], [True], {name: known[name] for name in gradients}, [])
    if not isinstance(gradients, Mapping) or not gradients:
        raise InvalidInputError(f"{where}: gradients maps parameter names to gradients, and is not empty")
    intake = _Intake(where, copy=copy)
    columns = {name: intake.parts(name, value, None if single else len(samples)) for name, value in gradients.items()}
    parameters = {}
    for name, rows in columns.items():
        try:
            parameters[name] = parameter_of(name, rows[0], known.get(name))
        except InvalidInputError as error:
            raise InvalidInputError(f"{where}, parameter {name}: {error}", parameter=name) from None
    losses = _per_sample(loss, len(samples), single, "loss")
    counts = _per_sample(tokens, len(samples), single, "tokens")
    dots = _per_sample(dot, len(samples), single, "dot")
    records, finite = [], []
    for number, one in enumerate(samples):
        parts = {name: rows[number] for name, rows in columns.items()}
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
        records.append(Record(epoch, step, one, parts, rank, losses[number], counts[number], dot=dots[number]))
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
    values = [value] if single else list(value) if np.iterable(value) else []
    if len(values) != count:
        raise InvalidInputError(f"{what} has {len(values)} values for {count} samples")
    check = whole_number if what == "tokens" else number
    return [check(one, what) for one in values]


class _Intake:
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

    def parts(self, name: str, value: Any, batch: int | None) -> list[tuple[Gradient, ...]]:
        """Return, for each sample of the batch (one when None), the parts of one parameter's gradient."""
        given = value if isinstance(value, list | tuple) else [value]
        if not isinstance(name, str) or not name or not given:
            raise InvalidInputError(f"{self._where}: gradients maps parameter names to gradients, not {name!r}")
        numbers: Sequence[int | None] = [None] if batch is None else range(batch)
        return [tuple(self._part(name, part, batch, number) for part in given) for number in numbers]

    def _part(self, name: str, part: Any, batch: int | None, number: int | None) -> Gradient:
        if isinstance(part, Factors):
            inputs = self._array(name, part.inputs, batch, number)
            outputs = self._array(name, part.output_gradients, batch, number)
            if inputs.ndim != 2 or outputs.ndim != 2 or len(inputs) != len(outputs):
                raise InvalidInputError(
                    f"{self._where}, parameter {name}: factors are inputs (T, d_in) and output_gradients (T, d_out) "
                    f"of the same T, not {inputs.shape} and {outputs.shape}",
                    parameter=name,
                )
            return Factors(inputs, outputs)
        if isinstance(part, Rows):
            return self._rows_part(name, part, batch, number)
        return self._array(name, part, batch, number)

    def _rows_part(self, name: str, part: Rows, batch: int | None, number: int | None) -> Rows:
        indices = part.indices.detach().cpu().numpy() if hasattr(part.indices, "detach") else np.asarray(part.indices)
        if indices.dtype.kind not in "iu":
            raise InvalidInputError(f"{self._where}, parameter {name}: row indices are integers, not {indices.dtype}")
        indices = self._one(name, indices, batch, number).astype(np.int64)
        values = self._array(name, part.values, batch, number)
        shape = tuple(part.shape)
        if len(shape) != 2 or indices.ndim != 1 or values.shape != (len(indices), shape[-1]):
            raise InvalidInputError(
                f"{self._where}, parameter {name}: rows are indices (n,) and values (n, d) of a (rows, d) shape, "
                f"not {indices.shape}, {values.shape} and {shape}",
                parameter=name,
            )
        if len(indices) and (indices.min() < 0 or indices.max() >= shape[0]):
            raise InvalidInputError(f"{self._where}, parameter {name}: row indices must lie in 0-{shape[0] - 1}")
        return Rows(indices, values, shape)

    def _array(self, name: str, value: Any, batch: int | None, number: int | None) -> np.ndarray:
        if id(value) not in self._taken:
            try:
                array = as_array(value)
            except InvalidInputError as error:
                raise InvalidInputError(f"{self._where}, parameter {name}: {error}", parameter=name) from None
            # The value is kept beside its copy: its id stays its own for as long as this call lasts.
            self._taken[id(value)] = value, np.array(array, order="C") if self._copy else array
        array = self._taken[id(value)][1]
        if number is None:
            return array
        key = id(value), number
        if key not in self._rows:
            self._rows[key] = self._one(name, array, batch, number)
        return self._rows[key]

    def _one(self, name: str, array: np.ndarray, batch: int | None, number: int | None) -> np.ndarray:
        if number is None:
            return array
        if array.ndim == 0 or len(array) != batch:
            raise InvalidInputError(
                f"{self._where}, parameter {name}: with {batch} samples every array has a leading axis of {batch}, "
                f"not shape {array.shape}",
                parameter=name,
            )
        row: np.ndarray = array[number]
        return row


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
