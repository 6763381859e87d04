"""Numbers in float32 at least: flows and positions, of which half precision would lose pixels."""

import torch
from torch import Tensor


def widened(values: Tensor) -> Tensor:
    """Returns the values in float32, or in float64 where they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
