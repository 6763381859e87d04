"""IRR-PWC's augmentation (arXiv 1904.05290, code), with which FastFlowNet is trained, too (arXiv 2103.04524)."""

import torch

from fleetflow.data.augment import color
from fleetflow.data.augment.dice import Dice
from fleetflow.data.augment.geometry import Affine, random_affine
from fleetflow.types import Sample

BOTH = Affine(translate=0.05, zoom=(1.0, 1.5), squeeze=(0.86, 1.16), rotate=11.46)  # 0.2 rad
SECOND = Affine(translate=0.00375, zoom=(0.985, 1.015), rotate=0.86)  # 0.015 rad
KITTI_BOTH = Affine(translate=0.01, zoom=(0.98, 1.02), rotate=0.57)  # 0.01 rad
KITTI_SECOND = Affine(translate=0.00125, zoom=(0.99, 1.01), rotate=0.57)
JITTER = (0.5, 0.5, 0.5, 0.5)


def irr(sample: Sample, generator: torch.Generator, size: tuple[int, int]) -> Sample:
    """Returns the samples of Chairs, Things or Sintel transformed, mirrored both ways, and changed in color.

    Published: shift by up to 5 %, zoom 1 to 1.5, squeeze 0.86 to 1.16, turn by 0.2 rad; frame2 alone by 0.375 %, 0.985
    to 1.015, 0.015 rad; brightness, contrast, saturation 0.5 to 1.5, any hue, gamma 0.7 to 1.5, the same for both
    frames; noise of deviation 0 to 0.04. Ours: colors are changed after the crop; a transform is right if the crop
    (not the whole frame) stays inside.
    """
    dice = Dice(generator, sample.flow)
    sample = random_affine(sample, dice, size, both=BOTH, second=SECOND, mirror=(0.5, 0.5))
    return color.paint(sample, dice, JITTER)


def irr_kitti(sample: Sample, generator: torch.Generator, size: tuple[int, int]) -> Sample:
    """Returns the samples of KITTI, whose truth is sparse: smaller transforms, mirrored to the side alone.

    Published: shift by up to 1 %, zoom 0.98 to 1.02, turn by 0.01 rad; frame2 alone by 0.125 %, 0.99 to 1.01, 0.01
    rad; colors and noise as in `irr`. Ours: truth is carried to the nearest pixel.
    """
    dice = Dice(generator, sample.flow)
    sample = random_affine(sample, dice, size, both=KITTI_BOTH, second=KITTI_SECOND, mirror=(0.5, 0.0), sparse=True)
    return color.paint(sample, dice, JITTER)
