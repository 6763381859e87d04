"""Faint texture, and texture that each frame has of its own: what codecs, denoisers and automatic exposure leave.

Texture of its own does not move with the surface. Where there is no other, the frames do not say what moves; the truth
stays the motion of the surface, and most such surfaces are still, so that the best answer is no motion.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STILL = 0.5  # pixels; a scene of which more than half moves less counts as still
STRONGEST = 0.06  # standard deviation of what is added, of 1


class Amount(NamedTuple):
    """How much of it there is; of still scenes where nothing else is said."""

    contrast: float  # the least that is left of a scene's contrast, as a share
    own: float  # probability of a texture of each frame's own
    constant: float  # the most of its strength that does not depend on the true texture, of 1
    constantly: float  # probability of such a part


FOOTAGE = Amount(contrast=0.02, own=0.7, constant=0.02, constantly=0.6)  # other numbers are a new edition of `footage`
TRAINING = Amount(contrast=0.002, own=0.8, constant=0.04, constantly=0.75)


class _Rows:
    """Random numbers [B, 1, 1, 1], drawn on the CPU so that every device sees the same."""

    def __init__(self, count: int, generator: torch.Generator, device: torch.device):
        self.count, self.generator, self.device = count, generator, device

    def uniform(self, low: float, high: float) -> Tensor:
        return (torch.rand(self.count, 1, 1, 1, generator=self.generator) * (high - low) + low).to(self.device)

    def log_uniform(self, low: float, high: float) -> Tensor:
        return torch.exp(self.uniform(*torch.tensor([low, high]).log().tolist()))

    def chance(self, still: Tensor, often: float, seldom: float) -> Tensor:
        """True with probability `often` in still scenes and `seldom` in others."""
        return self.uniform(0, 1) < torch.where(still, often, seldom)

    def patches(self, height: int, width: int) -> Tensor:
        """[B, 1, H, W] in [0, 1], smooth, about half of it near 1."""
        field = torch.randn(self.count, 1, 4, 5, generator=self.generator).to(self.device)
        field = F.interpolate(field, size=(32, 32), mode="bicubic", align_corners=True)
        return F.interpolate(field, size=(height, width), mode="bilinear", align_corners=True).mul(4).sigmoid()


def faint(frames: list[Tensor], flow: Tensor, generator: torch.Generator, amount: Amount) -> list[Tensor]:
    """Returns the frames [B, 3, H, W] in [0, 1], some with less contrast, some with a texture of their own.

    Args:
        flow: [B, 2, H, W] pixels of the first; still scenes get it more often and more of it.
        generator: a CPU generator; the textures themselves are drawn on the frames' device, seeded from it.
        amount: how much of it there is.
    """
    rows = _Rows(len(flow), generator, flow.device)
    still = ((flow.square().sum(1) < STILL**2).float().mean((1, 2)) > 0.5)[:, None, None, None]
    return _with_own_texture(rows, still, _low_contrast(rows, still, frames, amount), amount)


def _low_contrast(rows: _Rows, still: Tensor, frames: list[Tensor], amount: Amount) -> list[Tensor]:
    """The frames, some with 40 % of their contrast or less about one gray level, in all of the frame or in patches."""
    height, width = frames[0].shape[-2:]
    dull = rows.chance(still, 0.35, 0.08)
    contrast = torch.where(still, rows.log_uniform(amount.contrast, 0.3), rows.log_uniform(0.1, 0.4))
    level = rows.uniform(0.08, 0.75)
    part = torch.where(rows.chance(still, 0.5, 0.5), rows.patches(height, width), 1.0)
    kept = 1 - dull * part * (1 - contrast)
    return [level * (1 - kept) + frame * kept for frame in frames]


def _with_own_texture(rows: _Rows, still: Tensor, frames: list[Tensor], amount: Amount) -> list[Tensor]:
    """The frames, some with a texture each: as strong as their true texture or weaker, in patches far stronger.

    Scales of 0.5 to 10 pixels. A part of the strength does not depend on the true texture: from 0.3 levels of 255 on.
    """
    height, width = frames[0].shape[-2:]
    ratio = torch.where(still, rows.log_uniform(0.2, 3.0), rows.log_uniform(0.1, 1.0))
    beyond = rows.chance(still, 0.5, 0.15) * rows.patches(height, width)
    least = rows.log_uniform(0.001, amount.constant) * rows.chance(still, amount.constantly, 0.2)
    own, gray, blur = rows.chance(still, amount.own, 0.3), rows.chance(still, 0.7, 0.7), rows.log_uniform(0.5, 10)
    seed = int(torch.randint(2**62, (), generator=rows.generator))
    some = own.flatten().nonzero()[:, 0]
    if not len(some):
        return frames
    noise = torch.Generator(rows.device).manual_seed(seed)
    strength = _detail(frames[0][some]) * ratio[some] * (1 + 3 * beyond[some]) + least[some]
    strength = strength.clamp(max=STRONGEST)
    changed = []
    for frame in frames:
        pictures = [
            _texture(1 if plain else 3, height, width, sigma, noise).expand(3, -1, -1)
            for sigma, plain in zip(blur[some].flatten().tolist(), gray[some].flatten().tolist())
        ]
        changed.append(frame.index_copy(0, some, (frame[some] + torch.stack(pictures) * strength).clamp(0, 1)))
    return changed


def _detail(frame: Tensor) -> Tensor:
    """[B, 1, H, W]: standard deviation of the frame about its mean over 8 pixels, smoothed over some 32."""
    coarse = F.avg_pool2d(frame, 8, ceil_mode=True)
    variance = F.avg_pool2d(frame.square(), 8, ceil_mode=True) - coarse.square()
    variance = F.avg_pool2d(variance.mean(1, keepdim=True).clamp(min=0), 3, 1, 1, count_include_pad=False)
    return F.interpolate(variance, size=frame.shape[-2:], mode="bilinear").sqrt()


def _texture(channels: int, height: int, width: int, sigma: float, generator: torch.Generator) -> Tensor:
    """[channels, H, W] Gaussian noise of unit strength, blurred by sigma pixels: drawn on a grid that is as coarse."""
    step, device = max(1, int(sigma)), generator.device
    grid = torch.randn(channels, 1, height // step + 12, width // step + 12, generator=generator, device=device)
    taps = torch.arange(-4, 5.0, device=device)
    kernel = torch.exp(-taps.square() / (2 * (sigma / step) ** 2))
    kernel = kernel / kernel.sum()
    grid = F.conv2d(F.conv2d(grid, kernel[None, None, :, None]), kernel[None, None, None])
    if step > 1:
        grid = F.interpolate(grid, scale_factor=step, mode="bicubic")
    grid = grid[:, 0, step : step + height, step : step + width]
    return grid / grid.std(correction=0).clamp(min=1e-6)
