"""Newton's method on f(z) - z, its linear systems solved by GMRES (Saad & Schultz 1986; Knoll & Keyes 2004).

A product of the Jacobian with a direction v is (f(z + e v) - f(z)) / e, so the method asks for nothing but evaluations
of f: it needs no derivative, sees through detached parts of f, and its price is counted like that of any other solver.
For a linear f, as in the backward solve of `Implicit`, these products are exact.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fleetflow.deq.checks import number, whole
from fleetflow.deq.vectors import combine, dots, write


class Memory(NamedTuple):
    """One GMRES cycle around `base`: an orthonormal basis, and the operator on it (Arnoldi)."""

    base: Tensor  # [N, D]
    residual: Tensor  # [N, D] f(base) - base
    basis: Tensor  # [N, m + 1, D]
    matrix: Tensor  # [N, m, m + 1], the columns of the Hessenberg matrix
    inner: int  # directions asked for; 0 before the base is known


@dataclass(frozen=True)
class NewtonKrylov:
    """Proposes `inner` small trial steps, one for each Krylov direction, then the Newton step; and so on.

    Args:
        inner: directions in a cycle, 1 or more; a cycle costs inner + 1 evaluations and inner + 4 vectors of memory.
        precision: relative rounding error of f, which sets the length of trial steps; None takes that of the state's
            dtype, 4e-3 suits a map that is computed in bfloat16.
    """

    inner: int = 8
    precision: float | None = None

    def __post_init__(self):
        whole("inner", self.inner)
        if self.precision is not None:
            number("precision", self.precision, lambda precision: precision > 0, "above 0, or None")

    def start(self, z: Tensor) -> Memory:
        """Returns the empty memory for a state [N, D]."""
        samples, size = z.shape
        basis = z.new_empty(samples, self.inner + 1, size)
        return Memory(z, z, basis, z.new_zeros(samples, self.inner, self.inner + 1), 0)

    def propose(self, z: Tensor, fz: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Returns the next point, a trial step or the Newton step, and the memory."""
        base, residual, basis, matrix, inner = memory
        if inner == 0:
            base, residual = z, fz - z
            basis = write(basis, 0, _unit(residual)[0])
        else:
            known, direction = basis[:, :inner], basis[:, inner - 1]
            product = (fz - base - residual) / self._length(base, residual)
            image = direction - product
            weights = dots(known, image)
            image = image - combine(weights, known)
            left = dots(known, image)  # what rounding left of it
            unit, length = _unit(image - combine(left, known))
            column = torch.nn.functional.pad(torch.cat((weights + left, length), 1), (0, self.inner - inner))
            basis, matrix = write(basis, inner, unit), write(matrix, inner - 1, column)
        if inner == self.inner:
            return base + combine(_least_squares(matrix.mT, residual), basis[:, :-1]), memory._replace(inner=0)
        point = base + self._length(base, residual) * basis[:, inner]
        return point, Memory(base, residual, basis, matrix, inner + 1)

    def _length(self, base: Tensor, residual: Tensor) -> Tensor:
        """Returns [N, 1], the length of a trial step: the square root of the precision, in units of the state."""
        precision = torch.finfo(base.dtype).eps if self.precision is None else self.precision
        norms = [torch.linalg.vector_norm(vector, dim=1, keepdim=True) for vector in (base, residual)]
        return precision**0.5 * torch.maximum(*norms).clamp_min(torch.finfo(base.dtype).tiny)


def _unit(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the vector [N, D] divided by its length, and the length [N, 1]."""
    length = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    return vector / length.clamp_min(torch.finfo(vector.dtype).tiny), length


def _least_squares(matrix: Tensor, residual: Tensor) -> Tensor:
    """Returns [N, m], the weights of the directions whose image comes nearest to the residual; small if undecided."""
    samples, _, width = matrix.shape
    floor = torch.finfo(matrix.dtype).eps * torch.linalg.matrix_norm(matrix)[:, None, None].clamp_min(1)
    ridge = floor * torch.eye(width, dtype=matrix.dtype, device=matrix.device)
    orthogonal, triangle = torch.linalg.qr(torch.cat((matrix, ridge), 1))
    right = orthogonal[:, 0] * torch.linalg.vector_norm(residual, dim=1, keepdim=True)
    return torch.linalg.solve_triangular(triangle, right[:, :, None], upper=True)[:, :, 0]
