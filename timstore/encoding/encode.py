"""Choose how each gradient of a record is stored: dense, factors or rows, whichever is smaller."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from timstore.encoding.precision import LADDER, restore, store_as
from timstore.encoding.products import factor_norm, factor_norms, norm, norm_of_sum, product
from timstore.records import Factors, Gradient, Parameter, Rows, widen

_INDEX_BYTES = 4

# Which rows are kept, (n,) bools; None for all of them, which is what nearly every matrix keeps.
Keep = np.ndarray | None


@dataclass(frozen=True, eq=False, slots=True)
class Matrix:
    """Rows to be written: (n, d) in a stored dtype. Gradients that share storage hold the same object."""

    values: np.ndarray


@dataclass(frozen=True, eq=False, slots=True)
class Encoded:
    """One part of one parameter's gradient, ready to be written.

    Attributes:
        matrices: role (inputs, output_gradients, values, indices and their `_scales`) to its rows;
            empty when the part is zero.
        row_map: for factors, which rows of the shared inputs the rows of output_gradients belong to;
            None when they are all of them in order.
        rel_error: relative Frobenius error of what is stored, measured; 0 under exact.
        bytes: stored bytes before lossless compression; shared inputs count at the first that shares them.
        dense_bytes: bytes of the whole gradient, dense, in its captured dtype.
    """

    parameter: str
    part: int
    encoding: str
    precision: str
    norm: float
    rel_error: float
    bytes: int
    dense_bytes: int
    matrices: Mapping[str, Matrix]
    row_map: np.ndarray | None = None


@dataclass(eq=False, slots=True)
class _Layer:
    """One factored part on its way through `encode`, and which of its tokens' rows are kept."""

    parameter: Parameter
    part: int
    factors: Factors
    keep: Keep = None

    @property
    def saving(self) -> int:
        """How many bytes its output gradients are smaller than the product: what is left to pay for the inputs."""
        inputs, outputs = self.factors.inputs, self.factors.output_gradients
        dense = self.parameter.numel * max(_number_bytes(outputs), _number_bytes(inputs))
        factor: int = _count(self.keep, inputs) * outputs.shape[1] * outputs.itemsize
        return dense - factor


def encode(
    gradients: Mapping[str, Sequence[Gradient]],
    parameters: Mapping[str, Parameter],
    *,
    precision: str = "exact",
    max_rel_error: float = 0.02,
    drop_zero_rows: bool = True,
) -> tuple[list[Encoded], float]:
    """Return every part of a record's gradients as stored matrices, and the norm of the whole record.

    Args:
        gradients: parameter name to its parts, arrays already validated against `parameters`.
        precision: exact, bfloat16 or int8; a part whose measured relative error is above `max_rel_error`
            is stored one precision finer.
        drop_zero_rows: leave out token rows that contribute nothing; False keeps NaN and Inf in them.
    """
    encoded: list[Encoded] = []
    sharers: dict[int, list[_Layer]] = {}
    # Numbers too large to square are no mistake of ours: their norm is inf or NaN, and says so.
    with np.errstate(over="ignore", invalid="ignore"):
        for name, parts in gradients.items():
            for number, part in enumerate(parts):
                if isinstance(part, Factors):
                    sharers.setdefault(id(part.inputs), []).append(_Layer(parameters[name], number, part))
                else:
                    encoded.append(_encode_rows(parameters[name], number, part, precision, max_rel_error))
        for layers in sharers.values():
            encoded += _encode_factors(layers, precision, max_rel_error, drop_zero_rows)
        return encoded, _record_norm(encoded, gradients, parameters)


def _encode_factors(layers: list[_Layer], precision: str, max_rel_error: float, drop: bool) -> list[Encoded]:
    """Encode layers that share one input: its rows are stored once, for those whose factors are smaller."""
    inputs = layers[0].factors.inputs
    if drop:
        # A token whose input or output gradient is zero adds nothing to the product.
        used = _nonzero_rows(inputs)
        for layer in layers:
            layer.keep = _both(used, _nonzero_rows(layer.factors.output_gradients))
    smaller = [layer for layer in layers if layer.saving > 0]
    shared_bytes = _count(_union(smaller), inputs) * inputs.shape[1] * inputs.itemsize if smaller else 0
    # The shared input's rows are paid for by all of them together.
    if sum(layer.saving for layer in smaller) < shared_bytes:
        smaller = []
    encoded = []
    for layer in layers:
        if layer not in smaller:
            outputs = _only(layer.factors.output_gradients, layer.keep)
            dense = product(widen(outputs).T, widen(_only(inputs, layer.keep)))
            encoded.append(_encode_rows(layer.parameter, layer.part, dense, precision, max_rel_error))
    return encoded + (_encode_shared(inputs, smaller, precision, max_rel_error) if smaller else [])


def _encode_shared(inputs: np.ndarray, layers: list[_Layer], precision: str, max_rel_error: float) -> list[Encoded]:
    union = _union(layers)
    rows = _only(inputs, union)
    outputs = [_only(layer.factors.output_gradients, layer.keep) for layer in layers]
    row_maps = [
        _row_map(union, layer.keep) if len(output) < len(rows) else None
        for output, layer in zip(outputs, layers, strict=True)
    ]
    squares = [layer.factors.square for layer in layers]
    known = all(square is not None for square in squares)
    norms = [_root(float(square)) for square in squares] if known else _norms(rows, outputs, row_maps)
    for rung in LADDER[precision]:
        stored_inputs = store_as(rows, rung)
        stored_outputs = [store_as(output, rung) for output in outputs]
        errors = [
            0.0 if rung == "exact" or size == 0 else _factor_error(rows, stored_inputs, output, stored, row_map) / size
            for output, stored, row_map, size in zip(outputs, stored_outputs, row_maps, norms, strict=True)
        ]
        if all(error <= max_rel_error for error in errors) or rung == "exact":
            break
    shared = _matrices("inputs", *stored_inputs)
    encoded: list[Encoded] = []
    for layer, stored, row_map, size, error in zip(layers, stored_outputs, row_maps, norms, errors, strict=True):
        own = _matrices("output_gradients", *stored)
        encoded.append(
            Encoded(
                parameter=layer.parameter.name,
                part=layer.part,
                encoding="factors",
                precision=rung,
                norm=size,
                rel_error=error,
                bytes=_stored_bytes(own if encoded else {**shared, **own}),
                dense_bytes=layer.parameter.numel * max(inputs.itemsize, outputs[0].itemsize),
                matrices={**shared, **own} if len(stored[0]) else {},
                row_map=row_map,
            )
        )
    return encoded


def _norms(rows: np.ndarray, outputs: list[np.ndarray], row_maps: Sequence[np.ndarray | None]) -> list[float]:
    if all(row_map is None for row_map in row_maps):
        return factor_norms([widen(output) for output in outputs], widen(rows))
    pairs = zip(outputs, row_maps, strict=True)
    return [factor_norm(widen(output), widen(_mapped(rows, row_map))) for output, row_map in pairs]


def _root(square: float) -> float:
    return max(square, 0.0) ** 0.5 if math.isfinite(square) else math.nan


def _both(left: Keep, right: Keep) -> Keep:
    return right if left is None else left if right is None else left & right


def _union(layers: Sequence[_Layer]) -> Keep:
    """Return the rows of their shared inputs that any of the layers needs."""
    keeps = [layer.keep for layer in layers if layer.keep is not None]
    return np.logical_or.reduce(keeps) if len(keeps) == len(layers) else None


def _count(keep: Keep, rows: np.ndarray) -> int:
    return len(rows) if keep is None else int(np.count_nonzero(keep))


def _row_map(union: Keep, keep: Keep) -> np.ndarray | None:
    """Return where the kept rows are among those of the union."""
    if keep is None:
        return None
    positions = np.arange(len(keep)) if union is None else np.cumsum(union) - 1
    row_map: np.ndarray = positions[keep].astype(np.int32)
    return row_map


def _only(matrix: np.ndarray, keep: Keep) -> np.ndarray:
    """Return the rows to be kept; a view where they lie together."""
    if keep is None:
        return matrix
    count, first = np.count_nonzero(keep), int(keep.argmax())
    # Padding is at an end, as is the last token, which predicts nothing: what is left is one piece.
    return matrix[first : first + count] if keep[first : first + count].all() else matrix[keep]


def _mapped(rows: np.ndarray, row_map: np.ndarray | None) -> np.ndarray:
    return rows if row_map is None else rows[row_map]


def _number_bytes(array: np.ndarray) -> int:
    """Return the size of the array's numbers once they can be calculated with."""
    return max(array.itemsize, 4)


def _factor_error(
    rows: np.ndarray,
    stored_rows: tuple[np.ndarray, np.ndarray | None],
    output: np.ndarray,
    stored_output: tuple[np.ndarray, np.ndarray | None],
    row_map: np.ndarray | None,
) -> float:
    """Return the norm of (stored product - product), as one product of twice the tokens: nothing cancels."""
    exact_in, exact_out = widen(_mapped(rows, row_map)), widen(output)
    lossy_in, lossy_out = _mapped(restore(*stored_rows), row_map), restore(*stored_output)
    return factor_norm(
        np.concatenate([lossy_out, lossy_out - exact_out]), np.concatenate([lossy_in - exact_in, exact_in])
    )


def _encode_rows(
    parameter: Parameter, part: int, gradient: np.ndarray | Rows, precision: str, max_rel_error: float
) -> Encoded:
    """Encode a dense gradient or a set of rows: all of its rows, or only those that hold anything."""
    total, width = parameter.matrix_shape
    if isinstance(gradient, Rows):
        indices, values = np.asarray(gradient.indices), gradient.values
    else:
        indices, values = np.arange(total), gradient.reshape(total, width)
    dense_bytes = parameter.numel * values.itemsize
    keep = _nonzero_rows(values)
    count = _count(keep, values)
    # Repeated indices are summed at reading; a dense copy could not hold them apart.
    repeated = isinstance(gradient, Rows) and len(np.unique(indices)) < len(indices)
    as_rows = repeated or count * (width * values.itemsize + _INDEX_BYTES) < dense_bytes
    if as_rows:
        indices, values = _only(indices, keep), _only(values, keep)
    elif isinstance(gradient, Rows):
        dense = np.zeros((total, width), values.dtype)
        dense[indices] = values
        values = dense
    size = norm(Rows(indices, values, (total, width))) if as_rows else norm(values)
    for rung in LADDER[precision]:
        stored = store_as(values, rung)
        error = 0.0
        if rung != "exact" and size != 0:
            difference = restore(*stored).astype(np.float64) - widen(values)
            error = (norm(Rows(indices, difference, (total, width))) if as_rows else norm(difference)) / size
        if error <= max_rel_error or rung == "exact":
            break
    matrices = _matrices("values", *stored)
    if as_rows:
        matrices["indices"] = Matrix(indices.astype(np.int32 if total < 2**31 else np.int64).reshape(-1, 1))
    return Encoded(
        parameter=parameter.name,
        part=part,
        encoding="rows" if as_rows else "dense",
        precision=rung,
        norm=size,
        rel_error=error,
        bytes=_stored_bytes(matrices),
        dense_bytes=dense_bytes,
        matrices=matrices if len(values) else {},
    )


def _nonzero_rows(matrix: np.ndarray) -> Keep:
    """Say which rows hold any set bit, so that -0.0 and denormals count as something; None: all of them."""
    if matrix.shape[1] == 0:
        return np.zeros(len(matrix), bool)
    bits = np.ascontiguousarray(matrix).view(f"u{matrix.itemsize}")
    # Most rows show in their first number that they hold something; only the others are looked through.
    if bits[:, 0].all():
        return None
    nonzero: np.ndarray = bits[:, 0] != 0
    rest = np.flatnonzero(~nonzero)
    nonzero[rest] = bits[rest].any(axis=1)
    return None if nonzero.all() else nonzero


def _matrices(role: str, values: np.ndarray, scales: np.ndarray | None) -> dict[str, Matrix]:
    matrices = {role: Matrix(values)}
    if scales is not None:
        matrices[f"{role}_scales"] = Matrix(scales)
    return matrices


def _stored_bytes(matrices: Mapping[str, Matrix]) -> int:
    return sum(matrix.values.nbytes for matrix in matrices.values())


def _record_norm(
    encoded: list[Encoded], gradients: Mapping[str, Sequence[Gradient]], parameters: Mapping[str, Parameter]
) -> float:
    square = 0.0
    by_parameter: dict[str, dict[int, float]] = {}
    for part in encoded:
        by_parameter.setdefault(part.parameter, {})[part.part] = part.norm
    for name, norms in by_parameter.items():
        ordered = [norms[part] for part in sorted(norms)]
        square += norm_of_sum(gradients[name], ordered, parameters[name].matrix_shape) ** 2
    return float(np.sqrt(square))
