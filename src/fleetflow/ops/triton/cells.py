"""All-pairs correlations computed where they are read, in Triton, and their gradients.

This is a local correlation around each pixel's own position. The gradient of features1 is gathered; that of features2
is spread over the windows, which overlap as they like, and added up in whole numbers.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from fleetflow.ops.triton.blocks import channel_range, fixed_point, launch, pixels, products, tile, weighted, wide

P, K, C = 16, 16, 16  # pixels, cells and channels of a tile


@torch.library.custom_op("fleetflow::correlate_cells", mutates_args=())
def cells(first: Tensor, second: Tensor, positions: Tensor, radius: int, level: int) -> Tensor:
    """Returns [N, H * W, side, side], side = 2 radius + 2: the cells of each pixel's window, 0 outside the picture.

    Args:
        first: [N, C, H, W].
        second: [N, C, h, w], of that level.
        positions: [N, 2, H, W] pixels at level 0. Cell (i, j) of pixel p is <first(p), second(floor(positions(p) /
            2^level - radius) + (j, i))>.
    """
    count, channels, height, width = first.shape
    out = _no_cells(first, second, positions, radius, level)
    if out.numel() == 0:
        return out
    launch(
        _correlate,
        (triton.cdiv(count * height * width, P), triton.cdiv(out.shape[2] ** 2, K)),
        *(first, second, positions, out, count, channels, height, width, *second.shape[2:]),
        *(*first.stride(), *second.stride(), *positions.stride()),
        *(radius, 2.0**-level, P, K, tile(channels, C), wide(out.dtype)),
    )
    return out


@cells.register_fake
def _no_cells(first: Tensor, second: Tensor, positions: Tensor, radius: int, level: int) -> Tensor:
    side = 2 * radius + 2
    return first.new_empty(first.shape[0], first.shape[2] * first.shape[3], side, side)


@torch.library.custom_op("fleetflow::correlate_cells_gradient1", mutates_args=())
def _gradient1(gradient: Tensor, first: Tensor, second: Tensor, positions: Tensor, radius: int, level: int) -> Tensor:
    count, channels, height, width = first.shape
    out = torch.empty_like(first)
    if out.numel() == 0:
        return out
    size = tile(channels, C)
    launch(
        _gather,
        (triton.cdiv(count * height * width, P), triton.cdiv(channels, size)),
        *(gradient.contiguous(), second, positions, out, count, channels, height, width, *second.shape[2:]),
        *(*second.stride(), *positions.stride(), *out.stride()),
        *(radius, 2.0**-level, P, K, size, wide(out.dtype)),
    )
    return out


@_gradient1.register_fake
def _(gradient, first, second, positions, radius, level):
    return torch.empty_like(first)


@torch.library.custom_op("fleetflow::correlate_cells_gradient2", mutates_args=())
def _gradient2(gradient: Tensor, first: Tensor, second: Tensor, positions: Tensor, radius: int, level: int) -> Tensor:
    count, channels, height, width = first.shape
    if first.numel() * second.numel() == 0:
        return torch.zeros_like(second)
    sums = torch.zeros_like(second, dtype=torch.int64)
    scale = fixed_point(gradient.abs().amax() * first.abs().amax(), height * width)
    size = tile(channels, C)
    grid = (triton.cdiv(count * height * width, P), triton.cdiv(gradient.shape[2] ** 2, K), triton.cdiv(channels, size))
    launch(
        _spread,
        grid,
        *(gradient.contiguous(), first, positions, sums, scale, count, channels, height, width, *second.shape[2:]),
        *(*first.stride(), *positions.stride(), *sums.stride()),
        *(radius, 2.0**-level, P, K, size, wide(second.dtype)),
    )
    return (sums / scale).to(second.dtype)


@_gradient2.register_fake
def _(gradient, first, second, positions, radius, level):
    return torch.empty_like(second)


def _remember(ctx, inputs, output):
    first, second, positions, *ctx.how = inputs
    ctx.save_for_backward(first, second, positions)


def _gradients(ctx, gradient: Tensor):
    wanted = ctx.needs_input_grad
    return (
        _gradient1(gradient, *ctx.saved_tensors, *ctx.how) if wanted[0] else None,
        _gradient2(gradient, *ctx.saved_tensors, *ctx.how) if wanted[1] else None,
        *(None, None, None),
    )


cells.register_autograd(_gradients, setup_context=_remember)


@triton.jit
def corner(positions, here, radius, shrink, WIDE: tl.constexpr):
    """The corners of windows [P] along x or y, whole pixels, and how far from them the windows begin.

    Args:
        positions: pointers to those at level 0.
        shrink: 1 / 2^level.
    """
    at = tl.load(positions, here, 0).to(WIDE)
    at = tl.where(tl.abs(at) < 1e6, at, -1e6)  # far out, and what is no number: there is nothing
    at = at * shrink - radius
    whole = tl.floor(at)
    return whole.to(tl.int64), at - whole


@triton.jit
def _places(positions, positions_c, here, k, height, width, radius, shrink, WIDE: tl.constexpr):
    """Rows and columns in features2 [P, K] of cells k [K], and which of them exist."""
    left, _ = corner(positions, here, radius, shrink, WIDE)
    top, _ = corner(positions + positions_c, here, radius, shrink, WIDE)
    side = 2 * radius + 2
    row, column = top[:, None] + (k // side)[None, :], left[:, None] + (k % side)[None, :]
    inside = here[:, None] & (k < side * side)[None, :]
    return row, column, inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)


# fmt: off
@triton.jit
def _correlate(
    first, second, positions, out, count, channels, height, width, second_height, second_width,
    first_n, first_c, first_y, first_x, second_n, second_c, second_y, second_x,
    positions_n, positions_c, positions_y, positions_x,
    radius, shrink, P: tl.constexpr, K: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):
    # fmt: on
    n, y, x, here = pixels(count, height, width, P)
    k = tl.program_id(1) * K + tl.arange(0, K)
    positions += n * positions_n + y * positions_y + x * positions_x
    row, column, inside = _places(
        positions, positions_c, here, k, second_height, second_width, radius, shrink, WIDE
    )
    first += n * first_n + y * first_y + x * first_x
    second += n[:, None] * second_n + row * second_y + column * second_x
    total = products(first, first_c, here, second, second_c, inside, channels, C, WIDE)
    size = (2 * radius + 2) * (2 * radius + 2)
    out += (((n * height + y) * width + x) * size)[:, None] + k[None, :]
    tl.store(out, total, here[:, None] & (k < size)[None, :])


# fmt: off
@triton.jit
def _gather(
    gradient, second, positions, out, count, channels, height, width, second_height, second_width,
    second_n, second_c, second_y, second_x, positions_n, positions_c, positions_y, positions_x,
    out_n, out_c, out_y, out_x,
    radius, shrink, P: tl.constexpr, K: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):
    # fmt: on
    n, y, x, here = pixels(count, height, width, P)
    c = channel_range(tl.program_id(1) * C, C)
    positions += n * positions_n + y * positions_y + x * positions_x
    size = (2 * radius + 2) * (2 * radius + 2)
    gradient += ((n * height + y) * width + x) * size
    total = tl.zeros([P, C], WIDE)
    for start in range(0, size, K):
        k = start + tl.arange(0, K)
        row, column, inside = _places(
            positions, positions_c, here, k, second_height, second_width, radius, shrink, WIDE
        )
        weight = tl.load(gradient[:, None] + k[None, :], inside, 0).to(WIDE)
        there = second + n[:, None] * second_n + row * second_y + column * second_x
        total += weighted(weight, there, second_c, inside, c, channels, WIDE)
    out += (n * out_n + y * out_y + x * out_x)[:, None] + c[None, :] * out_c
    tl.store(out, total, here[:, None] & (c < channels)[None, :])


# fmt: off
@triton.jit
def _spread(
    gradient, first, positions, sums, scale, count, channels, height, width, second_height, second_width,
    first_n, first_c, first_y, first_x, positions_n, positions_c, positions_y, positions_x,
    sums_n, sums_c, sums_y, sums_x,
    radius, shrink, P: tl.constexpr, K: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):
    # fmt: on
    n, y, x, here = pixels(count, height, width, P)
    k = tl.program_id(1) * K + tl.arange(0, K)
    c = channel_range(tl.program_id(2) * C, C)
    positions += n * positions_n + y * positions_y + x * positions_x
    row, column, inside = _places(
        positions, positions_c, here, k, second_height, second_width, radius, shrink, WIDE
    )
    size = (2 * radius + 2) * (2 * radius + 2)
    gradient += (((n * height + y) * width + x) * size)[:, None] + k[None, :]
    weight = tl.load(gradient, inside, 0).to(WIDE) * tl.load(scale)
    first += (n * first_n + y * first_y + x * first_x)[:, None] + c[None, :] * first_c
    value = tl.load(first, here[:, None] & (c < channels)[None, :], 0).to(WIDE)
    sums += n[:, None] * sums_n + row * sums_y + column * sums_x
    whole = (weight[:, :, None] * value[:, None, :]).to(tl.int64)
    at = sums[:, :, None] + c[None, None, :] * sums_c
    tl.atomic_add(at, whole, inside[:, :, None] & (c < channels)[None, None, :], sem="relaxed")
