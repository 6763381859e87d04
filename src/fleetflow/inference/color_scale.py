"""One color scale for a whole clip, chosen from a few of its pairs before the first is drawn."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np

from fleetflow.io.video import VideoReader
from fleetflow.visualise import clip_scale, robust_scale

SCOUTS = 12  # pairs that are looked at
KEPT = 2**28  # bytes of their flows that are kept for when their turn comes


def scouts(pairs: int) -> list[int]:
    """Returns the indices of up to SCOUTS pairs, spread evenly from the first to the last."""
    return sorted({round(k * (pairs - 1) / (SCOUTS - 1)) for k in range(SCOUTS)}) if pairs > 0 else []


def scouted(flows: Iterable[tuple[int, np.ndarray]]) -> tuple[float, dict[int, np.ndarray]]:
    """Returns the scale in pixels for the flows [H, W, 2] of some pairs, and those that can be kept, by index."""
    scales, kept, size = [], {}, 0
    for k, flow in flows:
        scales.append(robust_scale(flow))
        size += flow.nbytes
        if size <= KEPT:
            kept[k] = flow
    return clip_scale(scales or [1.0]), kept


def video_scouts(reader: VideoReader) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields (index, frame, next frame) of the scouts of a video, seeking where the file allows it."""
    chosen = scouts((reader.counted() or 25 * SCOUTS) - 1)
    if reader.seekable:
        for k in chosen:
            for image1, image2 in pairwise(reader.among(k, 2)):
                yield k, image1, image2
        return
    for k, (image1, image2) in enumerate(pairwise(reader.among(0, chosen[-1] + 2 if chosen else 2))):
        if k in chosen:
            yield k, image1, image2
