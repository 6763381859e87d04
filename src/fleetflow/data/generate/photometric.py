"""What a camera does to rendered frames: exposure, colour, uneven light, fog, blur and noise, partly by frame."""

import torch
import torch.nn.functional as F
from torch import Tensor


def photometric(frame1: Tensor, frame2: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns both frames [B, 3, H, W] in [0, 1] as a camera would have taken them; the flow stays true.

    generator: a CPU generator; the noise itself is drawn on the frames' device, seeded from it.
    """
    count, device = len(frame1), frame1.device

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return (torch.rand(count, *size, generator=generator) * (high - low) + low).to(device)

    def sometimes(probability: float) -> Tensor:
        return (torch.rand(count, 1, 1, 1, generator=generator) < probability).to(device)

    seed = int(torch.randint(2**62, (), generator=generator))
    noise = torch.Generator(device=device).manual_seed(seed)
    contrast, gamma = uniform(0.7, 1.4, 1, 1, 1), uniform(0.75, 1.35, 1, 1, 1)
    tint, lift = uniform(0.85, 1.15, 3, 1, 1), uniform(-0.1, 0.1, 1, 1, 1)
    saturation = uniform(0.3, 1.4, 1, 1, 1) * ~sometimes(0.1)
    differs = sometimes(0.4)
    strength = uniform(0, 0.035, 1, 1, 1) * sometimes(0.6)
    sigma = uniform(0.3, 1.6, 1)[:, 0] * sometimes(0.2)[:, 0, 0, 0]
    fog, fog_colour = uniform(0.1, 0.6, 1, 1, 1) * sometimes(0.08), uniform(0.5, 1, 3, 1, 1)
    frames = []
    for k, frame in enumerate((frame1, frame2)):
        if k:  # the second exposure
            contrast = torch.where(differs, contrast * uniform(0.85, 1.18, 1, 1, 1), contrast)
            gamma = torch.where(differs, gamma * uniform(0.88, 1.14, 1, 1, 1), gamma)
            tint = torch.where(differs, tint * uniform(0.95, 1.05, 3, 1, 1), tint)
        gray = frame.mean(1, keepdim=True)
        frame = gray + (frame - gray) * saturation
        light = torch.randn(count, 1, 3, 4, generator=generator).to(device) * 0.12 * sometimes(0.2)
        light = F.interpolate(light, size=frame.shape[-2:], mode="bicubic", align_corners=True)
        frame = ((frame - 0.5) * contrast * tint + 0.5 + lift) * (1 + light)
        frame = frame.clamp(1e-4, 1).log_().mul_(gamma).exp_()
        frame = frame + fog * (fog_colour - frame)
        frame = _blurred(frame, sigma)
        frame = frame + torch.randn(frame.shape, generator=noise, device=device) * strength
        frames.append(frame.clamp(0, 1).mul(255).round_().div_(255))
    return frames[0], frames[1]


def _blurred(frame: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a sigma in pixels for each sample; 0 leaves the sample as it is."""
    rows = sigma.nonzero()[:, 0]
    if not len(rows):
        return frame
    taps = torch.arange(-4, 5, device=frame.device)
    kernel = torch.exp(-(taps**2) / (2 * sigma[rows, None] ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    part = frame[rows].flatten(0, 1)[None]
    part = F.pad(part, (4, 4, 4, 4), mode="replicate")
    part = F.conv2d(part, kernel[:, None, None, :], groups=len(kernel))
    part = F.conv2d(part, kernel[:, None, :, None], groups=len(kernel))
    frame = frame.clone()
    frame[rows] = part[0].unflatten(0, (len(rows), 3))
    return frame
