"""What pictures show of a motion that a network found in them: noise and plain surfaces have flows, too.

A motion is shown where pictures are more alike once it is taken back than as they are, and than moved the other way:
reading between pixels smooths noise, which makes pictures likelier in both directions. Cameras are fitted to the pictures, too
(`aligned`), so for them "than as they are" says little, and "than moved the other way" the most.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from fleetflow.motion.alignment import aligned, apart, gradients
from fleetflow.motion.camera import affine_flows, fit_similarity
from fleetflow.motion.layers import NEARBY, SHOWN, STEP, followed, is_shown, motion_behind
from fleetflow.ops.warp import inside, pixel_grid, warp

SMOOTH = ImageFilter.BoxBlur(1)
# Levels of gray a pixel, over noise, that count as half a texture, and the most that is noise; weight of no texture.
TEXTURE, LEAST = 1.5, 0.02
EDGE, MIDDLE = 0.15, 0.3  # share of the picture that is near its edges; weight of what is not
BESIDE = 0.05  # how much less places must differ once a motion is taken back; chosen on split=validation, like the rest
LONG = 8  # pairs over which a camera is followed that a pair alone does not show: a slow one, or one in noise
STAYS = 0.25  # share of what moves around a place that must stay in the picture
AROUND = 13  # pixels around a place
CHAINED = 3  # pairs over which what moves beside the camera is followed: noise does not go on, motion does
NOISE = 0.2  # pixels between two pictures: what is under it counts as no motion


def contrasts(pictures: Sequence[np.ndarray]) -> Tensor:
    """Returns [T, 1, h, w] levels of gray over the mean nearby, so that a drifting exposure shows no motion.

    Args:
        pictures: T times uint8 [h, w, 3].
    """
    gray = [np.asarray(Image.fromarray(each).convert("L").filter(SMOOTH), np.float32) for each in pictures]
    planes = torch.from_numpy(np.stack(gray))[:, None]
    return planes - blurred(planes, NEARBY)


def fit_cameras(flows: Tensor, planes: Tensor) -> list[np.ndarray]:
    """Returns the pan, zoom and roll of each flow, float64 [3, 3]; none at all, if the pictures do not show them.

    Where two pictures that follow each other do not, those LONG pairs apart may; then it is the mean over these. What has
    texture says most of it, and what is near the edges of the picture, where seldom anything else moves. What covers
    another motion is not the camera's (`motion_behind`).

    Args:
        flows: [T - 1, 2, h, w] pixels from each picture to the next.
        planes: [T, 1, h, w] of `contrasts`.
    """
    weights = (_textures(planes[:-1]) + LEAST)[:, 0]
    vectors = flows.permute(0, 2, 3, 1).numpy()
    fits = [fit_similarity(*each, STEP) for each in zip(vectors, (weights * _edges(planes)).numpy())]
    fits = aligned(fits, planes[:-1], planes[1:])
    cameras = [np.eye(3) for _ in fits]
    for count in (1, min(LONG, len(fits))):
        ways = affine_flows(followed(fits, count), flows.shape[2:])
        if is_shown(ways, planes, (inside(ways) & inside(-ways))[:, None], SHOWN):
            starts = [min(k, len(fits) - count) for k in range(len(fits))]
            cameras = [np.mean(fits[start : start + count], 0) for start in starts]
            break
    return motion_behind(cameras, fits, flows, planes, weights)


def moved_beside(flows: Tensor, cameras: Sequence[np.ndarray], planes: Tensor) -> Tensor:
    """Returns [T - 1, 2, h, w] pixels: the parts of the flows beside the camera's that the pictures show, 0 elsewhere.

    Told place by place from what a pixel does over CHAINED pairs, by all of them together, those that move most there
    before others, and by each. Where all around moves out of the picture nothing counts; in areas of one brightness the
    flow is believed.

    Arguments as of `fit_cameras`, and the fit of each flow, [3, 3].
    """
    pairs, size = len(flows), flows.shape[2:]
    count = min(CHAINED, pairs)
    starts = pairs - count + 1
    whole = flows[:starts]
    for k in range(1, count):
        whole = whole + warp(flows[k : k + starts], whole)
    camera = affine_flows(followed(cameras, count), size)
    beside = whole - camera
    length = torch.hypot(beside[:, :1], beside[:, 1:])
    first, last = planes[:starts], planes[count:]
    ways = (whole, camera, camera - beside)
    seen = torch.stack([inside(way) for way in ways]).all(0)[:, None]  # what leaves it speaks for no way
    back, still, away = (blurred(apart(first, warp(last, way)) * seen, AROUND) for way in ways)
    weight = length.clamp(max=1)
    all_back, all_still, all_away = (
        blurred((weight * each).mean(0, keepdim=True), AROUND) for each in (back, still, away)
    )
    somewhere = all_back < (1 - BESIDE) * torch.minimum(all_still, all_away).clamp(min=0.02)  # levels of gray, weighted
    here = back < torch.minimum(still, away).clamp(min=0.3)
    moves = length > NOISE * count
    stays = blurred((moves & seen).float(), AROUND) > STAYS * blurred(moves.float(), AROUND)
    found = beside / count * (here & somewhere & moves & stays)
    return found[[min(k, starts - 1) for k in range(pairs)]]


def blurred(planes: Tensor, radius: int) -> Tensor:
    """Returns the means [N, C, h, w] over squares of 2 radius + 1 pixels, as far as they are in the picture."""
    for axis in (2, 3):
        size = planes.shape[axis]
        place = torch.arange(size)
        first, last = (place - radius).clamp(min=0), (place + radius + 1).clamp(max=size)
        sums = torch.cat((torch.zeros_like(planes.narrow(axis, 0, 1)), planes.cumsum(axis)), axis)
        share = (1 / (last - first)).view((-1, 1) if axis == 2 else (-1,))
        planes = (sums.index_select(axis, last) - sums.index_select(axis, first)) * share
    return planes


def _textures(planes: Tensor) -> Tensor:
    """[N, 1, h, w] 0 to 1: how much of a texture each place has, over the noise of the picture."""
    right, down = gradients(planes)
    strength = blurred(right**2 + down**2, 2)
    noise = strength[..., ::3, ::3].flatten(1).median(1).values.clamp(max=TEXTURE**2)  # most of a plain picture
    strength = (strength - noise[:, None, None, None]).clamp(min=0)
    return strength / (strength + TEXTURE**2)


def _edges(planes: Tensor) -> Tensor:
    """[h, w] weights: places near the edges of the picture before others."""
    height, width = planes.shape[2:]
    x, y = pixel_grid(height, width, planes)
    away = torch.minimum(torch.minimum(x, width - 1 - x) / width, torch.minimum(y, height - 1 - y) / height)
    return torch.where(away < EDGE, 1.0, MIDDLE)
