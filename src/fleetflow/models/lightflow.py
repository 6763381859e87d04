"""Light Flow: Zhu et al., "Towards High Performance Video Object Detection for Mobiles", arXiv 1804.05830.

FlowNet's scheme with depthwise and pointwise convolutions only: six levels down, five flows on the way back up to
stride 4, whose plain mean is the result. Inside, flow is in units of 20 px of the full resolution at every level.
2,540,390 parameters at width 1; names and details are those of McDo/LightFlowPytorch, and kept with its checkpoints:
* the predictors of flow are blocks like all others and so end in batch normalization and a leaky ReLU (slope 0.1);
* features and flows are enlarged by repeating pixels; only the result is enlarged bilinearly, 4x;
* a checkpoint may store a `div_flow` of its own in place of those 20 px; it goes into the weights.
That repository takes multiples of 64 only; here other frames are resized and the flow is scaled back.
"""

from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleetflow.models.base import FlowModel
from fleetflow.ops.constant import constant
from fleetflow.ops.resize import resize
from fleetflow.ops.subtract_mean import subtract_mean
from fleetflow.registry import models
from fleetflow.types import FleetflowError, Prediction, size_of

FLOW_SCALE = 20.0  # pixels of the full resolution per unit of the network's flow
MEAN = (0.411, 0.432, 0.45)  # RGB
LIFT = 3.0  # standard deviations over the bend of a leaky ReLU, for what is to keep its sign
LEVELS = (6, 5, 4, 3, 2)  # of the five flows, coarsest first; level k has stride 2^k

# name: input channels, output channels at width 1, stride; in the order of the published checkpoints
LAYERS = {
    "conv1": (6, 32, 2),
    "conv2": (32, 64, 2),
    "conv3": (64, 128, 2),
    "conv4a": (128, 256, 2),
    "conv4b": (256, 256, 1),
    "conv5a": (256, 512, 2),
    "conv5b": (512, 512, 1),
    "conv6a": (512, 1024, 2),
    "conv6b": (1024, 1024, 1),
    "conv7": (1024, 256, 1),
    "conv8": (256 + 512, 128, 1),
    "conv9": (128 + 256, 64, 1),
    "conv10": (64 + 128, 32, 1),
    "conv11": (32 + 64, 16, 1),
    "conv12": (256, 2, 1),
    "conv13": (128, 2, 1),
    "conv14": (64, 2, 1),
    "conv15": (32, 2, 1),
    "conv16": (16, 2, 1),
}


def _separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Returns a 3x3 convolution of each channel alone, then a 1x1 convolution, each normalized and leaky."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.1, inplace=True),
    )


class StoredNorm(nn.BatchNorm2d):
    """Batch normalization by its stored statistics, 0 and 1 at first, in training too."""

    def train(self, mode: bool = True) -> "StoredNorm":
        return super().train(False)


def own_scale(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a checkpoint with flow in units of 20 px, where it says "div_flow", its own unit in pixels.

    The leaky ReLU behind the last normalization of a predictor passes a positive factor on.
    """
    scale = state.get("div_flow")
    if scale is None or not scale > 0:
        return state
    own = {key: value for key, value in state.items() if key != "div_flow"}
    for name, (_, outputs, _) in LAYERS.items():
        if outputs == 2:
            for key in (f"{name}.4.weight", f"{name}.4.bias"):
                if key in own:
                    own[key] = own[key] * (scale / FLOW_SCALE)
    return own


def _twice_as_large(picture: Tensor) -> Tensor:
    return F.interpolate(picture, scale_factor=2, mode="nearest")


class LightFlow(FlowModel):
    """width: factor on all channels but the 6 of the frames and the 2 of a flow; a multiple of 1/16.

    Args:
        stored: the norms behind the flows take stored statistics in training. As published, a batch gives its flows
            their mean and variance, so that those of small batches are drowned in noise.
    """

    stride = 64
    fit = "scale"
    grid = 4
    paper = "Zhu et al., arXiv 1804.05830"
    license = "MIT"
    translate: ClassVar = staticmethod(own_scale)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> nn.Sequential: ...  # its layers, whose names are those of LAYERS

    def __init__(self, width: float = 1.0, *, stored: bool = False):
        super().__init__()
        for name, (inputs, outputs, stride) in LAYERS.items():
            inputs, outputs = (count if count in (2, 6) else int(count * width) for count in (inputs, outputs))
            self.add_module(name, _separable(inputs, outputs, stride))
        for layer in self.modules():  # as published
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, a=0.1)
        for name, (_, outputs, _) in LAYERS.items():
            if stored and outputs == 2:
                block = getattr(self, name)
                block[4] = StoredNorm(2)
                block[3].get_parameter("weight").data.mul_(0.1)  # where nothing scales them, flows begin small

    def prepare(self, frame1: Tensor, frame2: Tensor) -> tuple[Tensor, Tensor]:
        mean = constant(MEAN, frame1)
        return subtract_mean(frame1, mean), subtract_mean(frame2, mean)

    def flows(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Returns the five flows [N, 2, h, w] of LEVELS in units of 20 px, for both frames [N, 6, H, W]."""
        level2 = self.conv2(self.conv1(frames))
        level3 = self.conv3(level2)
        level4 = self.conv4b(self.conv4a(level3))
        level5 = self.conv5b(self.conv5a(level4))
        features = self.conv7(self.conv6b(self.conv6a(level5)))
        flows = [self.conv12(features)]
        rest = (
            (level5, self.conv8, self.conv13),
            (level4, self.conv9, self.conv14),
            (level3, self.conv10, self.conv15),
            (level2, self.conv11, self.conv16),
        )
        for skip, decode, predict in rest:
            features = decode(torch.cat((_twice_as_large(features), skip), 1))
            flows.append(predict(features))
        return tuple(flow.float().contiguous() for flow in flows)

    def estimate(
        self, frame1: Tensor, frame2: Tensor, previous: Prediction | None, iterations: int | None
    ) -> Prediction:
        """Returns the prediction; its intermediate flows in training are the four coarser flows and the mean of all five.

        The published training judges the mean alone: weight 0 for those before it.
        """
        count, _, height, width = frame1.shape
        if self.training and count * height * width == self.stride**2:
            raise FleetflowError("batch normalization learns from two cells at least; take a larger batch or frames")
        flows = self.flows(torch.cat((frame1, frame2), 1))
        mean = reduce(lambda coarser, flow: _twice_as_large(coarser) + flow, flows) / len(flows)
        full = resize(FLOW_SCALE * mean, size_of(frame1))
        if not self.training:
            return Prediction(full)
        judged = (*flows[:-1], mean)
        return Prediction(full, tuple(flow * (FLOW_SCALE / 2**level) for level, flow in zip(LEVELS, judged)))


COMPARING = ("conv2", "conv3", "conv4a", "conv4b", "conv5a", "conv5b", "conv6a", "conv6b")


@torch.no_grad()
def init_as_matcher(model: LightFlow) -> None:
    """Changes fresh weights so that every layer of the way down compares the frames at nine displacements.

    Nothing here correlates, and from the published initialization the network predicts no motion for tens of thousands
    of pairs, until comparisons have formed by chance. Here they are laid out: of the channels that leave a layer
    * 0 and 1 to 9 hold the brightness of frame1 and, nine times, of frame2; the depthwise convolution of the next layer
      shifts each of the nine to another side; 10 and 11 hold both once more, blurred for the layer behind;
    * 12 to 29 hold the differences of frame1 and each of the nine, and their negatives: a pair of them behind the leaky
      ReLU is their absolute value;
    * 30 to 33 sum the displacements, weighted by how little the frames differ: right, left, down, up; 34 to 42 hold the
      absolute differences themselves.
    Where signs matter, the bias of the normalization lifts a channel over the bend of the ReLU. All other channels stay
    random, and everything is trained.

    Raises:
        FleetflowError: For widths that have fewer channels than that.
    """
    first: Any = model.conv1
    if first[3].out_channels < 30:
        raise FleetflowError("the start that compares frames needs 30 channels in the first layer; take width 1")
    ramp = torch.tensor([1.0, 2.0, 1.0]) / 4
    blur, shifts = ramp[:, None] * ramp, torch.eye(9).view(9, 3, 3)
    first[0].weight[:] = blur
    first[1].bias[:] = LIFT
    mix = first[3].weight
    mix[:12] = 0
    mix[[0, 10], :3] = 1 / 3
    mix[[*range(1, 10), 11], 3:] = 1 / 3
    first[4].bias[:12] = LIFT
    for layer in (getattr(model, name) for name in COMPARING):
        depthwise, mix = layer[0].weight, layer[3].weight[..., 0, 0]
        depthwise[0, 0], depthwise[1:10, 0] = shifts[4], shifts
        depthwise[10:30] = blur
        layer[1].bias[:30] = LIFT
        mix[:43] = 0
        mix[[0, 10], 10] = 1
        mix[[*range(1, 10), 11], 11] = 1
        for k in range(9):
            down, right = k // 3 - 1, k % 3 - 1
            pair = [12 + 2 * k, 13 + 2 * k]
            mix[pair, 0] = torch.tensor([1.0, -1.0])
            mix[pair, 1 + k] = torch.tensor([-1.0, 1.0])
            for row, weight in enumerate((-right, right, -down, down)):
                mix[30 + row, pair] = weight / 6
            mix[34 + k, pair] = 1.0
        layer[4].bias[:12] = LIFT
        layer[4].bias[30:43] = LIFT


@models.register
def lightflow() -> FlowModel:
    """Light Flow (2,540,390 parameters); reads the checkpoints of McDo/LightFlowPytorch."""
    return LightFlow()


@models.register
def lightflow_075() -> FlowModel:
    """Light Flow with three quarters of the channels (the paper's width 0.75)."""
    return LightFlow(0.75)


@models.register
def lightflow_050() -> FlowModel:
    """Light Flow with half of the channels (the paper's width 0.5)."""
    return LightFlow(0.5)
