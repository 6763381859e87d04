"""Local correlation: how alike are the features around a pixel in frame1 and in frame2 (FlowNet, arXiv 1504.06852)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.ops.kernels import accelerated


@accelerated
def local_correlation(features1: Tensor, features2: Tensor, radius: int, keep: Sequence[int] | None = None) -> Tensor:
    """Returns [N, K, H, W]: the mean over channels of features1(y, x) * features2(y + dy, x + dx).

    Args:
        features1, features2: [N, C, H, W] of one dtype; outside the picture features2 counts as 0.
        radius: displacements dy, dx run from -radius to radius; channel (dy + radius) * (2 radius + 1) + dx + radius.
        keep: the channels to compute, in their order; None computes all (2 radius + 1)^2.
    """
    height, width = features1.shape[-2:]
    side = 2 * radius + 1
    padded = F.pad(features2, (radius, radius, radius, radius))
    return torch.stack(
        [
            (features1 * padded[..., k // side : k // side + height, k % side : k % side + width]).mean(1)
            for k in (keep if keep is not None else range(side * side))
        ],
        dim=1,
    )
