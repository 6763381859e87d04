"""Resizing as networks had it whose frames were resized as 8-bit pictures by OpenCV (PWC-Net, LiteFlowNet2)."""

import torch
from torch import Tensor

from fleetflow.types import Size, size_of


def resize_8bit(frame: Tensor, size: Size) -> Tensor:
    """Returns the frame [N, 3, H, W] in [0, 1], resized bilinearly to `size` as OpenCV resizes 8-bit pictures.

    Weights are whole multiples of 1/2048, and each product is cut off at a quarter of a level of brightness. A frame
    that has the size comes back as it is; in an exported graph, whose sizes are open, rounded to levels of 1/255.
    """
    if not torch.compiler.is_exporting() and size_of(frame) == size:
        return frame

    def neighbors(old: int, new: int) -> tuple[Tensor, ...]:
        at = (torch.arange(new, dtype=torch.float64, device="cpu") + 0.5) * (old / new) - 0.5  # not all devices have it
        first = at.floor()
        share = ((at - first) * 2048).round().int()
        both = first.long().clamp(min=0), (first.long() + 1).clamp(max=old - 1)
        return tuple(values.to(frame.device) for values in (*both, 2048 - share, share))

    left, right, left_share, right_share = neighbors(frame.shape[3], size[1])
    top, bottom, top_share, bottom_share = neighbors(frame.shape[2], size[0])
    levels = (frame.float() * 255).round().int()
    rows = (levels[..., left] * left_share + levels[..., right] * right_share) >> 4
    quarters = (rows[..., top, :] * top_share[:, None] >> 16) + (rows[..., bottom, :] * bottom_share[:, None] >> 16)
    return ((quarters + 2) >> 2).to(frame.dtype) / 255
