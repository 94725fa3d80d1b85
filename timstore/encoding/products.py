"""Products of factors without forming them: norms, inner products, and dense gradients when asked for."""

from collections.abc import Sequence

import numpy as np

from timstore.records import Factors, Gradient, Rows, widen


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
            gram = inputs @ inputs.T if gram is None else gram
            square = _total(gram * (output @ output.T))
        else:
            square = _total(np.square(output.T @ inputs))
        norms.append(float(np.sqrt(max(square, 0.0))) if np.isfinite(square) else float("nan"))
    return norms


def norm(part: Gradient) -> float:
    """Return the Frobenius norm of one part. Rows that are named twice are summed first."""
    if isinstance(part, Factors):
        return factor_norm(widen(part.output_gradients), widen(part.inputs))
    if isinstance(part, Rows):
        return float(np.linalg.norm(_summed(part)[1].astype(np.float64)))
    return float(np.linalg.norm(widen(part).astype(np.float64)))


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
        tokens = widen(left.output_gradients) @ widen(right.output_gradients).T
        return _total(tokens * (widen(left.inputs) @ widen(right.inputs).T))
    if isinstance(right, Rows) and not isinstance(left, Rows):
        left, right = right, left
    if isinstance(left, Rows) and isinstance(right, Factors):
        indices, values = _summed(left)
        touched = widen(right.output_gradients)[:, indices].T @ widen(right.inputs)
        return _total(touched * values)
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


def _total(values: np.ndarray) -> float:
    return float(np.sum(values, dtype=np.float64))
