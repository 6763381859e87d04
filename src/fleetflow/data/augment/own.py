"""Ours, for pairs of any kind, dense or sparse: nothing is resampled, so the flow stays what was measured."""

import torch

from fleetflow.data.augment import color
from fleetflow.data.augment.dice import Dice
from fleetflow.data.augment.geometry import crop
from fleetflow.types import Sample

STRENGTH = (0.3, 0.3, 0.3, 0.05)  # of brightness, contrast, saturation, hue


def own(sample: Sample, generator: torch.Generator, size: tuple[int, int]) -> Sample:
    """Returns a random window of each sample, mirrored to the side with probability 0.5, and changed in color."""
    sample = crop(sample, generator, size)
    dice = Dice(generator, sample.flow)
    rows = dice.chance(0.5).to(sample.flow.device)
    mirrored = Sample._make(None if tensor is None else tensor.flip(-1) for tensor in sample)
    sign = sample.flow.new_tensor((-1.0, 1.0))[:, None, None]
    mirrored = mirrored._replace(
        flow=mirrored.flow * sign, backward=None if mirrored.backward is None else mirrored.backward * sign
    )
    sample = Sample._make(
        None
        if tensor is None or other is None
        else torch.where(rows.view(-1, *(1,) * (tensor.ndim - 1)), other, tensor)
        for tensor, other in zip(sample, mirrored)
    )
    frames = color.jitter(color.pair(sample), dice, STRENGTH, apart=0.2)
    return color.unpair(sample, frames)
