"""The two central types, and the one convention of axes, units and ranges that everything keeps.

frames   RGB, float in [0, 1], [3, H, W] or a batch [N, 3, H, W]
flow     pixels, [2, H, W] or [N, 2, H, W]; channel 0 is u (to the right), channel 1 is v (downwards);
         it goes from frame1 to frame2:  frame1(x) ~ frame2(x + flow(x))
valid    bool, [H, W] or [N, H, W]; where it is False the flow is unknown, and stored as 0
arrays   at the doors (files, `Predictor`) pictures and flows are numpy [H, W, C], pictures uint8 RGB
"""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # the command line reads this file before it needs torch
    from torch import Tensor


class FleetflowError(ValueError):
    """Something the user can fix. The message is one line: what happened, what was expected, what to do."""


Size = tuple[int, int]  # height and width, in pixels


def checked_size(size: Size) -> Size:
    """Returns height and width as whole numbers; raises FleetflowError for others, and for what is not over 0."""
    try:
        height, width = map(index, size)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise FleetflowError(f"size is {size!r}; expected height and width in pixels, such as (448, 1024)")
    return height, width


def size_of(planes: Tensor) -> Size:
    """Returns height and width of a tensor [..., H, W]; symbols where torch.export or a trace follows them."""
    height, width = planes.shape[-2:]
    return height, width


class Sample(NamedTuple):
    """One training or test example; a batch is the same type with a leading N on every field."""

    frame1: Tensor  # [3, H, W] float in [0, 1], RGB
    frame2: Tensor  # [3, H, W]
    flow: Tensor  # [2, H, W] pixels, frame1 -> frame2
    valid: Tensor  # [H, W] bool
    backward: Tensor | None = None  # [2, H, W] pixels, frame2 -> frame1, where it is known
    occluded: Tensor | None = None  # [H, W] bool: pixels of frame1 that frame2 does not show
    truths: Tensor | None = None  # [K, 2, H, W] pixels, for scores: all true vectors of a pixel (Spring has 4)


class Prediction(NamedTuple):
    """What a network returns for a batch of N pairs."""

    flow: Tensor  # [N, 2, H, W] pixels at the full resolution of the frames
    intermediate_flows: tuple[Tensor, ...] = ()  # in training: earlier or coarser flows, in pixels of their own grids
    state: Any = None  # what the network wants back with the next frame (hidden state, fixed point)
    residual: Tensor | None = None  # [N, H, W] fixed-point error of equilibrium networks
    uncertainty: Tensor | None = None  # [N, H, W] pixels: how far the flow may be off
    occlusion: Tensor | None = None  # [N, H, W] probability that frame2 does not show the pixel
    backward: Tensor | None = None  # [N, 2, H, W] pixels, frame2 -> frame1, where both directions were asked for
    features: Any = None  # of frame2, for the next pair of a clip, where they were asked for (`models.base.Clip`)
