"""All-pairs correlation on the CPU: all scales in one product, and windows read as runs of memory; or nothing stored.

All taps of a window share the fractional part of its position, so a lookup of (2r + 1)^2 taps between pixels needs
the (2r + 2)^2 correlations at whole pixels around it, blended once. Where the volumes are stored, they are so column
by column with zeros between: a column of any window, also of one that leaves the picture, is then one run of numbers.
Refinement soon moves the flow by less than a pixel, so a lookup without gradients reads only the windows that have
moved since the last. Averaging features2 before the product gives the coarser volumes, for less than averaging the
finest one.

Where the volumes would be too large, correlations are computed at the lookup: a tile of 16x16 pixels of frame1 looks
at neighboring windows of frame2, and one matrix product with the box around them holds all. Where the flow tears a
tile apart its box would be large; its pixels, and all pixels on a GPU, multiply with windows of their own. The backward
pass repeats these products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fleetflow.ops import all_pairs as definition
from fleetflow.ops.all_pairs import MEMORY_LIMIT, AllPairs, pooled

LINE = 16  # numbers of float32 in a line of the cache: with rows of whole lines the product takes 0.8 of the time
PAD = 10  # zeros before each column of a stored volume: what a window of radius 4 needs
TILE = 16  # measured on one CPU core at 56x128: 8 and 16 alike for a smooth flow, 16 better for a rough one
LARGEST_BOX = 4096  # pixels of frame2; beyond, separate windows are as fast as the product
CHUNK = 2**24  # numbers that the separate windows may take at a time, 64 MB


def all_pairs(features1: Tensor, features2: Tensor, levels: int, memory_limit: int = MEMORY_LIMIT) -> AllPairs:
    """Returns what `ops.all_pairs.all_pairs` defines, without the volumes if they would exceed the limit.

    For prediction, the volumes of features of low precision keep it: half the memory to write and to read.
    """
    count, _, height, width = features1.shape
    itemsize = torch.promote_types(features1.dtype, torch.float32).itemsize
    volume = sum((height >> level) * (width >> level) for level in range(levels))
    if count * height * width * volume * itemsize > memory_limit:
        return pooled(features1, features2, levels)
    if features1.device.type != "cpu":
        return definition.all_pairs.__wrapped__(features1, features2, levels)
    pyramid = pooled(features1, features2, levels)
    columns = [F.pad(scale.mT, (PAD, 0)).flatten(2) for scale in pyramid.features2]
    width = PAD + sum(part.shape[2] for part in columns)
    columns.append(columns[0].new_zeros(*columns[0].shape[:2], PAD + -width % LINE))
    trains = torch.is_grad_enabled() and (features1.requires_grad or features2.requires_grad)
    dtype = pyramid.features1.dtype if trains else features1.dtype  # a bfloat16 network rounds what it reads anyway
    with torch.autocast("cpu", enabled=False):
        table = pyramid.features1.flatten(2).mT.to(dtype) @ torch.cat(columns, 2).to(dtype)
    volumes = []
    for scale, part in zip(pyramid.features2, table.split([part.shape[2] for part in columns], 2)):
        volumes.append(part.unflatten(2, (scale.shape[3], PAD + scale.shape[2]))[..., PAD:].mT)
    sums = []
    table = _Table.apply(table, sums) if trains else table
    return pyramid._replace(volumes=tuple(volumes), table=table, last=[], sums=sums)


def lookup(pyramid: AllPairs, positions: Tensor, radius: int) -> Tensor:
    """Returns what `ops.all_pairs.lookup` defines, [N, K, H, W]."""
    side = 2 * radius + 2
    if pyramid.volumes is not None and (pyramid.table is None or side > PAD):
        return definition.lookup.__wrapped__(pyramid, positions, radius)
    positions = positions.to(torch.promote_types(positions.dtype, torch.float32)).nan_to_num(-1e6).flatten(2)
    corner = torch.stack([positions / 2**level - radius for level in range(len(pyramid.features2))], 3)
    whole = corner.detach().floor()
    share = (corner - whole).to(pyramid.features1.dtype)  # [N, 2, P, levels], x before y
    # Farther out than its own size, a window is empty wherever it is.
    limits = whole.new_tensor([scale.shape[:1:-1] for scale in pyramid.features2]).T[:, None]
    origin = torch.minimum(whole.clamp(min=-side), limits).long()
    if pyramid.table is None:
        levels = zip(pyramid.features2, origin.unbind(3))
        values = [_Windows.apply(pyramid.features1, scale, part, side) for scale, part in levels]
        values = torch.stack(values, 2).mT.flatten(3)  # column by column
    else:
        values = (_gathered if torch.is_grad_enabled() else _read)(pyramid, origin, side)
    # Both blends run over windows as flat rows; what the second makes of two columns' ends is left out below.
    x, y = share[..., None].unbind(1)
    values = values.to(share.dtype)
    values = torch.lerp(values[..., :-side], values[..., side:], x)
    values = torch.lerp(values[..., :-1], values[..., 1:], y)
    values = values.unfold(3, side - 1, side)  # [N, P, levels, x, y]
    return values.flatten(2).unflatten(1, pyramid.features1.shape[2:]).permute(0, 3, 1, 2)  # channels-last


def _gathered(pyramid: AllPairs, origin: Tensor, side: int) -> Tensor:
    """The windows [N, P, levels, side^2], column by column, with their corners at origin [N, 2, P, levels]."""
    start = _starts(origin, *_places(pyramid, origin), side)
    index = start[..., None] + torch.arange(side)
    return _Gathered.apply(pyramid.table, index.flatten(2), pyramid.sums).view(*start.shape[:3], side * side)


def _read(pyramid: AllPairs, origin: Tensor, side: int) -> Tensor:
    """What `_gathered` returns, without gradients: only windows that have moved since the last time are read.

    The result is `pyramid.last`, and changes at the next call. A refinement moves few windows after its first steps: 4
    to 10 % on real pairs.
    """
    table, last = pyramid.table, pyramid.last
    assert table is not None and last is not None  # `lookup` has looked
    if last and last[0].shape == origin.shape and last[1].shape[3] == side * side:
        values = last[1]
        moved = (origin != last[0]).any(1).flatten().nonzero()[:, 0]
    else:
        values = pyramid.features1.new_empty(origin[:, 0].shape + (side * side,))
        moved = torch.arange(origin[:, 0].numel())
    last[:] = origin, values
    pixel, level = moved // origin.shape[3], moved % origin.shape[3]
    corners = origin.movedim(1, 0).flatten(1).index_select(1, moved)[None]
    widths, heights, first = (place[level] for place in _places(pyramid, origin))
    start = _starts(corners, widths, heights, first, side)[0]
    runs = table.as_strided((table.numel() - side + 1, side), (1, 1))
    windows = runs.index_select(0, (start + pixel[:, None] * table.shape[2]).flatten())
    values.view(-1, side * side).index_copy_(0, moved, windows.view(-1, side * side).to(values.dtype))
    return values


def _places(pyramid: AllPairs, origin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The width and height of each level, and where it begins in a row of the table: [levels] each."""
    widths, heights = origin.new_tensor([scale.shape[:1:-1] for scale in pyramid.features2]).T
    columns = widths * (PAD + heights)
    return widths, heights, columns.cumsum(0) - columns


def _starts(origin: Tensor, widths: Tensor, heights: Tensor, first: Tensor, side: int) -> Tensor:
    """[N, ..., side]: where in its row of the table each column of the window at origin [N, 2, ...] begins."""
    x, y = origin.unbind(1)
    column = x[..., None] + torch.arange(side)
    start = (first + PAD + y)[..., None] + column * (PAD + heights)[:, None]
    return start * ((column >= 0) & (column < widths[:, None]))  # every row of the table begins with zeros


class _Table(torch.autograd.Function):
    """The table. All that `_Gathered` reads of it has one gradient, the only tensor in `sums` while it is made.

    By itself autograd would make a table of zeros for every lookup, and add them up.
    """

    @staticmethod
    def forward(ctx, table: Tensor, sums: list[Tensor]) -> Tensor:
        ctx.sums = sums
        return table.view_as(table)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.sums.clear()
        return gradient, None


class _Gathered(torch.autograd.Function):
    """table.gather(2, index)."""

    @staticmethod
    def forward(ctx, table: Tensor, index: Tensor, sums: list[Tensor]) -> Tensor:
        ctx.save_for_backward(index)
        ctx.sums, ctx.shape = sums, table.shape
        return table.gather(2, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        first = not ctx.sums
        if first:
            ctx.sums.append(gradient.new_zeros(ctx.shape))
        ctx.sums[0].scatter_add_(2, *ctx.saved_tensors, gradient)
        return ctx.sums[0] if first else None, None, None  # autograd holds the first, and the others add to it


class _Windows(torch.autograd.Function):
    """<features1(p), features2(origin(p) + (i, j))>, 0 outside: [N, P, side, side] for P = H * W pixels."""

    @staticmethod
    def forward(ctx, features1: Tensor, features2: Tensor, origin: Tensor, side: int) -> Tensor:
        ctx.save_for_backward(features1, features2, origin)
        ctx.side = side
        tiles, padded, origin, order, tile = _laid_out(features1, features2, origin, side)
        values = tiles.new_empty(*tiles.shape[:2], side * side)
        with torch.autocast(tiles.device.type, enabled=False):
            for sample in range(len(tiles)):
                first, second, corners = tiles[sample], padded[sample], origin[sample]
                boxes, rest = _boxes(corners, tile, side)
                for start, stop, left, top, right, bottom in boxes:
                    box = second[top:bottom, left:right]
                    product = first[start:stop] @ box.reshape(-1, box.shape[2]).mT
                    index = _index(corners[start:stop] - corners.new_tensor((left, top)), right - left, side)
                    torch.gather(product, 1, index, out=values[sample, start:stop])
                for pixels, index in _chunks(rest, corners, second, side):
                    windows = second.flatten(0, 1)[index]  # [n, side * side, C]
                    values[sample, pixels] = (windows @ first[pixels][:, :, None])[..., 0]
        return _pixel_order(values, order).unflatten(2, (side, side))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        features1, features2, origin = ctx.saved_tensors
        side, (height, width) = ctx.side, features2.shape[-2:]
        tiles, padded, origin, order, tile = _laid_out(features1, features2, origin, side)
        gradient = gradient.flatten(2).index_select(1, order)
        first_gradient, second_gradient = torch.zeros_like(tiles), torch.zeros_like(padded)
        with torch.autocast(tiles.device.type, enabled=False):
            for sample in range(len(tiles)):
                first, second, corners = tiles[sample], padded[sample], origin[sample]
                boxes, rest = _boxes(corners, tile, side)
                for start, stop, left, top, right, bottom in boxes:
                    box = second[top:bottom, left:right]
                    index = _index(corners[start:stop] - corners.new_tensor((left, top)), right - left, side)
                    product = gradient.new_zeros(stop - start, (bottom - top) * (right - left))
                    product.scatter_(1, index, gradient[sample, start:stop])
                    first_gradient[sample, start:stop] = product @ box.reshape(-1, box.shape[2])
                    part = (product.mT @ first[start:stop]).view(box.shape)
                    second_gradient[sample, top:bottom, left:right] += part
                for pixels, index in _chunks(rest, corners, second, side):
                    weights = gradient[sample, pixels]
                    first_gradient[sample, pixels] = (weights[:, None] @ second.flatten(0, 1)[index])[:, 0]
                    parts = weights[..., None] * first[pixels][:, None]
                    second_gradient[sample].flatten(0, 1).index_add_(0, index.flatten(), parts.flatten(0, 1))
        first_gradient = _pixel_order(first_gradient, order).mT.reshape(features1.shape)
        second_gradient = second_gradient[:, side : side + height, side : side + width].permute(0, 3, 1, 2)
        return first_gradient, second_gradient, None, None


def _laid_out(features1: Tensor, features2: Tensor, origin: Tensor, side: int) -> tuple[Tensor, ...]:
    """Pixels of frame1 tile by tile [N, P, C]; frame2 in a margin of zeros [N, h + 2 side, w + 2 side, C]; the corners
    of the windows in it [N, P, 2]; the order of the pixels [P], and the number of the tile of each [P]."""
    height, width = features1.shape[-2:]
    y, x = (torch.arange(size, device=features1.device) // TILE for size in (height, width))
    tile = (y[:, None] * -(-width // TILE) + x).flatten()
    tile, order = tile.sort(stable=True)
    tiles = features1.flatten(2).mT.index_select(1, order)
    padded = F.pad(features2.permute(0, 2, 3, 1), (0, 0, side, side, side, side))
    return tiles, padded, origin.mT.index_select(1, order) + side, order, tile


def _pixel_order(values: Tensor, order: Tensor) -> Tensor:
    """Values [N, P, K] tile by tile -> row by row."""
    return torch.empty_like(values).index_copy_(1, order, values)


def _boxes(corners: Tensor, tile: Tensor, side: int) -> tuple[list[tuple[int, ...]], Tensor]:
    """(first pixel, end, left, top, right, bottom) of each tile whose windows fit a small box; the other pixels."""
    everything = torch.arange(len(tile), device=tile.device)
    if corners.device.type != "cpu":
        return [], everything
    ends = torch.bincount(tile).cumsum(0)
    index = tile[:, None].expand_as(corners)
    low = corners.new_zeros(len(ends), 2).scatter_reduce_(0, index, corners, "amin", include_self=False)
    high = corners.new_zeros(len(ends), 2).scatter_reduce_(0, index, corners, "amax", include_self=False) + side
    compact = (high - low).prod(1) <= LARGEST_BOX
    rows = torch.cat((F.pad(ends[:-1], (1, 0))[:, None], ends[:, None], low, high), 1)
    return [tuple(row) for row in rows[compact].tolist()], everything[~compact[tile]]


def _index(corners: Tensor, width: int, side: int) -> Tensor:
    """[n, side * side]: where the window at each corner [n, 2] lies in a flattened picture of that width."""
    steps = torch.arange(side, device=corners.device)
    window = (steps[:, None] * width + steps).flatten()
    return (corners[:, 1] * width + corners[:, 0])[:, None] + window


def _chunks(pixels: Tensor, corners: Tensor, second: Tensor, side: int):
    """Yields pixels, so many at a time that their windows fit CHUNK, and the index of their windows in frame2."""
    for part in pixels.split(max(CHUNK // (side * side * second.shape[2]), 1)):
        if len(part):
            yield part, _index(corners[part], second.shape[1], side)
