"""What the kernels share: places of pixels in memory, sums over channels, sums as whole numbers, sizes of tiles.

In a kernel a tile holds P pixels (of all pictures of the batch, row by row), K displacements or taps, C channels.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


def tile(size: int, most: int) -> int:
    """Returns the length of a tile for `size` things: a power of 2, not above `most`."""
    return min(triton.next_power_of_2(max(size, 1)), most)


def wide(dtype: torch.dtype) -> tl.dtype:
    """Returns the dtype of sums over numbers of `dtype`: float64 for it, float32 for all others."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def fixed_point(bound: Tensor, count: int) -> Tensor:
    """Returns the power of 2 by which numbers are multiplied, to be added up as int64 without overflow.

    A sum of 2^20 numbers so keeps them to 2^-41 of the bound. The result is NaN if the bound is no finite number.

    Args:
        bound: the largest absolute value, a scalar on the device.
        count: how many of them meet in one sum at most.
    """
    exponent = (61 - math.log2(max(count, 1)) - bound.log2()).floor().clamp(-120, 120)
    return exponent.exp2() + 0 * bound


def launch(kernel, grid: tuple[int, ...], first: Tensor, *others) -> None:
    """Runs kernel(first, *others) on the device of `first`, which need not be the current one."""
    with torch.cuda.device_of(first):
        kernel[grid](first, *others)


@triton.jit
def pixels(count, height, width, P: tl.constexpr):
    """This program's pixels: number of the picture, row and column, each [P] int64, and which of them exist."""
    pixel = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    row = pixel // width
    return row // height, row % height, pixel % width, row // height < count


@triton.jit
def channel_range(start, C: tl.constexpr):
    return start + tl.arange(0, C).to(tl.int64)


@triton.jit
def products(first, first_stride, here, second, second_stride, inside, channels, C: tl.constexpr, WIDE: tl.constexpr):
    """[P, K]: the sums over channels of first [P] times second [P, K], both pointers to channel 0."""
    total = tl.zeros(inside.shape, WIDE)
    for start in range(0, channels, C):
        c = channel_range(start, C)
        a = tl.load(first[:, None] + c[None, :] * first_stride, here[:, None] & (c < channels)[None, :], 0)
        b = tl.load(
            second[:, :, None] + c[None, None, :] * second_stride,
            inside[:, :, None] & (c < channels)[None, None, :],
            0,
        )
        total += tl.sum(a.to(WIDE)[:, None, :] * b.to(WIDE), 2)
    return total


@triton.jit
def weighted(weight, second, second_stride, inside, c, channels, WIDE: tl.constexpr):
    """[P, C]: the sums over k of weight [P, K] times second [P, K] at channels c; second is a pointer to channel 0."""
    b = tl.load(
        second[:, :, None] + c[None, None, :] * second_stride, inside[:, :, None] & (c < channels)[None, None, :], 0
    )
    return tl.sum(weight[:, :, None] * b.to(WIDE), 1)
