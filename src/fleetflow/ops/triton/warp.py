"""Backward warping in Triton, and its gradients.

A program computes P pixels times C channels from the four neighbors of each pixel's place. The gradient of the flow is
gathered; that of the features is spread over the same neighbors, and added up in whole numbers.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from fleetflow.ops.triton.blocks import channel_range, fixed_point, launch, pixels, tile, wide

P, C = 32, 32  # pixels and channels of a tile


def warp(features: Tensor, flow: Tensor) -> Tensor:
    """Returns what `ops.warp.warp` defines, [N, C, H, W], channels-last in memory."""
    flow = flow.to(torch.promote_types(flow.dtype, torch.float32))
    count, channels, height, width = features.shape
    out = torch.empty_like(features, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    size = tile(channels, C)
    launch(
        _forward,
        (triton.cdiv(count * height * width, P), triton.cdiv(channels, size)),
        *(features, flow, out, count, channels, height, width),
        *(*features.stride(), *flow.stride(), *out.stride()),
        *(P, size, wide(flow.dtype)),
    )
    return out


def warp_gradients(gradient: Tensor, features: Tensor, flow: Tensor) -> list[Tensor]:
    """Returns the gradients of the features and of the flow for that of the result, [N, C, H, W]."""
    wider = flow.to(torch.promote_types(flow.dtype, torch.float32))
    to_flow = _flow_gradient(gradient, features, wider)
    return [_features_gradient(gradient, features, wider), to_flow.to(flow.dtype)]


def _features_gradient(gradient: Tensor, features: Tensor, flow: Tensor) -> Tensor:
    count, channels, height, width = features.shape
    if features.numel() == 0:
        return torch.empty_like(features, memory_format=torch.channels_last)
    sums = torch.zeros_like(features, dtype=torch.int64, memory_format=torch.channels_last)
    scale = fixed_point(gradient.abs().amax().to(flow.dtype), height * width)
    size = tile(channels, C)
    launch(
        _spread,
        (triton.cdiv(count * height * width, P), triton.cdiv(channels, size)),
        *(gradient, flow, sums, scale, count, channels, height, width),
        *(*gradient.stride(), *flow.stride(), *sums.stride()),
        *(P, size, wide(flow.dtype)),
    )
    return (sums / scale).to(features.dtype)


def _flow_gradient(gradient: Tensor, features: Tensor, flow: Tensor) -> Tensor:
    count, channels, height, width = features.shape
    out = torch.empty_like(flow, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    launch(
        _slopes,
        (triton.cdiv(count * height * width, P),),
        *(gradient, features, flow, out, count, channels, height, width),
        *(*gradient.stride(), *features.stride(), *flow.stride(), *out.stride()),
        *(P, tile(channels, C), wide(flow.dtype)),
    )
    return out


@triton.jit
def _place(at, size, WIDE: tl.constexpr):
    """The pixel left of (above) the positions [P], and how far they are from it; what sees no pixel is sent to -2."""
    at = tl.where((at > -1) & (at < size), at, -2.0).to(WIDE)  # so is what is no number
    first = tl.floor(at)
    return first.to(tl.int64), at - first


# fmt: off
@triton.jit
def _forward(
    features, flow, out, count, channels, height, width,
    features_n, features_c, features_y, features_x, flow_n, flow_c, flow_y, flow_x, out_n, out_c, out_y, out_x,
    P: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):
    # fmt: on
    n, y, x, here = pixels(count, height, width, P)
    c = channel_range(tl.program_id(1) * C, C)
    exists = c < channels
    flow += n * flow_n + y * flow_y + x * flow_x
    left, right_share = _place(x.to(WIDE) + tl.load(flow, here, 0), width, WIDE)
    top, bottom_share = _place(y.to(WIDE) + tl.load(flow + flow_c, here, 0), height, WIDE)
    total = tl.zeros([P, C], WIDE)
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            row, column = top + down, left + right
            inside = here & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            share = (bottom_share if down else 1 - bottom_share) * (right_share if right else 1 - right_share)
            at = features + n * features_n + row * features_y + column * features_x
            value = tl.load(at[:, None] + c[None, :] * features_c, inside[:, None] & exists[None, :], 0)
            total += share[:, None] * value.to(WIDE)
    out += (n * out_n + y * out_y + x * out_x)[:, None] + c[None, :] * out_c
    tl.store(out, total.to(out.dtype.element_ty), here[:, None] & exists[None, :])


# fmt: off
@triton.jit
def _spread(
    gradient, flow, sums, scale, count, channels, height, width,
    gradient_n, gradient_c, gradient_y, gradient_x, flow_n, flow_c, flow_y, flow_x, sums_n, sums_c, sums_y, sums_x,
    P: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):
    # fmt: on
    n, y, x, here = pixels(count, height, width, P)
    c = channel_range(tl.program_id(1) * C, C)
    exists = c < channels
    flow += n * flow_n + y * flow_y + x * flow_x
    left, right_share = _place(x.to(WIDE) + tl.load(flow, here, 0), width, WIDE)
    top, bottom_share = _place(y.to(WIDE) + tl.load(flow + flow_c, here, 0), height, WIDE)
    gradient += (n * gradient_n + y * gradient_y + x * gradient_x)[:, None] + c[None, :] * gradient_c
    value = tl.load(gradient, here[:, None] & exists[None, :], 0).to(WIDE) * tl.load(scale)
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            row, column = top + down, left + right
            inside = here & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            share = (bottom_share if down else 1 - bottom_share) * (right_share if right else 1 - right_share)
            at = (sums + n * sums_n + row * sums_y + column * sums_x)[:, None] + c[None, :] * sums_c
            whole = (share[:, None] * value).to(tl.int64)
            tl.atomic_add(at, whole, inside[:, None] & exists[None, :], sem="relaxed")


# fmt: off
@triton.jit
def _slopes(
    gradient, features, flow, out, count, channels, height, width,
    gradient_n, gradient_c, gradient_y, gradient_x, features_n, features_c, features_y, features_x,
    flow_n, flow_c, flow_y, flow_x, out_n, out_c, out_y, out_x,
    P: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):
    # fmt: on
    n, y, x, here = pixels(count, height, width, P)
    flow += n * flow_n + y * flow_y + x * flow_x
    left, right_share = _place(x.to(WIDE) + tl.load(flow, here, 0), width, WIDE)
    top, bottom_share = _place(y.to(WIDE) + tl.load(flow + flow_c, here, 0), height, WIDE)
    along_x, along_y = tl.zeros([P], WIDE), tl.zeros([P], WIDE)
    for start in range(0, channels, C):
        c = channel_range(start, C)
        exists = c < channels
        at = gradient + n * gradient_n + y * gradient_y + x * gradient_x
        weight = tl.load(at[:, None] + c[None, :] * gradient_c, here[:, None] & exists[None, :], 0).to(WIDE)
        for down in tl.static_range(2):
            for right in tl.static_range(2):
                row, column = top + down, left + right
                inside = here & (row >= 0) & (row < height) & (column >= 0) & (column < width)
                at = features + n * features_n + row * features_y + column * features_x
                value = tl.load(at[:, None] + c[None, :] * features_c, inside[:, None] & exists[None, :], 0)
                part = tl.sum(weight * value.to(WIDE), 1)
                along_x += part * (2 * right - 1) * (bottom_share if down else 1 - bottom_share)
                along_y += part * (2 * down - 1) * (right_share if right else 1 - right_share)
    out += n * out_n + y * out_y + x * out_x
    tl.store(out, along_x, here)
    tl.store(out + out_c, along_y, here)
