"""Pictures by which a network is quantized."""

from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from fleetflow.data.datasets.footage import CLASSES, footage
from fleetflow.export.graph import Sizes
from fleetflow.io.images import list_frames, read_image
from fleetflow.types import FleetflowError

COUNT = 30  # pairs; NNCF's default is 300, of single pictures
OPEN = (256, 384)  # height and width where the file takes any


def pairs(source: str, sizes: Sizes) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns up to COUNT pairs of uint8 [1, H, W, 3] pictures.

    Args:
        source: "footage" (its validation part, all classes), or a folder of frames, which follow one another by name.
        sizes: of the pictures that the file takes.

    Raises:
        FleetflowError: for a folder that is missing or has no such pair.
    """
    found = list(islice(_generated(sizes) if source == "footage" else _filmed(Path(source), sizes), COUNT))
    if not found:
        raise FleetflowError(f"{source} holds no two pictures of one size that the file takes; give other frames")
    return found


def _generated(sizes: Sizes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for image1, image2, _ in generated(sizes.size or OPEN, COUNT):
        yield image1, image2


def generated(
    size: tuple[int, int], count: int, classes: tuple[str, ...] = tuple(CLASSES)
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields image1, image2 (uint8 [1, H, W, 3]) and the true flow [1, H, W, 2] of pairs of footage.

    Args:
        size: height and width.
        count: of pairs.
        classes: of footage, in turn.
    """
    limit = -(-count // len(classes))
    files = footage(classes="+".join(classes), limit=limit, size=f"{size[0]}x{size[1]}")
    for k in range(count):
        sample = files[k]
        images = [(255 * frame).round().clamp(0, 255).byte() for frame in (sample.frame1, sample.frame2)]
        image1, image2, flow = (part.permute(1, 2, 0)[None].contiguous().numpy() for part in (*images, sample.flow))
        yield image1, image2, flow


def _filmed(folder: Path, sizes: Sizes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if not folder.is_dir():
        raise FleetflowError(f'{folder} is no folder; give a folder of frames, or "footage"')
    for first, second in pairwise(list_frames(folder)):
        image1, image2 = read_image(first)[None], read_image(second)[None]
        if (
            image1.shape == image2.shape
            and sizes.height in (None, image1.shape[1])
            and sizes.width in (None, image1.shape[2])
        ):
            yield image1, image2
