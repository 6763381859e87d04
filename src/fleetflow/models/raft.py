"""RAFT: Teed, Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020, arXiv 2003.12039.

Features of both frames at stride 8, the correlations of all their pixels at four scales, and a recurrent unit that
reads them around the flow so far and corrects it, step by step. `raft` has 5,257,536 parameters and enlarges the flow
by learned convex combinations; `raft_small` has 990,162 and enlarges it bilinearly.

The published number of iterations is 20 in the demo (the default here), 12 in training, 32 on Sintel and 24 on KITTI.
Frames are padded on all sides to multiples of 8, as published for Sintel (for KITTI: only at the bottom, not at the
top). Frames with a side shorter than 128 pixels, which the published code cannot take, as its coarsest correlation
would be of a single pixel, are enlarged until it is 128, and the flow is scaled back.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleetflow.layers.residual_encoder import BottleneckBlock, ResidualEncoder
from fleetflow.layers.update import (
    GRU,
    LEVELS,
    SEPARABLE,
    ConvReLU,
    Features,
    FlowHead,
    MaskHead,
    MotionEncoder,
    State,
    iterated,
    look,
)
from fleetflow.layers.upsample import convex_upsample
from fleetflow.layers.warm_start import starting_flow, starting_state
from fleetflow.models.base import FlowModel, RefiningModel
from fleetflow.ops.all_pairs import MEMORY_LIMIT, all_pairs
from fleetflow.ops.warp import pixel_grid
from fleetflow.registry import models
from fleetflow.types import Prediction, size_of


class UpdateBlock(nn.Module):
    """Hidden state [N, 128, h, w], context prepared by the GRU, correlation, flow -> next state, change of the flow."""

    radius, hidden, features = 4, 128, 256  # of the lookup; channels of the state; of the correlated features

    def __init__(self):
        super().__init__()
        self.encoder = MotionEncoder(LEVELS * (2 * self.radius + 1) ** 2)
        self.gru = GRU(self.hidden, 128 + 128, SEPARABLE)
        self.flow_head = FlowHead(self.hidden)
        self.mask = MaskHead(self.hidden)

    def forward(self, hidden: Tensor, context: Tensor, correlation: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.gru(hidden, context, self.encoder(correlation, flow))
        return hidden, self.flow_head(hidden)

    def enlarge(self, hidden: Tensor, flow: Tensor) -> Tensor:
        """Returns the flow [N, 2, 8h, 8w] in pixels of the frames."""
        return convex_upsample(flow, self.mask(hidden))


class SmallMotionEncoder(nn.Module):
    """Correlation [N, 196, h, w] and flow [N, 2, h, w] -> [N, 82, h, w], of which the last two are the flow."""

    def __init__(self, inputs: int):
        super().__init__()
        self.convc1 = ConvReLU(inputs, 96, 1)
        self.convf1 = ConvReLU(2, 64, 7, padding=3)
        self.convf2 = ConvReLU(64, 32, 3, padding=1)
        self.conv = ConvReLU(96 + 32, 80, 3, padding=1)

    def forward(self, correlation: Tensor, flow: Tensor) -> Tensor:
        moved = self.convf2(self.convf1(flow))
        return torch.cat((self.conv(torch.cat((self.convc1(correlation), moved), 1)), flow), 1)


class SmallUpdateBlock(nn.Module):
    """As UpdateBlock, for a state of 96 and a context of 64 channels, without weights for the enlargement."""

    radius, hidden, features = 3, 96, 128

    def __init__(self):
        super().__init__()
        self.encoder = SmallMotionEncoder(LEVELS * (2 * self.radius + 1) ** 2)
        self.gru = GRU(self.hidden, 64 + 82, {"": (3, 3)})
        self.flow_head = FlowHead(self.hidden, 128)

    def forward(self, hidden: Tensor, context: Tensor, correlation: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.gru(hidden, context, self.encoder(correlation, flow))
        return hidden, self.flow_head(hidden)

    def enlarge(self, hidden: Tensor, flow: Tensor) -> Tensor:
        """Returns the flow [N, 2, 8h, 8w] in pixels of the frames, bilinear with the corner pixels aligned."""
        return 8 * F.interpolate(flow, scale_factor=8, mode="bilinear", align_corners=True)


# torchvision's names, in the order in which they are replaced; see `own_names`
TORCHVISION = (
    ("feature_encoder.", "fnet."),
    ("context_encoder.", "cnet."),
    ("mask_predictor.convrelu.0.", "update_block.mask.0."),
    ("mask_predictor.conv.", "update_block.mask.2."),
    (".motion_encoder.convcorr1.0.", ".encoder.convc1."),
    (".motion_encoder.convcorr2.0.", ".encoder.convc2."),
    (".motion_encoder.convflow1.0.", ".encoder.convf1."),
    (".motion_encoder.convflow2.0.", ".encoder.convf2."),
    (".motion_encoder.conv.0.", ".encoder.conv."),
    ("net.convnormrelu.0.", "net.conv1."),
    ("net.convnormrelu.1.", "net.norm1."),
    *((f".convnormrelu{k}.0.", f".conv{k}.") for k in (1, 2, 3)),
    *((f".convnormrelu{k}.1.", f".norm{k}.") for k in (1, 2, 3)),
    ("net.conv.", "net.conv2."),
)


def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a checkpoint of torchvision (raft_large, raft_small) with the names of princeton-vl, others unchanged."""
    if not any(key.startswith("feature_encoder.") for key in state):
        return state
    small = not any(".convgru2." in key for key in state)
    own = {}
    for key, value in state.items():
        for theirs, ours in TORCHVISION:
            key = key.replace(theirs, ours)
        for unit in "12":
            for gate in "zrq":
                own_gate = f".gru.conv{gate}." if small else f".gru.conv{gate}{unit}."
                key = key.replace(f".recurrent_block.convgru{unit}.conv{gate}.", own_gate)
        own[key] = value
        if key.startswith("cnet.") and ".downsample.1." in key:
            own[key.replace(".downsample.1.", ".norm3.")] = value  # one tensor, which is named twice here
    return own


class RAFT(RefiningModel):
    """update: the class of the recurrent block; encoder: makes a feature network of so many outputs and such a norm.

    Args:
        context: channels and norm of the context network, of which the first start the hidden state.
        iterations: refinement iterations.
        memory_limit: bytes that the stored correlations may take (see `all_pairs`).
    """

    fit = "pad"
    paper = "Teed, Deng, ECCV 2020, arXiv 2003.12039"
    license = "BSD-3-Clause"
    translate: ClassVar = staticmethod(own_names)

    def __init__(
        self,
        update: type[UpdateBlock] | type[SmallUpdateBlock] = UpdateBlock,
        encoder: Callable[[int, str], nn.Module] = ResidualEncoder,
        *,
        context: tuple[int, str] = (256, "batch"),
        iterations: int = 20,
        memory_limit: int = MEMORY_LIMIT,
    ):
        super().__init__()
        self.iterations = iterations
        self.memory_limit = memory_limit
        self.fnet = encoder(update.features, "instance")
        self.cnet = encoder(*context)
        self.update_block = update()

    def prepare(self, frame1: Tensor, frame2: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * frame1 - 1, 2 * frame2 - 1

    def encode(
        self, frame1: Tensor, frame2: Tensor, features: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Features, State]:
        features = features or (self.fnet(frame1), self.fnet(frame2))
        pyramid = all_pairs(*features, LEVELS, self.memory_limit)
        hidden, context = self.cnet(frame1).tensor_split([self.update_block.hidden], 1)
        flow = starting_flow(None, hidden)
        context = self.update_block.gru.prepare(context.relu())
        return Features(pyramid, context, pixel_grid(*size_of(flow), flow)), (hidden.tanh(), flow)

    def step(self, features: Features, state: State) -> State:
        """Returns the next state. No gradient flows to the flow of the state before, only to its hidden part."""
        hidden, flow = state[0], state[1].detach()
        hidden, change = self.update_block(hidden, features.context, *look(features, flow, self.update_block.radius))
        return hidden, flow + change.to(flow.dtype)

    def decode(self, state: State) -> Tensor:
        return self.update_block.enlarge(*state)

    def search(
        self, step: Callable[[State], State], rest: State, previous: Prediction | None, iterations: int
    ) -> tuple[list[State], dict[str, Any]]:
        """Returns the states, all of them in training; the next pair may begin with the last one."""
        return iterated(step, starting_state(previous, rest, iterations), iterations, self.training)


def _small_encoder(outputs: int, norm: str) -> ResidualEncoder:
    return ResidualEncoder(outputs, norm, BottleneckBlock, (32, 64, 96))


@models.register
def raft(*, iterations: int = 20, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """RAFT (ECCV 2020, 5,257,536 parameters); reads the checkpoints of princeton-vl/RAFT and of torchvision."""
    return RAFT(iterations=iterations, memory_limit=memory_limit)


@models.register
def raft_small(*, iterations: int = 20, memory_limit: int = MEMORY_LIMIT) -> FlowModel:
    """RAFT small (990,162 parameters); reads the checkpoints of princeton-vl/RAFT and of torchvision."""
    context = (SmallUpdateBlock.hidden + 64, "none")
    return RAFT(SmallUpdateBlock, _small_encoder, context=context, iterations=iterations, memory_limit=memory_limit)
