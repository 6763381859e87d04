"""Ours: what cameras, weather and codecs do to both frames; the flow stays what it is."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.data.augment import color
from fleetflow.data.augment.dice import Dice
from fleetflow.data.augment.geometry import crop
from fleetflow.types import Sample

# Quantization of JPEG at quality 50, brightness and color (ITU-T T.81, annex K).
LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA = tuple(
    tuple(row) + (99,) * (8 - len(row))
    for row in ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56), (47, 66), (), (), (), ())
)


def effects(
    sample: Sample,
    generator: torch.Generator,
    size: tuple[int, int],
    *,
    first: Callable[[Sample, torch.Generator, tuple[int, int]], Sample] = crop,
    blurred: float = 0.2,
    foggy: float = 0.1,
    compressed: float = 0.3,
) -> Sample:
    """Returns the samples after `first`, an augmentation, some of them blurred, in fog, or compressed.

    blurred, foggy, compressed: the probabilities. Ranges are ours: a blur of 3 to 15 px in any direction, fog of 0.2 to
    0.7 at its thickest, JPEG quality 20 to 80. Compression comes last, as in a file.
    """
    sample = first(sample, generator, size)
    dice = Dice(generator, sample.flow)
    frames = color.pair(sample)
    length, angle = dice.uniform(3, 15), dice.uniform(0, 180)
    frames = motion_blur(frames, length * dice.chance(blurred), angle)
    density = dice.uniform(0.2, 0.7) * dice.chance(foggy)
    frames = fog(frames, density, dice)
    quality = dice.uniform(20, 80).masked_fill(~dice.chance(compressed), 100)
    return color.unpair(sample, compression(frames, quality))


def motion_blur(frames: Tensor, length: Tensor, angle: Tensor) -> Tensor:
    """Returns frames [N, F, 3, H, W] averaged along a line, as by a camera that shakes while the shutter is open.

    length: [N] pixels, up to 31; 1 and less leaves a sample as it is. angle: [N] degrees. The line is centerd on the
    pixel, so nothing is displaced.
    """
    rows = (length > 1).nonzero()[:, 0]
    if not len(rows):
        return frames
    radius = int(length.max().clamp(max=31) // 2) + 1
    steps = torch.arange(-radius, radius + 1, dtype=torch.float64)
    turn = angle[rows].deg2rad().view(-1, 1, 1)
    along = turn.cos() * steps + turn.sin() * steps[:, None]
    across = turn.cos() * steps[:, None] - turn.sin() * steps
    end = (length[rows].view(-1, 1, 1) / 2 + 0.5 - along.abs()).clamp(0, 1)
    kernel = end * (1 - across.abs()).clamp(min=0)
    kernel = (kernel / kernel.sum((1, 2), keepdim=True)).to(frames)
    part = frames[rows.to(frames.device)]
    planes = part.flatten(1, 2).flatten(0, 1)[None]
    weights = kernel.repeat_interleave(part.shape[1] * 3, 0)[:, None]
    planes = F.conv2d(F.pad(planes, (radius,) * 4, mode="replicate"), weights, groups=len(weights))
    frames = frames.clone()
    frames[rows.to(frames.device)] = planes[0].view_as(part)
    return frames


def fog(frames: Tensor, density: Tensor, dice: Dice) -> Tensor:
    """Returns frames [N, F, 3, H, W] under a bright veil with soft swathes, the same before all frames of a sample.

    density: [N] share of the veil's color at its thickest, in [0, 1]; 0 leaves a sample as it is.
    """
    if not bool((density > 0).any()):
        return frames
    size = frames.shape[-2:]
    swathes = sum(
        F.interpolate(dice.uniform(0, share, 1, n, n + 1), size=size, mode="bicubic", align_corners=True)
        for n, share in ((3, 0.5), (6, 0.3), (12, 0.2))
    )
    veil = (density.view(-1, 1, 1, 1) * swathes.clamp(0, 1))[:, None].to(frames)
    light = (dice.uniform(0.6, 1, 1) + dice.uniform(-0.05, 0.05, 3)).clamp(max=1).view(-1, 1, 3, 1, 1)
    return frames + veil * (light.to(frames) - frames)


def compression(frames: Tensor, quality: Tensor) -> Tensor:
    """Returns frames [N, F, 3, H, W] as JPEG of this quality gives them back (color at full resolution).

    quality: [N], 1 to 100; samples of 100 stay as they are.
    """
    rows = (quality < 100).nonzero()[:, 0]
    if not len(rows):
        return frames
    part = frames[rows.to(frames.device)]
    height, width = part.shape[-2:]
    padded = F.pad(part.flatten(0, 1) * 255, (0, -width % 8, 0, -height % 8), mode="replicate")
    planes = torch.einsum("cd,ndhw->nchw", _to_ycc(padded), padded).round_()  # a file holds bytes
    planes[:, 0] -= 128
    transform = _cosines(padded)
    blocks = planes.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # [..., 8, 8]
    table = padded.new_tensor((LUMA, CHROMA, CHROMA))
    worth = quality[rows].to(padded)
    worth = torch.where(worth < 50, 50 / worth, 2 - worth / 50).repeat_interleave(part.shape[1])
    table = (table * worth.view(-1, 1, 1, 1) + 0.5).floor().clamp(1, 255)[:, :, None, None]
    waves = transform @ blocks @ transform.T
    blocks = transform.T @ ((waves / table).round() * table) @ transform
    planes = blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    planes[:, 0] += 128
    back = torch.einsum("cd,ndhw->nchw", torch.linalg.inv(_to_ycc(padded)), planes)[..., :height, :width]
    frames = frames.clone()
    frames[rows.to(frames.device)] = (back / 255).clamp(0, 1).view_as(part)
    return frames


def _to_ycc(like: Tensor) -> Tensor:
    """The matrix from RGB to brightness and two color differences (JFIF)."""
    red, green, blue = color.GRAY
    rows = [
        (red, green, blue),
        (-red / 1.772, -green / 1.772, (1 - blue) / 1.772),
        ((1 - red) / 1.402, -green / 1.402, -blue / 1.402),
    ]
    return like.new_tensor(rows)


def _cosines(like: Tensor) -> Tensor:
    """The 8x8 matrix of the orthonormal discrete cosine transform."""
    k = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos((2 * k + 1) * k[:, None] * torch.pi / 16) / 2
    matrix[0] /= 2**0.5
    return matrix.to(like)
