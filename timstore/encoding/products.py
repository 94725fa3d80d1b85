"""Products of factors without forming them: norms, inner products, and dense gradients when asked for.

What the writer takes runs beside a training that wants every core: it stays on the writer's own thread.
"""

from collections.abc import Sequence

import numpy as np

from timstore.records import Factors, Gradient, Rows, widen

# Of a product's rows, sums and columns: so few multiplications that numpy's BLAS wakes no threads of its own for them,
# which would take cores from training, and go on spinning there for a while.
_BLOCK = 64, 128, 32


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return `left @ right`, (m, k) by (k, n), on the calling thread alone."""
    down, along, across = _BLOCK
    found = np.zeros((left.shape[0], right.shape[1]), np.result_type(left, right))
    for row in range(0, found.shape[0], down):
        for column in range(0, found.shape[1], across):
            block = found[row : row + down, column : column + across]
            for start in range(0, left.shape[1], along):
                end = start + along
                block += left[row : row + down, start:end] @ right[start:end, column : column + across]
    return found


def densify(parts: Sequence[Gradient], matrix_shape: tuple[int, int]) -> np.ndarray:
    """Return the sum of the parts as one (rows, columns) matrix, float64 if any part is, else float32."""
    total: np.ndarray | None = None
    for part in parts:
        dense = _dense(part, matrix_shape)
        total = dense if total is None else total + dense
    return np.zeros(matrix_shape, np.float32) if total is None else total


def factor_norm(output_gradients: np.ndarray, inputs: np.ndarray) -> float:
    """Return the Frobenius norm of `output_gradients.T @ inputs`, shapes (T, d_out) and (T, d_in)."""
    return factor_norms([output_gradients], inputs)[0]


def factor_norms(outputs: Sequence[np.ndarray], inputs: np.ndarray) -> list[float]:
    """Return the Frobenius norm of `output.T @ inputs` for every output, shapes (T, d_out) and (T, d_in).

    Each by the cheaper of two ways: from the T x T Gram matrices, of which that of the inputs is one for all, or by
    forming the product. A Gram matrix is symmetric, and takes half of what another product of its size does.
    """
    tokens, d_in = inputs.shape
    share = d_in / len(outputs)
    gram: np.ndarray | None = None
    norms = []
    for output in outputs:
        d_out = output.shape[1]
        if tokens * (share + d_out) < 2 * d_in * d_out:
            gram = product(inputs, inputs.T) if gram is None else gram
            square = _total(gram * product(output, output.T))
        else:
            square = _total(np.square(product(output.T, inputs)))
        norms.append(float(np.sqrt(max(square, 0.0))) if np.isfinite(square) else float("nan"))
    return norms


def norm(part: Gradient) -> float:
    """Return the Frobenius norm of one part. Rows that are named twice are summed first."""
    if isinstance(part, Factors):
        return factor_norm(widen(part.output_gradients), widen(part.inputs))
    if isinstance(part, Rows):
        return _length(_summed(part)[1])
    return _length(widen(part))


def norm_of_sum(parts: Sequence[Gradient], norms: Sequence[float], matrix_shape: tuple[int, int]) -> float:
    """Return the norm of the parts' sum from the parts' own norms and the inner products between them."""
    square = sum(value * value for value in norms)
    for index, left in enumerate(parts):
        for right in parts[index + 1 :]:
            square += 2 * inner(left, right, matrix_shape)
    return float(np.sqrt(max(square, 0.0))) if np.isfinite(square) else float("nan")


def inner(left: Gradient, right: Gradient, matrix_shape: tuple[int, int]) -> float:
    """Return the inner product of two parts of one parameter; a product of factors is never formed for it."""
    if isinstance(left, Factors) and isinstance(right, Factors):
        tokens = product(widen(left.output_gradients), widen(right.output_gradients).T)
        return _total(tokens * product(widen(left.inputs), widen(right.inputs).T))
    if isinstance(right, Rows) and not isinstance(left, Rows):
        left, right = right, left
    if isinstance(left, Rows):
        indices, values = _summed(left)
        if isinstance(right, Factors):
            return _total(product(widen(right.output_gradients)[:, indices].T, widen(right.inputs)) * values)
        if isinstance(right, Rows):
            others, more = _summed(right)
            _, here, there = np.intersect1d(indices, others, assume_unique=True, return_indices=True)
            return _total(values[here].astype(np.float64) * more[there])
        return _total(values.astype(np.float64) * widen(right).reshape(matrix_shape)[indices])
    return _total(_dense(left, matrix_shape).astype(np.float64) * _dense(right, matrix_shape))


def _dense(part: Gradient, matrix_shape: tuple[int, int]) -> np.ndarray:
    if isinstance(part, Factors):
        product: np.ndarray = widen(part.output_gradients).T @ widen(part.inputs)
        return product
    if isinstance(part, Rows):
        indices, values = _summed(part)
        dense = np.zeros(matrix_shape, values.dtype)
        dense[indices] = values
        return dense
    return widen(part).reshape(matrix_shape)


def _summed(part: Rows) -> tuple[np.ndarray, np.ndarray]:
    indices, inverse = np.unique(part.indices, return_inverse=True)
    values = widen(part.values)
    if len(indices) == len(part.indices):
        return part.indices, values
    summed = np.zeros((len(indices), values.shape[1]), values.dtype)
    np.add.at(summed, inverse, values)
    return indices, summed


def _length(values: np.ndarray) -> float:
    flat = values.astype(np.float64).reshape(-1)
    return float(np.sqrt(np.einsum("i,i->", flat, flat)))  # not by BLAS


def _total(values: np.ndarray) -> float:
    return float(np.sum(values, dtype=np.float64))
