"""Broyden's good method on f(z) - z, its inverse Jacobian kept as -1 plus rank-one terms (Broyden 1965; Bai 2019)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fleetflow.deq.checks import whole
from fleetflow.deq.vectors import combine, dots, write


class Memory(NamedTuple):
    """The last point and the rank-one terms of the inverse Jacobian, -1 + sum of left_k right_k^T."""

    point: Tensor  # [N, D]
    residual: Tensor  # [N, D] f(point) - point
    applied: Tensor  # [N, D] inverse Jacobian times that residual
    left: Tensor  # [N, m, D]
    right: Tensor  # [N, m, D]
    count: int  # terms in use
    started: bool


@dataclass(frozen=True)
class Broyden:
    """Proposes the quasi-Newton step of the inverse Jacobian that the steps so far have taught.

    Args:
        history: rank-one terms, 1 or more; it costs 2 * history vectors of memory. When they are full the method
            forgets all of them and starts again from where it is.
    """

    history: int = 30

    def __post_init__(self):
        whole("history", self.history)

    def start(self, z: Tensor) -> Memory:
        """Returns the empty memory for a state [N, D]."""
        samples, size = z.shape
        left, right = (z.new_empty(samples, self.history, size) for _ in range(2))
        return Memory(z, z, z, left, right, 0, False)

    def propose(self, z: Tensor, fz: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Returns the next point and the memory with one more term."""
        residual, (point, before, applied_before, left, right, count, started) = fz - z, memory
        if count == self.history:
            count, started = 0, False
        applied = _apply(left, right, count, residual)
        if started:
            step, change = z - point, residual - before
            row = _apply(right, left, count, step)  # step^T times the inverse Jacobian
            slope = (row * change).sum(1, keepdim=True)
            known = slope.isfinite() & (slope != 0)  # else nothing has been learnt
            column = (step - applied + applied_before) / torch.where(known, slope, 1)
            column = torch.where(known & column.isfinite().all(1, keepdim=True), column, 0)
            applied = applied + column * (row * residual).sum(1, keepdim=True)
            left, right, count = write(left, count, column), write(right, count, row), count + 1
        return z - applied, Memory(z, residual, applied, left, right, count, True)


def _apply(left: Tensor, right: Tensor, count: int, vector: Tensor) -> Tensor:
    """Returns [N, D]: (-1 + sum of left_k right_k^T) vector, over the first `count` terms."""
    if count == 0:
        return -vector
    return combine(dots(right[:, :count], vector), left[:, :count]) - vector
