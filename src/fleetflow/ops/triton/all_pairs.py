"""Reading the all-pairs correlations in Triton, stored or not, and the gradients.

All taps of a window share the fractional part of its position: a window of (2 radius + 1)^2 taps between pixels blends
the cells at whole pixels below it, a row and a column more. Where the volumes are stored the cells lie in them; where
they are not, `cells` computes them first. A pixel's window touches its own part of the volume only, so both gradients
are gathered.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from fleetflow.ops.all_pairs import AllPairs
from fleetflow.ops.triton.blocks import launch, pixels, wide
from fleetflow.ops.triton.cells import cells, corner

P = 8  # pixels of a tile, with the whole window of each


def lookup(pyramid: AllPairs, positions: Tensor, radius: int) -> Tensor:
    """Returns what `ops.all_pairs.lookup` defines, [N, K, H, W], channels-last in memory."""
    first, windows = pyramid.features1, []
    positions = positions.to(first.dtype)
    for level, second in enumerate(pyramid.features2):
        if pyramid.volumes is not None:
            windows.append(_read(pyramid.volumes[level], positions, radius, level, False))
        else:
            windows.append(_read(cells(first, second, positions, radius, level), positions, radius, level, True))
    return torch.cat(windows, 1)


@torch.library.custom_op("fleetflow::read_windows", mutates_args=())
def _read(volume: Tensor, positions: Tensor, radius: int, level: int, own: bool) -> Tensor:
    """[N, H * W, h, w] -> the windows [N, (2 radius + 1)^2, H, W].

    Args:
        own: the volume holds the cells of each pixel's own window, h = w = 2 radius + 2, and nothing else.
    """
    count, _, height, width = positions.shape
    out = _windows(volume, positions, radius, level, own)
    if out.numel() == 0:
        return out
    launch(
        _forward,
        (triton.cdiv(count * height * width, P),),
        *(volume, positions, out, count, height, width, *volume.shape[2:]),
        *(*volume.stride(), *positions.stride(), *out.stride()),
        *(radius, 2.0**-level, own, P, triton.next_power_of_2(out.shape[1]), wide(volume.dtype)),
    )
    return out


@_read.register_fake
def _windows(volume: Tensor, positions: Tensor, radius: int, level: int, own: bool) -> Tensor:
    shape = (positions.shape[0], (2 * radius + 1) ** 2, *positions.shape[2:])
    return torch.empty(shape, dtype=volume.dtype, device=volume.device, memory_format=torch.channels_last)


@torch.library.custom_op("fleetflow::read_windows_volume_gradient", mutates_args=())
def _volume_gradient(gradient: Tensor, volume: Tensor, positions: Tensor, radius: int, level: int, own: bool) -> Tensor:
    count, _, height, width = positions.shape
    out = torch.zeros_like(volume, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    launch(
        _to_cells,
        (triton.cdiv(count * height * width, P),),
        *(gradient, positions, out, count, height, width, *volume.shape[2:]),
        *(*gradient.stride(), *positions.stride(), *out.stride()),
        *(radius, 2.0**-level, own, P, triton.next_power_of_2((2 * radius + 2) ** 2), wide(volume.dtype)),
    )
    return out


@_volume_gradient.register_fake
def _(gradient, volume, positions, radius, level, own):
    return torch.empty_like(volume, memory_format=torch.contiguous_format)


@torch.library.custom_op("fleetflow::read_windows_position_gradient", mutates_args=())
def _position_gradient(
    gradient: Tensor, volume: Tensor, positions: Tensor, radius: int, level: int, own: bool
) -> Tensor:
    count, _, height, width = positions.shape
    out = torch.empty_like(positions, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    launch(
        _slopes,
        (triton.cdiv(count * height * width, P),),
        *(gradient, volume, positions, out, count, height, width, *volume.shape[2:]),
        *(*gradient.stride(), *volume.stride(), *positions.stride(), *out.stride()),
        *(radius, 2.0**-level, own, P, triton.next_power_of_2(gradient.shape[1]), wide(volume.dtype)),
    )
    return out


@_position_gradient.register_fake
def _(gradient, volume, positions, radius, level, own):
    return torch.empty_like(positions, memory_format=torch.contiguous_format)


def _remember(ctx, inputs, output):
    volume, positions, *ctx.how = inputs
    ctx.save_for_backward(volume, positions)


def _gradients(ctx, gradient: Tensor):
    wanted = ctx.needs_input_grad
    return (
        _volume_gradient(gradient, *ctx.saved_tensors, *ctx.how) if wanted[0] else None,
        _position_gradient(gradient, *ctx.saved_tensors, *ctx.how) if wanted[1] else None,
        *(None, None, None),
    )


_read.register_autograd(_gradients, setup_context=_remember)


@triton.jit
def _cells_at(volume, row_stride, column_stride, top, left, row, column, here, height, width, WIDE: tl.constexpr):
    """The cells [P, T] at rows and columns [T] of the windows; volume is a pointer to the part of each pixel [P]."""
    row, column = top[:, None] + row[None, :], left[:, None] + column[None, :]
    inside = here[:, None] & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return tl.load(volume[:, None] + row * row_stride + column * column_stride, inside, 0).to(WIDE)


# fmt: off
@triton.jit
def _forward(
    volume, positions, out, count, height, width, volume_height, volume_width,
    volume_n, volume_p, volume_y, volume_x, positions_n, positions_c, positions_y, positions_x,
    out_n, out_t, out_y, out_x,
    radius, shrink, OWN: tl.constexpr, P: tl.constexpr, T: tl.constexpr, WIDE: tl.constexpr,
):
    # fmt: on
    n, y, x, here = pixels(count, height, width, P)
    positions += n * positions_n + y * positions_y + x * positions_x
    left, right_share = corner(positions, here, radius, shrink, WIDE)
    top, bottom_share = corner(positions + positions_c, here, radius, shrink, WIDE)
    if OWN:
        left, top = left * 0, top * 0
    volume += n * volume_n + (y * width + x) * volume_p
    tap = tl.arange(0, T)
    side = 2 * radius + 1
    total = tl.zeros([P, T], WIDE)
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            row, column = tap % side + down, tap // side + right
            value = _cells_at(
                volume, volume_y, volume_x, top, left, row, column, here, volume_height, volume_width, WIDE
            )
            share = (bottom_share if down else 1 - bottom_share) * (right_share if right else 1 - right_share)
            total += share[:, None] * value
    out += (n * out_n + y * out_y + x * out_x)[:, None] + tap[None, :] * out_t
    tl.store(out, total.to(out.dtype.element_ty), here[:, None] & (tap < side * side)[None, :])


# fmt: off
@triton.jit
def _to_cells(
    gradient, positions, out, count, height, width, volume_height, volume_width,
    gradient_n, gradient_t, gradient_y, gradient_x, positions_n, positions_c, positions_y, positions_x,
    out_n, out_p, out_y, out_x,
    radius, shrink, OWN: tl.constexpr, P: tl.constexpr, T: tl.constexpr, WIDE: tl.constexpr,
):
    # fmt: on
    n, y, x, here = pixels(count, height, width, P)
    positions += n * positions_n + y * positions_y + x * positions_x
    left, right_share = corner(positions, here, radius, shrink, WIDE)
    top, bottom_share = corner(positions + positions_c, here, radius, shrink, WIDE)
    if OWN:
        left, top = left * 0, top * 0
    gradient += n * gradient_n + y * gradient_y + x * gradient_x
    cell = tl.arange(0, T)
    side = 2 * radius + 1
    row, column = cell // (side + 1), cell % (side + 1)
    total = tl.zeros([P, T], WIDE)
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            b, a = row - down, column - right  # the tap of which this cell is that neighbor
            exists = here[:, None] & ((a >= 0) & (a < side) & (b >= 0) & (b < side))[None, :]
            value = tl.load(gradient[:, None] + (a * side + b)[None, :] * gradient_t, exists, 0).to(WIDE)
            share = (bottom_share if down else 1 - bottom_share) * (right_share if right else 1 - right_share)
            total += share[:, None] * value
    row, column = top[:, None] + row[None, :], left[:, None] + column[None, :]
    inside = here[:, None] & (cell < (side + 1) * (side + 1))[None, :]
    inside = inside & (row >= 0) & (row < volume_height) & (column >= 0) & (column < volume_width)
    out += n * out_n + (y * width + x) * out_p
    tl.store(out[:, None] + row * out_y + column * out_x, total.to(out.dtype.element_ty), inside)


# fmt: off
@triton.jit
def _slopes(
    gradient, volume, positions, out, count, height, width, volume_height, volume_width,
    gradient_n, gradient_t, gradient_y, gradient_x, volume_n, volume_p, volume_y, volume_x,
    positions_n, positions_c, positions_y, positions_x, out_n, out_c, out_y, out_x,
    radius, shrink, OWN: tl.constexpr, P: tl.constexpr, T: tl.constexpr, WIDE: tl.constexpr,
):
    # fmt: on
    n, y, x, here = pixels(count, height, width, P)
    positions += n * positions_n + y * positions_y + x * positions_x
    left, right_share = corner(positions, here, radius, shrink, WIDE)
    top, bottom_share = corner(positions + positions_c, here, radius, shrink, WIDE)
    if OWN:
        left, top = left * 0, top * 0
    volume += n * volume_n + (y * width + x) * volume_p
    tap = tl.arange(0, T)
    side = 2 * radius + 1
    gradient += n * gradient_n + y * gradient_y + x * gradient_x
    exists = here[:, None] & (tap < side * side)[None, :]
    weight = tl.load(gradient[:, None] + tap[None, :] * gradient_t, exists, 0).to(WIDE)
    along_x, along_y = tl.zeros([P], WIDE), tl.zeros([P], WIDE)
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            row, column = tap % side + down, tap // side + right
            value = _cells_at(
                volume, volume_y, volume_x, top, left, row, column, here, volume_height, volume_width, WIDE
            )
            part = tl.sum(weight * value, 1)
            along_x += part * (2 * right - 1) * (bottom_share if down else 1 - bottom_share)
            along_y += part * (2 * down - 1) * (right_share if right else 1 - right_share)
    out += n * out_n + y * out_y + x * out_x
    tl.store(out, along_x * shrink, here)
    tl.store(out + out_c, along_y * shrink, here)
