"""Bilinear resizing, pixel edges aligned: a few planes of a flow on a CPU faster than torch does it."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.ops.kernels import is_captured, is_reference
from fleetflow.types import Size

PLANES = 2  # channels of a flow


def resize(picture: Tensor, size: Size) -> Tensor:
    """Returns the picture [N, C, h, w], bilinearly resized to `size` (height, width), pixel edges aligned.

    torch mixes four numbers for each pixel. Flows that grow are made wider by torch first, while they have few rows, and
    then higher by mixing whole rows: on a CPU two to four times as fast, the same but for rounding.
    """
    if picture.shape[1] > PLANES:
        return _plain(picture, size)
    picture = picture.contiguous()  # a flow as two planes: three times faster than as pairs
    mixes = picture.device.type == "cpu" and picture.dtype in (torch.float32, torch.float64)
    if not mixes or picture.requires_grad or is_captured() or is_reference() or size[0] <= picture.shape[2]:
        return _plain(picture, size)
    return _higher(_plain(picture, (picture.shape[2], size[1])), size[0])


def _plain(picture: Tensor, size: Size) -> Tensor:
    return F.interpolate(picture, size=tuple(size), mode="bilinear", align_corners=False)


def _higher(planes: Tensor, height: int) -> Tensor:
    """The planes [N, C, h, w] with `height` rows, each a mean of the two rows beside it."""
    above, below, share = _rows(planes.shape[2], height)
    return torch.lerp(planes.index_select(2, above), planes.index_select(2, below), share.to(planes.dtype))


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _rows(old: int, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the `old` rows are above and below each of the `new` ones, and the share of the lower one, [new, 1]."""
    place = ((torch.arange(new) + 0.5) * (old / new) - 0.5).clamp_(min=0)  # in float32, as torch has it
    above = place.long()
    return above, (above + 1).clamp_(max=old - 1), (place - above)[:, None]
