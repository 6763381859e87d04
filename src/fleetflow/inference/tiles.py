"""Frames that are too large for the memory, predicted in tiles that overlap, and whose flows fade into each other."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fleetflow.types import Prediction

OVERLAP = 128  # pixels that neighboring tiles share; of these the outer quarter on either side is not used
MULTIPLE = 64  # of the sides of tiles: the largest stride of a network
SMALLEST = (2 * OVERLAP) ** 2  # pixels of a tile


def tile_size(height: int, width: int, pixels: int) -> tuple[int, int]:
    """Returns height and width of the largest tiles of at most so many pixels that cover a frame in an even grid."""
    for count in range(1, height * width):
        fitting = []
        for rows in (rows for rows in range(1, count + 1) if count % rows == 0):
            tile = _side(height, rows), _side(width, count // rows)
            if math.prod(tile) <= pixels:
                fitting.append(tile)
        if fitting:
            return min(fitting, key=lambda tile: abs(math.log(tile[0] / tile[1])))
    return MULTIPLE, MULTIPLE


def _side(length: int, count: int) -> int:
    """The side of `count` tiles that cover `length` with their overlaps."""
    side = -(-(length + (count - 1) * OVERLAP) // count)
    return max(-(-side // MULTIPLE) * MULTIPLE, 2 * OVERLAP) if count > 1 else length


def tiled(run: Callable[[Tensor, Tensor], Prediction], frame1: Tensor, frame2: Tensor, pixels: int) -> Prediction:
    """Returns the flow of frames [N, 3, H, W], predicted in tiles of at most so many pixels.

    Motion that leaves a tile and its overlaps is not seen in it.
    """
    height, width = frame1.shape[-2:]
    tile = tile_size(height, width, pixels)
    total = frame1.new_zeros(len(frame1), 2, height, width, dtype=torch.float32)
    weights = frame1.new_zeros(1, 1, height, width, dtype=torch.float32)
    for rows, row_weights in _places(height, tile[0]):
        for columns, column_weights in _places(width, tile[1]):
            place = (..., rows, columns)
            flow = run(frame1[place].contiguous(), frame2[place].contiguous()).flow.float()
            weight = (row_weights[:, None] * column_weights).to(flow.device)
            total[place] += flow * weight
            weights[place] += weight
    return Prediction(total.div_(weights))


def _places(length: int, side: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields where the tiles lie along one axis, and what their pixels count: less towards a neighbor."""
    if side >= length:
        yield slice(0, length), torch.ones(length)
        return
    count = -(-(length - OVERLAP) // (side - OVERLAP))
    for k in range(count):
        start = round(k * (length - side) / (count - 1))
        ramp = ((torch.arange(side) + 0.5 - OVERLAP / 4) / (OVERLAP / 2)).clamp(1e-4, 1)
        weight = torch.ones(side)
        weight = weight * ramp if start > 0 else weight
        weight = weight * ramp.flip(0) if start + side < length else weight
        yield slice(start, start + side), weight
