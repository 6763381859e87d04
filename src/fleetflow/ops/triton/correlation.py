"""Local correlation in Triton, every displacement or every second (third, ...), and its gradients.

A program computes P pixels times K displacements from tiles of C channels; no window is copied. Both gradients are
gathered: that of features2 reads at q - d what the forward pass read at q.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fleetflow.ops.triton.blocks import channel_range, launch, pixels, products, tile, weighted, wide

P, K, C = 16, 16, 16  # pixels, displacements and channels of a tile


def local_correlation(features1: Tensor, features2: Tensor, radius: int, keep: Sequence[int] | None = None) -> Tensor:
    """Returns what `ops.correlation.local_correlation` defines, [N, K, H, W], channels-last in memory."""
    return correlation(features1, features2, radius, 1, keep)


def local_correlation_gradients(
    gradient: Tensor, features1: Tensor, features2: Tensor, radius: int, keep: Sequence[int] | None = None
) -> list[Tensor]:
    """Returns the gradients of both features for that of the result, [N, K, H, W]."""
    return correlation_gradients(gradient, features1, features2, radius, 1, keep)


def correlation(first: Tensor, second: Tensor, radius: int, stride: int, keep: Sequence[int] | None) -> Tensor:
    """Returns the correlation at every `stride`-th displacement, [N, K, H, W], channels-last in memory."""
    count, channels, height, width = first.shape
    kept = (2 * (radius // stride) + 1) ** 2 if keep is None else len(keep)
    dtype = torch.promote_types(first.dtype, second.dtype)
    shape = (count, kept, height, width)
    out = torch.empty(shape, dtype=dtype, device=first.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(count * height * width, P), triton.cdiv(kept, K))
    launch(
        _forward,
        grid,
        *(first, second, out, count, channels, height, width, kept),
        *(*first.stride(), *second.stride(), *out.stride()),
        *(2 * (radius // stride) + 1, stride, None if keep is None else tuple(keep)),
        *(P, K, tile(channels, C), wide(out.dtype)),
    )
    return out


def correlation_gradients(
    gradient: Tensor, first: Tensor, second: Tensor, radius: int, stride: int, keep: Sequence[int] | None
) -> list[Tensor]:
    """Returns the gradients of both features for that of the result, [N, K, H, W]."""
    return [
        _gradient(gradient, second, first, radius, stride, keep, False),
        _gradient(gradient, first, second, radius, stride, keep, True),
    ]


def _gradient(
    gradient: Tensor, other: Tensor, like: Tensor, radius: int, stride: int, keep: Sequence[int] | None, second: bool
) -> Tensor:
    """The gradient of features1, for which `other` is features2, or (`second`) the other way round."""
    count, channels, height, width = other.shape
    out = torch.empty_like(like)
    if out.numel() == 0:
        return out
    size = tile(channels, C)
    grid = (triton.cdiv(count * height * width, P), triton.cdiv(channels, size))
    launch(
        _backward,
        grid,
        *(gradient, other, out, count, channels, height, width, gradient.shape[1]),
        *(*gradient.stride(), *other.stride(), *out.stride()),
        *(2 * (radius // stride) + 1, stride, None if keep is None else tuple(keep), second),
        *(P, K, size, wide(gradient.dtype)),
    )
    return out


@triton.jit
def _shifts(k, side, stride, KEEP: tl.constexpr):
    """The displacements (dy, dx) of channels k [K]; KEEP lists the numbers of the kept ones, None keeps all."""
    number = k
    if KEEP is not None:
        for place in tl.static_range(len(KEEP)):
            number = tl.where(k == place, KEEP[place], number)
    return (number // side - side // 2) * stride, (number % side - side // 2) * stride


# fmt: off
@triton.jit
def _forward(
    first, second, out, count, channels, height, width, kept,
    first_n, first_c, first_y, first_x, second_n, second_c, second_y, second_x, out_n, out_k, out_y, out_x,
    side, stride, KEEP: tl.constexpr, P: tl.constexpr, K: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):
    # fmt: on
    n, y, x, here = pixels(count, height, width, P)
    k = tl.program_id(1) * K + tl.arange(0, K)
    down, right = _shifts(k, side, stride, KEEP)
    there_y, there_x = y[:, None] + down[None, :], x[:, None] + right[None, :]
    wanted = here[:, None] & (k < kept)[None, :]
    inside = wanted & (there_y >= 0) & (there_y < height) & (there_x >= 0) & (there_x < width)
    first += n * first_n + y * first_y + x * first_x
    second += n[:, None] * second_n + there_y * second_y + there_x * second_x
    total = products(first, first_c, here, second, second_c, inside, channels, C, WIDE)
    out += (n * out_n + y * out_y + x * out_x)[:, None] + k.to(tl.int64)[None, :] * out_k
    tl.store(out, (total / channels).to(out.dtype.element_ty), wanted)


# fmt: off
@triton.jit
def _backward(
    gradient, other, out, count, channels, height, width, kept,
    gradient_n, gradient_k, gradient_y, gradient_x, other_n, other_c, other_y, other_x, out_n, out_c, out_y, out_x,
    side, stride, KEEP: tl.constexpr, SECOND: tl.constexpr,
    P: tl.constexpr, K: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):
    # fmt: on
    n, y, x, here = pixels(count, height, width, P)
    c = channel_range(tl.program_id(1) * C, C)
    total = tl.zeros([P, C], WIDE)
    for start in range(0, kept, K):
        k = start + tl.arange(0, K)
        down, right = _shifts(k, side, stride, KEEP)
        if SECOND:
            down, right = -down, -right
        there_y, there_x = y[:, None] + down[None, :], x[:, None] + right[None, :]
        inside = here[:, None] & (k < kept)[None, :]
        inside = inside & (there_y >= 0) & (there_y < height) & (there_x >= 0) & (there_x < width)
        weight = gradient + n[:, None] * gradient_n + k.to(tl.int64)[None, :] * gradient_k
        if SECOND:
            weight += there_y * gradient_y + there_x * gradient_x
        else:
            weight += (y * gradient_y + x * gradient_x)[:, None]
        weight = tl.load(weight, inside, 0).to(WIDE)
        there = other + n[:, None] * other_n + there_y * other_y + there_x * other_x
        total += weighted(weight, there, other_c, inside, c, channels, WIDE)
    out += (n * out_n + y * out_y + x * out_x)[:, None] + c[None, :] * out_c
    tl.store(out, (total / channels).to(out.dtype.element_ty), here[:, None] & (c < channels)[None, :])
