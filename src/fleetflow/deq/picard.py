"""Picard: the plain iteration z <- f(z), damped if wanted (Picard 1890; Krasnoselskii 1955, Mann 1953)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fleetflow.deq.checks import number


@dataclass(frozen=True)
class Picard:
    """Proposes z + damping (f(z) - z). It converges where f contracts; damping < 1 helps where f swings.

    Args:
        damping: above 0; 1 is the plain iteration. A real part of every eigenvalue of f's Jacobian below 1 is enough
            for some damping to converge.
    """

    damping: float = 1.0

    def __post_init__(self):
        number("damping", self.damping, lambda damping: damping > 0, "above 0")

    def start(self, z: Tensor) -> tuple:
        """Returns the empty memory: there is nothing to remember."""
        return ()

    def propose(self, z: Tensor, fz: Tensor, memory: tuple) -> tuple[Tensor, tuple]:
        """Returns the next point and the memory."""
        return (fz if self.damping == 1 else torch.lerp(z, fz, self.damping)), memory
