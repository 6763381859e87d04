"""Pans, zooms and rolls of whole pictures, found in the pictures themselves, from those that flows have on.

A flow is a little off everywhere, on plain or dark ground by more; over a whole picture four numbers can be told better.
Least squares of brightness after Lucas and Kanade (1981), with the mean of both pictures' gradients and the weights of
Geman and McClure, so that what moves by itself says little.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.motion.camera import affine_flows, similarity
from fleetflow.ops.warp import inside, pixel_grid, warp

CAPPED = 20.0  # levels of gray that a difference counts at most
SIDE, STEPS = 2, 5  # pixels of a side that are taken together, and so many steps
FURTHEST = 4.0  # of these pixels that a pan, zoom and roll each go in a step, at most, at the left and right side
FEWEST = 4000  # pixels that must be seen: to fewer, four numbers can be fitted by chance
SCALE, LEAST = 1.5, 0.3  # of the median difference at which a pixel counts a quarter, and levels of gray at least
LIKELIER = 0.05  # share by which pictures must be more alike. Chosen on generated clips, split=validation.


def aligned(
    motions: Sequence[np.ndarray], first: Tensor, last: Tensor, places: Tensor | None = None
) -> list[np.ndarray]:
    """Returns for each pair of pictures the motion [3, 3] that makes them most alike, near the one that is given.

    Those under which they are not clearly more alike stay as they are.

    Args:
        motions: N pans, zooms and rolls, [3, 3] from the first picture to the last.
        first: [N, 1, h, w] levels of gray, without what a drifting exposure does.
        last: as `first`.
        places: bool [N, 1, h, w], where in the first pictures to look; None: everywhere.
    """
    seen = torch.ones_like(first) if places is None else places.float()
    size = [side // SIDE * SIDE for side in first.shape[2:]]  # of what is left when it is made smaller
    found = _parameters(motions, size)
    smaller = [F.avg_pool2d(each, SIDE) for each in (first, last, seen)]
    for _ in range(STEPS):
        found = _step(found, *smaller)
    better = [similarity(each, size) for each in found.tolist()]
    ways = [affine_flows(each, first.shape[2:]) for each in (motions, better)]
    looked = seen * (inside(ways[0]) & inside(ways[1]))[:, None]
    before, after = ((apart(first, warp(last, way)) * looked).sum((1, 2, 3)) for way in ways)
    likelier = (after < (1 - LIKELIER) * before) & (looked.sum((1, 2, 3)) >= FEWEST)
    return [new if likely else old for new, old, likely in zip(better, motions, likelier)]


def apart(one: Tensor, other: Tensor) -> Tensor:
    """Returns how many levels of gray pictures differ, up to CAPPED."""
    return (one - other).abs().clamp(max=CAPPED)


def gradients(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Returns [N, 1, h, w] levels of gray a pixel to the right, and down."""
    right = F.pad((pictures[..., 2:] - pictures[..., :-2]) / 2, (1, 1))
    down = F.pad((pictures[..., 2:, :] - pictures[..., :-2, :]) / 2, (0, 0, 1, 1))
    return right, down


def _parameters(motions: Sequence[np.ndarray], size: Sequence[int]) -> Tensor:
    """[N, 4] float64 of motions [3, 3]: how much they grow and turn, and where the middle of the picture goes."""
    each = torch.from_numpy(np.stack(motions))
    middle = torch.tensor([(size[1] - 1) / 2, (size[0] - 1) / 2], dtype=each.dtype)
    pan = each[:, :2, :2] @ middle + each[:, :2, 2] - middle
    return torch.cat((each[:, :1, 0] - 1, each[:, 1:2, 0], pan), 1)


def _step(found: Tensor, first: Tensor, last: Tensor, seen: Tensor) -> Tensor:
    """`found` [N, 4] after a step of Gauss and Newton, on pictures made smaller by SIDE."""
    height, width = first.shape[2:]
    x, y = pixel_grid(height, width, first)
    x, y = x - (width - 1) / 2, y - (height - 1) / 2
    grow, turn, right, down = found.float().T[..., None, None]
    way = torch.stack((grow * x - turn * y + right / SIDE, turn * x + grow * y + down / SIDE), 1)
    moved = warp(torch.cat((last, *gradients(last)), 1), way)
    to_right, to_down = (torch.stack(gradients(first)) + moved[:, 1:].transpose(0, 1)[:, :, None]) / 2
    missed = moved[:, :1] - first
    scale = (SCALE * missed.abs().flatten(1)[:, ::7].median(1).values).clamp(min=LEAST)[:, None, None, None]
    weight = seen * inside(way)[:, None] / (1 + (missed / scale) ** 2) ** 2
    half = width / 2  # so that all four are told about as well
    slopes = (to_right * x + to_down * y) / half, (to_down * x - to_right * y) / half, to_right, to_down
    design = torch.stack([each.flatten(1) for each in slopes], 2)
    weighted = (design * weight.flatten(1)[..., None]).transpose(1, 2)
    square = (weighted @ design).double()
    damping = (1e-3 * square.diagonal(dim1=1, dim2=2).mean(1) + 1e-6)[:, None, None] * torch.eye(4, dtype=found.dtype)
    change = -torch.linalg.solve(square + damping, (weighted @ missed.flatten(1)[..., None]).double())[..., 0]
    return found + change.clamp(-FURTHEST, FURTHEST) * found.new_tensor((1 / half, 1 / half, SIDE, SIDE))
