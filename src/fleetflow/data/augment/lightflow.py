"""Light Flow's augmentation, as McDo/LightFlowPytorch trains it: shifts, turns, crop, flips; no colors."""

import torch

from fleetflow.data.augment.dice import Dice
from fleetflow.data.augment.geometry import place, rotation, translation
from fleetflow.types import Sample


def lightflow(sample: Sample, generator: torch.Generator, size: tuple[int, int]) -> Sample:
    """Returns the samples with frame2 shifted by up to 10 px, both frames turned by up to 10 degrees, and mirrored.

    Published: these; the two turns differ by up to 5 degrees; mirrored both ways with probability 1/2. Ours: drawn
    again until the crop lies inside the frames (theirs are black there, their flow 0); the difference of the turns and
    the shift move frame2 alone, as one transform.
    """
    dice = Dice(generator, sample.flow)

    def draw(reach: float, tries: int) -> torch.Tensor:
        return dice.uniform(-reach, reach, tries)

    return place(
        sample,
        dice,
        size,
        both=lambda tries: rotation(draw(10, tries)),
        second=lambda tries: translation(draw(10, tries), draw(10, tries)) @ rotation(draw(5, tries)),
        mirror=(0.5, 0.5),
    )
