"""Moving a sample: frames, flow, validity and occlusion under one affine map for each frame.

A map is float64 [N, 3, 3] on the CPU and takes a pixel (x, y, 1) of the new frame to the old one, of which it is
sampled; centers of pixels lie on whole numbers. With maps A1 and A2, new pixel p shows old pixel A1 p of frame1, which
moves to A1 p + flow, and that is shown at A2^-1 (A1 p + flow) of the new frame2. So the new flow has no error but that
of sampling the old one.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.data.augment.dice import Dice
from fleetflow.ops.warp import pixel_grid
from fleetflow.types import FleetflowError, Sample, size_of

EDGE = 0.25  # square pixels: where flows that are mixed vary by more, a motion boundary lies between them
TRIES = 50  # draws of a transform until both windows lie inside the old frames


class Affine(NamedTuple):
    """Ranges of a random transform about the center of the frame."""

    translate: float = 0.0  # largest shift to each side, as a share of width and height
    zoom: tuple[float, float] = (1.0, 1.0)  # over 1 enlarges
    squeeze: tuple[float, float] = (1.0, 1.0)  # width is multiplied by it, height divided
    rotate: float = 0.0  # largest angle to each side, degrees


def resample(sample: Sample, map1: Tensor, map2: Tensor, size: tuple[int, int]) -> Sample:
    """Returns the sample seen through map1 (frame1, flow, validity, occlusion) and map2 (frame2, backward flow).

    Args:
        size: (height, width) of the new frames. Frames are bilinear, edge pixels repeated. The flow is bilinear, too,
            but takes the nearest pixel across a motion boundary, so that no flow appears that nothing has. A new pixel
            is valid where it lies in the old frame and all pixels that it is made from were; occluded also where it
            leaves frame2.
    """
    near, far = _Points(map1, map2, sample, size), _Points(map2, map1, sample, size)
    masks = [sample.valid] if sample.occluded is None else [sample.valid, sample.occluded]
    flow, frame1, masks = near.move(
        torch.where(sample.valid[:, None], sample.flow, 0), sample.frame1, torch.stack(masks, 1).to(sample.flow.dtype)
    )
    valid = (masks[:, 0] > 1 - 1e-4) & near.inside
    if sample.backward is None:
        backward, frame2 = None, far.sample(sample.frame2)
    else:
        backward, frame2 = far.move(sample.backward, sample.frame2)
        backward = torch.where(far.inside[:, None], backward, 0)
    new = Sample(frame1, frame2, torch.where(valid[:, None], flow, 0), valid, backward)
    return new if sample.occluded is None else new._replace(occluded=(masks[:, 1] > 0.5) | leaving(new))


def scatter(sample: Sample, map1: Tensor, map2: Tensor, size: tuple[int, int]) -> Sample:
    """Returns what `resample` does, but every known pixel of sparse truth is carried to the nearest new pixel.

    Bilinear sampling would lose lone pixels, as KITTI's are. Where two meet, the later in reading order stays, as in
    RAFT's code (arXiv 2003.12039). The truth of a pixel is then off by at most half a pixel in place, not in length.
    """
    count, _, height, width = sample.flow.shape
    moved = resample(sample, map1, map2, size)
    old = pixel_grid(height, width, sample.flow).expand(count, -1, -1, -1)
    new = apply(map1.inverse(), old)
    flow = apply(map2.inverse(), old + torch.where(sample.valid[:, None], sample.flow, 0)) - new
    x, y = new.round().unbind(1)
    kept = sample.valid & (x >= 0) & (y >= 0) & (x < size[1]) & (y < size[0])
    area = size[0] * size[1]
    place = torch.arange(count, device=x.device)[:, None, None] * area + (y * size[1] + x).long()
    source = torch.arange(kept.numel(), device=x.device).view_as(kept)
    winner = torch.full((count * area,), -1, dtype=torch.long, device=x.device)
    winner = winner.scatter_reduce(0, place[kept], source[kept], "amax").view(count, *size)
    valid = winner >= 0
    flat = flow.permute(0, 2, 3, 1).reshape(-1, 2)[winner.clamp(min=0)].permute(0, 3, 1, 2)
    moved = moved._replace(flow=torch.where(valid[:, None], flat, 0), valid=valid)
    return moved if moved.occluded is None else moved._replace(occluded=moved.occluded | leaving(moved))


def crop(sample: Sample, generator: torch.Generator, size: tuple[int, int]) -> Sample:
    """Returns a random window of each sample, of size (height, width); raises FleetflowError for smaller frames."""
    dice = Dice(generator, sample.flow)
    x, y = window(sample, dice, size)
    corners = [(int(left), int(top)) for left, top in zip(x, y)]

    def cut(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return torch.stack(
            [part[..., top : top + size[0], left : left + size[1]] for part, (left, top) in zip(tensor, corners)]
        )

    new = Sample._make(map(cut, sample))
    new = new._replace(flow=torch.where(new.valid[:, None], new.flow, 0))
    return new if new.occluded is None else new._replace(occluded=new.occluded | leaving(new))


def random_affine(
    sample: Sample,
    dice: Dice,
    size: tuple[int, int],
    *,
    both: Affine,
    second: Affine,
    mirror: tuple[float, float] = (0.0, 0.0),
    sparse: bool = False,
) -> Sample:
    """Returns a random window of the sample under a transform of both frames, and one more of frame2 alone.

    Args:
        size: (height, width) of the window, not larger than the frames.
        both, second: their ranges.
        mirror: probabilities of a mirror image to the side and upside down.
        sparse: carry the truth as `scatter` does.

    Raises:
        FleetflowError: For frames smaller than the window.
    """
    old = size_of(sample.flow)
    return place(
        sample,
        dice,
        size,
        both=lambda tries: _draw(dice, both, old, tries),
        second=lambda tries: _draw(dice, second, old, tries),
        mirror=mirror,
        sparse=sparse,
    )


def place(
    sample: Sample,
    dice: Dice,
    size: tuple[int, int],
    *,
    both: Callable[[int], Tensor],
    second: Callable[[int], Tensor],
    mirror: tuple[float, float] = (0.0, 0.0),
    sparse: bool = False,
) -> Sample:
    """Returns what `random_affine` does, for transforms that are drawn by functions.

    Args:
        both, second: number of tries -> maps [N, tries, 3, 3] from old to new, about the center of the frame. The first
            try whose windows lie inside both old frames is taken, and where none does the one that sticks out least;
            validity says where.
    """
    old = size_of(sample.flow)
    shift = translation(*window(sample, dice, size))[:, None]
    first = around(old, both(TRIES))
    map1, map2 = first.inverse() @ shift, (around(old, second(TRIES)) @ first).inverse() @ shift
    beyond = _beyond(map1, sample, size) + _beyond(map2, sample, size)
    best = (beyond + torch.arange(TRIES) * 1e-9).argmin(1)
    rows = torch.arange(dice.count)
    mirrored = flips(dice, size, *mirror)
    return (scatter if sparse else resample)(sample, map1[rows, best] @ mirrored, map2[rows, best] @ mirrored, size)


def flips(dice: Dice, size: tuple[int, int], horizontal: float, vertical: float) -> Tensor:
    """Returns maps [N, 3, 3] that mirror a frame of size (height, width) with these probabilities."""
    sign_x, sign_y = (1 - 2 * dice.chance(p).double() for p in (horizontal, vertical))
    return around(size, scaling(sign_x, sign_y))


def window(sample: Sample, dice: Dice, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns a random corner (left, top), each [N], of a window; raises FleetflowError for smaller frames."""
    height, width = sample.flow.shape[-2:]
    if height < size[0] or width < size[1]:
        raise FleetflowError(
            f"frames are {height}x{width}, smaller than the crop {size[0]}x{size[1]}; set height= and width="
        )
    top = dice.whole(0, height - size[0])
    return dice.whole(0, width - size[1]), top


def leaving(sample: Sample) -> Tensor:
    """Returns [N, H, W] bool: known pixels of frame1 that move out of frame2."""
    return sample.valid & ~_inside(pixel_grid(*size_of(sample.flow), sample.flow) + sample.flow, sample.flow)


def apply(maps: Tensor, points: Tensor) -> Tensor:
    """Returns the points [N, 2, H, W] (x, y) under maps [N, 3, 3], on the points' device."""
    maps = maps.to(points)[:, :2, :, None, None]
    return maps[:, :, 0] * points[:, :1] + maps[:, :, 1] * points[:, 1:] + maps[:, :, 2]


def translation(x: Tensor, y: Tensor) -> Tensor:
    """Returns maps [..., 3, 3] that add (x, y)."""
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return _matrix(one, zero, x, zero, one, y)


def scaling(x: Tensor, y: Tensor) -> Tensor:
    """Returns maps [..., 3, 3] that multiply by (x, y)."""
    zero = torch.zeros_like(x)
    return _matrix(x, zero, zero, zero, y, zero)


def rotation(degrees: Tensor) -> Tensor:
    """Returns maps [..., 3, 3] that turn clockwise as seen on the screen (y points downwards)."""
    angle = degrees.deg2rad()
    zero = torch.zeros_like(angle)
    return _matrix(angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero)


def around(size: tuple[int, int], maps: Tensor) -> Tensor:
    """Returns the maps [..., 3, 3], applied about the center of a frame of size (height, width)."""
    x, y = (torch.full(maps.shape[:-2], (n - 1) / 2, dtype=maps.dtype) for n in reversed(size))
    return translation(x, y) @ maps @ translation(-x, -y)


class _Points:
    """Where the new pixels of one frame lie in its old frame, and what is read there."""

    def __init__(self, own: Tensor, other: Tensor, sample: Sample, size: tuple[int, int]):
        count, _, height, width = sample.flow.shape
        self.new = pixel_grid(*size, sample.flow).expand(count, -1, -1, -1)
        self.old = apply(own, self.new)
        self.back = other.inverse()
        self.inside = _inside(self.old, sample.flow)
        scale = self.old.new_tensor((2 / max(width - 1, 1), 2 / max(height - 1, 1)))
        self.grid = self.old.permute(0, 2, 3, 1) * scale - 1

    def sample(self, planes: Tensor, mode: str = "bilinear") -> Tensor:
        """Returns the planes [N, C, H, W] at the old places of the new pixels."""
        return F.grid_sample(planes, self.grid, mode=mode, padding_mode="border", align_corners=True)

    def move(self, flow: Tensor, *planes: Tensor) -> tuple[Tensor, ...]:
        """Returns the new flow, and other planes [N, C, H, W] at the old places of the new pixels."""
        square = flow.square().sum(1, keepdim=True)
        smooth, square, *others = self.sample(torch.cat((flow, square, *planes), 1)).split(
            (2, 1, *(part.shape[1] for part in planes)), 1
        )
        variance = square - smooth.square().sum(1, keepdim=True)
        smooth = torch.where(variance > EDGE, self.sample(flow, "nearest"), smooth)
        return apply(self.back, self.old + smooth) - self.new, *others


def _draw(dice: Dice, ranges: Affine, size: tuple[int, int], tries: int) -> Tensor:
    """Random maps [N, tries, 3, 3] from old to new, about the center of a frame of size (height, width)."""
    zoom, squeeze = dice.uniform(*ranges.zoom, tries), dice.uniform(*ranges.squeeze, tries)
    turned = rotation(dice.uniform(-ranges.rotate, ranges.rotate, tries)) @ scaling(zoom * squeeze, zoom / squeeze)
    x, y = (dice.uniform(-ranges.translate, ranges.translate, tries) * n for n in reversed(size))
    return translation(x, y) @ turned


def _beyond(maps: Tensor, sample: Sample, size: tuple[int, int]) -> Tensor:
    """How far, in pixels, the corners of the new frame stick out of the old one: [N, TRIES] for maps of that shape."""
    height, width = sample.flow.shape[-2:]
    right, bottom = size[1] - 1.0, size[0] - 1.0
    corners = torch.tensor([[0, right, 0, right], [0, 0, bottom, bottom], [1, 1, 1, 1]], dtype=maps.dtype)
    x, y = (maps @ corners)[..., :2, :].unbind(-2)
    across, along = (torch.relu(-p).amax(-1) + torch.relu(p - n + 1).amax(-1) for p, n in ((x, width), (y, height)))
    return across + along


def _inside(points: Tensor, frame: Tensor) -> Tensor:
    """Whether points [N, 2, h, w] lie on a pixel of the frame [N, C, H, W]."""
    height, width = frame.shape[-2:]
    x, y = points.unbind(1)
    return (x > -0.501) & (y > -0.501) & (x < width - 0.499) & (y < height - 0.499)


def _matrix(*rows: Tensor) -> Tensor:
    one, zero = torch.ones_like(rows[0]), torch.zeros_like(rows[0])
    return torch.stack((*rows, zero, zero, one), -1).unflatten(-1, (3, 3))
