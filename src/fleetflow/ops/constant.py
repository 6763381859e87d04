"""A few numbers as a tensor, written on the device: no copy from the CPU, so CUDA graphs can record it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """Returns [len(values)] with the device and dtype of `like`."""
    return torch.stack([like.new_full((), value) for value in values])
