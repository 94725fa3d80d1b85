"""A small space that holds what matrices make of some vectors: block Lanczos with full re-orthogonalisation.

With several matrices, as curvature has been at several moments, it is the space of their weighted mean, in which each
of them is known.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from timstore.rollbacks.vectors import Vector, Workspace

# Symmetric matrices times a vector, one after another: parameter to a flat tensor.
Apply = Callable[[Vector], Iterable[Mapping[str, torch.Tensor]]]
# What is left of a vector once it is orthogonal to the others is rounding, below this share of it.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False, slots=True)
class Space:
    """An orthonormal basis of k vectors, and what is known in it.

    Attributes:
        matrices: (matrices, k, k), symmetric, float64.
        mean: (k, k), theirs.
        starts: (k, starts), the vectors that it was made from.
    """

    basis: list[Vector]
    matrices: torch.Tensor
    mean: torch.Tensor
    starts: torch.Tensor

    def free(self) -> None:
        """Give the vectors back."""
        for vector in self.basis:
            vector.free()


def eigen(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (eigenvalues, not below 0; eigenvectors as columns) of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp(min=0), vectors


def krylov(starts: Sequence[Vector], apply: Apply, weights: Sequence[float], workspace: Workspace, depth: int) -> Space:
    """Return the space of some vectors and of what `depth` products make of each; the vectors are used up.

    Cost: at most `depth` products with every matrix, and as many workspace vectors, for each that is not zero.

    Args:
        weights: of the matrices in their mean.
    """
    # In the span of b, A b, A^2 b, ... a function f(A) b is nearly f of the small matrix, for what few steep directions
    # hold is in there first. Each level multiplies the vectors that the one before it added.
    basis: list[Vector] = []
    coefficients = [_added(start, basis) for start in starts]
    products: list[list[list[float]]] = [[] for _ in weights]
    first, last = 0, len(basis)
    for level in range(depth):
        for number in range(first, last):
            image, part = workspace.new(), workspace.new()
            for columns, weight, result in zip(products, weights, apply(basis[number]), strict=True):
                for name, numbers in result.items():
                    part.write(name, 0, numbers)
                # The matrices are symmetric: what later vectors have of it is seen when their turn comes.
                columns.append([part.dot(other) for other in basis[: number + 1]])
                image.add(part, weight)
            part.free()
            _added(image, basis, keep=level + 1 < depth)
        first, last = last, len(basis)
    # Of a symmetric matrix the upper triangle tells all.
    upper = torch.stack([_columns(columns, len(basis)) for columns in products])
    matrices = upper + upper.mT.tril(-1)
    # Products were taken with each of them, and the mean's follow.
    mean = torch.tensor(weights, dtype=torch.float64, device="cpu") @ matrices.flatten(1)
    return Space(basis, matrices, mean.view(matrices.shape[1:]), _columns(coefficients, len(basis)))


def random_signs(workspace: Workspace) -> Vector:
    """Return a vector of signs: the mean of its products with f(A) is the trace of f(A)."""
    # z' f(A) z is the sum over i and j of f(A)_ij z_i z_j, and independent signs leave i = j alone in the mean.
    draw, result = torch.Generator().manual_seed(0), workspace.new()
    for name, size in workspace.sizes.items():
        # Bytes: a parameter's worth of the default integers would be twice the vector.
        signs = torch.randint(0, 2, (size,), generator=draw, device="cpu", dtype=torch.int8).mul_(2).sub_(1)
        result.write(name, 0, signs.to(workspace.device, workspace.dtype))
    return result


def _added(vector: Vector, basis: list[Vector], *, keep: bool = True) -> list[float]:
    """Take a vector into an orthonormal basis, unless it lies in it or is not kept; return its coefficients."""
    length = vector.norm()
    coefficients = [0.0] * len(basis)
    # Gram-Schmidt, twice: once leaves what rounding put back. What is left over is a new direction, or rounding itself.
    for _ in range(2):
        for number, other in enumerate(basis):
            share = vector.dot(other)
            vector.add(other, -share)
            coefficients[number] += share
    rest = vector.norm()
    if not keep or rest <= _ROUNDING * length:
        vector.free()
        return coefficients
    vector.scale(1 / rest)
    basis.append(vector)
    return [*coefficients, rest]


def _columns(columns: Sequence[Sequence[float]], size: int) -> torch.Tensor:
    """Return (size, columns): the columns, each with zeros below."""
    made = torch.zeros(size, len(columns), dtype=torch.float64, device="cpu")
    for column, numbers in enumerate(columns):
        made[: len(numbers), column] = torch.tensor(numbers, dtype=torch.float64)
    return made
