"""The recurrent update of RAFT (arXiv 2003.12039, section 3.3) and its descendants, in parts, and the plain loop over it.

Every part takes its widths, so that larger and smaller descendants are built of the same ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fleetflow.ops.all_pairs import AllPairs, lookup

LEVELS = 4  # of the correlation pyramid
State = tuple[Tensor, Tensor]  # hidden [N, C, h, w], flow [N, 2, h, w] in pixels of the coarse grid


class ConvReLU(nn.Conv2d):
    """A convolution and what is positive of it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu_()


class MotionEncoder(nn.Module):
    """Correlation [N, inputs, h, w] and flow [N, 2, h, w] -> [N, outputs, h, w], of which the last two are the flow.

    Args:
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
        self.convc1 = ConvReLU(inputs, correlation_widths[0], 1)
        self.convc2 = ConvReLU(*correlation_widths, 3, padding=1)
        self.convf1 = ConvReLU(2, flow_widths[0], 7, padding=3)
        self.convf2 = ConvReLU(*flow_widths, 3, padding=1)
        self.conv = ConvReLU(correlation_widths[1] + flow_widths[1], outputs - 2, 3, padding=1)

    def forward(self, correlation: Tensor, flow: Tensor) -> Tensor:
        similar = self.convc2(self.convc1(correlation))
        moved = self.convf2(self.convf1(flow))
        return torch.cat((self.conv(torch.cat((similar, moved), 1)), flow), 1)


class GRU(nn.Module):
    """Gated recurrent unit with convolutions, eqs. 3 to 6: one unit for each kernel, one after the other.

    Args:
        hidden, inputs: channels of the state, and of context and motion together.
        kernels: (rows, columns) by the ending of the names of the unit's convolutions. Made ready for prediction by
            `layers.fused.FusedGRU`.
    """

    def __init__(self, hidden: int, inputs: int, kernels: dict[str, tuple[int, int]]):
        super().__init__()
        self.endings = tuple(kernels)
        for ending, (rows, columns) in kernels.items():
            for gate in ("convz", "convr", "convq"):
                layer = nn.Conv2d(hidden + inputs, hidden, (rows, columns), padding=(rows // 2, columns // 2))
                self.add_module(gate + ending, layer)

    def units(self) -> list[tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d]]:
        """Returns for each unit its convolutions for update, reset and candidate."""
        return [tuple(getattr(self, gate + end) for gate in ("convz", "convr", "convq")) for end in self.endings]

    def prepare(self, context: Tensor) -> Tensor:
        """Returns what `forward` takes as the context [N, C, h, w], which is the same in all iterations."""
        return context

    def forward(self, hidden: Tensor, context: Tensor, motion: Tensor) -> Tensor:
        """Returns the next state, [N, hidden, h, w] like the one given, which may be of a wider dtype than the rest."""
        x = torch.cat((context, motion), 1)
        for update, reset, candidate in self.units():
            near = hidden.to(x.dtype)
            both = torch.cat((near, x), 1)
            z, r = torch.sigmoid(update(both)), torch.sigmoid(reset(both))
            q = torch.tanh(candidate(torch.cat((r * near, x), 1)))
            hidden = (1 - z) * hidden + z * q
        return hidden


SEPARABLE = {"1": (1, 5), "2": (5, 1)}  # kernels of RAFT's large unit


class FlowHead(nn.Module):
    """Hidden state [N, hidden, h, w] -> change of the flow [N, 2, h, w], pixels of that grid."""

    def __init__(self, hidden: int, width: int = 256):
        super().__init__()
        self.conv1 = ConvReLU(hidden, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv2(self.conv1(hidden))


class MaskHead(nn.Sequential):
    """Hidden state [N, hidden, h, w] -> weights [N, 576, h, w] for `convex_upsample`.

    The last factor, 0.25, balances the gradients, as published.
    """

    def __init__(self, hidden: int):
        super().__init__(nn.Conv2d(hidden, 256, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(256, 64 * 9, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        return 0.25 * super().forward(hidden)


class Features(NamedTuple):
    """What the frames tell a recurrent network; the same in all steps."""

    pyramid: AllPairs
    context: Any  # as the GRU prepared it
    grid: Tensor  # [2, h, w] the x and the y of every pixel of the coarse grid
    attended: Any = None  # as the attention prepared it, in networks that have one


def look(features: Features, flow: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Returns the correlation around where the flow [N, 2, h, w] leads, and the flow, both in the context's dtype."""
    correlation = lookup(features.pyramid, features.grid + flow, radius)
    context = features.context if isinstance(features.context, Tensor) else features.context[0]
    dtype = context.dtype
    return correlation.to(dtype), flow.to(dtype, memory_format=torch.channels_last)  # like what they are put beside


def iterated(
    step: Callable[[State], State], state: State, iterations: int, every: bool
) -> tuple[list[State], dict[str, Any]]:
    """Returns the states after the steps (`every` one of them, or the last), and what the next pair begins with."""
    states = []
    for _ in range(iterations):
        state = step(state)
        states.append(state)
    return states if every else states[-1:], {"state": tuple(part.detach() for part in state)}
