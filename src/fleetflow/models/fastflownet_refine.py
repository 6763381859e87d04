"""FastFlowNet with refinement: the network for those who can wait half a second. Ours.

FastFlowNet (arXiv 2103.04524) goes from coarse to fine once; what its coarse levels miss or smear, its fine levels cannot
bring back, as they look four pixels far. Here its flow at stride 8 is the start of a few iterations of RAFT's kind
(arXiv 2003.12039): correlations of all pixels, read around the flow so far, and a recurrent unit that corrects it.
FastFlowNet's finest level (stride 4) goes on from there, and the result is enlarged by learned convex combinations. A
regressed start instead of zero is what SEA-RAFT (arXiv 2405.14793) and NeuFlow (arXiv 2403.10425) do to need few iterations.

The correlated features and the context come from FastFlowNet's own pyramid, so both frames are encoded once. Beside the
correlations the unit is told what RAFT's is not: how alike the frames are without any motion (`Rest`), where a flow leaves
the frame (`margins`), and how places that look alike move (`Gather`, as in GMA, arXiv 2104.02409). Fresh weights change
nothing: with trained ones of FastFlowNet (`grow`), the network begins as FastFlowNet.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleetflow.layers.attention import Attended, Attention
from fleetflow.layers.residual_encoder import ResidualBlock
from fleetflow.layers.update import GRU, LEVELS, ConvReLU, FlowHead, MotionEncoder
from fleetflow.layers.upsample import convex_upsample
from fleetflow.layers.warm_start import starting_flow
from fleetflow.models.base import FlowModel
from fleetflow.models.fastflownet import FLOW_SCALE, FastFlowNet
from fleetflow.ops.all_pairs import MEMORY_LIMIT, AllPairs, all_pairs, lookup
from fleetflow.ops.constant import constant
from fleetflow.ops.warp import pixel_grid
from fleetflow.registry import models
from fleetflow.types import FleetflowError, Prediction, size_of

RADIUS = 3  # of the lookup, as in RAFT-small
HIDDEN, CONTEXT, FEATURES, MOTION = 64, 48, 64, 64  # channels; RAFT-small has 96, 64, 128, 82
GATHERED = 32  # channels that a place is told of others that look like it
GRID = 8  # stride of the refinement
FAR = 8.0  # pixels of the grid of stride 8: a bound of the flow and of the margin that the recurrent unit is told
SHIFT = 2.0  # of a spoiled start: standard deviation in x and in y, pixels of the grid of stride 8
WINDOW = LEVELS * (2 * RADIUS + 1) ** 2  # correlations that a lookup returns for a pixel
FINE = 4  # stride of FastFlowNet's finest level, and the factor by which its flow is enlarged


class State(NamedTuple):
    """What an iteration changes."""

    hidden: Tensor  # [N, HIDDEN, h, w]
    flow: Tensor  # [N, 2, h, w] float32, pixels of the grid of stride 8


class Features(NamedTuple):
    """What is computed once for a pair."""

    pyramid: AllPairs  # correlations of all pixels at stride 8
    context: Tensor  # what `GRU.prepare` makes of the context
    alike: Attended  # which places of frame1 look alike
    level2: tuple[Tensor, Tensor]  # FastFlowNet's features of both frames at stride 4


def normalized(x: Tensor) -> Tensor:
    """Returns [N, C, h, w] scaled at each pixel so that its C numbers have the root mean square 1 (arXiv 1910.07467);
    where they are below some 0.001, a smaller one.

    Nothing else bounds the features that the recurrent unit is given: FastFlowNet has no norms, and trained with Muon its
    features, correlated without this one, grew until every gate was saturated and no gradient came through
    (docs/lab/training-log.md). A correlation of two such vectors, divided by sqrt(C), is sqrt(C) times their cosine.
    """
    wide = x.float()  # as float16 has no squares over 65,504
    return (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-6)).to(x.dtype)


def shortened(flow: Tensor) -> Tensor:
    """Returns flows [N, 2, h, w] with long components shortened: far below `FAR` hardly, there by half, all to below it."""
    return flow / (1 + flow.abs() / FAR)


def margins(target: Tensor) -> Tensor:
    """Returns [N, 1, h, w] how far targets [N, 2, h, w], pixels of their grid, are inside the frame, in units of `FAR`.

    At most 1, and -1 as far outside, where correlations are 0 and say nothing of likeness.
    """
    height, width = size_of(target)
    inside = torch.minimum(target, constant((width - 1, height - 1), target).view(2, 1, 1) - target)
    return (torch.minimum(inside[:, :1], inside[:, 1:]) / FAR).clamp(-1, 1)


def spoiled(flow: Tensor, share: float) -> Tensor:
    """Returns flows [N, 2, h, w], pixels of their grid, of which about a share is shortened and shifted at random.

    For training. Where FastFlowNet is wrong by much, few correlations tell what is right, and elsewhere there is little to
    correct: from its own starts the iterations learned to do nothing. What they are to do is learned from starts that
    are wrong where the correlations do tell. A whole flow takes one factor in [0, 1) and one shift; draws are those of
    the CPU's global generator, which checkpoints hold.
    """
    count = len(flow)
    kept, shift, chosen = torch.rand(count), SHIFT * torch.randn(count, 2), torch.rand(count) < share
    kept, shift, chosen = (draw.to(flow.device).view(count, -1, 1, 1) for draw in (kept, shift, chosen))
    return torch.where(chosen, flow * kept + shift, flow)


class Head(nn.Module):
    """FastFlowNet's levels 2 and 3, [N, 32, 2h, 2w] and [N, 64, h, w], -> [N, outputs, h, w], `normalized`."""

    def __init__(self, outputs: int):
        super().__init__()
        self.reduce = ConvReLU(32, 32, 3, stride=2, padding=1)
        self.merge = ConvReLU(96, 64, 1)
        self.block1 = ResidualBlock(64, 64, "none", 1)
        self.block2 = ResidualBlock(64, 64, "none", 1)
        self.project = nn.Conv2d(64, outputs, 1)

    def forward(self, level2: Tensor, level3: Tensor) -> Tensor:
        x = self.merge(torch.cat((self.reduce(level2), level3), 1))
        return normalized(self.project(self.block2(self.block1(x))))


class Rest(nn.Sequential):
    """Correlations around no motion, [N, WINDOW, h, w] -> what they add to the hidden state and the context, at first 0.

    Still ground beside a fast object is where coarse-to-fine flow floods. There the correlations around the flow so far
    know rest, if at all, from a coarse level; here they always say how alike the frames are without any motion.
    """

    def __init__(self):
        last = nn.Conv2d(48, HIDDEN + CONTEXT, 3, padding=1)
        super().__init__(ConvReLU(WINDOW, 48, 1), last)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)


class Gather(nn.Module):
    """Motion features [N, MOTION, h, w] -> [N, GATHERED, h, w]: means over the places of frame1 that look alike.

    The middle of a plain thing shows no motion of its own, and what is hidden in frame2 none at all: they take that of
    their likes, as in GMA (arXiv 2104.02409). Here at half the resolution, which costs a sixteenth.
    """

    def __init__(self):
        super().__init__()
        self.attention = Attention(1, content=True, position=False, channels=CONTEXT, embedded=False)
        self.values = nn.Conv2d(MOTION, GATHERED, 1)

    def prepare(self, context: Tensor, memory_limit: int) -> Attended:
        return self.attention(F.avg_pool2d(context, 2), memory_limit)

    def forward(self, alike: Attended, memory_limit: int, motion: Tensor) -> Tensor:
        values = self.values(F.avg_pool2d(motion, 2))
        mixed = self.attention.mix(alike, memory_limit, values.flatten(2).mT[:, None])
        return F.interpolate(mixed[:, 0].mT.unflatten(2, values.shape[-2:]), scale_factor=2.0, mode="nearest")


class UpdateBlock(nn.Module):
    """Hidden state, context, likes, correlation, flow, margin -> next hidden state, change of the flow (at first 0).

    The context is prepared by the unit; `mix` returns for motion features those of places that look alike.
    """

    def __init__(self):
        super().__init__()
        self.encoder = MotionEncoder(WINDOW, (64, 48), (48, 24), MOTION)
        self.gru = GRU(HIDDEN, CONTEXT + MOTION + 1 + GATHERED, {"": (3, 3)})
        self.flow_head = FlowHead(HIDDEN, 96)
        for parameter in self.flow_head.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        hidden: Tensor,
        context: Tensor,
        mix: Callable[[Tensor], Tensor],
        correlation: Tensor,
        flow: Tensor,
        margin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        motion = self.encoder(correlation, shortened(flow))
        # the flow apart: normalized with the rest, a long one would leave the rest no length
        motion = torch.cat((normalized(motion[:, :-2]), motion[:, -2:]), 1)
        hidden = self.gru(hidden, context, torch.cat((motion, margin, mix(motion)), 1))
        return hidden, self.flow_head(hidden)


class Enlarge(nn.Sequential):
    """[N, 64, h, w] -> weights [N, 144, h, w] for `convex_upsample`, at first those of a bilinear enlargement."""

    def __init__(self):
        last = nn.Conv2d(64, 9 * FINE**2, 1)
        super().__init__(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(inplace=True), last)
        nn.init.zeros_(last.weight)
        last.bias = nn.Parameter(bilinear_weights(FINE).clamp(min=0.01).log().flatten())


def bilinear_weights(factor: int) -> Tensor:
    """Returns [9, factor, factor]: how much each neighbor (row by row) counts for each fine pixel of a cell."""
    at = (torch.arange(factor) + 0.5) / factor - 0.5  # where the fine pixels are, in cells, from the cell's middle
    side = (1 - (at - torch.tensor([[-1.0], [0.0], [1.0]])).abs()).clamp(min=0)  # [3, factor]
    return (side[:, None, :, None] * side[None, :, None, :]).flatten(0, 1)


class FastFlowNetRefine(FlowModel):
    """FastFlowNet, refined.

    Args:
        iterations: of the refinement.
        memory_limit: bytes that the correlations, and what looks alike, may take each (see `all_pairs`, `Attention`).
        spoil: the share of starts that are `spoiled` in training.
    """

    stride = 64
    fit = "scale"
    grid = 4
    paper = "ours, 2026; parts of FastFlowNet (arXiv 2103.04524), RAFT and GMA"
    license = "Apache-2.0"

    def __init__(self, *, iterations: int = 4, memory_limit: int = MEMORY_LIMIT, spoil: float = 0.0):
        super().__init__()
        self.spoil = spoil
        self.iterations = iterations
        self.memory_limit = memory_limit
        self.fastflownet = FastFlowNet()
        self.fnet = Head(FEATURES)
        self.cnet = Head(HIDDEN + CONTEXT)
        self.rest = Rest()
        self.gather = Gather()
        self.update_block = UpdateBlock()
        self.enlarge = Enlarge()

    def prepare(self, frame1: Tensor, frame2: Tensor) -> tuple[Tensor, Tensor]:
        return self.fastflownet.prepare(frame1, frame2)

    def encode(
        self, frame1: Tensor, frame2: Tensor, previous: Prediction | None = None
    ) -> tuple[Features, State, tuple[Tensor, ...]]:
        """Returns the features of a prepared pair, the state that the iterations start from, and coarser flows.

        The start is the flow of FastFlowNet's level 3 (in training some are `spoiled`), or what `previous` says; the
        coarser flows are those of FastFlowNet's levels 6 to 3 in units of 20 px, none where they are not needed.
        """
        level2, level3, *coarse = self.fastflownet.frame_features(torch.cat((frame1, frame2)))
        features1, features2 = self.fnet(level2, level3).tensor_split(2)
        first2, second2 = level2.tensor_split(2)
        pyramid = all_pairs(features1, features2, LEVELS, self.memory_limit)
        still = pixel_grid(*size_of(features1), features1.float()).expand(len(features1), -1, -1, -1)
        context = self.cnet(first2, level3.tensor_split(2)[0])
        context = context + self.rest(lookup(pyramid, still, RADIUS).to(context.dtype))
        hidden, context = context.split((HIDDEN, CONTEXT), 1)
        context = context.relu()
        alike = self.gather.prepare(context, self.memory_limit)
        features = Features(pyramid, self.update_block.gru.prepare(context), alike, (first2, second2))
        if previous is not None and not self.training:
            return features, State(hidden.tanh(), starting_flow(previous, features1)), ()
        flows = []
        for level, both in zip((6, 5, 4, 3), (*coarse[::-1], level3)):
            one, two = both.tensor_split(2)
            flows.append(self.fastflownet.level(level, one, two, flows[-1] if flows else None)[0])
        start = flows[-1] * (FLOW_SCALE / GRID)
        if self.training and self.spoil:
            start = spoiled(start, self.spoil)
        return features, State(hidden.tanh(), start), tuple(flows)

    def step(self, features: Features, state: State) -> State:
        """Returns the state after one more iteration; as in RAFT, no gradient flows through the flow before it."""
        hidden, flow = state.hidden, state.flow.detach()
        target = pixel_grid(*size_of(flow), flow) + flow
        correlation = lookup(features.pyramid, target, RADIUS)
        moved = flow.to(hidden.dtype, memory_format=torch.channels_last)  # like the features it is put beside
        mix = partial(self.gather, features.alike, self.memory_limit)
        inside = margins(target).to(hidden.dtype)
        hidden, change = self.update_block(hidden, features.context, mix, correlation.to(hidden.dtype), moved, inside)
        return State(hidden, flow + change.to(flow.dtype))

    def decode(self, features: Features, state: State) -> tuple[Tensor, Tensor]:
        """Returns the flow [N, 2, H, W] in pixels, and the flow of stride 4 that it is enlarged from, in its pixels."""
        first, second = features.level2
        flow, hidden = self.fastflownet.level(2, first, second, state.flow * (GRID / FLOW_SCALE))
        flow = flow * (FLOW_SCALE / FINE)
        weights = self.enlarge(torch.cat((hidden, first), 1))
        return convex_upsample(flow, weights, FINE, border="replicate"), flow

    def estimate(
        self, frame1: Tensor, frame2: Tensor, previous: Prediction | None, iterations: int | None
    ) -> Prediction:
        """Returns the prediction; its state is the flow on the grid of stride 8, with which a following pair may begin.

        Intermediate flows in training: FastFlowNet's levels 6 to 3, one for each iteration (stride 8), the last of
        stride 4.
        """
        assert iterations is not None  # `forward` has put in the network's own
        features, state, coarse = self.encode(frame1, frame2, previous)
        flows = [flow * (FLOW_SCALE / 2**level) for level, flow in zip((6, 5, 4, 3), coarse)]
        for _ in range(iterations):
            state = self.step(features, state)
            flows.append(state.flow)
        full, fine = self.decode(features, state)
        return Prediction(full, (*flows, fine) if self.training else (), state.flow.detach())


def grow(model: FastFlowNetRefine, *given: FlowModel) -> None:
    """Gives the network the weights of a trained FastFlowNet; raises FleetflowError for any other network."""
    if len(given) != 1 or not isinstance(given[0], FastFlowNet):
        kinds = " and ".join(type(network).__name__ for network in given)
        raise FleetflowError(f"fastflownet_refine starts from FastFlowNet, not from {kinds}; give --start fastflownet")
    model.fastflownet.load_state_dict(given[0].state_dict())


@models.register
def fastflownet_refine(*, iterations: int = 4, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """FastFlowNet, refined by four iterations of RAFT's kind (ours, 2,328,970 parameters)."""
    return FastFlowNetRefine(iterations=iterations, memory_limit=memory_limit)
