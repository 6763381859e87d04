"""Learning-rate schedules: (step, steps) -> factor on the learning rate, pure functions of the step (from 0).

A recipe binds the rest with `functools.partial`. Steps in a table are those of a run of `of` steps, the published
length; a run of another length stretches the table. Without `of` they are meant as they stand.
"""

import math
from functools import partial


def constant(step: int, steps: int) -> float:
    """Returns 1."""
    return 1.0


def warm_flat_cool(step: int, steps: int, *, warmup: int, cooldown: float) -> float:
    """Returns a linear warm-up of `warmup` steps, then 1, then a straight line to 0 over the share `cooldown`."""
    warm = (step + 1) / warmup if warmup else 1.0
    left = (steps - step) / (cooldown * steps) if cooldown else 1.0
    return max(0.0, min(1.0, warm, left))


def table(step: int, steps: int, *, rates: tuple[tuple[float, float], ...], of: float | None = None) -> float:
    """Returns the factor of the last row (first step, factor) of `rates` that has begun, 1 before the first row."""
    place = step * of / steps if of else step
    return next((factor for first, factor in reversed(rates) if place >= first), 1.0)


def multi_step(
    step: int, steps: int, *, milestones: tuple[float, ...], of: float | None = None, gamma: float = 0.5
) -> float:
    """Returns gamma to the number of milestones that are reached (torch's MultiStepLR; the default halves the rate)."""
    place = step * of / steps if of else step
    return gamma ** sum(place >= milestone for milestone in milestones)


def one_cycle(
    step: int, steps: int, *, warm: float = 0.05, extra: int = 100, start: float = 1 / 25, end: float = 4e-6
) -> float:
    """Returns a straight line from `start` to 1 over the share `warm` of the steps, then one down to `end`.

    Args:
        extra: steps that the cycle is longer than the run, so that the run ends above `end`. The defaults are RAFT's
            (arXiv 2003.12039, code): torch's OneCycleLR, linear, with 1/25 and 1/25/10,000 and 100 steps more.
    """
    last = steps + extra - 1
    top = max(warm * (steps + extra) - 1, 0.0)
    if step < top:
        return start + (1 - start) * step / top
    return max(end, 1 - (1 - end) * (step - top) / max(last - top, 1))


def cosine(step: int, steps: int, *, warmup: int = 0, end: float = 0.0) -> float:
    """Returns a linear warm-up of `warmup` steps, then half a cosine from 1 to `end` (torch's CosineAnnealingLR)."""
    if step < warmup:
        return (step + 1) / warmup
    place = min(1.0, (step - warmup) / max(steps - warmup, 1))
    return end + (1 - end) * (1 + math.cos(math.pi * place)) / 2


# FlowNet 2.0 (arXiv 1612.01925), from 1e-4: 1.2 million steps on Chairs.
s_long = partial(multi_step, milestones=(400_000, 600_000, 800_000, 1_000_000), of=1_200_000)
# Then from 1e-5 on Things: 500,000 steps (mmflow goes on to 600,000 and halves once more, at 500,000).
s_fine = partial(multi_step, milestones=(200_000, 300_000, 400_000), of=500_000)

# Light Flow: from 1e-3, by epochs of its code's README; its code itself moves two of the rows by one epoch.
lightflow = partial(
    table,
    rates=((0, 1), (58, 1 / 2), (174, 1 / 4), (232, 1 / 8), (289, 1 / 16), (347, 1 / 32)),
    of=403,
)

# LiteFlowNet2 as mmflow trains it: each stage on Chairs from 1e-4 in 300,000 steps; fine-tuning from 5e-5.
liteflownet2_pre = partial(multi_step, milestones=(120_000, 160_000, 200_000, 240_000), of=300_000)
liteflownet2_sintel = partial(multi_step, milestones=(200_000, 300_000, 400_000, 500_000), of=600_000)
liteflownet2_kitti = partial(multi_step, milestones=(200_000, 300_000, 400_000), of=500_000)

# PWC-Net on Sintel as mmflow trains it, from 3e-5, with the "disruption" of PWC-Net+ (arXiv 1809.05571): the rate
# falls by ten halvings within 150,000 steps, jumps back to 2e-5, and falls again.
_HALVINGS = (45_000, 65_000, 85_000, 95_000, 97_500, 100_000, 110_000, 120_000, 130_000, 140_000)
pwcnet_sintel = partial(
    table,
    rates=tuple(
        (150_000 * cycle + first, top * 0.5**k)
        for cycle, top in enumerate((1.0, 2 / 3))
        for k, first in enumerate((0, *_HALVINGS))
    ),
    of=300_000,
)
