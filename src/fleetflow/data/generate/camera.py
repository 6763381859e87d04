"""What a camera makes of rendered frames: look, exposure, optics, sensor noise, processing and codec, partly by frame.

The chain: color_jitter (the scene's light and colors), camera_response (exposure and white balance, which change along
a clip), defocus, noise, resizing, sharpening, 4:2:0, eight bits, codec. The flow stays true throughout.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.data.generate.codec import KINDS, through_codec


class Camera(NamedTuple):
    """The settings of B cameras that take T frames each. Pictures are in [0, 1]."""

    contrast: Tensor  # [B]
    gamma: Tensor  # [B]
    saturation: Tensor  # [B] 0 is gray
    lift: Tensor  # [B] added
    tint: Tensor  # [B, 3] factors of R, G, B
    fog: Tensor  # [B] share of the picture that is fog
    fog_color: Tensor  # [B, 3]
    exposure: Tensor  # [B, T] factors, by frame
    response: Tensor  # [B, T] exponents, by frame
    balance: Tensor  # [B, T, 3] factors of R, G, B, by frame
    light: Tensor  # [B, T] strength of uneven light, its own in each frame
    defocus: Tensor  # [B] sigma, pixels
    shot: Tensor  # [B] variance of the noise at full signal (Poisson)
    read: Tensor  # [B] standard deviation of the noise without signal (Gaussian)
    grain: Tensor  # [B] share of the noise that is coarse, as denoisers leave it
    size: Tensor  # [B] pixels of the sensor per pixel of the frame, 1 or less: the frame is enlarged from it
    sharpen: Tensor  # [B] strength of the unsharp mask
    subsampled: Tensor  # [B] bool, chroma at half the size (4:2:0)
    codec: Tensor  # [B] -1 none, else a number of codec.KINDS
    quality: Tensor  # [B] of the codec, 0 best, 1 worst
    begun: Tensor  # [B] bool, the clip began before these frames


class _Draw:
    """Random tensors of shape [B, ...] on the CPU."""

    def __init__(self, count: int, generator: torch.Generator):
        self.count, self.generator = count, generator

    def uniform(self, low: float, high: float, *size: int) -> Tensor:
        return torch.rand(self.count, *size, generator=self.generator) * (high - low) + low

    def log_uniform(self, low: float, high: float, *size: int) -> Tensor:
        return self.uniform(math.log(low), math.log(high), *size).exp()

    def chance(self, probability: float, *size: int) -> Tensor:
        return torch.rand(self.count, *size, generator=self.generator) < probability


def draw_camera(count: int, frames: int, generator: torch.Generator, night: float = 0.06) -> Camera:
    """Returns `count` cameras for clips of so many frames, on the CPU. night: probability of a dark, noisy one."""
    draw = _Draw(count, generator)
    changes = draw.chance(0.4)[:, None]
    dark = draw.chance(night)

    def walk(low: float, high: float, *size: int) -> Tensor:
        """[B, T, *size] factors that change from frame to frame where the camera's do; the first is 1."""
        steps = draw.log_uniform(low, high, frames, *size)
        steps = torch.where(changes.view(-1, 1, *(1,) * len(size)), steps, 1.0)
        steps[:, 0] = 1
        return steps.cumprod(1).clamp(0.6, 1.6)

    exposure = walk(0.85, 1.18) * torch.where(dark, draw.log_uniform(0.2, 0.6), 1.0)[:, None]
    read = draw.uniform(0, 0.03) * draw.chance(0.6)
    kinds = torch.tensor([0.5, 0.25, 0.12, 0.08, 0.05])  # as in codec.KINDS; the last two are slow
    codec = torch.multinomial(kinds, count, replacement=True, generator=generator)
    assert len(kinds) == len(KINDS)
    return Camera(
        contrast=draw.uniform(0.7, 1.4),
        gamma=draw.uniform(0.75, 1.35),
        saturation=draw.uniform(0.3, 1.4) * ~draw.chance(0.1),
        lift=draw.uniform(-0.1, 0.1),
        tint=draw.uniform(0.85, 1.15, 3),
        fog=draw.uniform(0.1, 0.6) * draw.chance(0.08),
        fog_color=draw.uniform(0.5, 1, 3),
        exposure=exposure,
        response=walk(0.88, 1.14),
        balance=walk(0.95, 1.05, 3),
        light=0.12 * draw.chance(0.2, frames),
        defocus=draw.uniform(0.3, 1.6) * draw.chance(0.2),
        shot=torch.where(dark, draw.log_uniform(1e-3, 1e-2), draw.log_uniform(1e-5, 1e-3) * draw.chance(0.6)),
        read=torch.where(dark, draw.uniform(0.005, 0.04), read),
        grain=draw.uniform(0, 1) * draw.chance(0.4),
        size=torch.where(draw.chance(0.12), draw.uniform(0.5, 0.95), 1.0),
        sharpen=draw.uniform(0.2, 1.5) * draw.chance(0.2),
        subsampled=draw.chance(0.4),
        codec=torch.where(draw.chance(0.5), codec, -1),
        quality=draw.uniform(0, 1),
        begun=draw.chance(0.5),
    )


def film(frames: list[Tensor], camera: Camera, generator: torch.Generator) -> list[Tensor]:
    """Returns the frames [B, 3, H, W] in [0, 1] of a clip as the cameras would have taken them, in eight bits.

    Args:
        generator: a CPU generator; the noise itself is drawn on the frames' device, seeded from it.
    """
    device = frames[0].device
    seed = int(torch.randint(2**62, (), generator=generator))
    own = torch.Generator(device=device).manual_seed(seed)
    camera = Camera(*(setting.to(device) for setting in camera))
    taken = []
    for k, frame in enumerate(frames):
        light = torch.randn(len(frame), 1, 3, 4, generator=generator).to(device)
        frame = camera_response(color_jitter(frame, camera), camera, k, light)
        frame = noise(blurred(frame, camera.defocus), camera, own)
        frame = processed(frame, camera)
        taken.append(frame.clamp(0, 1).mul(255).round_().div_(255))
    return through_codec(taken, camera.codec, camera.quality, camera.begun)


def color_jitter(frame: Tensor, camera: Camera) -> Tensor:
    """Returns the frame with the light and colors of the scene changed: what all frames of a clip share."""
    gray = frame.mean(1, keepdim=True)
    frame = gray + (frame - gray) * _wide(camera.saturation)
    frame = (frame - 0.5) * _wide(camera.contrast) * camera.tint[..., None, None] + 0.5 + _wide(camera.lift)
    return frame + _wide(camera.fog) * (camera.fog_color[..., None, None] - frame)


def camera_response(frame: Tensor, camera: Camera, k: int, light: Tensor) -> Tensor:
    """Returns frame number k of a clip as exposed: gain, white balance, curve, uneven light [B, 1, h, w] by frame."""
    gain = camera.exposure[:, k, None, None, None] * camera.balance[:, k, :, None, None]
    lit = camera.light[:, k].nonzero()[:, 0]
    frame = frame * gain
    if len(lit):
        uneven = F.interpolate(light[lit], size=frame.shape[-2:], mode="bilinear", align_corners=True)
        frame[lit] *= 1 + uneven * camera.light[lit, k, None, None, None]
    return frame.clamp(1e-4, 1).log_().mul_(_wide(camera.gamma * camera.response[:, k])).exp_()


def noise(frame: Tensor, camera: Camera, generator: torch.Generator) -> Tensor:
    """Returns the frame with Poisson-Gaussian sensor noise, part of it coarse as denoisers and demosaicing leave it."""
    rows = ((camera.shot > 0) | (camera.read > 0)).nonzero()[:, 0]
    if not len(rows):
        return frame
    part = frame[rows]
    sigma = (_wide(camera.shot[rows]) * part + _wide(camera.read[rows]).square()).sqrt_()
    drawn = torch.randn(part.shape, generator=generator, device=part.device)
    coarse = camera.grain[rows].nonzero()[:, 0]
    if len(coarse):
        share = _wide(camera.grain[rows][coarse])
        soft = F.avg_pool2d(drawn[coarse], 3, 1, 1) * 3  # as strong as before
        drawn[coarse] = (1 - share) * drawn[coarse] + share * soft
    return frame.index_copy(0, rows, part.addcmul_(drawn, sigma))


def processed(frame: Tensor, camera: Camera) -> Tensor:
    """Returns the frame enlarged from a smaller sensor, sharpened, and with its chroma at half the size."""
    frame, size = frame.clone(), frame.shape[-2:]
    for row in (camera.size < 1).nonzero()[:, 0].tolist():
        factor = float(camera.size[row])
        small = [max(1, round(length * factor)) for length in size]
        part = F.interpolate(frame[row : row + 1], size=small, mode="bilinear", antialias=True)
        frame[row : row + 1] = F.interpolate(part, size=size, mode="bilinear")
    rows = (camera.sharpen > 0).nonzero()[:, 0]
    if len(rows):
        part = frame[rows]
        mean = F.avg_pool2d(F.pad(part, (1, 1, 1, 1), mode="replicate"), 3, 1)
        frame[rows] = part + _wide(camera.sharpen[rows]) * (part - mean)
    rows = (camera.subsampled & (camera.codec < 0)).nonzero()[:, 0]  # codecs do it themselves
    if len(rows):
        part = frame[rows].clamp(0, 1)
        luma = (part * part.new_tensor((0.299, 0.587, 0.114))[:, None, None]).sum(1, keepdim=True)
        chroma = F.avg_pool2d(part - luma, 2, ceil_mode=True)
        frame[rows] = luma + F.interpolate(chroma, scale_factor=2, mode="bilinear")[..., : size[0], : size[1]]
    return frame


def blurred(frame: Tensor, sigma: Tensor) -> Tensor:
    """Returns the frame with a Gaussian blur of sigma [B] pixels (at most 2); 0 leaves a sample as it is."""
    rows = sigma.nonzero()[:, 0]
    if not len(rows):
        return frame
    taps = torch.arange(-4, 5, device=frame.device)
    kernel = torch.exp(-(taps**2) / (2 * sigma[rows, None] ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    part = F.pad(frame[rows].flatten(0, 1)[None], (4, 4, 4, 4), mode="replicate")
    part = F.conv2d(part, kernel[:, None, None, :], groups=len(kernel))
    part = F.conv2d(part, kernel[:, None, :, None], groups=len(kernel))
    return frame.index_copy(0, rows, part[0].unflatten(0, (len(rows), 3)))


def _wide(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]
