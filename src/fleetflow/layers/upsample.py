"""Convex upsampling: a fine pixel takes a weighted mean of nine coarse flows (RAFT, arXiv 2003.12039, section 3.3)."""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


def convex_upsample(flow: Tensor, weights: Tensor, factor: int = 8, border: str = "constant") -> Tensor:
    """Returns [N, 2, factor * h, factor * w]: the flow in pixels of the fine grid.

    Args:
        flow: [N, 2, h, w] in pixels of the coarse grid.
        border: what is outside of it, "constant" 0 (as published) or "replicate", the nearest flow inside.
        weights: [N, 9 * factor^2, h, w] before the softmax over the nine neighbors; channel (k * factor + dy) * factor
            + dx weighs neighbor k (row by row) for the fine pixel (dy, dx) of the cell.
    """
    count, _, height, width = flow.shape
    weights = weights.to(flow.dtype).view(count, 1, 9, factor, factor, height, width).softmax(2)
    padded = F.pad(factor * flow, (1, 1, 1, 1), mode=border)[:, :, None, None]
    parts = (  # one neighbor at a time: the product of all nine would be the largest tensor of the network
        weight * padded[..., k // 3 : k // 3 + height, k % 3 : k % 3 + width]
        for k, weight in enumerate(weights.unbind(2))
    )
    fine = reduce(torch.add, parts)
    return fine.permute(0, 1, 4, 2, 5, 3).reshape(count, 2, factor * height, factor * width)
