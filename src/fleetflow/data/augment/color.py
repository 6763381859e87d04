"""Changes of color: functions of frames [N, F, 3, H, W] in [0, 1], F frames of each of N samples.

A factor is float [N, F or 1, 1, 1, 1]; results are clamped to [0, 1]. `pair` and `unpair` go from a sample and back.
"""

import torch
from torch import Tensor

from fleetflow.data.augment.dice import Dice
from fleetflow.types import Sample

GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601


def pair(sample: Sample) -> Tensor:
    """Returns both frames, [N, 2, 3, H, W]."""
    return torch.stack((sample.frame1, sample.frame2), 1)


def unpair(sample: Sample, frames: Tensor) -> Sample:
    """Returns the sample with these frames [N, 2, 3, H, W]."""
    return sample._replace(frame1=frames[:, 0], frame2=frames[:, 1])


def brightness(frames: Tensor, factor: Tensor) -> Tensor:
    """Returns frames multiplied by the factor."""
    return (frames * factor).clamp_(0, 1)


def contrast(frames: Tensor, factor: Tensor, together: Tensor | None = None) -> Tensor:
    """Returns the distance of frames from their mean gray, multiplied by the factor.

    Args:
        together: bool [N, 1, 1, 1, 1]: samples whose frames share one mean.
    """
    mean = gray(frames).mean((-2, -1), keepdim=True)
    if together is not None:
        mean = torch.where(together, mean.mean(1, keepdim=True), mean)
    return (frames * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def saturation(frames: Tensor, factor: Tensor) -> Tensor:
    """Returns the distance of frames from their gray, pixel by pixel, multiplied by the factor."""
    return (frames * factor).addcmul_(gray(frames), 1 - factor).clamp_(0, 1)


def hue(frames: Tensor, turn: Tensor) -> Tensor:
    """Returns frames with the hue turned, 1 being the whole circle of red, yellow, green, cyan, blue, magenta."""
    red, green, blue = frames.unbind(2)
    high, low = frames.amax(2), frames.amin(2)
    span = high - low
    of_red, of_green = high == red, high == green
    angle = torch.where(of_red, green - blue, torch.where(of_green, blue - red, red - green))
    angle.div_(span.clamp(min=1e-12)).add_(6 * turn[:, :, 0])
    angle.add_(torch.where(of_red, 0.0, torch.where(of_green, 2.0, 4.0)))
    turned = torch.empty_like(frames)
    for plane, first in zip(turned.unbind(2), (5, 3, 1)):
        place = angle + first
        place.sub_((place / 6).floor_(), alpha=6)  # remainder_ is three times slower
        share = torch.minimum(place, 4 - place).clamp_(0, 1)
        torch.addcmul(high, span, share, value=-1, out=plane)
    return turned


def gamma(frames: Tensor, power: Tensor) -> Tensor:
    """Returns frames to the power: over 1 darkens."""
    return frames.clamp(1e-6, 1).pow(power)


def noise(frames: Tensor, sigma: Tensor, dice: Dice) -> Tensor:
    """Returns frames plus independent normal noise of standard deviation sigma."""
    return dice.normal(frames).mul_(sigma).add_(frames).clamp_(0, 1)


def gray(frames: Tensor) -> Tensor:
    """Returns [N, F, 1, H, W], how bright the pixels look."""
    red, green, blue = frames.split(1, 2)
    return (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])


def factors(numbers: Tensor, like: Tensor) -> Tensor:
    """Returns numbers [N] or [N, F] as factors [N, F or 1, 1, 1, 1] with the dtype and device of `like`."""
    return numbers.reshape(len(numbers), -1, 1, 1, 1).to(like)


def jitter(frames: Tensor, dice: Dice, strength: tuple[float, float, float, float], *, apart: float = 0.0) -> Tensor:
    """Returns frames with brightness, contrast, saturation and hue changed, in a random order (one for the batch).

    Args:
        strength: (b, c, s, h): factors from 1 - b to 1 + b, ..., the hue turned by -h to h of the circle.
        apart: probability that the frames of a sample are changed each for itself; else by the same amounts.
    """
    together = ~dice.chance(apart)
    changes = (brightness, contrast, saturation, hue)
    for k in dice.order(4):
        middle, reach = float(changes[k] is not hue), strength[k]
        each = dice.uniform(max(middle - reach, middle - 1), middle + reach, frames.shape[1])
        amount = factors(torch.where(together[:, None], each[:, :1], each), frames)
        shared = (together.view(-1, 1, 1, 1, 1).to(frames.device),) if changes[k] is contrast else ()
        frames = changes[k](frames, amount, *shared)
    return frames


def paint(sample: Sample, dice: Dice, strength: tuple[float, float, float, float], *, sigma: float = 0.04) -> Sample:
    """Returns the samples with jitter of this strength and gamma 0.7 to 1.5, the same for both frames, and with noise.

    Args:
        sigma: largest deviation of the noise, which goes from 0 to it; 0 leaves the noise out. The default is what
            IRR-PWC and mmflow's FlowNet2, PWC-Net and LiteFlowNet2 share, fine-tuning of the last on Sintel excepted.
    """
    frames = jitter(pair(sample), dice, strength)
    frames = gamma(frames, factors(dice.uniform(0.7, 1.5), frames))
    if sigma:
        frames = noise(frames, factors(dice.uniform(0, sigma), frames), dice)
    return unpair(sample, frames)
