"""What pictures show of a motion that a network found in them: noise and plain surfaces have flows, too.

A motion is shown where pictures are more alike once it is taken back than as they are, and than moved the other way:
reading between pixels smooths noise, which makes pictures likelier in both directions.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from fleetflow.motion.camera import fit_similarity
from fleetflow.ops.warp import inside, pixel_grid, warp

SMOOTH = ImageFilter.BoxBlur(1)
NEARBY = 16  # pixels around a place whose mean is its brightness
TEXTURE, LEAST = 1.5, 0.1  # levels of gray a pixel that count as half a texture; weight of a pixel that has none
EDGE, MIDDLE = 0.15, 0.3  # share of the picture that is near its edges; weight of what is not
STEP = 6  # of the pixels that a fit looks at
# How much less pictures must differ once a motion is taken back: the whole picture, and places. Chosen on generated
# clips, split=validation.
SHOWN, BESIDE = 0.02, 0.05
AROUND, CAPPED = 7, 20.0  # pixels around a place; levels of gray that a difference counts at most
CHAINED = 3  # pairs over which what moves beside the camera is followed: noise does not go on, motion does
NOISE = 0.15  # pixels between two pictures: what is under it counts as no motion


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

    What has texture says most of it, and what is near the edges of the picture, where seldom anything else moves.

    Args:
        flows: [T - 1, 2, h, w] pixels from each picture to the next.
        planes: [T, 1, h, w] of `contrasts`.
    """
    weights = _weights(planes[:-1]).numpy()
    fits = [fit_similarity(flow, each, STEP) for flow, each in zip(flows.permute(0, 2, 3, 1).numpy(), weights)]
    return fits if _is_shown(affine_flows(fits, flows.shape[2:]), planes) else [np.eye(3) for _ in fits]


def affine_flows(matrices: Sequence[np.ndarray], size: tuple[int, ...]) -> Tensor:
    """Returns the flows [N, 2, h, w] of N affine motions [3, 3] of pictures of a size (h, w)."""
    each = torch.from_numpy(np.stack(matrices)).float()
    grid = pixel_grid(size[0], size[1], each)
    return torch.einsum("nij,jhw->nihw", each[:, :2, :2], grid) + each[:, :2, 2, None, None] - grid


def moved_beside(flows: Tensor, cameras: Sequence[np.ndarray], planes: Tensor) -> Tensor:
    """Returns [T - 1, 2, h, w] pixels: the parts of the flows beside the camera's that the pictures show, 0 elsewhere.

    Told place by place from what a pixel does over CHAINED pairs, by all of them together, those that move most there
    before others, and by each. Arguments as of `fit_cameras`.
    """
    pairs, size = len(flows), flows.shape[2:]
    count = min(CHAINED, pairs)
    starts = pairs - count + 1
    whole, turned = flows[:starts], list(cameras[:starts])
    for k in range(1, count):
        whole = whole + warp(flows[k : k + starts], whole)
        turned = [later @ before for later, before in zip(cameras[k:], turned)]
    camera = affine_flows(turned, size)
    beside = whole - camera
    length = beside.norm(dim=1, keepdim=True)
    first, last = planes[:starts], planes[count:]
    back, still, away = (
        blurred(_apart(first, warp(last, way)), AROUND) for way in (camera + beside, camera, camera - beside)
    )
    weight = length.clamp(max=1)
    all_back, all_still, all_away = (
        blurred((weight * each).mean(0, keepdim=True), AROUND) for each in (back, still, away)
    )
    somewhere = all_back < (1 - BESIDE) * torch.minimum(all_still, all_away).clamp(min=0.02)  # levels of gray, weighted
    here = back < torch.minimum(still, away).clamp(min=0.3)
    found = beside / count * (here & somewhere & (length > NOISE * count))
    return found[[min(k, starts - 1) for k in range(pairs)]]


def blurred(planes: Tensor, radius: int) -> Tensor:
    """Returns the means [N, C, h, w] over squares of 2 radius + 1 pixels, as far as they are in the picture."""
    side = 2 * radius + 1
    down = F.avg_pool2d(planes, (side, 1), 1, (radius, 0), count_include_pad=False)  # two passes: a third of the time
    return F.avg_pool2d(down, (1, side), 1, (0, radius), count_include_pad=False)


def _weights(planes: Tensor) -> Tensor:
    """[N, h, w] how much the flow of each pixel says of the camera."""
    height, width = planes.shape[2:]
    right = F.pad((planes[..., 2:] - planes[..., :-2]) / 2, (1, 1))
    down = F.pad((planes[..., 2:, :] - planes[..., :-2, :]) / 2, (0, 0, 1, 1))
    strength = blurred(right**2 + down**2, 2)[:, 0]
    x, y = pixel_grid(height, width, planes)
    away = torch.minimum(torch.minimum(x, width - 1 - x) / width, torch.minimum(y, height - 1 - y) / height)
    return (LEAST + strength / (strength + TEXTURE**2)) * torch.where(away < EDGE, 1.0, MIDDLE)


def _is_shown(cameras: Tensor, planes: Tensor) -> bool:
    """Whether the pictures, all of them together, show the camera's motion."""
    first, last = planes[:-1], planes[1:]
    seen = (inside(cameras) & inside(-cameras))[:, None]
    as_it_is, back, away = (
        float(_apart(first, other)[seen].sum()) for other in (last, warp(last, cameras), warp(last, -cameras))
    )
    return back < (1 - SHOWN) * min(as_it_is, away)


def _apart(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs().clamp(max=CAPPED)
