"""RAFT's augmentation (arXiv 2003.12039, code), which GMA and DEQ-Flow share, for dense and for sparse truth."""

import torch
from torch import Tensor

from fleetflow.data.augment import color
from fleetflow.data.augment.dice import Dice
from fleetflow.data.augment.geometry import flips, resample, scaling, scatter, translation
from fleetflow.ops.warp import pixel_grid
from fleetflow.types import Sample


def raft(
    sample: Sample,
    generator: torch.Generator,
    size: tuple[int, int],
    *,
    scale: tuple[float, float] = (-0.2, 0.6),
    mirror: bool = True,
) -> Sample:
    """Returns the samples scaled, stretched, mirrored, cropped, changed in color, with boxes erased from frame2.

    Published: scaled with probability 0.8, each axis by 2^-0.2 to 2^0.2 more with probability 0.8; brightness,
    contrast, saturation 0.6 to 1.4, hue by 0.5/pi of the circle, with probability 0.2 apart for the two frames; with
    probability 0.5 one or two boxes of 50 to 100 px filled with the mean color. Ours: colors and boxes after the
    crop.

    Args:
        scale: range of the logarithm, to base 2, of the scale: Chairs (-0.1, 1.0), Things (-0.4, 0.8), Sintel, and
            Things together with Sintel, (-0.2, 0.6).
        mirror: to the side with probability 0.5, upside down 0.1.
    """
    dice = Dice(generator, sample.flow)
    scales = _scales(sample, dice, size, scale, stretch=0.2, margin=8)
    map_ = _map(sample, dice, size, scales, mirror=(0.5, 0.1) if mirror else (0.0, 0.0))
    sample = resample(sample, map_, map_, size)
    frames = color.jitter(color.pair(sample), dice, (0.4, 0.4, 0.4, 0.5 / torch.pi), apart=0.2)
    return erased(color.unpair(sample, frames), dice)


def raft_sparse(
    sample: Sample,
    generator: torch.Generator,
    size: tuple[int, int],
    *,
    scale: tuple[float, float] = (-0.2, 0.4),
    mirror: bool = False,
) -> Sample:
    """Returns the samples of sparse truth scaled, cropped, changed in color, with boxes erased from frame2.

    Published: scaled with probability 0.8, both axes alike; brightness, contrast, saturation 0.7 to 1.3, hue by 0.3/pi
    of the circle, the same for both frames; boxes as in `raft`; the crop is drawn from 50 px (20 px) beyond the frame
    and pushed back, so that its borders are often those of the frame. Ours: colors and boxes after the crop.

    Args:
        scale: range of the logarithm, to base 2, of the scale: KITTI alone (-0.2, 0.4), together with Sintel (-0.3,
            0.5), HD1K (-0.5, 0.2).
        mirror: to the side with probability 0.5: HD1K, and KITTI together with Sintel.
    """
    dice = Dice(generator, sample.flow)
    scales = _scales(sample, dice, size, scale, stretch=0.0, margin=1)
    map_ = _map(sample, dice, size, scales, mirror=(0.5 if mirror else 0.0, 0.0), beyond=(50, 20))
    sample = scatter(sample, map_, map_, size)
    frames = color.jitter(color.pair(sample), dice, (0.3, 0.3, 0.3, 0.3 / torch.pi))
    return erased(color.unpair(sample, frames), dice)


def erased(sample: Sample, dice: Dice, *, probability: float = 0.5, sides: tuple[int, int] = (50, 100)) -> Sample:
    """Returns the samples with one or two boxes of frame2 filled with its mean color; what they hide is occluded."""
    height, width = sample.flow.shape[-2:]
    grid = pixel_grid(height, width, sample.flow).expand(dice.count, -1, -1, -1)
    target = grid + sample.flow
    frame2, hidden = sample.frame2, torch.zeros_like(sample.valid)
    mean = frame2.mean((-2, -1), keepdim=True)
    some, second = dice.chance(probability), dice.chance(0.5)
    for use in (some, some & second):
        left, top = dice.whole(0, width - 1), dice.whole(0, height - 1)
        across, down = dice.whole(*sides), dice.whole(*sides)
        box = torch.stack((left, top, left + across, top + down)).masked_fill(~use, -1e9)[..., None, None].to(grid)

        def within(points: Tensor, box: Tensor = box) -> Tensor:
            x, y = points.unbind(1)
            return (x > box[0] - 0.5) & (y > box[1] - 0.5) & (x < box[2] - 0.5) & (y < box[3] - 0.5)

        frame2 = torch.where(within(grid)[:, None], mean, frame2)
        hidden = hidden | within(target)
    occluded = None if sample.occluded is None else sample.occluded | (hidden & sample.valid)
    return sample._replace(frame2=frame2, occluded=occluded)


def _scales(
    sample: Sample, dice: Dice, size: tuple[int, int], scale: tuple[float, float], *, stretch: float, margin: int
) -> Tensor:
    """Scales [N, 2] to the right and downwards, such that the crop and `margin` pixels more fit into the frame.

    The published code leaves one in five samples as it is and fails where those are smaller than the crop.
    """
    height, width = sample.flow.shape[-2:]
    least = torch.tensor(((size[1] + margin) / width, (size[0] + margin) / height), dtype=torch.float64)
    both = dice.uniform(*scale)[:, None]
    apart = dice.uniform(-stretch, stretch, 2) * dice.chance(0.8)[:, None]
    drawn = torch.maximum(2 ** (both + apart), least)
    fits = torch.tensor((size[1] / width, size[0] / height), dtype=torch.float64).clamp(min=1)
    return torch.where(dice.chance(0.8)[:, None], drawn, fits)


def _map(
    sample: Sample,
    dice: Dice,
    size: tuple[int, int],
    scales: Tensor,
    *,
    mirror: tuple[float, float],
    beyond: tuple[int, int] = (0, 0),
) -> Tensor:
    """The map from a random window of the scaled frame to the frame; edges of frames, not centers, stay in place."""
    corner = []
    for axis in (0, 1):
        full = (sample.flow.shape[-1 - axis] * scales[:, axis] + 1e-6).floor()
        spare = (full - size[1 - axis]).clamp(min=0)
        drawn = dice.whole(-beyond[axis], spare + beyond[axis] * (axis == 0))
        corner.append(torch.minimum(drawn.clamp(min=0), spare))
    half = torch.full_like(corner[0], 0.5)
    edges = translation(-half, -half) @ scaling(*(1 / scales).unbind(1)) @ translation(half, half)
    return edges @ translation(*corner) @ flips(dice, size, *mirror)
