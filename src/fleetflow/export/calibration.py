"""Pictures by which a network is quantized."""

from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch

from fleetflow.data.generate import generate
from fleetflow.export.graph import Sizes
from fleetflow.io.images import list_frames, read_image
from fleetflow.types import FleetflowError

COUNT = 48  # pairs; NNCF's default is 300, of single pictures
OPEN = (256, 384)  # height and width where the file takes any


def pairs(source: str, sizes: Sizes) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns up to COUNT pairs of uint8 [1, H, W, 3] pictures.

    Args:
        source: "generated", or a folder of frames, which follow one another by name.
        sizes: of the pictures that the file takes.
    """
    found = list(islice(_generated(sizes) if source == "generated" else _filmed(Path(source), sizes), COUNT))
    if not found:
        raise FleetflowError(f"{source} holds no two pictures of one size that the file takes; give other frames")
    return found


def _generated(sizes: Sizes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for k in range(COUNT):
        sample = generate(1, *(sizes.size or OPEN), seed=2026, index=k)
        frames = ((255 * frame).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous() for frame in sample[:2])
        image1, image2 = (frame.numpy() for frame in frames)
        yield image1, image2


def _filmed(folder: Path, sizes: Sizes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if not folder.is_dir():
        raise FleetflowError(f'{folder} is no folder; give a folder of frames, or "generated"')
    for first, second in pairwise(list_frames(folder)):
        image1, image2 = read_image(first)[None], read_image(second)[None]
        if (
            image1.shape == image2.shape
            and sizes.height in (None, image1.shape[1])
            and sizes.width in (None, image1.shape[2])
        ):
            yield image1, image2
