"""Losses that need no truth: how well frame2, brought back by the flow, agrees with frame1, and what a flow is like.

Throughout, frames are [N, 3, H, W] in [0, 1], flows [N, 2, H, W] in pixels; `backward` goes from frame2 to frame1.
"""

from typing import Literal

import torch
from torch import Tensor

from fleetflow.ops.census import census_distance
from fleetflow.ops.warp import inside, pixel_grid, warp
from fleetflow.types import FleetflowError

Occlusion = Literal["consistency", "range"]


def photometric(frame1: Tensor, frame2: Tensor, flow: Tensor, visible: Tensor) -> Tensor:
    """Returns the census loss over the visible pixels: the mean of (distance + 0.001)^0.4, frame2 warped by the flow.

    Args:
        visible: [N, H, W] bool. The robust power is that of Jonschkowski et al., "What Matters in Unsupervised Optical
            Flow" (ECCV 2020), which lets wrong matches that no mask caught pull little.
    """
    distance = census_distance(frame1, warp(frame2, flow))
    return _mean((distance + 0.001) ** 0.4, visible)


def smoothness(flow: Tensor, frame1: Tensor, order: int = 1, edges: float = 150.0) -> Tensor:
    """Returns the mean length of the flow's first or second differences, less at the edges of the frame.

    Args:
        order: 1 asks for constant flow, 2 for flow that is linear in x and y (roads, walls: KITTI).
        edges: how fast the weight exp(-edges * difference in color) falls.
    """
    if order not in (1, 2):
        raise FleetflowError(f"the order of smoothness is {order}; expected 1 or 2")
    total = flow.new_zeros(())
    for axis in (-1, -2):
        change = flow.diff(n=order, dim=axis)
        count = change.shape[axis]
        color = (frame1.narrow(axis, order, count) - frame1.narrow(axis, 0, count)) / order
        weight = torch.exp(-edges * color.abs().mean(1, keepdim=True))
        total = total + (weight * (change.square() + 1e-6).sqrt()).mean()
    return total / 2


def visible(flow: Tensor, backward: Tensor, occlusion: Occlusion = "consistency") -> Tensor:
    """Returns [N, H, W] bool: pixels of frame1 that frame2 shows, as far as the two flows tell.

    "consistency": going there and back ends where it began, |f + b|^2 < 0.01 (|f|^2 + |b|^2) + 0.5 (Sundaram, Brox,
    Keutzer, ECCV 2010). "range": some pixel of frame2 comes from here, `range_map(backward)` >= 0.75 (Wang et al.,
    "Occlusion Aware Unsupervised Learning of Optical Flow", CVPR 2018); it does not mind flows that are inexact.
    """
    if occlusion == "range":
        return inside(flow) & (range_map(backward) >= 0.75)
    if occlusion != "consistency":
        raise FleetflowError(f'occlusion is "{occlusion}"; expected consistency or range')
    gap, allowed = _there_and_back(flow, backward)
    return inside(flow) & (gap < allowed)


def confidence(flow: Tensor, backward: Tensor) -> Tensor:
    """Returns [N, H, W] in [0, 1]: how far a flow can teach, exp(-gap / allowed) of the test in `visible`, 0 outside.

    MDFlow (Kong, Yang, "Unsupervised Optical Flow Learning by Reliable Mutual Knowledge Distillation", 2022) has one
    network learn only what the other is sure of; this measure of being sure is ours.
    """
    gap, allowed = _there_and_back(flow, backward)
    return torch.exp(-gap / allowed) * inside(flow)


def distillation(flow: Tensor, teacher: Tensor, trust: Tensor) -> Tensor:
    """Returns the mean distance in pixels between the flow and the teacher's, weighted by trust [N, H, W] in [0, 1]."""
    return _mean(((flow - teacher).square().sum(1) + 1e-6).sqrt(), trust)


def range_map(flow: Tensor) -> Tensor:
    """Returns [N, H, W]: how many pixels the flow brings to each pixel, every one shared bilinearly among four."""
    count, _, height, width = flow.shape
    x, y = (pixel_grid(height, width, flow) + flow).flatten(2).unbind(1)
    left, top = x.floor(), y.floor()
    landed = flow.new_zeros(count, height * width)
    for column, across in ((left, left + 1 - x), (left + 1, x - left)):
        for row, down in ((top, top + 1 - y), (top + 1, y - top)):
            within = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            place = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            landed.scatter_add_(1, place.long(), across * down * within)
    return landed.view(count, height, width)


def _there_and_back(flow: Tensor, backward: Tensor) -> tuple[Tensor, Tensor]:
    """|f + b|^2 at each pixel, b read where f leads, and how large it may be: both [N, H, W] squared pixels."""
    back = warp(backward, flow)
    gap = (flow + back).square().sum(1)
    return gap, 0.01 * (flow.square().sum(1) + back.square().sum(1)) + 0.5


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    weight = weight.to(values.dtype)
    return (values * weight).sum() / weight.sum().clamp(min=1)
