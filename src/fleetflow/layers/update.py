"""The recurrent update of RAFT (arXiv 2003.12039, section 3.3) and its descendants, in parts, and the loop over it.

Every part takes its widths, so that larger and smaller descendants are built of the same ones.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleetflow.ops.all_pairs import AllPairs, lookup
from fleetflow.ops.constant import constant
from fleetflow.ops.warp import pixel_grid

LEVELS = 4  # of the correlation pyramid
SMALLEST = 128  # pixels of a frame's side; below, the coarsest level of the pyramid would be a single pixel


class MotionEncoder(nn.Module):
    """Correlation [N, inputs, h, w] and flow [N, 2, h, w] -> [N, outputs, h, w], of which the last two are the flow.

    correlation_widths, flow_widths: channels of the two convolutions on either.
    """

    def __init__(
        self,
        inputs: int,
        correlation_widths: tuple[int, int] = (256, 192),
        flow_widths: tuple[int, int] = (128, 64),
        outputs: int = 128,
    ):
        super().__init__()
        self.convc1 = nn.Conv2d(inputs, correlation_widths[0], 1)
        self.convc2 = nn.Conv2d(*correlation_widths, 3, padding=1)
        self.convf1 = nn.Conv2d(2, flow_widths[0], 7, padding=3)
        self.convf2 = nn.Conv2d(*flow_widths, 3, padding=1)
        self.conv = nn.Conv2d(correlation_widths[1] + flow_widths[1], outputs - 2, 3, padding=1)

    def forward(self, correlation: Tensor, flow: Tensor) -> Tensor:
        similar = F.relu(self.convc2(F.relu(self.convc1(correlation))))
        moved = F.relu(self.convf2(F.relu(self.convf1(flow))))
        return torch.cat((F.relu(self.conv(torch.cat((similar, moved), 1))), flow), 1)


def gated(hidden: Tensor, x: Tensor, update: nn.Module, reset: nn.Module, candidate: nn.Module) -> Tensor:
    """Returns the next hidden state of a gated recurrent unit, eqs. 3 to 6: [N, hidden, h, w] like the one given."""
    both = torch.cat((hidden, x), 1)
    z, r = torch.sigmoid(update(both)), torch.sigmoid(reset(both))
    q = torch.tanh(candidate(torch.cat((r * hidden, x), 1)))
    return (1 - z) * hidden + z * q


class SeparableGRU(nn.Module):
    """Hidden state [N, hidden, h, w] and input [N, inputs, h, w] -> next state: a unit of 1x5, then one of 5x1."""

    def __init__(self, hidden: int, inputs: int):
        super().__init__()
        for name, kernel in (("1", (1, 5)), ("2", (5, 1))):
            padding = (kernel[0] // 2, kernel[1] // 2)
            for gate in ("convz", "convr", "convq"):
                self.add_module(gate + name, nn.Conv2d(hidden + inputs, hidden, kernel, padding=padding))

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        hidden = gated(hidden, x, self.convz1, self.convr1, self.convq1)
        return gated(hidden, x, self.convz2, self.convr2, self.convq2)


class FlowHead(nn.Module):
    """Hidden state [N, hidden, h, w] -> change of the flow [N, 2, h, w], pixels of that grid."""

    def __init__(self, hidden: int, width: int = 256):
        super().__init__()
        self.conv1 = nn.Conv2d(hidden, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(hidden)))


class MaskHead(nn.Sequential):
    """Hidden state [N, hidden, h, w] -> weights [N, 576, h, w] for `convex_upsample`.

    The last factor, 0.25, balances the gradients, as published.
    """

    def __init__(self, hidden: int):
        super().__init__(nn.Conv2d(hidden, 256, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(256, 64 * 9, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        return 0.25 * super().forward(hidden)


def refine(
    update: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    pyramid: AllPairs,
    hidden: Tensor,
    flow: Tensor,
    radius: int,
    steps: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the hidden state and the flow [N, 2, h, w] float32 after each of `steps` steps.

    update: (hidden, correlation, flow) -> (hidden, change of the flow), flow in pixels of the coarse grid.
    No gradient flows from one step's flow to the step before, only through the hidden state.
    """
    grid = pixel_grid(*flow.shape[-2:], flow)
    for _ in range(steps):
        flow = flow.detach()
        correlation = lookup(pyramid, grid + flow, radius)
        moved = flow.to(hidden.dtype, memory_format=torch.channels_last)  # like the features it is put beside
        hidden, change = update(hidden, correlation.to(hidden.dtype), moved)
        flow = flow + change.to(flow.dtype)
        yield hidden, flow


def grown(frame: Tensor) -> Tensor:
    """Returns the frame [N, C, H, W], enlarged bilinearly until no side is shorter than SMALLEST.

    Both sides grow by one factor, as long as the longer one stays within four times SMALLEST. On crops of 64x64 pixels
    of real pairs this halves the error of the published RAFT-small against repeating the edge pixels up to 128x128
    (0.70 px, 1.36 px).
    """
    height, width = frame.shape[-2:]
    factor = SMALLEST / min(height, width)
    if factor <= 1:
        return frame
    size = tuple(max(side, SMALLEST, min(int(side * factor), 4 * SMALLEST) // 8 * 8) for side in (height, width))
    return F.interpolate(frame, size=size, mode="bilinear", align_corners=False)


def shrunk(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the flow [N, 2, H, W] of grown frames for frames of `size` (height, width), in their pixels."""
    height, width = flow.shape[-2:]
    if (height, width) == tuple(size):
        return flow
    factors = constant((size[1] / width, size[0] / height), flow)[:, None, None]
    return F.interpolate(flow, size=size, mode="bilinear", align_corners=False) * factors
