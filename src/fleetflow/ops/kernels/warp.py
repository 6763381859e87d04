"""Backward warping on the CPU as one weighted sum of four table rows per pixel, any float dtype, with gradients.

`grid_sample` is quicker for pictures and flows, float32 of few channels: 8 times at one channel, alike at some 40.

`embedding_bag` reads rows of a [pixels, channels] table, weighs and adds them: exactly bilinear sampling of
channels-last features, vectorized for bfloat16 too (where `grid_sample` would have to go through float32: 18 times
slower). Its backward with respect to the table is again a sum of rows, those of the gradient, sorted by target.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.ops import warp as definition

FEW = 16  # channels
FAR = 1e6  # pixels, farther than any picture


def warp(features: Tensor, flow: Tensor) -> Tensor:
    """Returns what `ops.warp.warp` defines, [N, C, H, W], channels-last in memory."""
    count, channels, height, width = features.shape
    if features.dtype == torch.float32 and channels <= FEW:
        flow = flow.nan_to_num(nan=FAR).clamp(-FAR, FAR)  # outside the picture: gives 0
        return definition.warp.__wrapped__(features, flow)  # pyright: ignore[reportFunctionMemberAccess]
    index, shares = _neighbors(features, flow)
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)
    sampled = F.embedding_bag(index, table, per_sample_weights=_weights(shares).to(table.dtype), mode="sum")
    return sampled.view(count, height, width, channels).permute(0, 3, 1, 2)


def warp_gradients(gradient: Tensor, features: Tensor, flow: Tensor) -> list[Tensor]:
    """Returns the gradients of the features and of the flow for that of the result, [N, C, H, W]."""
    count, channels, height, width = features.shape
    index, shares = _neighbors(features, flow)
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)
    gradient = gradient.permute(0, 2, 3, 1).reshape(-1, channels)

    flat = index.view(-1).long()
    order = flat.argsort()
    ends = torch.bincount(flat, minlength=len(table)).cumsum(0)
    starts = F.pad(ends[:-1], (1, 0))
    weights = _weights(shares).view(-1)[order].to(gradient.dtype)
    to_table = F.embedding_bag(order // 4, gradient, starts, mode="sum", per_sample_weights=weights)

    slopes = (F.embedding(index, table) * gradient[:, None]).sum(-1, dtype=shares[0].dtype)  # [P, 4], of the weights
    left, right, top, bottom, *inside = shares
    slopes = slopes.view(*left.shape, 4)
    upper, lower = slopes[..., :2], slopes[..., 2:]
    beside = (upper * top[..., None] + lower * bottom[..., None]).unbind(-1)
    below = (upper[..., 0] * left + upper[..., 1] * right, lower[..., 0] * left + lower[..., 1] * right)
    along_x = beside[1] * inside[1] - beside[0] * inside[0]
    along_y = below[1] * inside[3] - below[0] * inside[2]
    to_flow = torch.stack((along_x, along_y), 1)
    return [to_table.view(count, height, width, channels).permute(0, 3, 1, 2), to_flow.to(flow.dtype)]


def _neighbors(features: Tensor, flow: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The rows of the table [pixels, 4] that each pixel reads, top left, top right, bottom left, bottom right; and the
    shares of left, right, top and bottom, and which of these lie in the picture, [N, H, W] each."""
    count, _, height, width = features.shape
    flow = flow.to(torch.promote_types(flow.dtype, torch.float32))
    position = definition.pixel_grid(height, width, flow) + flow
    position = position.nan_to_num(nan=-2.0, posinf=-2.0, neginf=-2.0)  # outside the picture: gives 0
    x, y = position.clamp(-2, max(height, width) + 1).unbind(1)
    left, top = x.floor(), y.floor()
    inside = _inside(left, width), _inside(left + 1, width), _inside(top, height), _inside(top + 1, height)
    shares = (
        (left + 1 - x) * inside[0],
        (x - left) * inside[1],
        (top + 1 - y) * inside[2],
        (y - top) * inside[3],
    )
    columns = torch.stack((left, left + 1, left, left + 1), dim=-1)
    rows = torch.stack((top, top, top + 1, top + 1), dim=-1)
    first_row = torch.arange(count, dtype=torch.int32)[:, None, None, None] * (height * width)
    index = first_row + (rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)).to(torch.int32)
    return index.view(-1, 4), (*shares, *inside)


def _weights(shares: tuple[Tensor, ...]) -> Tensor:
    """The weights of the four rows of each pixel, [pixels, 4]."""
    left, right, top, bottom = shares[:4]
    return torch.stack((left * top, right * top, left * bottom, right * bottom), -1).view(-1, 4)


def _inside(position: Tensor, size: int) -> Tensor:
    return (position >= 0) & (position < size)
