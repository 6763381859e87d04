"""FlowNet: Dosovitskiy et al., ICCV 2015, arXiv 1504.06852; FlowNet 2.0: Ilg et al., CVPR 2017, arXiv 1612.01925.

Four networks, and their stacks. S sees both frames as one picture of 6 channels; C correlates the features of the two
at 441 displacements; SD is S with small filters, for small displacements; each of them contracts to stride 64 and
refines the flow up to stride 4. In a stack, the next S network sees both frames, the second frame warped back by the
flow so far, that flow, and the error that remains: `flownet_cs`, `flownet_css`. `flownet2` has a fourth network
decide at full resolution, per pixel, between the flow of CSS and that of SD.

Inside, flow is in units of 20 px of the full resolution, except SD's within `flownet2` and the deciding network's.
Kept as the published PyTorch weights were used (NVIDIA/flownet2-pytorch), although the Caffe original differs:
* frames are RGB less the mean color of the pair (Caffe: BGR);
* the flows of C and of the first S network are enlarged bilinearly, those of the second S network and of SD by
  repeating pixels (TensorFlow port: all bilinear with corners aligned);
* SD's output is multiplied by 20 when it stands alone and divided by 20 within `flownet2` (where it was trained on
  flow * 20);
* the 2x enlargements of flow in S have no bias, those of the other networks have one;
* that repository notes 38,676,504 parameters for S alone; there are 38,676,506.
It crops frames to multiples of 64; here they are resized and the flow is scaled back, as the Caffe release does.
Not read yet: the checkpoints of mmflow, which name their layers differently.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleetflow.models.base import FlowModel
from fleetflow.ops.constant import constant
from fleetflow.ops.dilated_correlation import dilated_correlation
from fleetflow.ops.resize import resize
from fleetflow.ops.subtract_mean import mean_color, subtract_mean
from fleetflow.ops.warp import pixel_grid, warp
from fleetflow.registry import models
from fleetflow.types import Prediction, size_of

FLOW_SCALE = 20.0  # pixels of the full resolution per unit of the networks' flow
RADIUS, RADIUS_STRIDE = 20, 2  # of C's correlation, in pixels of its features of stride 8
LEVELS = (6, 5, 4, 3, 2)  # of the flows, coarsest first; level k has stride 2^k
FUSION_LEVELS = (2, 1, 0)

# name: input channels, output channels, kernel, stride; in the order of the published checkpoints
HEAD = {"conv2": (64, 128, 5, 2), "conv3": (128, 256, 5, 2)}
DEEP = {
    "conv4": (256, 512, 3, 2),
    "conv4_1": (512, 512, 3, 1),
    "conv5": (512, 512, 3, 2),
    "conv5_1": (512, 512, 3, 1),
    "conv6": (512, 1024, 3, 2),
    "conv6_1": (1024, 1024, 3, 1),
}
LAYERS_S = {**HEAD, "conv3_1": (256, 256, 3, 1), **DEEP}
LAYERS_C = {
    "conv1": (3, 64, 7, 2),
    **HEAD,
    "conv_redir": (256, 32, 1, 1),
    "conv3_1": (32 + (2 * (RADIUS // RADIUS_STRIDE) + 1) ** 2, 256, 3, 1),
    **DEEP,
}
LAYERS_SD = {
    "conv0": (6, 64, 3, 1),
    "conv1": (64, 64, 3, 2),
    "conv1_1": (64, 128, 3, 1),
    "conv2": (128, 128, 3, 2),
    "conv2_1": (128, 128, 3, 1),
    "conv3": (128, 256, 3, 2),
    "conv3_1": (256, 256, 3, 1),
    **DEEP,
}
LAYERS_FUSION = {
    "conv0": (11, 64, 3, 1),
    "conv1": (64, 64, 3, 2),
    "conv1_1": (64, 128, 3, 1),
    "conv2": (128, 128, 3, 2),
    "conv2_1": (128, 128, 3, 1),
}


def _add_convolutions(network: nn.Module, layers: dict[str, tuple[int, int, int, int]]) -> None:
    for name, (inputs, outputs, kernel, stride) in layers.items():
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2)
        network.add_module(name, nn.Sequential(convolution, nn.LeakyReLU(0.1, inplace=True)))


def _add_refinement(
    network: nn.Module,
    levels: tuple[int, ...],
    skips: tuple[int, ...],
    ups: tuple[int, ...],
    *,
    inter: bool = False,
    bias: bool = True,
) -> None:
    """Adds the layers that `_refine` runs.

    Args:
        skips: channels of the features, coarsest first.
        ups: channels of the enlarged features of each level but the first.
        inter: a linear convolution to as many channels stands before each prediction but the first.
        bias: that of the 2x enlargements of flow.
    """
    joined = (skips[0], *(skip + up + 2 for skip, up in zip(skips[1:], ups)))
    for level, inputs, outputs in zip(levels[1:], joined, ups):
        up = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1)
        network.add_module(f"deconv{level}", nn.Sequential(up, nn.LeakyReLU(0.1, inplace=True)))
    if inter:
        for level, inputs, outputs in zip(levels[1:], joined[1:], ups):
            network.add_module(f"inter_conv{level}", nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1)))
    for level, inputs in zip(levels, (skips[0], *ups) if inter else joined):
        network.add_module(f"predict_flow{level}", nn.Conv2d(inputs, 2, 3, 1, 1))
    for level in levels[1:]:
        network.add_module(f"upsampled_flow{level + 1}_to_{level}", nn.ConvTranspose2d(2, 2, 4, 2, 1, bias=bias))


def _refine(network: nn.Module, levels: tuple[int, ...], skips: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns the flow [N, 2, h, w] float32 of each level, coarsest first, for features coarsest first."""
    parts = dict(network.named_children())
    features = skips[0]
    flows = [parts[f"predict_flow{levels[0]}"](features)]
    for level, skip in zip(levels[1:], skips[1:]):
        enlarged = parts[f"upsampled_flow{level + 1}_to_{level}"](flows[-1])
        features = torch.cat((skip, parts[f"deconv{level}"](features), enlarged), 1)
        inter = parts.get(f"inter_conv{level}")  # its result is not passed on
        flows.append(parts[f"predict_flow{level}"](features if inter is None else inter(features)))
    return tuple(flow.float() for flow in flows)


def _initialize(network: nn.Module) -> None:
    """Fresh weights as published: biases, too, are random, from 0 to 1."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias)


def _enlarge(flow: Tensor, mode: str) -> Tensor:
    """Returns the flow on a grid four times as fine, its values unchanged."""
    if mode == "nearest":
        return F.interpolate(flow, scale_factor=4)
    height, width = size_of(flow)
    return resize(flow, (4 * height, 4 * width))


def _prediction(flows: tuple[Tensor, ...], mode: str, training: bool) -> Prediction:
    """Returns the prediction for flows of LEVELS in units of 20 px, enlarged in the given mode."""
    full = _enlarge(FLOW_SCALE * flows[-1], mode)
    if not training:
        return Prediction(full)
    return Prediction(full, tuple(flow * (FLOW_SCALE / 2**level) for level, flow in zip(LEVELS, flows)))


def _length(vectors: Tensor) -> Tensor:
    """Returns [N, 1, H, W], the length of the vector at each pixel; its gradient where that is 0 is 0."""
    return torch.linalg.vector_norm(vectors, dim=1, keepdim=True)


def _warp_inside(frame: Tensor, flow: Tensor) -> Tensor:
    """Returns frame(x + flow(x)), positions outside moved to the nearest pixel inside."""
    grid = pixel_grid(*size_of(frame), flow)
    limits = constant((frame.shape[3] - 1, frame.shape[2] - 1), flow)[:, None, None]
    return warp(frame, torch.minimum((grid + flow).clamp(min=0), limits) - grid)


def _correct(network: "FlowNetS", frame1: Tensor, frame2: Tensor, flow: Tensor) -> tuple[Tensor, ...]:
    """Returns the flows of the next network of a stack, in units of 20 px, given the flow so far in pixels."""
    warped = _warp_inside(frame2, flow)
    inputs = (frame1, frame2, warped, flow / FLOW_SCALE, _length(frame1 - warped))
    return network.flows(torch.cat(inputs, 1))


class _FlowNet(FlowModel):
    """What the whole family does to its frames."""

    stride = 64
    fit = "scale"
    grid = 4
    paper = "Ilg et al., CVPR 2017, arXiv 1612.01925"
    license = "Apache-2.0, weights research only"

    def prepare(self, frame1: Tensor, frame2: Tensor) -> tuple[Tensor, Tensor]:
        mean = mean_color(frame1, frame2)
        return subtract_mean(frame1, mean), subtract_mean(frame2, mean)


class _Single(_FlowNet):
    """A network of its own right, which the stacks use as a part by its `flows`."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> nn.Module: ...  # its layers, whose names are those of the tables above

    @abstractmethod
    def flows(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Returns the flows [N, 2, h, w] of LEVELS in units of 20 px, for both frames [N, 6 (or more), H, W]."""

    def estimate(
        self, frame1: Tensor, frame2: Tensor, previous: Prediction | None, iterations: int | None
    ) -> Prediction:
        return _prediction(self.flows(torch.cat((frame1, frame2), 1)), "bilinear", self.training)

    def _refine_from(self, level2: Tensor, level3: Tensor) -> tuple[Tensor, ...]:
        level4 = self.conv4_1(self.conv4(level3))
        level5 = self.conv5_1(self.conv5(level4))
        level6 = self.conv6_1(self.conv6(level5))
        return _refine(self, LEVELS, (level6, level5, level4, level3, level2))


class FlowNetS(_Single):
    def __init__(self, inputs: int = 6):
        super().__init__()
        _add_convolutions(self, {"conv1": (inputs, 64, 7, 2), **LAYERS_S})
        _add_refinement(self, LEVELS, (1024, 512, 512, 256, 128), (512, 256, 128, 64), bias=False)
        _initialize(self)

    def flows(self, frames: Tensor) -> tuple[Tensor, ...]:
        level2 = self.conv2(self.conv1(frames))
        return self._refine_from(level2, self.conv3_1(self.conv3(level2)))


class FlowNetC(_Single):
    def __init__(self):
        super().__init__()
        _add_convolutions(self, LAYERS_C)
        _add_refinement(self, LEVELS, (1024, 512, 512, 256, 128), (512, 256, 128, 64))
        _initialize(self)

    def flows(self, frames: Tensor) -> tuple[Tensor, ...]:
        both = self.conv2(self.conv1(torch.cat(frames.chunk(2, 1))))
        features1, features2 = self.conv3(both).tensor_split(2)
        volume = F.leaky_relu(dilated_correlation(features1, features2, RADIUS, RADIUS_STRIDE), 0.1)
        level3 = self.conv3_1(torch.cat((self.conv_redir(features1), volume), 1))
        return self._refine_from(both.tensor_split(2)[0], level3)


class FlowNetSD(_Single):
    def __init__(self):
        super().__init__()
        _add_convolutions(self, LAYERS_SD)
        _add_refinement(self, LEVELS, (1024, 512, 512, 256, 128), (512, 256, 128, 64), inter=True)
        _initialize(self)

    def flows(self, frames: Tensor) -> tuple[Tensor, ...]:
        level2 = self.conv2_1(self.conv2(self.conv1_1(self.conv1(self.conv0(frames)))))
        return self._refine_from(level2, self.conv3_1(self.conv3(level2)))


class FlowNetFusion(nn.Module):
    """[N, 11, H, W] frame1, two flows, their lengths, and the errors they leave -> flows in pixels, strides 4, 2, 1."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> nn.Module: ...

    def __init__(self):
        super().__init__()
        _add_convolutions(self, LAYERS_FUSION)
        _add_refinement(self, FUSION_LEVELS, (128, 128, 64), (32, 16), inter=True)
        _initialize(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        level0 = self.conv0(x)
        level1 = self.conv1_1(self.conv1(level0))
        return _refine(self, FUSION_LEVELS, (self.conv2_1(self.conv2(level1)), level1, level0))


class FlowNetCS(_FlowNet):
    def __init__(self):
        super().__init__()
        self.flownetc = FlowNetC()
        self.flownets_1 = FlowNetS(12)

    def estimate(
        self, frame1: Tensor, frame2: Tensor, previous: Prediction | None, iterations: int | None
    ) -> Prediction:
        flow = _enlarge(FLOW_SCALE * self.flownetc.flows(torch.cat((frame1, frame2), 1))[-1], "bilinear")
        return _prediction(_correct(self.flownets_1, frame1, frame2, flow), "bilinear", self.training)


class FlowNetCSS(_FlowNet):
    def __init__(self):
        super().__init__()
        self.flownetc = FlowNetC()
        self.flownets_1 = FlowNetS(12)
        self.flownets_2 = FlowNetS(12)

    def estimate(
        self, frame1: Tensor, frame2: Tensor, previous: Prediction | None, iterations: int | None
    ) -> Prediction:
        return _prediction(_three_networks(self, frame1, frame2), "nearest", self.training)


class FlowNet2(_FlowNet):
    grid = 1

    def __init__(self):
        super().__init__()
        self.flownetc = FlowNetC()
        self.flownets_1 = FlowNetS(12)
        self.flownets_2 = FlowNetS(12)
        self.flownets_d = FlowNetSD()
        self.flownetfusion = FlowNetFusion()

    def estimate(
        self, frame1: Tensor, frame2: Tensor, previous: Prediction | None, iterations: int | None
    ) -> Prediction:
        large = _enlarge(FLOW_SCALE * _three_networks(self, frame1, frame2)[-1], "nearest")
        small = _enlarge(self.flownets_d.flows(torch.cat((frame1, frame2), 1))[-1] / FLOW_SCALE, "nearest")
        errors = [_length(frame1 - _warp_inside(frame2, flow)) for flow in (small, large)]
        inputs = (frame1, small, large, _length(small), _length(large), *errors)
        coarse, middle, full = self.flownetfusion(torch.cat(inputs, 1))
        return Prediction(full, (coarse / 4, middle / 2, full) if self.training else ())


@torch.no_grad()
def start_stack(model: _FlowNet, *earlier: _FlowNet) -> None:
    """Copies trained networks into the stack that they are part of, and freezes all of it but the newest network.

    FlowNet 2.0 trains one network at a time (arXiv 1612.01925, section 4). earlier: FlowNetC or a shorter stack; for
    FlowNet2, FlowNetCSS and FlowNetSD. A stack of the same kind goes on where it was.
    """
    prefixes = {FlowNetC: "flownetc.", FlowNetSD: "flownets_d."}
    known = {
        prefixes.get(type(network), "") + name: value
        for network in earlier
        for name, value in network.state_dict().items()
    }
    newest = [name for name, _ in model.named_children()][-1]
    for name, weight in model.named_parameters():
        if name in known:
            weight.copy_(known[name])
        weight.requires_grad_(name.startswith(newest + "."))


def _three_networks(stack: FlowNetCSS | FlowNet2, frame1: Tensor, frame2: Tensor) -> tuple[Tensor, ...]:
    """Returns the flows of LEVELS of C, S, S one after the other, in units of 20 px."""
    flow = _enlarge(FLOW_SCALE * stack.flownetc.flows(torch.cat((frame1, frame2), 1))[-1], "bilinear")
    flow = _enlarge(FLOW_SCALE * _correct(stack.flownets_1, frame1, frame2, flow)[-1], "bilinear")
    return _correct(stack.flownets_2, frame1, frame2, flow)


@models.register
def flownet_s() -> FlowModel:
    """FlowNetS as FlowNet 2.0 trains it (38,676,506 parameters); reads NVIDIA's FlowNet2-S checkpoint."""
    return FlowNetS()


@models.register
def flownet_c() -> FlowModel:
    """FlowNetC as FlowNet 2.0 trains it (39,175,298 parameters); reads NVIDIA's FlowNet2-C checkpoint."""
    return FlowNetC()


@models.register
def flownet_sd() -> FlowModel:
    """FlowNet-SD, for small displacements (45,371,666 parameters); reads NVIDIA's FlowNet2-SD checkpoint."""
    return FlowNetSD()


@models.register
def flownet_cs() -> FlowModel:
    """FlowNet2-CS, a stack of two (77,870,620 parameters); reads NVIDIA's FlowNet2-CS checkpoint."""
    return FlowNetCS()


@models.register
def flownet_css() -> FlowModel:
    """FlowNet2-CSS, a stack of three (116,565,942 parameters); reads NVIDIA's FlowNet2-CSS checkpoint."""
    return FlowNetCSS()


@models.register
def flownet2() -> FlowModel:
    """FlowNet 2.0: CSS, SD and their fusion (162,518,834 parameters); reads NVIDIA's FlowNet2 checkpoint."""
    return FlowNet2()
