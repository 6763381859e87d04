"""GMA: Jiang et al., "Learning to Estimate Hidden Motions with Global Motion Aggregation", ICCV 2021, arXiv 2104.02409.

RAFT whose recurrent unit also sees, at each pixel, the motion features of all pixels that look alike in frame1: an
attention over the context features, computed once, mixes them at every step. 5,879,873 parameters with one head.
Position embeddings belong to the published checkpoints of every variant; where they are not used they are not trained.

Steps, padding and small frames as in `raft`; GMA's own evaluation takes 12 steps, 32 for Sintel's test, 24 for KITTI.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fleetflow.layers.residual_encoder import ResidualEncoder
from fleetflow.layers.update import LEVELS, FlowHead, MaskHead, MotionEncoder, SeparableGRU, grown, refine, shrunk
from fleetflow.layers.upsample import convex_upsample
from fleetflow.layers.warm_start import starting_flow
from fleetflow.models.base import FlowModel
from fleetflow.ops.all_pairs import MEMORY_LIMIT, all_pairs
from fleetflow.registry import models
from fleetflow.types import FleetflowError, Prediction

CHANNELS = 128  # of the hidden state, the context, the motion features and each head
RADIUS = 4
LARGEST_SIDE = 160  # pixels of stride 8 that the position embeddings cover


class PositionEmbedding(nn.Module):
    """Scores of the pixel at row u, column v for the query at (y, x): <query, height[u - y] + width[v - x]>."""

    def __init__(self):
        super().__init__()
        places = torch.arange(LARGEST_SIDE)
        self.register_buffer("rel_ind", places - places[:, None] + LARGEST_SIDE - 1)
        self.rel_height = nn.Embedding(2 * LARGEST_SIDE - 1, CHANNELS)
        self.rel_width = nn.Embedding(2 * LARGEST_SIDE - 1, CHANNELS)

    def forward(self, queries: Tensor, top: int, height: int) -> Tensor:
        """Returns [N, heads, rows, w, height, w] for the queries [N, heads, rows, w, 128] of the rows from `top` on."""
        rows, width = queries.shape[2:4]
        if max(height, width) > LARGEST_SIDE:
            raise FleetflowError(
                f"frames are up to {8 * max(height, width)} pixels wide or high; the position embeddings cover "
                f"{8 * LARGEST_SIDE}: use gma, or smaller frames"
            )
        vertical = self.rel_height(self.rel_ind[top : top + rows, :height]).to(queries.dtype)
        horizontal = self.rel_width(self.rel_ind[:width, :width]).to(queries.dtype)
        vertical = torch.einsum("nhyxd,yud->nhyxu", queries, vertical)
        horizontal = torch.einsum("nhyxd,xvd->nhyxv", queries, horizontal)
        return vertical[..., None] + horizontal[..., None, :]


class Attention(nn.Module):
    """Which pixels of the context are alike, in content or relative position or both (section 3.1, eqs. 3 to 5)."""

    def __init__(self, heads: int, content: bool, position: bool):
        super().__init__()
        self.heads, self.content, self.position = heads, content, position
        self.to_qk = nn.Conv2d(CHANNELS, 2 * heads * CHANNELS, 1, bias=False)
        self.pos_emb = PositionEmbedding().requires_grad_(position)

    def weights(self, queries: Tensor, keys: Tensor, top: int, bottom: int) -> Tensor:
        """Returns [N, heads, rows * w, h * w], of sum 1, for the rows from `top` to `bottom` of [N, heads, h, w, d]."""
        part = queries[:, :, top:bottom]
        scores = self.pos_emb(part, top, keys.shape[2]).flatten(4).flatten(2, 3) if self.position else 0
        if self.content:
            scores = part.flatten(2, 3) @ keys.flatten(2, 3).mT + scores
        return scores.softmax(-1)

    def forward(self, context: Tensor, memory_limit: int) -> Callable[[Tensor], Tensor]:
        """Returns the function that mixes values [N, heads, h * w, d] by the attention of context [N, 128, h, w].

        The matrix of heads * (h w)^2 weights is stored, or, where it would take more than `memory_limit` bytes,
        computed anew a few rows at a time whenever it is used.
        """
        both = self.to_qk(context).unflatten(1, (2, self.heads, CHANNELS)).permute(1, 0, 2, 4, 5, 3)
        queries, keys = both[0] * CHANNELS**-0.5, both[1]
        height = keys.shape[2]
        line = keys[..., 0].numel() * keys.shape[3] * keys.element_size()  # bytes of one row's weights
        if line * height <= memory_limit:
            stored = self.weights(queries, keys, 0, height)
            return lambda values: stored.to(values.dtype) @ values
        rows = max(memory_limit // (4 * line), 1)  # scores, their sum and the softmax exist together

        def mix(values: Tensor) -> Tensor:
            parts = (
                self.weights(queries, keys, top, min(top + rows, height)).to(values.dtype) @ values
                for top in range(0, height, rows)
            )
            return torch.cat(tuple(parts), 2)

        return mix


class Aggregate(nn.Module):
    """Motion features [N, 128, h, w] plus gamma times their mixture by the attention (eq. 2)."""

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads
        self.gamma = nn.Parameter(torch.zeros(1))
        self.to_v = nn.Conv2d(CHANNELS, heads * CHANNELS, 1, bias=False)
        self.project = nn.Conv2d(heads * CHANNELS, CHANNELS, 1, bias=False) if heads > 1 else nn.Sequential()

    def forward(self, motion: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
        values = self.to_v(motion).unflatten(1, (self.heads, CHANNELS)).flatten(3).mT
        mixed = mix(values).mT.flatten(1, 2).unflatten(2, motion.shape[-2:])
        return motion + self.gamma * self.project(mixed)


class UpdateBlock(nn.Module):
    """Hidden state and context [N, 128, h, w], attention, correlation, flow -> next state and change of the flow."""

    def __init__(self, heads: int):
        super().__init__()
        self.encoder = MotionEncoder(LEVELS * (2 * RADIUS + 1) ** 2)
        self.gru = SeparableGRU(CHANNELS, 3 * CHANNELS)
        self.flow_head = FlowHead(CHANNELS)
        self.mask = MaskHead(CHANNELS)
        self.aggregator = Aggregate(heads)

    def forward(
        self, hidden: Tensor, context: Tensor, mix: Callable[[Tensor], Tensor], correlation: Tensor, flow: Tensor
    ) -> tuple[Tensor, Tensor]:
        motion = self.encoder(correlation, flow)
        hidden = self.gru(hidden, torch.cat((context, motion, self.aggregator(motion, mix)), 1))
        return hidden, self.flow_head(hidden)


class GMA(FlowModel):
    """heads: of the attention. content, position: what it compares; at least one of them.

    steps: refinement steps. memory_limit: bytes that the stored correlations and the stored attention may take each.
    """

    stride = 8
    fit = "pad"
    grid = 8
    paper = "Jiang et al., ICCV 2021, arXiv 2104.02409"
    licence = "WTFPL"

    def __init__(
        self,
        *,
        heads: int = 1,
        content: bool = True,
        position: bool = False,
        steps: int = 20,
        memory_limit: int = MEMORY_LIMIT,
    ):
        super().__init__()
        if not (content or position):
            raise FleetflowError("GMA without content and position has nothing to attend to; set one of them")
        self.steps = steps
        self.memory_limit = memory_limit
        self.fnet = ResidualEncoder(256, "instance")
        self.cnet = ResidualEncoder(2 * CHANNELS, "batch")
        self.update_block = UpdateBlock(heads)
        self.att = Attention(heads, content, position)

    def prepare(self, frame1: Tensor, frame2: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * frame1 - 1, 2 * frame2 - 1

    def estimate(self, frame1: Tensor, frame2: Tensor, previous: Prediction | None, steps: int | None) -> Prediction:
        """Returns the prediction; steps and memory are those of RAFT: all full flows, and the last one at stride 8."""
        size = frame1.shape[-2:]
        frame1, frame2 = grown(frame1), grown(frame2)
        pyramid = all_pairs(self.fnet(frame1), self.fnet(frame2), LEVELS, self.memory_limit)
        hidden, context = self.cnet(frame1).chunk(2, 1)
        hidden, context = hidden.tanh(), context.relu()
        mix = self.att(context, self.memory_limit)

        def update(hidden: Tensor, correlation: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
            return self.update_block(hidden, context, mix, correlation, flow)

        def enlarge(hidden: Tensor, flow: Tensor) -> Tensor:
            return shrunk(convex_upsample(flow, self.update_block.mask(hidden)), size)

        refined = refine(update, pyramid, hidden, starting_flow(previous, hidden), RADIUS, steps)
        flows = []
        for hidden, flow in refined:
            if self.training:
                flows.append(enlarge(hidden, flow))
        return Prediction(flows[-1] if flows else enlarge(hidden, flow), tuple(flows), flow.detach())


@models.register
def gma(*, steps: int = 20, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """GMA (ICCV 2021, 5,879,873 parameters), attention by content; reads the checkpoints of zacjiang/GMA."""
    return GMA(steps=steps, memory_limit=memory_limit)


@models.register
def gma_position_only(*, steps: int = 20, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """GMA with attention by relative position alone; reads the checkpoints of zacjiang/GMA (position_only)."""
    return GMA(content=False, position=True, steps=steps, memory_limit=memory_limit)


@models.register
def gma_position_and_content(*, steps: int = 20, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """GMA with attention by both; reads the checkpoints of zacjiang/GMA (position_and_content)."""
    return GMA(position=True, steps=steps, memory_limit=memory_limit)


@models.register
def gma_heads2(*, steps: int = 20, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """GMA with two heads (5,961,793 parameters); reads the checkpoints of zacjiang/GMA (num_heads 2)."""
    return GMA(heads=2, steps=steps, memory_limit=memory_limit)
