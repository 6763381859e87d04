"""Correlation at every second (third, ...) displacement: FlowNetC's cost volume (arXiv 1504.06852, section 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.ops.kernels import accelerated


@accelerated
def dilated_correlation(features1: Tensor, features2: Tensor, radius: int, stride: int) -> Tensor:
    """Returns [N, K, H, W]: the mean over channels of features1(y, x) * features2(y + dy, x + dx).

    Args:
        features1, features2: [N, C, H, W] of one dtype; outside the picture features2 counts as 0.
        radius, stride: displacements dy, dx in pixels are the multiples of `stride` from -radius to radius, `side` of
            them on an axis and K = side^2; channel (dy / stride + side // 2) * side + dx / stride + side // 2. FlowNetC
            has radius 20 and stride 2, which makes 441 channels.
    """
    height, width = features1.shape[-2:]
    reach = radius // stride * stride
    padded = F.pad(features2, (reach, reach, reach, reach))
    shifts = range(0, 2 * reach + 1, stride)
    return torch.stack(
        [(features1 * padded[..., y : y + height, x : x + width]).mean(1) for y in shifts for x in shifts], dim=1
    )
