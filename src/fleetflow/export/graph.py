"""The graph that is exported: uint8 RGB pictures in, flow in pixels out, and all that lies between inside of it."""

import copy
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleetflow.export.forms import for_runtimes
from fleetflow.models.base import FlowModel, resize
from fleetflow.ops.constant import constant
from fleetflow.types import FleetflowError

LARGEST_SIDE, LARGEST_BATCH = 8192, 64  # that a graph with open sizes is promised for
UNLIMITED = 2**62  # bytes that stored correlations may take: in a graph nothing is computed at the lookup


class Sizes(NamedTuple):
    """Which pictures a graph takes: of one height and width, or of any from `least` on.

    height, width: fixed pixels, or None for any. batch: whether the number of pairs is open; else it is 1.
    """

    height: int | None = None
    width: int | None = None
    batch: bool = True
    least: int = 64


class Graph(nn.Module):
    """A network with its preprocessing and its way back: (image1, image2) -> flow.

    image1, image2: uint8 [N, H, W, 3], RGB, as pictures lie in memory. The result is float32 [N, H, W, 2], pixels to the
    right and downwards, as a .flo file holds them.
    """

    def __init__(self, model: FlowModel, iterations: int | None):
        super().__init__()
        self.model, self.iterations = model, model.iterations_of(iterations)

    def forward(self, image1: Tensor, image2: Tensor) -> Tensor:
        frames = [image.permute(0, 3, 1, 2).float() / 255 for image in (image1, image2)]
        return flow_of(self.model, *frames, self.iterations).permute(0, 2, 3, 1)


def flow_of(model: FlowModel, frame1: Tensor, frame2: Tensor, iterations: int | None) -> Tensor:
    """Returns the flow [N, 2, H, W] as `FlowModel.forward` does, without a branch that depends on the size.

    Frames that fit are padded by nothing or resized to their own size, which leaves them as they are.
    """
    height, width = frame1.shape[-2:]
    new_height, new_width = ((size + model.stride - 1) // model.stride * model.stride for size in (height, width))
    frame1, frame2 = model.prepare(frame1, frame2)
    if model.fit == "scale":
        frame1, frame2 = (resize(frame, (new_height, new_width)) for frame in (frame1, frame2))
        flow = resize(model.estimate(frame1, frame2, None, iterations).flow.float(), (height, width))
        return flow * constant((width / new_width, height / new_height), flow)[:, None, None]
    left = (new_width - width) // 2
    top = 0 if model.fit == "pad_bottom" else (new_height - height) // 2
    sides = (left, new_width - width - left, top, new_height - height - top)
    frame1, frame2 = (F.pad(frame, sides, mode="replicate") for frame in (frame1, frame2))
    flow = model.estimate(frame1, frame2, None, iterations).flow.float()
    return flow[..., top : top + height, left : left + width]
