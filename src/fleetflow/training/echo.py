"""Data echoing (Choi et al., arXiv 1907.05550): a generated pair is learned from several times, where making it is slow.

FastFlowNet learns from a pair of 384x640 in 0.2 s of a core with bfloat16 units, which takes 0.3 s to make. Its
second use is a mirror image in other colors, in a later batch beside other pairs.
"""

from collections.abc import Callable

import torch

from fleetflow.data.augment import color
from fleetflow.data.augment.dice import Dice
from fleetflow.data.augment.own import STRENGTH
from fleetflow.types import FleetflowError, Sample

APART = 12  # batches between two uses of a pair: a multiple of the usual numbers of workers, which take turns
MOST = 4  # mirror images that a frame has


class Echo:
    """Batches of which each `1 / uses` is new and the rest was in the batches 12, 24, ... before.

    What is in a batch follows from its number and size alone: what this process did not make itself is made again.

    Args:
        make: (count, height, width, place) -> so many new pairs, those of batch number `place`.
        uses: of a pair, 1 to 4.
    """

    def __init__(self, make: Callable[[int, int, int, int], Sample], uses: int):
        self.make, self.uses = make, uses
        self.kept: dict[tuple[int, int, int, int], Sample] = {}

    def batch(self, count: int, height: int, width: int, place: int) -> Sample:
        """Returns batch number `place`, of `count` pairs, which `uses` must divide."""
        used = [(count // self.uses, height, width, place - k * APART) for k in range(self.uses)]
        for key in used:
            if key not in self.kept:
                self.kept[key] = self.make(*key)
        rows = [_turned(self.kept[key], k, place)[:4] for k, key in enumerate(used)]
        self.kept = {key: sample for key, sample in self.kept.items() if key[3] > used[-1][3]}
        return Sample(*map(torch.cat, zip(*rows)))


def check(uses: int, count: int) -> None:
    """Raises FleetflowError where a batch of `count` pairs, or the part of one, cannot be of pairs used so often."""
    if uses > MOST or count % uses:
        raise FleetflowError(
            f"echo is {uses}, of batches (or parts) of {count} pairs; expected 1 to {MOST} that divides it"
        )


def _turned(sample: Sample, k: int, place: int) -> Sample:
    """The k-th use of a sample: itself, then mirrored to the side, upside down, or both, and changed in color."""
    if k == 0:
        return sample
    axes = [axis for axis, bit in ((-1, 1), (-2, 2)) if k & bit]
    frame1, frame2, flow, valid = (tensor.flip(axes) for tensor in sample[:4])
    sign = flow.new_tensor([-1.0 if -1 in axes else 1.0, -1.0 if -2 in axes else 1.0])[:, None, None]
    mirrored = Sample(frame1, frame2, flow * sign, valid)
    dice = Dice(torch.Generator().manual_seed(place % 2**63), flow)
    return color.unpair(mirrored, color.jitter(color.pair(mirrored), dice, STRENGTH))
