"""The parts of gradients as users give them, as arrays of ours."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from timstore.errors import InvalidInputError, shown
from timstore.records import Factors, Gradient, Parameter, Rows, as_array, dtype_name, widen


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
        indices = self._one(name, indices, batch, number).astype(np.int64)
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
            self._rows[key] = self._one(name, array, batch, number)
        return self._rows[key]

    def _one(self, name: str, array: np.ndarray, batch: int | None, number: int | None) -> np.ndarray:
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
