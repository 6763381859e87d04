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

from fleetflow.ops import all_pairs as pairs
from fleetflow.ops import correlation, dilated_correlation, subtract_mean, warp
from fleetflow.ops.all_pairs import AllPairs, pooled

BLOCK = 16  # pixels of a row that share one matrix product; of 8, 16, 32 and 64 the fastest in both runtimes


def _correlations(features1: Tensor, features2: Tensor, reach: int, stride: int) -> Tensor:
    """Returns [N, side^2, H, W]: means over channels for all displacements from -reach to reach, `stride` apart.

    A block of BLOCK pixels of a row is multiplied with the BLOCK + 2 reach pixels around it in each row of frame2. In
    the product [BLOCK, width] pixel t finds its displacements at t, t + stride, ...: padded by BLOCK numbers and read
    as rows that are one longer, they stand at 0, stride, ... for every pixel.
    """
    count, channels, height, width = features1.shape
    blocks = (width + BLOCK - 1) // BLOCK
    more = blocks * BLOCK - width
    tails = -(-2 * reach // BLOCK)  # blocks that hold what lies to the right of a block's own pixels
    first = F.pad(features1 / channels, (0, more)).permute(0, 2, 3, 1).reshape(count, height, blocks, BLOCK, channels)
    second = F.pad(features2, (reach, more + tails * BLOCK - reach, reach, reach)).permute(0, 2, 3, 1)
    second = second.reshape(count, height + 2 * reach, blocks + tails, BLOCK, channels)
    parts = [second[:, :, k : k + blocks] for k in range(tails + 1)]
    parts[-1] = parts[-1][:, :, :, : 2 * reach - (tails - 1) * BLOCK]
    around = torch.cat(parts, 3).mT  # [N, H + 2 reach, blocks, C, BLOCK + 2 reach]
    wide = BLOCK + 2 * reach
    rows = []
    for down in range(0, 2 * reach + 1, stride):
        product = (first @ around[:, down : down + height]).flatten(3)
        skewed = F.pad(product, (0, BLOCK)).reshape(count, height, blocks, BLOCK, wide + 1)
        rows.append(skewed[..., : 2 * reach + 1 : stride])
    volume = torch.cat(rows, 4).permute(0, 4, 1, 2, 3)
    return volume.reshape(count, -1, height, blocks * BLOCK)[..., :width]


def local_correlation(features1: Tensor, features2: Tensor, radius: int, keep: Sequence[int] | None = None) -> Tensor:
    """Returns what `ops.correlation.local_correlation` defines, [N, K, H, W]."""
    volume = _correlations(features1, features2, radius, 1)
    return volume if keep is None else volume.index_select(1, torch.tensor(list(keep)))


def dilated_correlation_form(features1: Tensor, features2: Tensor, radius: int, stride: int) -> Tensor:
    """Returns what `ops.dilated_correlation.dilated_correlation` defines, [N, K, H, W]."""
    return _correlations(features1, features2, radius // stride * stride, stride)


def warp_form(features: Tensor, flow: Tensor) -> Tensor:
    """Returns what `ops.warp.warp` defines, [N, C, H, W]: four gathers of pixels, whose channels lie side by side.

    A border of zeros, one pixel before and two behind, stands for all that is outside of the picture.
    """
    count, channels, height, width = features.shape
    x, y = (warp.pixel_grid(height, width, flow) + flow).unbind(1)
    x, y = (torch.where(at == at, at, -1.0) for at in (x, y))  # NaN is outside: an index must be one
    x, y = x.clamp(min=-1, max=width), y.clamp(min=-1, max=height)
    left, top = x.floor(), y.floor()
    right_share, down_share = (x - left)[..., None], (y - top)[..., None]
    wide = width + 3
    table = F.pad(features, (1, 2, 1, 2)).permute(0, 2, 3, 1).reshape(-1, channels)
    first = (torch.arange(count, device=features.device) * ((height + 3) * wide))[:, None, None]
    index = (first + (top.long() + 1) * wide + left.long() + 1).flatten()

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
    for level, volume in enumerate(pyramid.volumes):
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


def mean_color(frame1: Tensor, frame2: Tensor) -> Tensor:
    """Returns what `ops.subtract_mean.mean_color` defines, [N, C, 1, 1]: means of rows, then their mean.

    ONNX Runtime adds up all pixels one by one in float32; at 128x192 the sum is off by 5e-6 of itself already, which
    moved a flow of FastFlowNet by 0.05 px.
    """
    first, second = (frame.mean(3, keepdim=True).mean(2, keepdim=True) for frame in (frame1, frame2))
    return (first + second) / 2


FORMS: dict[Callable, Callable] = {
    correlation.local_correlation: local_correlation,
    dilated_correlation.dilated_correlation: dilated_correlation_form,
    warp.warp: warp_form,
    pairs.all_pairs: all_pairs,
    pairs.lookup: lookup,
    subtract_mean.mean_color: mean_color,
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
