"""Texture banks: what the surfaces of generated scenes look like, procedural or cut from a folder of photographs."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.io import read_image
from fleetflow.types import FleetflowError

SIDE = 512  # pixels; a texture is square and continues mirrored beyond its edges
LEVELS = 5  # mip levels: 512, 256, ... 32 pixels
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class Textures(NamedTuple):
    """Square pictures with mip levels, one table of pixels so that one look-up can read from all of them."""

    table: Tensor  # [pixels, 4] float16: R, G, B in [0, 1] and a column of zeros (rows of 8 bytes)
    count: int

    @property
    def device(self) -> torch.device:
        return self.table.device

    def to(self, device) -> "Textures":
        return self._replace(table=self.table.to(device))


def level_start(level: Tensor, count: int) -> Tensor:
    """Returns the first row of a mip level in the table (integer tensor in, integer tensor out)."""
    sizes = torch.tensor([count * (SIDE >> k) ** 2 for k in range(LEVELS)], device=level.device)
    return F.pad(sizes.cumsum(0)[:-1], (1, 0))[level]


def bank(pictures: Tensor) -> Textures:
    """Returns the bank of [T, 3, SIDE, SIDE] pictures in [0, 1]."""
    rows, level = [], pictures.half()
    for k in range(LEVELS):
        if k:
            level = F.avg_pool2d(level.float(), 2).half()
        pixels = level.permute(0, 2, 3, 1).reshape(-1, 3)
        rows.append(F.pad(pixels, (0, 1)))
    return Textures(torch.cat(rows), len(pictures))


def photographs(folder: str | Path, limit: int | None = None, seed: int = 0) -> Textures:
    """Returns a bank with a square crop of every picture below `folder` (of `limit` of them, drawn by `seed`)."""
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in PICTURES)
    if not files:
        raise FleetflowError(f"{folder} holds no pictures ({', '.join(PICTURES)}); name a folder of photographs")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(files), generator=generator).tolist()[:limit]
    pictures = torch.empty(len(order), 3, SIDE, SIDE, dtype=torch.float16)
    for row, k in enumerate(order):
        picture = torch.from_numpy(read_image(files[k])).permute(2, 0, 1)[None].float() / 255
        side = min(picture.shape[-2:])
        y, x = (int(torch.randint(size - side + 1, (), generator=generator)) for size in picture.shape[-2:])
        picture = picture[..., y : y + side, x : x + side]
        pictures[row] = F.interpolate(picture, size=(SIDE, SIDE), mode="bilinear", antialias=True)[0].clamp(0, 1)
    return bank(pictures)


def procedural(count: int = 48, seed: int = 0) -> Textures:
    """Returns a bank of `count` textures made of noise, dead leaves, stripes and gradients: no picture needed."""
    generator = torch.Generator().manual_seed(seed)
    makers = (_clouds, _leaves, _stripes, _cells)
    pictures = torch.stack([_painted(makers[k % len(makers)](generator), generator) for k in range(count)])
    return bank(pictures)


def _rand(generator: torch.Generator, *size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.rand(size, generator=generator) * (high - low) + low


def _clouds(generator: torch.Generator) -> Tensor:
    """Noise with a power spectrum 1 / f^a, a between 0.7 and 2 in amplitude: [3, SIDE, SIDE], any range."""
    slope = float(_rand(generator, 1, low=0.7, high=2.0))
    total = torch.zeros(3, SIDE, SIDE)
    for octave in range(1, 9):
        grid = torch.randn(1, 3, 2**octave + 1, 2**octave + 1, generator=generator)
        total += F.interpolate(grid, size=(SIDE, SIDE), mode="bicubic")[0] * 2 ** (-slope * (octave - 1) / 1.5)
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
        colour = torch.randn(3, 1, 1, generator=generator)
        ramp = 0.4 * float(torch.randn(1, generator=generator)) * (x[box] - cx) / radius
        picture[(slice(None), *box)] = torch.where(inside, colour + ramp, picture[(slice(None), *box)])
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
    """Worley cells: every pixel has the colour of its nearest seed, darker towards the border: [3, SIDE, SIDE]."""
    seeds = int(_rand(generator, 1, low=20, high=150))
    small = SIDE // 2
    y, x = torch.meshgrid(torch.arange(small) / small, torch.arange(small) / small, indexing="ij")
    points = _rand(generator, seeds, 2)
    distance = (x[..., None] - points[:, 0]) ** 2 + (y[..., None] - points[:, 1]) ** 2
    two = distance.topk(2, largest=False)
    colour = torch.randn(seeds, 3, generator=generator)[two.indices[..., 0]].permute(2, 0, 1)
    border = (two.values[..., 1].sqrt() - two.values[..., 0].sqrt()) * seeds**0.5
    cells = colour * (0.3 + 0.7 * border.clamp(0, 0.5) * 2)
    return F.interpolate(cells[None], size=(SIDE, SIDE), mode="bilinear")[0] + 0.2 * _clouds(generator)


def _painted(values: Tensor, generator: torch.Generator) -> Tensor:
    """Values of any range -> colours in [0, 1]: channels mixed, brightness and contrast drawn."""
    values = (values - values.mean()) / (values.std() + 1e-6)
    gray = values.mean(0, keepdim=True)
    values = gray + (values - gray) * float(_rand(generator, 1, low=0, high=1))
    contrast, level = float(_rand(generator, 1, low=0.06, high=0.3)), _rand(generator, 3, 1, 1, low=0.25, high=0.75)
    return (level + contrast * values).clamp(0, 1)
