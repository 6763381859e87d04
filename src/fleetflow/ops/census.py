"""The census: how two frames differ, whatever their brightness."""

import torch
from torch import Tensor

NOISE = 0.81  # squared gray levels of 255 below which a difference in the census is noise (UnFlow)
SOFT = 0.1  # squared difference of two soft signs that counts as half a mismatch (UnFlow)


def census_distance(frame1: Tensor, frame2: Tensor, patch: int = 7) -> Tensor:
    """Returns [N, H, W] in [0, 1): the share of neighbors whose order to the pixel differs between the frames, soft.

    Each pixel is described by the soft signs of its differences in gray to the other pixels of a patch x patch window;
    the distance is their soft Hamming distance (Meister, Hur, Roth, "UnFlow", AAAI 2018). A change of brightness does
    not alter it, one of contrast only where differences are near the noise. Frames are continued by their edge pixels.
    """
    height, width = frame1.shape[-2:]
    reach = patch // 2
    gray = [255 * frame.float().mean(1) for frame in (frame1, frame2)]
    wide = [torch.nn.functional.pad(frame[:, None], (reach,) * 4, mode="replicate")[:, 0] for frame in gray]
    total = torch.zeros_like(gray[0])
    for k in range(patch * patch):
        if k == patch * patch // 2:
            continue
        down, right = divmod(k, patch)
        signs = []
        for frame, around in zip(gray, wide):
            difference = around[:, down : down + height, right : right + width] - frame
            signs.append(difference * (difference.square() + NOISE).rsqrt())
        gap = (signs[0] - signs[1]).square()
        total = total + gap / (gap + SOFT)
    return total / (patch * patch - 1)
