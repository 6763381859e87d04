"""Dilated correlation as dense correlations: displacements of stride s never leave a pixel's phase.

The pixels whose row and column leave the remainders (i, j) on division by s form a picture of their own, s times
smaller on each axis, and a displacement by s pixels is one by a single pixel there. So each of the s * s phases is an
ordinary correlation of radius // s. They are computed one after the other, which divides the memory for the windows
of frame2 by s * s: for FlowNetC and a frame of 1088x1920 the peak is 0.25 GB (0.75 GB with the gradients), for one of
2160x3840 it is 1 GB. The definition took 14 GB for the former, and some forty times as long.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.ops.correlation import local_correlation


def dilated_correlation(features1: Tensor, features2: Tensor, radius: int, stride: int) -> Tensor:
    """Returns what `ops.dilated_correlation.dilated_correlation` defines, [N, K, H, W]."""
    height, width = features1.shape[-2:]
    below, right = -height % stride, -width % stride
    first, second = (F.pad(features, (0, right, 0, below)) for features in (features1, features2))
    volume = torch.stack(
        [
            local_correlation(first[..., y::stride, x::stride], second[..., y::stride, x::stride], radius // stride)
            for y in range(stride)
            for x in range(stride)
        ]
    )
    phases = volume.unflatten(0, (stride, stride)).permute(2, 3, 4, 0, 5, 1)  # [N, K, h, stride, w, stride]
    return phases.flatten(4).flatten(2, 3)[..., :height, :width]
