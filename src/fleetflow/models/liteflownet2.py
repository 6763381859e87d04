"""LiteFlowNet2: Hui, Tang, Loy, "A Lightweight Optical Flow CNN", IEEE TPAMI 2020, arXiv 1903.07414.

A pyramid of six levels, the first of full resolution, so that level k has stride 2^(k - 1). At each level from 6 to 3
the flow so far is corrected twice and smoothed once, by three networks: M reads a correction from the correlation of
the features at 49 displacements, S from the features themselves, and R replaces each vector by a weighted mean of
those around it, with weights of its own for every pixel (no edge is blurred that the frames show). Inside, flow is in
units of 20 px at every level; the result has stride 4 and is enlarged bilinearly. 6,428,112 parameters.

It is trained from the top, in five stages that the variants are named after; `grow` takes a stage to the next one.
Kept as published (open-mmlab/mmflow), whose parameters are named like those here:
* the correlation is the plain sum over channels (Caffe release: the mean);
* flows, and the correlation of level 3, which is computed for every second pixel only, are enlarged by a constant
  filter that checkpoints contain. It was meant to be the bilinear one, but its row index is a fraction: it is lopsided;
* frames are BGR, and the mean is that of the Caffe release, in its order;
* frames of other sizes are resized to multiples of 64 as 8-bit pictures, by the arithmetic of OpenCV.

`translate` makes the weights of the Caffe release (twhui/LiteFlowNet2) fit exactly, its bilinear filters included. Its
own preparation of frames is not followed: multiples of 32, another mean for frame2, frames for R averaged instead of
sampled. Its model for KITTI has a seventh network, of level 2, and is refused.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleetflow.layers.masked_warp import masked_warp
from fleetflow.layers.resize_8bit import resize_8bit
from fleetflow.models.base import FlowModel, rounded_up
from fleetflow.ops.constant import constant
from fleetflow.ops.correlation import local_correlation
from fleetflow.ops.resize import resize
from fleetflow.ops.subtract_mean import subtract_mean
from fleetflow.registry import models
from fleetflow.types import FleetflowError, Prediction, size_of

FLOW_SCALE = 20.0  # pixels of the full resolution per unit of the network's flow
MEAN = (0.411618, 0.434631, 0.454253)  # of the channels B, G, R
RADIUS = 3
DISPLACEMENTS = (2 * RADIUS + 1) ** 2
LEVELS = (6, 5, 4, 3)
# Of the levels 1 to 6: channels, convolutions, kernel size; the first convolution of a level has stride 2, but for 1.
PYRAMID = ((32, 1, 7), (32, 3, 3), (64, 2, 3), (96, 2, 3), (128, 1, 3), (192, 1, 3))
CHANNELS = {level: PYRAMID[level - 1][0] for level in LEVELS}
KERNELS = {6: 3, 5: 3, 4: 5, 3: 5}  # of the last convolution of M and S, and of the weighted means of R
KNOWN = 128  # channels of the features of frame1 that R reads, at least
SPARSE = 3  # the level whose correlation is computed for every second pixel and displacement


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
    return nn.Sequential(OrderedDict(conv=layer, activate=nn.LeakyReLU(0.1, inplace=True)))


def _chain(*channels: int) -> nn.Sequential:
    return nn.Sequential(*(_convolution(*pair) for pair in zip(channels, channels[1:])))


class Enlargement(nn.Module):
    """[N, C, h, w] -> [N, C, 2h, 2w], by a constant filter, the same for every channel, that checkpoints contain."""

    weight: Tensor

    def __init__(self, channels: int):
        super().__init__()
        k = torch.arange(16)
        x, y = ((1 - (at / 2 - 0.75).abs()) for at in (k % 4, k / 4))  # the bilinear filter has k // 4
        self.register_buffer("weight", (x * y).view(1, 1, 4, 4).repeat(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # flows keep float32
            return F.conv_transpose2d(x, self.weight.to(x.dtype), stride=2, padding=1, groups=len(self.weight))


class Matching(nn.Module):
    """M: features of both frames, those of frame2 warped -> [N, 2, h, w] correction of the flow."""

    def __init__(self, level: int):
        super().__init__()
        kernel = KERNELS[level]
        self.layers = _chain(DISPLACEMENTS, 128, 128, 96, 64, 32)
        self.pred_flow = nn.Conv2d(32, 2, kernel, padding=kernel // 2)
        self.corr_up = Enlargement(DISPLACEMENTS) if level == SPARSE else None

    def forward(self, features1: Tensor, features2: Tensor) -> Tensor:
        if self.corr_up is not None:
            features1, features2 = features1[..., ::2, ::2], features2[..., ::2, ::2]
        volume = F.leaky_relu(local_correlation(features1, features2, RADIUS) * features1.shape[1], 0.1)
        if self.corr_up is not None:
            volume = self.corr_up(volume)
        return self.pred_flow(self.layers(volume))


class SubPixel(nn.Module):
    """S: features of both frames, those of frame2 warped, and the flow -> [N, 2, h, w] correction of the flow."""

    def __init__(self, level: int):
        super().__init__()
        kernel = KERNELS[level]
        self.layers = _chain(2 * CHANNELS[level] + 2, 128, 128, 96, 64, 32)
        self.pred_flow = nn.Conv2d(32, 2, kernel, padding=kernel // 2)

    def forward(self, features1: Tensor, features2: Tensor, flow: Tensor) -> Tensor:
        flow = flow.to(features1.dtype, memory_format=torch.channels_last)  # like the features, else they are copied
        x = torch.cat((features1, features2, flow), 1)
        return self.pred_flow(self.layers(x))


class Regularization(nn.Module):
    """R: the error that the flow leaves [N, 1, h, w], the flow, features of frame1 -> the flow, smoothed."""

    def __init__(self, level: int):
        super().__init__()
        self.kernel = kernel = KERNELS[level]
        count, margin = kernel**2, kernel // 2
        self.layers = _chain(1 + 2 + max(CHANNELS[level], KNOWN), 128, 128, 64, 64, 32, 32)
        if kernel == 3:
            self.dist_layer = nn.Conv2d(32, count, kernel, padding=margin)
        else:
            self.dist_layer = nn.Sequential(
                nn.Conv2d(32, count, (kernel, 1), padding=(margin, 0)),
                nn.Conv2d(count, count, (1, kernel), padding=(0, margin)),
            )

    def forward(self, error: Tensor, flow: Tensor, features: Tensor) -> Tensor:
        centered = flow - flow.mean((2, 3), keepdim=True)
        seen = torch.cat((error, centered), 1).to(features.dtype, memory_format=torch.channels_last)
        x = torch.cat((seen, features), 1)
        shares = (-self.dist_layer(self.layers(x)).float().square()).softmax(1)
        around = F.unfold(flow, self.kernel, padding=self.kernel // 2)  # outside the picture flow counts as 0
        return (around.view(flow.shape[0], 2, -1, *flow.shape[2:]) * shares[:, None]).sum(2)


class Level(nn.Module):
    """The networks of one level; the lowest level of a stage does not enlarge its flow."""

    def __init__(self, level: int, lowest: bool, regularized: bool):
        super().__init__()
        channels = CHANNELS[level]
        self.pixels = FLOW_SCALE / 2 ** (level - 1)  # of this level, per unit of flow
        if regularized:
            self.rfeat_layer = _convolution(channels, KNOWN, 1) if channels < KNOWN else nn.Identity()
        self.NetM = Matching(level)
        self.NetS = SubPixel(level)
        self.NetR = Regularization(level) if regularized else None
        if not lowest:
            self.upflow_layer = Enlargement(2)

    def forward(
        self, features1: Tensor, features2: Tensor, frame1: Tensor, frame2: Tensor, flow: Tensor | None
    ) -> Tensor:
        """Returns the flow [N, 2, h, w], given the one so far; frames are resized to the level, flows are float32."""
        warped = features2 if flow is None else masked_warp(features2, flow * self.pixels)
        matched = self.NetM(features1, warped).float()
        found = matched if flow is None else flow + matched
        found = found + self.NetS(features1, masked_warp(features2, found * self.pixels), found).float()
        if self.NetR is None:
            return found
        error = torch.linalg.vector_norm(frame1 - masked_warp(frame2, found * self.pixels), dim=1, keepdim=True)
        return self.NetR(error, found, self.rfeat_layer(features1))


def _caffe_names() -> Iterator[tuple[str, str]]:
    """Yields the name of each trained layer of the Caffe release, and that of its parameters here."""
    for level, (_, count, _) in enumerate(PYRAMID, 1):
        for k in range(count):
            yield f"conv{level}" + (f"_{k + 1}" if count > 1 else ""), f"encoder.layers.{level - 1}.layers.{k}.conv"
    for level in LEVELS:
        here = f"decoder.decoders.level{level}"
        for network, letter, count in (("D1", "M", 5), ("D2", "S", 5), ("R", "R", 6)):
            for k in range(count):
                yield f"conv{k + 1}_{network}_L{level}", f"{here}.Net{letter}.layers.{k}.conv"
        yield "scaled_flow_D1_L6" if level == 6 else f"scaled_flow_D1_res_L{level}", f"{here}.NetM.pred_flow"
        yield f"scaled_flow_D2_res_L{level}", f"{here}.NetS.pred_flow"
        if KERNELS[level] == 3:
            yield f"dist_R_L{level}", f"{here}.NetR.dist_layer"
        else:
            yield f"distH_R_L{level}", f"{here}.NetR.dist_layer.0"
            yield f"distW_R_L{level}", f"{here}.NetR.dist_layer.1"
        if CHANNELS[level] < KNOWN:
            yield f"F0_128_L{level}", f"{here}.rfeat_layer.conv"
        if level > LEVELS[-1]:
            yield f"scaled_flow_R_L{level}to{level - 1}", f"{here}.upflow_layer"
    yield f"corr_L{SPARSE}", f"decoder.decoders.level{SPARSE}.NetM.corr_up"


def from_caffe(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state of `liteflownet2` for one of the Caffe release, {LAYER.0: weight, LAYER.1: bias}.

    As correlations are means there, the layer that reads one is divided by the number of channels. Layers that hold
    the mean of the frames or only add up channels have no place here; all others that are unknown keep their names.
    Any other state is returned as it is.
    """
    if "conv1.0" not in state or "conv1_D1_L6.0" not in state:
        return state
    names = dict(_caffe_names())
    found = {}
    for key, value in state.items():
        layer, _, number = key.rpartition(".")
        if layer.startswith(("img0s_aug", "img1s_aug", "ScaleMag_")):
            continue
        if layer.startswith(("sum_exp_kernel_R_L", "scaled_flow0_R_L")) and bool((value == 1 - int(number)).all()):
            continue  # a sum: weights 1, bias 0
        if layer in names and number in ("0", "1"):
            key = f"{names[layer]}.{'weight' if number == '0' else 'bias'}"
            value = value.flatten() if number == "1" else value
        found[key] = value
    for level in LEVELS:
        key = f"decoder.decoders.level{level}.NetM.layers.0.conv.weight"
        if key in found:
            found[key] = found[key] / CHANNELS[level]
    return found


class LiteFlowNet2(FlowModel):
    """lowest: the level of the finest flow; regularized: False leaves R out, as the first stage of the training."""

    stride = 64
    fit = "scale"
    grid = 4
    paper = "Hui et al., TPAMI 2020, arXiv 1903.07414"
    license = "Apache-2.0, Caffe weights research only"
    translate: ClassVar = staticmethod(from_caffe)
    encoder: Any  # dictionaries of modules, nested as the names of the published checkpoints are
    decoder: Any

    def __init__(self, lowest: int = LEVELS[-1], *, regularized: bool = True):
        super().__init__()
        self.levels = tuple(level for level in LEVELS if level >= lowest)
        self.grid = 2 ** (lowest - 1)
        pyramid, inputs = nn.ModuleList(), 3
        for level, (outputs, count, kernel) in enumerate(PYRAMID, 1):
            first = _convolution(inputs, outputs, kernel, 2 if level > 1 else 1)
            rest = (_convolution(outputs, outputs, kernel) for _ in range(count - 1))
            pyramid.append(nn.ModuleDict({"layers": nn.Sequential(first, *rest)}))
            inputs = outputs
        self.encoder = nn.ModuleDict({"layers": pyramid})
        decoders = {f"level{level}": Level(level, level == lowest, regularized) for level in sorted(self.levels)}
        self.decoder = nn.ModuleDict({"decoders": nn.ModuleDict(decoders)})
        for layer in self.modules():  # as published
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def prepare(self, frame1: Tensor, frame2: Tensor) -> tuple[Tensor, Tensor]:
        size = rounded_up(size_of(frame1), self.stride)
        frames = [resize_8bit(frame.flip(1), size) for frame in (frame1, frame2)]  # BGR
        mean = constant(MEAN, frame1)
        return subtract_mean(frames[0], mean), subtract_mean(frames[1], mean)

    def frame_features(self, frame: Tensor) -> list[Tensor]:
        """Returns the features of levels 1 (stride 1, 32 channels) to 6 (stride 32, 192 channels)."""
        levels = []
        for level in self.encoder["layers"]:
            frame = level["layers"](frame)
            levels.append(frame)
        return levels

    def estimate(
        self,
        frame1: Tensor,
        frame2: Tensor,
        previous: Prediction | None,
        iterations: int | None,
        features: tuple[Any, Any] | None = None,
    ) -> Prediction:
        """Returns the prediction; its intermediate flows in training are the flows of all levels, coarsest first."""
        first, second = self.seen(frame1, frame2, features)
        flows = []
        for level in self.levels:
            decoder = self.decoder["decoders"][f"level{level}"]
            flow = self.decoder["decoders"][f"level{level + 1}"].upflow_layer(flows[-1]) if flows else None
            both = first[level - 1], second[level - 1]
            frames = (resize(frame, size_of(both[0])) for frame in (frame1, frame2))
            flows.append(decoder(*both, *frames, flow))
        # Two channels are enlarged three times faster as planes than channels-last.
        full = resize((FLOW_SCALE * flows[-1]).contiguous(), size_of(frame1))
        if not self.training:
            return Prediction(full)
        pixels = (FLOW_SCALE / 2 ** (level - 1) for level in self.levels)
        return Prediction(full, tuple(flow * scale for flow, scale in zip(flows, pixels)))


@torch.no_grad()
def init_as_matcher(model: LiteFlowNet2) -> None:
    """Changes fresh weights so that every M begins as a crude matcher: where the correlation is high, go there.

    As `fastflownet.init_as_matcher`, which says why. The first layer subtracts from each correlation the mean of all;
    from the second on four channels carry the sums of the displacements to the right, left, down and up that they
    weigh, in pairs of opposite sign through the leaky layers. All else stays random, and everything is trained.
    """
    for layer in model.encoder.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.sub_(layer.weight.mean((1, 2, 3), keepdim=True)).mul_(1.3)
    smooth = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
    offsets = torch.arange(-RADIUS, RADIUS + 1.0)
    down, right = torch.meshgrid(offsets, offsets, indexing="ij")
    ways = torch.stack((right, -right, down, -down)).flatten(1)
    sign = torch.tensor([[1.0, -1.0]])
    pairs = torch.block_diag(sign, sign)  # the two differences of four channels
    for level in model.levels:
        decoder = model.decoder["decoders"][f"level{level}"]
        first, second, *others = (block.conv.weight for block in decoder.NetM.layers)
        less_mean = (torch.eye(DISPLACEMENTS) - 1 / DISPLACEMENTS) / CHANNELS[level]
        first[:DISPLACEMENTS] = 200 * less_mean[..., None, None] * smooth
        second[:4] = 0
        second[:4, :DISPLACEMENTS, 1, 1] = 0.1 * ways
        for weight in others:
            weight[:4] = 0
            weight[:4, :4, 1, 1] = 0.9 * torch.stack((pairs, -pairs), 1).flatten(0, 1)
        for predict in (decoder.NetM.pred_flow, decoder.NetS.pred_flow):
            predict.weight.mul_(0.02)
        predict, center = decoder.NetM.pred_flow.weight, KERNELS[level] // 2
        predict[:, :4] = 0
        predict[:, :4, center, center] = 0.07 / decoder.pixels * pairs


@torch.no_grad()
def grow(model: LiteFlowNet2, earlier: LiteFlowNet2) -> None:
    """Copies into `model` the weights of an earlier stage of the training, with which the next one starts.

    A level that is new takes the weights of the lowest level of `earlier` where the shapes agree (LiteFlowNet did so;
    mmflow's stages leave a new level as it was initialized). All else that is new keeps its own.

    Raises:
        FleetflowError: If `earlier` has a level that `model` lacks.
    """
    if len(earlier.levels) > len(model.levels):
        raise FleetflowError(
            f"a stage down to level {earlier.levels[-1]} cannot start one down to level {model.levels[-1]}; "
            "give the later stage first"
        )
    known = earlier.state_dict()
    for key, value in model.state_dict().items():
        for level in model.levels[len(earlier.levels) :]:
            key = key.replace(f"level{level}.", f"level{earlier.levels[-1]}.")
        if key in known and known[key].shape == value.shape:
            value.copy_(known[key])


@models.register
def liteflownet2() -> FlowModel:
    """LiteFlowNet2 (6,428,112 parameters); reads mmflow's checkpoints (.pth) and the Caffe release (.caffemodel)."""
    return LiteFlowNet2()


@models.register
def liteflownet2_m4s4r4() -> FlowModel:
    """LiteFlowNet2's stage down to level 4 (5,101,701 parameters); reads mmflow's checkpoints of M4S4R4."""
    return LiteFlowNet2(4)


@models.register
def liteflownet2_m5s5r5() -> FlowModel:
    """LiteFlowNet2's stage down to level 5 (3,697,466 parameters); reads mmflow's checkpoints of M5S5R5."""
    return LiteFlowNet2(5)


@models.register
def liteflownet2_m6s6r6() -> FlowModel:
    """LiteFlowNet2's stage of level 6 (2,238,541 parameters); reads mmflow's checkpoints of M6S6R6."""
    return LiteFlowNet2(6)


@models.register
def liteflownet2_m6s6() -> FlowModel:
    """LiteFlowNet2's first stage, level 6 without R (1,725,156 parameters); reads mmflow's checkpoints of M6S6."""
    return LiteFlowNet2(6, regularized=False)
