"""The operators as runtimes compute them fast: matrix products and gathers in place of many small sums and samplings.

Each form computes what the function of its name in `fleetflow.ops` defines, in operators of ONNX that every runtime
has, with any sizes open. Many small sums, GridSample and gathers of single numbers along the last axis are what takes
long in ONNX Runtime and OpenVINO on a CPU.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.models import base
from fleetflow.ops import all_pairs as pairs
from fleetflow.ops import correlation, dilated_correlation, subtract_mean, warp
from fleetflow.ops import resize as resizing
from fleetflow.ops.all_pairs import AllPairs, pooled
from fleetflow.types import Prediction

TILE = 8  # pixels a side that share one product of a local correlation; of 4 and 8 the faster in both runtimes
BLOCK = 16  # pixels of a row that share one of a dilated correlation; of 8, 16, 32 and 64 the fastest in both
FAR = 16384.0  # pixels: a flow that leaves every picture
FOURFOLD = 4  # the stride of the finest flow of FastFlowNet, PWC-Net, FlowNet2 and others


def dilated_correlation_form(features1: Tensor, features2: Tensor, radius: int, stride: int) -> Tensor:
    """Returns what `ops.dilated_correlation.dilated_correlation` defines, [N, K, H, W].

    A block of BLOCK pixels of a row is multiplied with the BLOCK + 2 reach pixels around it in each row of frame2. In
    the product [BLOCK, width] pixel t finds its displacements at t, t + stride, ...: one gather for each row, by numbers
    that are the same for all blocks. Displacements end up innermost, as the convolution behind wants them.
    """
    count, channels, height, width = features1.shape
    reach = radius // stride * stride
    side, wide = 2 * (radius // stride) + 1, BLOCK + 2 * reach
    blocks = (width + BLOCK - 1) // BLOCK
    more = blocks * BLOCK - width
    tails = -(-2 * reach // BLOCK)  # blocks that hold what lies to the right of a block's own pixels
    first = F.pad(features1 / channels, (0, more)).permute(0, 2, 3, 1).reshape(count, height, blocks, BLOCK, channels)
    second = F.pad(features2, (reach, more + tails * BLOCK - reach, reach, reach)).permute(0, 2, 3, 1)
    second = second.reshape(count, height + 2 * reach, blocks + tails, BLOCK, channels)
    parts = [second[:, :, k : k + blocks] for k in range(tails + 1)]
    parts[-1] = parts[-1][:, :, :, : 2 * reach - (tails - 1) * BLOCK]
    around = torch.cat(parts, 3)  # [N, H + 2 reach, blocks, BLOCK + 2 reach, C]
    rows = []
    places = torch.tensor([at * wide + at + stride * k for at in range(BLOCK) for k in range(side)])
    for row in range(side):
        product = (first @ around[:, stride * row : stride * row + height].mT).flatten(3)
        rows.append(product.index_select(3, places).reshape(count, height, blocks * BLOCK, side))
    return torch.cat(rows, 3)[:, :, :width].permute(0, 3, 1, 2)


def _moved(x: Tensor, *axes: int) -> Tensor:
    """The tensor with its axes in another order, copied: a view has strides, by which open sizes would be decided on."""
    return x.permute(axes).clone(memory_format=torch.contiguous_format)


def local_correlation(features1: Tensor, features2: Tensor, radius: int, keep: Sequence[int] | None = None) -> Tensor:
    """Returns what `ops.correlation.local_correlation` defines, [N, K, H, W].

    One product for each tile of TILE x TILE pixels, with all pixels of frame2 that are near enough to one of them; in it
    the numbers of a pixel are found by one gather, whose places are the same for all tiles.
    """
    count, channels, height, width = features1.shape
    rows, columns = (height + TILE - 1) // TILE, (width + TILE - 1) // TILE
    down, right, side, shifts = rows * TILE - height, columns * TILE - width, TILE + 2 * radius, 2 * radius + 1
    one, two = (features.permute(0, 2, 3, 1) for features in (features1, features2))  # as convolutions write them
    first = F.pad(one / channels, (0, 0, 0, right, 0, down))
    first = _moved(first.reshape(count, rows, TILE, columns, TILE, channels), 0, 1, 3, 5, 2, 4)
    first = first.reshape(count, rows * columns, channels, TILE * TILE)
    second = F.pad(two, (0, 0, radius, radius + right, radius, radius + down))
    wide = columns * TILE + 2 * radius
    corners = (torch.arange(rows)[:, None] * wide + torch.arange(columns)).flatten() * TILE
    window = (torch.arange(side)[:, None] * wide + torch.arange(side)).flatten()
    around = second.reshape(count, -1, channels).index_select(1, (corners[:, None] + window).flatten())
    product = around.reshape(count, rows * columns, side * side, channels) @ first
    wanted = range(shifts * shifts) if keep is None else keep
    places = [
        ((y + k // shifts) * side + x + k % shifts) * TILE * TILE + y * TILE + x
        for y in range(TILE) for x in range(TILE) for k in wanted
    ]  # fmt: skip
    found = product.flatten(2).index_select(2, torch.tensor(places))
    found = _moved(found.reshape(count, rows, columns, TILE, TILE, len(wanted)), 0, 1, 3, 2, 4, 5)
    found = found.reshape(count, rows * TILE, columns * TILE, len(wanted))[:, :height, :width]
    return found.permute(0, 3, 1, 2)  # displacements innermost, as the convolution behind wants them


def warp_form(features: Tensor, flow: Tensor) -> Tensor:
    """Returns what `ops.warp.warp` defines, [N, C, H, W]: four gathers of pixels, whose channels lie side by side.

    A border of two zeros stands for all that is outside of the picture. Places are whole numbers, and only the flow is a
    float: bfloat16 has eight bits, in which a position beyond 256 would be off by a pixel.
    """
    count, channels, height, width = features.shape
    flow = torch.where(flow == flow, flow, FAR).clamp(min=-FAR, max=FAR)  # NaN is outside: an index must be one
    whole = flow.floor()
    right_share, down_share = (flow - whole)[..., None].unbind(1)
    rows, columns = (torch.arange(side, device=flow.device) for side in (height, width))
    left, top = whole.long().unbind(1)
    left, top = (left + columns).clamp(min=-2, max=width), (top + rows[:, None]).clamp(min=-2, max=height)
    wide = width + 4
    table = F.pad(features, (2, 2, 2, 2)).permute(0, 2, 3, 1).reshape(-1, channels)
    first = (torch.arange(count, device=flow.device) * ((height + 4) * wide))[:, None, None]
    index = (first + (top + 2) * wide + left + 2).flatten()

    def pixels(offset: int) -> Tensor:
        return table.index_select(0, index + offset).reshape(count, height, width, channels)

    left_share, up_share = 1 - right_share, 1 - down_share
    upper = pixels(0) * (left_share * up_share) + pixels(1) * (right_share * up_share)
    lower = pixels(wide) * (left_share * down_share) + pixels(wide + 1) * (right_share * down_share)
    return (upper + lower).permute(0, 3, 1, 2)


def all_pairs(features1: Tensor, features2: Tensor, levels: int, memory_limit: int = 0) -> AllPairs:
    """Returns what `ops.all_pairs.all_pairs` defines; all correlations are stored.

    The coarser volumes are products with averaged features, which is the same and less to compute.
    """
    pyramid = pooled(features1, features2, levels)
    first = pyramid.features1.flatten(2).mT
    volumes = [(first @ scale.flatten(2)).unflatten(2, scale.shape[-2:]) for scale in pyramid.features2]
    return pyramid._replace(volumes=tuple(volumes))


def lookup(pyramid: AllPairs, positions: Tensor, radius: int) -> Tensor:
    """Returns what `ops.all_pairs.lookup` defines, [N, K, H, W].

    All taps of a window share the fractional part of its position: (2 radius + 2)^2 correlations at whole pixels are
    gathered and blended along y, then along x. What lies outside has the weight 0.
    """
    count, _, height, width = positions.shape
    centers = torch.where(positions == positions, positions, -1e6).flatten(2).mT.reshape(-1, 2)
    windows = []
    for level, volume in enumerate(pyramid.volumes or ()):
        rows, columns = volume.shape[2:]
        corners = centers / 2**level - radius
        left, left_shares, right_shares = _taps(corners[:, 0], columns, 2 * radius + 2)
        top, up_shares, down_shares = _taps(corners[:, 1], rows, 2 * radius + 2)
        index = (top[:, :, None] * columns + left[:, None, :]).flatten(1)
        values = volume.reshape(-1, rows * columns).gather(1, index).unflatten(1, (2 * radius + 2, 2 * radius + 2))
        values = values[:, :-1] * up_shares[:, :, None] + values[:, 1:] * down_shares[:, :, None]
        values = values[:, :, :-1] * left_shares[:, None] + values[:, :, 1:] * right_shares[:, None]
        windows.append(values.mT.flatten(1))
    return torch.cat(windows, 1).reshape(count, height * width, -1).mT.reshape(count, -1, height, width)


def _taps(at: Tensor, size: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the whole positions [P, side] from `at` [P] on, kept inside, and the shares of neighbors [P, side - 1]."""
    at = at.clamp(min=-side, max=size)  # farther out, a window is empty wherever it is
    whole = at.floor()
    share = (at - whole)[:, None]
    taps = whole.long()[:, None] + torch.arange(side, device=at.device)
    known = ((taps >= 0) & (taps < size)).to(at.dtype)
    return taps.clamp(min=0, max=size - 1), (1 - share) * known[:, :-1], share * known[:, 1:]


def _rows(frame: Tensor) -> Tensor:
    """A frame [N, C, H, W] as [N, 1, H, W C], the numbers as they lie in a picture."""
    return frame.permute(0, 2, 3, 1).flatten(2)[:, None]


def mean_color(frame1: Tensor, frame2: Tensor) -> Tensor:
    """Returns what `ops.subtract_mean.mean_color` defines, [N, C, 1, 1]: means of columns, then their mean, corrected once.

    Runtimes add up numbers one by one in float32. All pixels of 128x192 at once are off by 5e-6 of the sum, which moved a
    flow of FastFlowNet by 0.05 px; the mean of what is left after subtracting a mean corrects it.
    """
    count, channels, _, width = frame1.shape
    columns = [_rows(frame).mean((1, 2)).reshape(count, width, channels) for frame in (frame1, frame2)]
    columns = (columns[0] + columns[1]) / 2
    mean = columns.mean(1, keepdim=True)
    return (mean + (columns - mean).mean(1, keepdim=True)).reshape(count, channels, 1, 1)


def less_mean(frame: Tensor, mean: Tensor) -> Tensor:
    """Returns what `ops.subtract_mean.subtract_mean` defines, in rows of numbers, which need no other layout."""
    count, channels, height, width = frame.shape
    rows = _rows(frame) - mean.reshape(-1, 1, 1, channels).repeat(1, 1, 1, width)
    return rows.reshape(count, height, width, channels).permute(0, 3, 1, 2)


def seen_before(frame1: Tensor, frame2: Tensor, prediction: Prediction) -> Prediction:
    """In place of `models.base._still`: graphs look at the bytes of pictures (`graph.shows_no_motion`)."""
    return prediction


def resize(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns what `ops.resize.resize` defines.

    A flow enlarged FOURFOLD is a convolution that writes the 16 pixels that come from one, as they lie in memory: an
    eighth of the time.
    """
    height, width = picture.shape[2:]
    known = all(isinstance(side, int) for side in (height, width, *size))
    if not known or picture.shape[1] > 2 or tuple(size) != (FOURFOLD * height, FOURFOLD * width):
        return F.interpolate(picture, size=tuple(size), mode="bilinear", align_corners=False)
    taps = torch.zeros(FOURFOLD, 3)  # shares of the pixel before, the pixel itself and the pixel behind
    for k in range(FOURFOLD):
        offset = (k + 0.5) / FOURFOLD - 0.5
        taps[k] = torch.tensor([max(-offset, 0), 1 - abs(offset), max(offset, 0)])
    kernel = taps[:, None, None, None, :, None] * taps[None, :, None, None, None, :]  # [y, x, to, from, 3, 3]
    kernel = kernel * torch.eye(picture.shape[1])[:, :, None, None]
    count, channels = picture.shape[:2]
    wide = F.pad(picture, (1, 1, 1, 1), mode="replicate")
    found = F.conv2d(wide, kernel.flatten(0, 2).to(picture)).permute(0, 2, 3, 1)
    found = _moved(found.reshape(count, height, width, FOURFOLD, FOURFOLD * channels), 0, 1, 3, 2, 4)
    return found.reshape(count, *size, channels).permute(0, 3, 1, 2)


FORMS: dict[Callable, Callable] = {
    correlation.local_correlation: local_correlation,
    dilated_correlation.dilated_correlation: dilated_correlation_form,
    warp.warp: warp_form,
    pairs.all_pairs: all_pairs,
    pairs.lookup: lookup,
    subtract_mean.mean_color: mean_color,
    subtract_mean.subtract_mean: less_mean,
    resizing.resize: resize,
    base._still: seen_before,
}


@contextmanager
def for_runtimes() -> Iterator[None]:
    """Runs the block with these forms in place of the operators, in every module of fleetflow that has imported them.

    For one thread: other threads see the forms, too, which compute the same.
    """
    forms, changed = {id(definition): form for definition, form in FORMS.items()}, []
    for name, module in list(sys.modules.items()):
        if name.startswith("fleetflow.") and module is not sys.modules[__name__]:
            for attribute, value in list(vars(module).items()):
                if id(value) in forms:
                    changed.append((module, attribute, value))
                    setattr(module, attribute, forms[id(value)])
    try:
        yield
    finally:
        for module, attribute, value in changed:
            setattr(module, attribute, value)
