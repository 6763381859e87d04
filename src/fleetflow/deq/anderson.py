"""Anderson mixing: the combination of the last points whose residual is smallest (Anderson 1965; Walker & Ni 2011)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fleetflow.deq.checks import flag, number, whole
from fleetflow.deq.vectors import combine, dots, write


class Memory(NamedTuple):
    """The last points, in a ring of m slots."""

    images: Tensor  # [N, m, D] f(z)
    residuals: Tensor  # [N, m, D] f(z) - z
    gram: Tensor  # [N, m, m] inner products of the residuals
    known: Tensor  # [N, m] bool: slots in use
    lowest: Tensor  # [N] smallest square of a residual
    count: int  # points seen


@dataclass(frozen=True)
class Anderson:
    """Proposes the affine combination of the last images whose combined residual is smallest.

    Args:
        history: points remembered, 1 or more; it costs 2 * history vectors of memory.
        damping: above 0; 1 takes the combined image, less goes only that part of the way from the combined point, more
            goes beyond it: 1.5 to 2 saves evaluations on maps that approach their fixed point from one side
            (docs/deq.md).
        ridge: how much large weights are penalized, in units of each residual's own square if `scaled`, absolutely if
            not. The published DEQ solvers use an absolute 1e-4, which holds them back once residuals are near 1e-2.
        restart: a sample whose residual exceeds its lowest this many times forgets its history: then it takes a plain
            step, which leads out of places where the residual has a minimum but no zero. torch.inf never forgets.
    """

    history: int = 6
    damping: float = 1.0
    ridge: float = 1e-6
    scaled: bool = True
    restart: float = 3.0

    def __post_init__(self):
        whole("history", self.history)
        number("damping", self.damping, lambda damping: damping > 0, "above 0")
        number("ridge", self.ridge, lambda ridge: ridge >= 0, "of 0 or more")
        flag("scaled", self.scaled)
        number("restart", self.restart, lambda restart: restart > 1, "above 1")

    def start(self, z: Tensor) -> Memory:
        """Returns the empty memory for a state [N, D]."""
        samples, size = z.shape
        images, residuals = (z.new_empty(samples, self.history, size) for _ in range(2))
        gram, lowest = z.new_zeros(samples, self.history, self.history), z.new_full((samples,), torch.inf)
        return Memory(images, residuals, gram, gram[:, 0].bool(), lowest, 0)

    def propose(self, z: Tensor, fz: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Returns the next point and the memory with this one in the place of the oldest."""
        slot, filled = memory.count % self.history, min(memory.count + 1, self.history)
        residual = fz - z
        images, residuals = write(memory.images, slot, fz), write(memory.residuals, slot, residual)
        products = torch.nn.functional.pad(dots(residuals[:, :filled], residual), (0, self.history - filled))
        gram = write(write(memory.gram, slot, products).mT, slot, products)
        square = products[:, slot].detach()
        lost = square > self.restart**2 * memory.lowest
        known = write(memory.known & ~lost[:, None], slot, torch.ones_like(lost))
        weights = self._weights(gram[:, :filled, :filled], known[:, :filled], slot)
        point = combine(weights, images[:, :filled])
        if self.damping != 1:
            point = point - (1 - self.damping) * combine(weights, residuals[:, :filled])
        lowest = torch.minimum(memory.lowest, square)
        return point, Memory(images, residuals, gram, known, lowest, memory.count + 1)

    def _weights(self, gram: Tensor, known: Tensor, newest: int) -> Tensor:
        """Returns [N, n] that minimize w^T (gram + ridge) w with sum 1; the newest alone where that has no answer."""
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        scale = known.to(gram.dtype)
        if self.scaled:
            scale = scale * gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
        matrix = gram * scale[:, :, None] * scale[:, None, :] + self.ridge * eye
        weights = torch.linalg.solve_ex(matrix, scale)[0] * scale
        weights = weights / weights.sum(1, keepdim=True)
        return torch.where(weights.isfinite().all(1, keepdim=True), weights, eye[newest])
