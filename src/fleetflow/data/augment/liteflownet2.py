"""LiteFlowNet2's augmentation as mmflow trains it; its FlowNet2 and PWC-Net take that of Chairs, too."""

import torch

from fleetflow.data.augment import color
from fleetflow.data.augment.dice import Dice
from fleetflow.data.augment.geometry import Affine, random_affine
from fleetflow.types import Sample

BOTH = Affine(translate=0.05, zoom=(1.0, 1.5), squeeze=(0.86, 1.16), rotate=10.0)
SECOND = Affine(translate=0.00375, zoom=(0.985, 1.015), rotate=1.0)
SINTEL_BOTH = Affine(translate=0.05, zoom=(1.0, 1.2), squeeze=(0.95, 1.1), rotate=5.0)
KITTI_BOTH = Affine(translate=0.02, zoom=(0.98, 1.02), rotate=0.5)
KITTI_SECOND = Affine(translate=0.0025, zoom=(0.99, 1.01), rotate=0.5)
JITTER = (0.5, 0.5, 0.5, 0.5)
KITTI_JITTER = (0.05, 0.2, 0.25, 0.1)
MIRROR = (0.5, 0.5)


def liteflownet2(sample: Sample, generator: torch.Generator, size: tuple[int, int]) -> Sample:
    """Returns the samples of Chairs or Things transformed, mirrored both ways, and changed in color.

    Published: shift by up to 5 %, zoom 1 to 1.5, squeeze 0.86 to 1.16, turn by 10 degrees; frame2 alone by 0.375 %,
    0.985 to 1.015, 1 degree; brightness, contrast, saturation 0.5 to 1.5, any hue, gamma 0.7 to 1.5, noise of deviation
    0 to 0.04. Ours: colors are changed after the crop, which stays inside the frames.
    """
    dice = Dice(generator, sample.flow)
    sample = random_affine(sample, dice, size, both=BOTH, second=SECOND, mirror=MIRROR)
    return color.paint(sample, dice, JITTER)


def liteflownet2_sintel(sample: Sample, generator: torch.Generator, size: tuple[int, int]) -> Sample:
    """Returns the samples of Sintel: as `liteflownet2`, with smaller transforms and without noise.

    Published: zoom 1 to 1.2, squeeze 0.95 to 1.1, turn by 5 degrees, no noise; KITTI, mixed in, has its noise (mmflow's
    sintel_kitti_liteflownet2_320x768.py).
    """
    dice = Dice(generator, sample.flow)
    sample = random_affine(sample, dice, size, both=SINTEL_BOTH, second=SECOND, mirror=MIRROR)
    return color.paint(sample, dice, JITTER, sigma=0)


def liteflownet2_kitti(
    sample: Sample,
    generator: torch.Generator,
    size: tuple[int, int],
    *,
    jitter: tuple[float, float, float, float] = KITTI_JITTER,
) -> Sample:
    """Returns the samples of KITTI, whose truth is sparse.

    Published: shift by up to 2 %, zoom 0.98 to 1.02, turn by half a degree; frame2 alone by 0.25 %, 0.99 to 1.01, half
    a degree; brightness 0.95 to 1.05, contrast 0.8 to 1.2, saturation 0.75 to 1.25, hue by 0.1 of the circle, gamma and
    noise as in `liteflownet2`. Ours: truth goes to the nearest pixel.

    Args:
        jitter: of brightness, contrast, saturation, hue, as in `color.paint`: the default is that of training on KITTI
            alone; together with Sintel it is JITTER, that of `liteflownet2`.
    """
    dice = Dice(generator, sample.flow)
    sample = random_affine(sample, dice, size, both=KITTI_BOTH, second=KITTI_SECOND, mirror=MIRROR, sparse=True)
    return color.paint(sample, dice, jitter)
