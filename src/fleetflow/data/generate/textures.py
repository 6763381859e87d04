"""Texture banks: what the surfaces of generated scenes look like, procedural ones here, others in `photographs.py`.

A bank has three parts, in this order: pictures; plain surfaces (asphalt, walls, skies), always procedural; cut-outs,
which are pictures of single objects and bring their outlines.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.data.generate.shapes import GRID

SIDE = 512  # pixels; a texture is square and continues mirrored beyond its edges
LEVELS = 5  # mip levels: 512, 256, ... 32 pixels


class Textures(NamedTuple):
    """Square pictures with mip levels, one table of pixels so that one look-up can read from all of them."""

    table: Tensor  # [pixels, 4] float16: R, G, B in [0, 1] and a column of zeros (rows of 8 bytes)
    count: int  # pictures
    plain: int = 0  # plain surfaces
    outlines: Tensor = torch.empty(0, GRID, GRID)  # [C, GRID, GRID] of the cut-outs, as of `shapes.shape_bank`

    @property
    def total(self) -> int:
        return self.count + self.plain + len(self.outlines)

    @property
    def device(self) -> torch.device:
        return self.table.device

    def to(self, device) -> "Textures":
        return self._replace(table=self.table.to(device), outlines=self.outlines.to(device))


def level_start(level: Tensor, count: int) -> Tensor:
    """Returns the first row of a mip level in a table of `count` textures (integer tensor in, integer tensor out)."""
    sizes = torch.tensor([count * (SIDE >> k) ** 2 for k in range(LEVELS)], device=level.device)
    return F.pad(sizes.cumsum(0)[:-1], (1, 0))[level]


def bank(pictures: Tensor, plain: int = 0, outlines: Tensor | None = None) -> Textures:
    """Returns the bank of [T, 3, SIDE, SIDE] pictures in [0, 1], the last of them plain surfaces, then cut-outs."""
    rows, level = [], pictures.half()
    for k in range(LEVELS):
        if k:
            level = F.avg_pool2d(level.float(), 2).half()
        pixels = level.permute(0, 2, 3, 1).reshape(-1, 3)
        rows.append(F.pad(pixels, (0, 1)))
    outlines = torch.empty(0, GRID, GRID) if outlines is None else outlines
    return Textures(torch.cat(rows), len(pictures) - plain - len(outlines), plain, outlines)


def procedural(count: int = 48, seed: int = 0) -> Textures:
    """Returns a bank of `count` textures made of noise, dead leaves, stripes and gradients: no picture needed."""
    generator = torch.Generator().manual_seed(seed)
    makers = (_clouds, _leaves, _stripes, _cells)
    pictures = torch.stack([_painted(makers[k % len(makers)](generator), generator) for k in range(count)])
    surfaces = plain_surfaces(seed=seed)
    return bank(torch.cat((pictures, surfaces)), len(surfaces))


def plain_surfaces(count: int = 24, seed: int = 0) -> Tensor:
    """Returns [count, 3, SIDE, SIDE]: asphalt and concrete, walls, skies and water, all of low contrast."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([_plain(k % 3, generator) for k in range(count)])


def _plain(kind: int, generator: torch.Generator) -> Tensor:
    """A gray or dark ground with fine grain (0), a wall of hardly any texture (1), a gradient with soft clouds (2)."""
    y, x = torch.meshgrid(torch.arange(SIDE) / SIDE, torch.arange(SIDE) / SIDE, indexing="ij")
    tint = 1 + 0.04 * torch.randn(3, 1, 1, generator=generator)
    angle = 6.283 * _rand(generator, 1)
    ramp = (x - 0.5) * angle.cos() + (y - 0.5) * angle.sin()
    if kind == 2:
        level, contrast, slope = _rand(generator, 3, 1, 1, low=0.35, high=0.9), 0.08 * _rand(generator, 1), 0.3
        grain = torch.zeros(3, SIDE, SIDE)
        for octave in range(1, 6):
            field = torch.randn(1, 1, 2**octave + 1, 2**octave + 1, generator=generator)
            grain = grain + F.interpolate(field, size=(SIDE, SIDE), mode="bicubic")[0] * 2 ** (1 - octave)
    else:
        level = _rand(generator, 1, low=0.08, high=0.45) if kind == 0 else _rand(generator, 1, low=0.2, high=0.9)
        contrast = 0.006 * 6 ** _rand(generator, 1) if kind == 0 else 0.002 * 6 ** _rand(generator, 1)
        slope = 0.1
        small = SIDE // int(2 ** torch.randint(0, 3, (), generator=generator))
        fine = torch.randn(1, 1, small, small, generator=generator)
        fine = F.interpolate(fine, size=(SIDE, SIDE), mode="bilinear")[0]
        broad = _clouds(generator, channels=1)
        grain = fine / fine.std() + 0.7 * broad / broad.std()
    return (level * tint + contrast * grain + slope * _rand(generator, 1) * ramp).clamp(0, 1)


def _rand(generator: torch.Generator, *size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.rand(size, generator=generator) * (high - low) + low


def _clouds(generator: torch.Generator, channels: int = 3) -> Tensor:
    """Noise with a power spectrum 1 / f^a, a between 0.7 and 2 in amplitude: [channels, SIDE, SIDE], any range.

    Three channels are drawn, however many are enlarged.
    """
    slope = float(_rand(generator, 1, low=0.7, high=2.0))
    total = torch.zeros(channels, SIDE, SIDE)
    for octave in range(1, 9):
        grid = torch.randn(1, 3, 2**octave + 1, 2**octave + 1, generator=generator)[:, :channels]
        total += F.interpolate(grid, size=(SIDE, SIDE), mode="bicubic")[0].mul_(2 ** (-slope * (octave - 1) / 1.5))
    return total


def _leaves(generator: torch.Generator) -> Tensor:
    """Dead leaves: discs and squares of many sizes on top of one another, with power-law radii: [3, SIDE, SIDE]."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    picture = _clouds(generator) * 0.1
    for _ in range(220):
        radius = 6.0 * (1 - 0.995 * float(_rand(generator, 1))) ** (-1 / 1.5)
        radius = int(min(radius, SIDE / 3)) + 2
        cx, cy = (_rand(generator, 2) * SIDE).int().tolist()
        box = (slice(max(cy - radius, 0), cy + radius), slice(max(cx - radius, 0), cx + radius))
        dx, dy = (x[box] - cx).float().abs(), (y[box] - cy).float().abs()
        inside = dx**2 + dy**2 < radius**2 if _rand(generator, 1) < 0.6 else dx + 0.3 * dy < 0.9 * radius
        color = torch.randn(3, 1, 1, generator=generator)
        ramp = 0.4 * float(torch.randn(1, generator=generator)) * (x[box] - cx) / radius
        picture[(slice(None), *box)] = torch.where(inside, color + ramp, picture[(slice(None), *box)])
    return picture + 0.15 * torch.randn(1, SIDE, SIDE, generator=generator)


def _stripes(generator: torch.Generator) -> Tensor:
    """Two waves of random direction and shape, bent by clouds, as on cloth, walls and fences: [3, SIDE, SIDE]."""
    y, x = torch.meshgrid(torch.arange(SIDE) / SIDE, torch.arange(SIDE) / SIDE, indexing="ij")
    bend = _clouds(generator)
    total = 0.25 * bend
    for k in range(2):
        angle, turns = _rand(generator, 1) * 6.283, 4 * 2 ** _rand(generator, 1, low=0, high=4)
        wave = torch.sin(6.283 * turns * (x * angle.cos() + y * angle.sin()) + bend[k] * float(_rand(generator, 1)))
        hard = 1 + 6 * float(_rand(generator, 1))
        total = total + torch.tanh(hard * wave) * torch.randn(3, 1, 1, generator=generator)
    return total


def _cells(generator: torch.Generator) -> Tensor:
    """Worley cells: every pixel has the color of its nearest seed, darker towards the border: [3, SIDE, SIDE]."""
    seeds = int(_rand(generator, 1, low=20, high=150))
    small = SIDE // 2
    y, x = torch.meshgrid(torch.arange(small) / small, torch.arange(small) / small, indexing="ij")
    points = _rand(generator, seeds, 2)
    distance = (x[..., None] - points[:, 0]) ** 2 + (y[..., None] - points[:, 1]) ** 2
    first, nearest = distance.min(-1)
    second = distance.scatter_(-1, nearest[..., None], torch.inf).amin(-1)
    color = torch.randn(seeds, 3, generator=generator)[nearest].permute(2, 0, 1)
    border = (second.sqrt() - first.sqrt()) * seeds**0.5
    cells = color * (0.3 + 0.7 * border.clamp(0, 0.5) * 2)
    return F.interpolate(cells[None], size=(SIDE, SIDE), mode="bilinear")[0] + 0.2 * _clouds(generator)


def _painted(values: Tensor, generator: torch.Generator) -> Tensor:
    """Values of any range -> colors in [0, 1]: channels mixed, brightness and contrast drawn."""
    values = (values - values.mean()) / (values.std() + 1e-6)
    gray = values.mean(0, keepdim=True)
    values = gray + (values - gray) * float(_rand(generator, 1, low=0, high=1))
    contrast, level = float(_rand(generator, 1, low=0.06, high=0.3)), _rand(generator, 3, 1, 1, low=0.25, high=0.75)
    return (level + contrast * values).clamp(0, 1)
