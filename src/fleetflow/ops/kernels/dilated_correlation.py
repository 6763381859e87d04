"""Dilated correlation as dense correlations: displacements of stride s never leave a pixel's phase.

The pixels whose row and column leave the remainders (i, j) on division by s form a picture of their own, s times
smaller on each axis, and a displacement by s pixels is one by a single pixel there. So each of the s * s phases is an
ordinary correlation of radius // s. They are computed one after the other, which divides the memory for the windows
of frame2 by s * s: for FlowNetC and a frame of 1088x1920 the peak is 0.25 GB (0.75 GB with the gradients), for one of
2160x3840 it is 1 GB. The reference implementation took 14 GB for the former, and some forty times as long.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.ops.kernels.correlation import local_correlation, local_correlation_gradients


def dilated_correlation(features1: Tensor, features2: Tensor, radius: int, stride: int) -> Tensor:
    """Returns what `ops.dilated_correlation.dilated_correlation` defines, [N, K, H, W]."""
    height, width = features1.shape[-2:]
    pairs = zip(_phases(features1, stride), _phases(features2, stride))
    return _joined([local_correlation(*pair, radius // stride) for pair in pairs], stride)[..., :height, :width]


def dilated_correlation_gradients(
    gradient: Tensor, features1: Tensor, features2: Tensor, radius: int, stride: int
) -> list[Tensor]:
    """Returns the gradients of both features for that of the result, [N, K, H, W]."""
    height, width = features1.shape[-2:]
    phases = zip(*(_phases(part, stride) for part in (gradient, features1, features2)))
    found = zip(*(local_correlation_gradients(part, one, two, radius // stride) for part, one, two in phases))
    return [_joined(parts, stride)[..., :height, :width] for parts in found]


def _phases(picture: Tensor, stride: int) -> list[Tensor]:
    """[N, C, H, W] -> its stride * stride phases [N, C, h, w], padded by zeros to one size."""
    height, width = picture.shape[-2:]
    picture = F.pad(picture, (0, -width % stride, 0, -height % stride))
    return [picture[..., y::stride, x::stride] for y in range(stride) for x in range(stride)]


def _joined(phases: Sequence[Tensor], stride: int) -> Tensor:
    """The picture that has these phases [N, C, h, w]: [N, C, stride * h, stride * w]."""
    rows = torch.stack(list(phases)).unflatten(0, (stride, stride)).permute(2, 3, 4, 0, 5, 1)
    return rows.flatten(4).flatten(2, 3)
