"""Backward warping: frame2 brought back onto frame1 by the flow."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.ops.kernels import accelerated


def pixel_grid(height: int, width: int, like: Tensor) -> Tensor:
    """Returns [2, H, W], the x and the y of every pixel, with the device and dtype of `like`."""
    y, x = torch.meshgrid(
        torch.arange(height, device=like.device, dtype=like.dtype),
        torch.arange(width, device=like.device, dtype=like.dtype),
        indexing="ij",
    )
    return torch.stack((x, y))


def inside(flow: Tensor) -> Tensor:
    """Returns [N, H, W] bool: pixels of frame1 that the flow leaves within frame2."""
    height, width = flow.shape[-2:]
    x, y = (pixel_grid(height, width, flow) + flow).unbind(1)
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


@accelerated
def warp(features: Tensor, flow: Tensor) -> Tensor:
    """Returns [N, C, H, W]: features(x + flow(x)), bilinear, 0 outside the picture.

    Args:
        features: [N, C, H, W].
        flow: [N, 2, H, W] pixels, channel 0 to the right. Positions are computed in float32 at least. Pixel centers lie
            on whole numbers (`grid_sample` with align_corners=True: with False, FastFlowNet's published weights lose
            1.4 px on Sintel, issue ltkong218/FastFlowNet#24).
    """
    height, width = features.shape[-2:]
    flow = flow.to(torch.promote_types(flow.dtype, torch.float32))
    x, y = (pixel_grid(height, width, flow) + flow).unbind(1)
    grid = torch.stack((2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1), dim=-1)
    if width == 1 or height == 1:  # the normalized coordinate has no scale on an axis of one pixel: warp a wider one
        padded = F.pad(features, (0, int(width == 1), 0, int(height == 1)))
        flow = F.pad(flow, (0, int(width == 1), 0, int(height == 1)))
        return warp.__wrapped__(padded, flow)[..., :height, :width]
    sampled = F.grid_sample(features.to(grid.dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return sampled.to(features.dtype)
