"""Backward warping on the CPU as one weighted sum of four table rows per pixel, any float dtype, with gradients.

`embedding_bag` reads rows of a [pixels, channels] table, weighs and adds them: exactly bilinear sampling of
channels-last features, vectorized for bfloat16 too (where `grid_sample` would have to go through float32: 18 times
slower). Its backward with respect to the table is again a sum of rows, those of the gradient, sorted by target.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.ops import warp as definition


def warp(features: Tensor, flow: Tensor) -> Tensor:
    """Returns what `ops.warp.warp` defines, [N, C, H, W], channels-last in memory on the CPU."""
    if features.device.type != "cpu":
        return definition.warp.__wrapped__(features, flow)
    count, channels, height, width = features.shape
    flow = flow.to(torch.promote_types(flow.dtype, torch.float32))
    position = definition.pixel_grid(height, width, flow) + flow
    position = position.nan_to_num(nan=-2.0, posinf=-2.0, neginf=-2.0)  # outside the picture: gives 0
    x, y = position.clamp(-2, max(height, width) + 1).unbind(1)
    left, top = x.detach().floor(), y.detach().floor()
    right_share = (x - left) * _inside(left + 1, width)
    bottom_share = (y - top) * _inside(top + 1, height)
    left_share = (left + 1 - x) * _inside(left, width)
    top_share = (top + 1 - y) * _inside(top, height)
    columns = torch.stack((left, left + 1, left, left + 1), dim=-1)
    rows = torch.stack((top, top, top + 1, top + 1), dim=-1)
    weights = torch.stack(
        (left_share * top_share, right_share * top_share, left_share * bottom_share, right_share * bottom_share), -1
    )
    first_row = torch.arange(count, dtype=torch.int32)[:, None, None, None] * (height * width)
    index = first_row + (rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)).to(torch.int32)
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)
    sampled = _WeightedRows.apply(table, index.view(-1, 4), weights.view(-1, 4))
    return sampled.view(count, height, width, channels).permute(0, 3, 1, 2)


def _inside(position: Tensor, size: int) -> Tensor:
    return (position >= 0) & (position < size)


class _WeightedRows(torch.autograd.Function):
    """sum_k weights[p, k] * table[index[p, k]] for every p: [P, C]."""

    @staticmethod
    def forward(ctx, table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(table, index, weights)
        return F.embedding_bag(index, table, per_sample_weights=weights.to(table.dtype), mode="sum")

    @staticmethod
    def backward(ctx, gradient: Tensor):
        table, index, weights = ctx.saved_tensors
        gradient = gradient.contiguous()
        table_gradient = weights_gradient = None
        if ctx.needs_input_grad[0]:
            flat = index.view(-1).long()
            order = flat.argsort()
            ends = torch.bincount(flat, minlength=len(table)).cumsum(0)
            starts = F.pad(ends[:-1], (1, 0))
            order_weights = weights.view(-1)[order].to(gradient.dtype)
            table_gradient = F.embedding_bag(order // 4, gradient, starts, mode="sum", per_sample_weights=order_weights)
        if ctx.needs_input_grad[2]:
            weights_gradient = (F.embedding(index, table) * gradient[:, None]).sum(-1, dtype=weights.dtype)
        return table_gradient, None, weights_gradient
