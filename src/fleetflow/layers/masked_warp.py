"""Warping that counts a sample as outside where it mixes with the outside (PWC-Net, LiteFlowNet2)."""

import torch
from torch import Tensor

from fleetflow.ops.warp import pixel_grid, warp


def masked_warp(features: Tensor, flow: Tensor, threshold: float = 0.9999) -> Tensor:
    """Returns [N, C, H, W]: features(x + flow(x)), and 0 where less than `threshold` of a sample is of the picture.

    Args:
        features: [N, C, H, W].
        flow: [N, 2, H, W] pixels, float32.
    """
    return warp(features, flow) * inside(flow, threshold)


def inside(flow: Tensor, threshold: float) -> Tensor:
    """Returns bool [N, 1, H, W]: at x + flow(x) at least so large a share of a bilinear sample is of the picture."""
    height, width = flow.shape[-2:]
    x, y = (pixel_grid(height, width, flow) + flow).unbind(1)
    shares = [torch.minimum(at + 1, size - at).clamp(0, 1) for at, size in ((x, width), (y, height))]
    return (shares[0] * shares[1] >= threshold)[:, None]
