"""All-pairs correlation: every pixel of frame1 with every one of frame2, at several scales, looked up in windows.

RAFT, arXiv 2003.12039, section 3.2.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.ops.constant import constant
from fleetflow.ops.kernels import switched

MEMORY_LIMIT = 2 * 2**30  # bytes; beyond, correlations are computed when they are looked up


class AllPairs(NamedTuple):
    """The correlations of two pictures at scales 1, 1/2, 1/4, ...: a value, from which `lookup` reads."""

    features1: Tensor  # [N, C, H, W], divided by the square root of C
    features2: tuple[Tensor, ...]  # per level [N, C, H / 2^level, W / 2^level], halved by averaging 2x2 pixels
    volumes: tuple[Tensor, ...] | None  # per level [N, H * W, H / 2^level, W / 2^level]; None: compute at the lookup
    table: Tensor | None = None  # [N, H * W, K], of which the volumes are views, as the fast lookup on the CPU reads it
    last: list[Tensor] | None = None  # what that has read last, without gradients: windows that stay are read once
    sums: list[Tensor] | None = None  # where the gradients of all that is read from the table meet


def halve(picture: Tensor) -> Tensor:
    """Returns [N, C, h // 2, w // 2], the means of 2x2 pixels; an odd last row or column is left out."""
    height, width = picture.shape[-2:]
    if min(height, width) < 2:
        return picture.new_zeros(*picture.shape[:2], height // 2, width // 2)
    return F.avg_pool2d(picture, 2)


def pooled(features1: Tensor, features2: Tensor, levels: int) -> AllPairs:
    """Returns the pyramid without its volumes, float32 or wider, features channels-last in memory."""
    dtype = torch.promote_types(features1.dtype, torch.float32)
    first, second = (f.to(dtype, memory_format=torch.channels_last) for f in (features1, features2))
    scales = [second]
    for _ in range(levels - 1):
        scales.append(halve(scales[-1]))
    return AllPairs(first / first.shape[1] ** 0.5, tuple(scales), None)


@switched
def all_pairs(features1: Tensor, features2: Tensor, levels: int, memory_limit: int = MEMORY_LIMIT) -> AllPairs:
    """Returns the pyramid of correlations <features1(p), features2(q)> / sqrt(C), averaged over 2x2 q per level.

    Args:
        features1, features2: [N, C, H, W] of one dtype; correlations are float32 or wider.
        memory_limit: bytes that the volumes may take, 4/3 N (H W)^2 numbers; a larger pyramid is not stored, and its
            lookups compute the few correlations that they read (the reference implementation always stores).
    """
    pyramid = pooled(features1, features2, levels)
    with torch.autocast(features1.device.type, enabled=False):
        volume = pyramid.features1.flatten(2).mT @ pyramid.features2[0].flatten(2)
    volumes = [volume.unflatten(2, features2.shape[-2:])]
    for _ in range(levels - 1):
        volumes.append(halve(volumes[-1]))
    return pyramid._replace(volumes=tuple(volumes))


@switched
def lookup(pyramid: AllPairs, positions: Tensor, radius: int) -> Tensor:
    """Returns [N, K, H, W]: for each pixel of frame1 the correlations in a window of frame2, at every level.

    Args:
        positions: [N, 2, H, W] pixels of frame2 at level 0, x before y; the center at level k is positions / 2^k.
        radius: offsets run from -radius to radius, side = 2 radius + 1; channel level * side^2 + a * side + b is at (x
            + a - radius, y + b - radius): the horizontal offset is the slow one, unlike in `local_correlation`. Between
            pixels bilinear, 0 outside the picture. The result has the pyramid's dtype.
    """
    count, _, height, width = positions.shape
    side = 2 * radius + 1
    volumes = pyramid.volumes
    if volumes is None:
        first, seconds = pyramid.features1, pyramid.features2
        volumes = [(first.flatten(2).mT @ second.flatten(2)).unflatten(2, second.shape[-2:]) for second in seconds]
    offsets = torch.arange(-radius, radius + 1, device=positions.device, dtype=volumes[0].dtype)
    offsets = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), dim=-1)  # [a, b, (x, y)]
    centers = positions.to(offsets.dtype).nan_to_num(-1e6).permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
    windows = []
    for level, volume in enumerate(volumes):
        if min(volume.shape[2:]) == 0:
            windows.append(volume.new_zeros(count, side * side, height, width))
            continue
        size = constant(volume.shape[:1:-1], offsets)
        grid = (2 * (centers / 2**level + offsets) + 1) / size - 1  # pixel k has its middle at (2 k + 1) / size - 1
        sampled = F.grid_sample(volume.flatten(0, 1)[:, None], grid, padding_mode="zeros", align_corners=False)
        windows.append(sampled.view(count, height, width, side * side).permute(0, 3, 1, 2))
    return torch.cat(windows, 1)
