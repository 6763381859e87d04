"""Random numbers and homographies that the worlds of generated scenes are drawn with."""

import math

import torch
from torch import Tensor

SHEETS = 8  # of a scene, unless its world says otherwise


class Draw:
    """Random numbers of shape [B, L] (or [B, n]) from one generator, on the CPU so that every device sees the same."""

    def __init__(self, count: int, generator: torch.Generator):
        self.count, self.generator = count, generator

    def uniform(self, low: float, high: float, sheets: int = SHEETS) -> Tensor:
        return torch.rand(self.count, sheets, generator=self.generator) * (high - low) + low

    def log_uniform(self, low: float, high: float, sheets: int = SHEETS) -> Tensor:
        return self.uniform(math.log(low), math.log(high), sheets).exp()

    def normal(self, sigma: float, sheets: int = SHEETS) -> Tensor:
        return torch.randn(self.count, sheets, generator=self.generator) * sigma

    def chance(self, probability: float, sheets: int = SHEETS) -> Tensor:
        return torch.rand(self.count, sheets, generator=self.generator) < probability

    def shutter(self, often: float) -> Tensor:
        """[B] share of the time between frames that the shutter is open, 0 where there is no motion blur."""
        return (self.uniform(0.1, 0.9, 1) * self.chance(often, 1))[:, 0]

    def integer(self, below: int, sheets: int = SHEETS) -> Tensor:
        return torch.randint(below, (self.count, sheets), generator=self.generator)


def matrix(*entries: Tensor | float) -> Tensor:
    """Returns [B, L, 3, 3] from nine entries, row by row, each [B, L] or a number."""
    shape = next(entry.shape for entry in entries if isinstance(entry, Tensor))
    full = [entry if isinstance(entry, Tensor) else torch.full(shape, float(entry)) for entry in entries]
    return torch.stack(full, -1).unflatten(-1, (3, 3))


def shift(x: Tensor, y: Tensor) -> Tensor:
    return matrix(1, 0, x, 0, 1, y, 0, 0, 1)


def turn(angle: Tensor, scale_x: Tensor | float = 1.0, scale_y: Tensor | float = 1.0) -> Tensor:
    """Returns the scaling by axis followed by a rotation (radians), about the origin."""
    c, s = angle.cos(), angle.sin()
    return matrix(c * scale_x, -s * scale_y, 0, s * scale_x, c * scale_y, 0, 0, 0, 1)
