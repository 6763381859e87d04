"""All chance of an augmentation, drawn for a whole batch from one generator."""

import torch
from torch import Tensor


class Dice:
    """Draws for a batch of `count` samples; the numbers are the same on every device, noise per pixel excepted."""

    def __init__(self, generator: torch.Generator, like: Tensor):
        self.generator, self.count, self.device = generator, len(like), like.device

    def uniform(self, low: float, high: float, *size: int) -> Tensor:
        """Returns float64 [N, *size] in [low, high), on the CPU."""
        numbers = torch.rand(
            self.count, *size, generator=self.generator, dtype=torch.float64, device=self.generator.device
        )
        return (numbers * (high - low) + low).cpu()

    def chance(self, probability: float) -> Tensor:
        """Returns bool [N], True with this probability, on the CPU."""
        return self.uniform(0, 1) < probability

    def whole(self, low: int, high: Tensor | int) -> Tensor:
        """Returns float64 [N], whole numbers from `low` to `high` (an int or [N]), both included, on the CPU."""
        return (low + (self.uniform(0, 1) * (high - low + 1)).floor()).clamp(min=low)

    def order(self, count: int) -> list[int]:
        """Returns 0 ... count - 1 in a random order, one for the batch."""
        return self.uniform(0, 1, count)[0].argsort().tolist()

    def normal(self, like: Tensor) -> Tensor:
        """Returns normal noise of the shape, dtype and device of `like`, drawn there."""
        seed = int(self.uniform(0, 2**53)[0])
        noise = torch.Generator(device=like.device).manual_seed(seed)
        return torch.randn(like.shape, generator=noise, device=like.device, dtype=like.dtype)
