"""Texture banks from a folder of photographs and cut-outs."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fleetflow.data.generate.held_out import Use, use_of
from fleetflow.data.generate.shapes import GRID
from fleetflow.data.generate.textures import SIDE, Textures, bank, plain_surfaces
from fleetflow.io.images import read_image
from fleetflow.types import FleetflowError

CUTOUTS = 64  # at most
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def photographs(folder: str | Path, limit: int | None = None, seed: int = 0, use: Use = "train") -> Textures:
    """Returns a bank with a square crop of every photograph below `folder`, and the cut-outs there.

    Cut-outs are pictures whose background is transparent. Pictures whose names `held_out.use_of` keeps for another
    use are left out. limit: of each kind, drawn by `seed`; cut-outs are at most CUTOUTS.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in PICTURES)
    if not files:
        raise FleetflowError(f"{folder} holds no pictures ({', '.join(PICTURES)}); name a folder of photographs")
    files = [path for path in files if use_of(path.name) == use]
    if not files:
        raise FleetflowError(f"{folder} holds no pictures for {use}, all names are kept for other uses; add some")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(files), generator=generator).tolist()
    cut = [k for k in order if transparent(files[k])]
    order, cut = [k for k in order if k not in cut][:limit], cut[: min(limit or CUTOUTS, CUTOUTS)]
    surfaces = plain_surfaces(seed=seed)
    pictures = torch.empty(len(order) + len(surfaces) + len(cut), 3, SIDE, SIDE, dtype=torch.float16)
    for row, k in enumerate(order):
        picture = torch.from_numpy(read_image(files[k])).permute(2, 0, 1)[None].float() / 255
        side = min(picture.shape[-2:])
        y, x = (int(torch.randint(size - side + 1, (), generator=generator)) for size in picture.shape[-2:])
        picture = picture[..., y : y + side, x : x + side]
        pictures[row] = F.interpolate(picture, size=(SIDE, SIDE), mode="bilinear", antialias=True)[0].clamp(0, 1)
    pictures[len(order) : len(order) + len(surfaces)] = surfaces
    outlines = torch.empty(len(cut), GRID, GRID)
    for row, k in enumerate(cut):
        pictures[len(order) + len(surfaces) + row], outlines[row] = cut_out(files[k])
    if not order:
        raise FleetflowError(f"{folder} holds cut-outs only; add photographs")
    return bank(pictures, len(surfaces), outlines)


def transparent(path: Path) -> bool:
    """Returns True where a picture has an alpha channel that is not full everywhere."""
    try:
        with Image.open(path) as image:
            return image.mode in ("RGBA", "LA") and bool(np.asarray(image.getchannel("A")).min() < 128)
    except OSError:
        return False  # `read_image` says what is wrong


def cut_out(path: Path) -> tuple[Tensor, Tensor]:
    """Returns the picture [3, SIDE, SIDE] of a cut-out, colors continued beyond its outline, and that outline."""
    color = torch.from_numpy(read_image(path)).permute(2, 0, 1).float() / 255
    with Image.open(path) as image:
        alpha = torch.from_numpy(np.array(image.getchannel("A"))).float()[None] / 255
    layers = torch.cat((color * alpha, alpha))[None]
    height, width = layers.shape[-2:]
    side = round(1.06 * max(height, width))  # with a margin
    left, top = (side - width) // 2, (side - height) // 2
    layers = F.pad(layers, (left, side - width - left, top, side - height - top))
    sharp = F.interpolate(layers, size=(SIDE, SIDE), mode="bilinear", antialias=True)[0]
    picture, known = sharp[:3], sharp[3:]
    for cells in (64, 16, 4, 1):  # what is not known takes the mean of what is, from ever farther away
        coarse = F.adaptive_avg_pool2d(sharp, cells)
        wide = F.interpolate(coarse[None], size=(SIDE, SIDE), mode="bilinear")[0]
        missing = 1 - known.clamp(max=1)
        weight = torch.where(wide[3:] > 1e-3, missing, 0.0)
        picture, known = picture + weight * wide[:3] / wide[3:].clamp(min=1e-3), known + weight
    outline = 2 * F.interpolate(layers[:, 3:], size=(GRID, GRID), mode="bilinear", antialias=True)[0, 0] - 1
    return picture.clamp(0, 1), outline
