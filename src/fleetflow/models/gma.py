"""GMA: Jiang et al., "Learning to Estimate Hidden Motions with Global Motion Aggregation", ICCV 2021, arXiv 2104.02409.

RAFT whose recurrent unit also sees, at each pixel, the motion features of all pixels that look alike in frame1: an
attention over the context features, computed once, mixes them at every step. 5,879,873 parameters with one head.
Position embeddings belong to the published checkpoints of every variant; where they are not used they are not trained.

Steps, padding and small frames as in `raft`; GMA's own evaluation takes 12 iterations, 32 for Sintel's test, 24 for KITTI.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fleetflow.layers.attention import Aggregate, Attention
from fleetflow.layers.residual_encoder import ResidualEncoder
from fleetflow.layers.update import (
    GRU,
    LEVELS,
    SEPARABLE,
    Features,
    FlowHead,
    MaskHead,
    MotionEncoder,
    State,
    iterated,
    look,
)
from fleetflow.layers.upsample import convex_upsample
from fleetflow.layers.warm_start import starting_flow
from fleetflow.models.base import FlowModel, RefiningModel
from fleetflow.ops.all_pairs import MEMORY_LIMIT, all_pairs
from fleetflow.ops.warp import pixel_grid
from fleetflow.registry import models
from fleetflow.types import FleetflowError, Prediction, size_of

CHANNELS = 128  # of the hidden state, the context, the motion features and each head
RADIUS = 4


class UpdateBlock(nn.Module):
    """Hidden state [N, 128, h, w], context prepared by the GRU, attention, correlation, flow -> the same as RAFT's."""

    def __init__(self, heads: int):
        super().__init__()
        self.encoder = MotionEncoder(LEVELS * (2 * RADIUS + 1) ** 2)
        self.gru = GRU(CHANNELS, 3 * CHANNELS, SEPARABLE)
        self.flow_head = FlowHead(CHANNELS)
        self.mask = MaskHead(CHANNELS)
        self.aggregator = Aggregate(heads)

    def forward(
        self, hidden: Tensor, context: Tensor, mix: Callable[[Tensor], Tensor], correlation: Tensor, flow: Tensor
    ) -> tuple[Tensor, Tensor]:
        motion = self.encoder(correlation, flow)
        hidden = self.gru(hidden, context, torch.cat((motion, self.aggregator(motion, mix)), 1))
        return hidden, self.flow_head(hidden)


class GMA(RefiningModel):
    """heads: of the attention. content, position: what it compares; at least one of them.

    Args:
        iterations: refinement iterations.
        memory_limit: bytes that the stored correlations and the stored attention may take each.
    """

    fit = "pad"
    paper = "Jiang et al., ICCV 2021, arXiv 2104.02409"
    license = "WTFPL"

    def __init__(
        self,
        *,
        heads: int = 1,
        content: bool = True,
        position: bool = False,
        iterations: int = 20,
        memory_limit: int = MEMORY_LIMIT,
    ):
        super().__init__()
        if not (content or position):
            raise FleetflowError("GMA without content and position has nothing to attend to; set one of them")
        self.iterations = iterations
        self.memory_limit = memory_limit
        self.fnet = ResidualEncoder(256, "instance")
        self.cnet = ResidualEncoder(2 * CHANNELS, "batch")
        self.update_block = UpdateBlock(heads)
        self.att = Attention(heads, content, position)

    def prepare(self, frame1: Tensor, frame2: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * frame1 - 1, 2 * frame2 - 1

    def encode(
        self, frame1: Tensor, frame2: Tensor, features: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Features, State]:
        features = features or (self.fnet(frame1), self.fnet(frame2))
        pyramid = all_pairs(*features, LEVELS, self.memory_limit)
        hidden, context = self.cnet(frame1).chunk(2, 1)
        flow, context = starting_flow(None, hidden), context.relu()
        attended = self.att(context, self.memory_limit)
        context = self.update_block.gru.prepare(context)
        return Features(pyramid, context, pixel_grid(*size_of(flow), flow), attended), (hidden.tanh(), flow)

    def step(self, features: Features, state: State) -> State:
        """Returns the next state. No gradient flows to the flow of the state before, only to its hidden part."""
        hidden, flow = state[0], state[1].detach()
        mix = partial(self.att.mix, features.attended, self.memory_limit)
        hidden, change = self.update_block(hidden, features.context, mix, *look(features, flow, RADIUS))
        return hidden, flow + change.to(flow.dtype)

    def decode(self, state: State) -> Tensor:
        hidden, flow = state
        return convex_upsample(flow, self.update_block.mask(hidden))

    def search(
        self, step: Callable[[State], State], rest: State, previous: Prediction | None, iterations: int
    ) -> tuple[list[State], dict[str, Any]]:
        """Returns the states, all of them in training; the next pair may begin with the last flow."""
        return iterated(step, (rest[0], starting_flow(previous, rest[0])), iterations, self.training)


@models.register
def gma(*, iterations: int = 20, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """GMA (ICCV 2021, 5,879,873 parameters), attention by content; reads the checkpoints of zacjiang/GMA."""
    return GMA(iterations=iterations, memory_limit=memory_limit)


@models.register
def gma_position_only(*, iterations: int = 20, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """GMA with attention by relative position alone; reads the checkpoints of zacjiang/GMA (position_only)."""
    return GMA(content=False, position=True, iterations=iterations, memory_limit=memory_limit)


@models.register
def gma_position_and_content(*, iterations: int = 20, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """GMA with attention by both; reads the checkpoints of zacjiang/GMA (position_and_content)."""
    return GMA(position=True, iterations=iterations, memory_limit=memory_limit)


@models.register
def gma_heads2(*, iterations: int = 20, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """GMA with two heads (5,961,793 parameters); reads the checkpoints of zacjiang/GMA (num_heads 2)."""
    return GMA(heads=2, iterations=iterations, memory_limit=memory_limit)
