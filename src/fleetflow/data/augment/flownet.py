"""FlowNet's augmentation, which PWC-Net took over (arXiv 1504.06852, 1709.02371)."""

import torch

from fleetflow.data.augment import color
from fleetflow.data.augment.dice import Dice
from fleetflow.data.augment.geometry import Affine, random_affine
from fleetflow.data.augment.irr import SECOND
from fleetflow.types import Sample

BOTH = Affine(translate=0.2, zoom=(0.9, 2.0), rotate=17.0)


def flownet(sample: Sample, generator: torch.Generator, size: tuple[int, int]) -> Sample:
    """Returns the samples shifted by up to 20 %, turned by 17 degrees, zoomed 0.9 to 2, and changed in color.

    Published: these; contrast -0.8 to 0.4, each color times 0.5 to 2, gamma 0.7 to 1.5, brightness with deviation 0.2,
    all the same for both frames, and noise of deviation 0 to 0.04. The transform of frame2 alone is called smaller
    without figures; here it is that of IRR-PWC. Ours: contrast is read as a logarithm (0.45 to 1.49 times), colors are
    changed after the crop.
    """
    dice = Dice(generator, sample.flow)
    sample = random_affine(sample, dice, size, both=BOTH, second=SECOND)
    frames = color.pair(sample)

    def draw(low: float, high: float) -> torch.Tensor:
        return color.factors(dice.uniform(low, high), frames)

    tint = dice.uniform(0.5, 2, 3).view(-1, 1, 3, 1, 1).to(frames)
    frames = color.contrast(frames, draw(-0.8, 0.4).exp())
    frames = color.gamma(color.brightness(frames, tint), draw(0.7, 1.5))
    lift = 0.2 * torch.erfinv(dice.uniform(-1, 1)) * 2**0.5  # normal
    frames = frames.add_(color.factors(lift, frames).clamp(-0.6, 0.6)).clamp_(0, 1)
    return color.unpair(sample, color.noise(frames, draw(0, 0.04), dice))
