"""A small space that holds what a matrix makes of one vector: Lanczos with full re-orthogonalisation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from timstore.rollbacks.vectors import Vector, Workspace

# A symmetric matrix times a vector: parameter to a flat tensor.
Apply = Callable[[Vector], Mapping[str, torch.Tensor]]


@dataclass(frozen=True, eq=False, slots=True)
class Space:
    """An orthonormal basis, the first of it the start vector's direction, and the matrix within it.

    Attributes:
        matrix: (k, k), symmetric, float64.
        length: of the start vector.
    """

    basis: list[Vector]
    matrix: torch.Tensor
    length: float

    def eigen(self, matrix: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (eigenvalues, not below 0; eigenvectors as columns; the start vector in them) of its own matrix.

        Args:
            matrix: another one within this space.
        """
        values, vectors = torch.linalg.eigh(self.matrix if matrix is None else matrix)
        return values.clamp(min=0), vectors, self.length * vectors[0]

    def project(self, apply: Apply) -> torch.Tensor:
        """Return another matrix within this space, (k, k). Cost: one product for every basis vector."""
        size = len(self.basis)
        found = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        for column, vector in enumerate(self.basis):
            image = apply(vector)
            for row, other in enumerate(self.basis):
                found[row, column] = sum(float(one.double() @ other.read(name).double()) for name, one in image.items())
        return (found + found.T) / 2

    def free(self) -> None:
        """Give the vectors back."""
        for vector in self.basis:
            vector.free()


def krylov(start: Vector, apply: Apply, workspace: Workspace, steps: int) -> Space | None:
    """Return the space of a start vector; None if that is zero. Cost: at most `steps` products and vectors."""
    length = start.norm()
    if length == 0:
        return None
    basis = [workspace.new()]
    basis[0].add(start, 1 / length)
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        candidate = workspace.new()
        for name, image in apply(basis[-1]).items():
            candidate.write(name, 0, image)
        diagonal.append(candidate.dot(basis[-1]))
        # Twice: once leaves what rounding put back.
        for vector in (*basis, *basis):
            candidate.add(vector, -candidate.dot(vector))
        size = candidate.norm()
        if len(basis) >= steps or size <= 1e-10 * max(map(abs, diagonal)):
            candidate.free()
            break
        candidate.scale(1 / size)
        beside.append(size)
        basis.append(candidate)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    for number, size in enumerate(beside):
        matrix[number, number + 1] = matrix[number + 1, number] = size
    return Space(basis, matrix, length)
