"""FastFlowNet: Kong, Shen, Yang, "FastFlowNet: A Lightweight Network for Fast Optical Flow Estimation", ICRA 2021.

1,366,114 parameters, of which the published checkpoints name every one. A pyramid of six levels, the upper three by
average pooling; at each level from 6 to 2 features of frame2 are warped by the flow so far, correlated with those of
frame1 at 53 of 81 displacements, and a decoder of grouped convolutions with channel shuffle corrects the flow.
Inside, flow is in units of 20 px at every level; the result has stride 4 and is enlarged bilinearly.

The published table's "12.2 GFLOPs" are multiply-adds at 436x1024 (12.59 G at 448x1024).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleetflow.models.base import FlowModel
from fleetflow.ops.correlation import local_correlation
from fleetflow.ops.resize import resize
from fleetflow.ops.subtract_mean import mean_color, subtract_mean
from fleetflow.ops.warp import warp
from fleetflow.ops.widened import widened
from fleetflow.registry import models
from fleetflow.types import Prediction, size_of

FLOW_SCALE = 20.0  # pixels of the full resolution per unit of the network's flow
GROUPS = 3

# The 53 of the 81 displacements of radius 4 that are kept: all within the inner 5x5 diamond-cornered block, every
# second one around it ("center dense dilated correlation", section III-B).
KEPT = (
    *(0, 2, 4, 6, 8),
    *(10, 12, 14, 16),
    *(18, 20, 21, 22, 23, 24, 26),
    *(28, 29, 30, 31, 32, 33, 34),
    *(36, 38, 39, 40, 41, 42, 44),
    *(46, 47, 48, 49, 50, 51, 52),
    *(54, 56, 57, 58, 59, 60, 62),
    *(64, 66, 68, 70),
    *(72, 74, 76, 78, 80),
)


def _convolution(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups), nn.LeakyReLU(0.1, inplace=True))


def _twice(channels: int = 2) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, channels, 4, 2, 1)


class Decoder(nn.Module):
    """[N, 87, h, w] correlation, features and flow -> [N, 2, h, w] correction of the flow, [N, 32, h, w] features."""

    def __init__(self):
        super().__init__()
        self.conv1 = _convolution(len(KEPT) + 32 + 2, 96)
        self.conv2 = _convolution(96, 96, groups=GROUPS)
        self.conv3 = _convolution(96, 96, groups=GROUPS)
        self.conv4 = _convolution(96, 96, groups=GROUPS)
        self.conv5 = _convolution(96, 64)
        self.conv6 = _convolution(64, 32)
        self.conv7 = nn.Conv2d(32, 2, 3, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv1(x)
        for convolution in (self.conv2, self.conv3, self.conv4):
            x = F.channel_shuffle(convolution(x), GROUPS)
        features = self.conv6(self.conv5(x))
        return self.conv7(features), features


class FastFlowNet(FlowModel):
    stride = 64
    fit = "scale"
    grid = 4
    keeps_features = False  # of the pair's mean color
    paper = "Kong et al., ICRA 2021, arXiv 2103.04524"
    license = "research only"

    def __init__(self):
        super().__init__()
        self.pconv1_1 = _convolution(3, 16, stride=2)
        self.pconv1_2 = _convolution(16, 16)
        self.pconv2_1 = _convolution(16, 32, stride=2)
        self.pconv2_2 = _convolution(32, 32)
        self.pconv2_3 = _convolution(32, 32)
        self.pconv3_1 = _convolution(32, 64, stride=2)
        self.pconv3_2 = _convolution(64, 64)
        self.pconv3_3 = _convolution(64, 64)
        self.rconv2 = _convolution(32, 32)
        self.rconv3 = _convolution(64, 32)
        self.rconv4 = _convolution(64, 32)
        self.rconv5 = _convolution(64, 32)
        self.rconv6 = _convolution(64, 32)
        self.up3 = _twice()
        self.up4 = _twice()
        self.up5 = _twice()
        self.up6 = _twice()
        self.decoder2 = Decoder()
        self.decoder3 = Decoder()
        self.decoder4 = Decoder()
        self.decoder5 = Decoder()
        self.decoder6 = Decoder()
        for layer in self.modules():  # as published
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def prepare(self, frame1: Tensor, frame2: Tensor) -> tuple[Tensor, Tensor]:
        mean = mean_color(frame1, frame2)
        return subtract_mean(frame1, mean).flip(1), subtract_mean(frame2, mean).flip(
            1
        )  # BGR; flip keeps the memory layout

    def frame_features(self, frame: Tensor) -> tuple[Tensor, ...]:
        """Returns the features of levels 2 (stride 4, 32 channels) to 6 (stride 64, 64 channels)."""
        level1 = self.pconv1_2(self.pconv1_1(frame))
        level2 = self.pconv2_3(self.pconv2_2(self.pconv2_1(level1)))
        level3 = self.pconv3_3(self.pconv3_2(self.pconv3_1(level2)))
        level4 = F.avg_pool2d(level3, 2)
        level5 = F.avg_pool2d(level4, 2)
        return level2, level3, level4, level5, F.avg_pool2d(level5, 2)

    def level(self, level: int, features1: Tensor, features2: Tensor, coarser: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the flow [N, 2, h, w] of a level in units of 20 px, and its decoder's features [N, 32, h, w].

        Args:
            level: 6 (stride 64) to 2 (stride 4), whose features both frames have.
            coarser: the flow of the level above, None for level 6.
        """
        if coarser is None:
            flow = features1.new_zeros(features1.shape[0], 2, *features1.shape[2:])
        else:
            flow = getattr(self, f"up{level + 1}")(coarser.to(features1.dtype))
            features2 = warp(features2, widened(flow) * (FLOW_SCALE / 2**level))
        volume = local_correlation(features1, features2, 4, KEPT)
        features = getattr(self, f"rconv{level}")(features1)
        seen = torch.cat((volume, features, flow.to(volume.dtype)), 1)
        correction, hidden = getattr(self, f"decoder{level}")(seen)
        return widened(correction) if coarser is None else widened(correction) + widened(flow), hidden

    def estimate(
        self,
        frame1: Tensor,
        frame2: Tensor,
        previous: Prediction | None,
        iterations: int | None,
        features: tuple[Any, Any] | None = None,
    ) -> Prediction:
        first, second = self.seen(frame1, frame2, features)
        flows = []
        for level in (6, 5, 4, 3, 2):
            flows.append(self.level(level, first[level - 2], second[level - 2], flows[-1] if flows else None)[0])
        # Two channels are enlarged three times faster as planes than channels-last.
        full = resize((flows[-1] * FLOW_SCALE).contiguous(), size_of(frame1))
        if not self.training:
            return Prediction(full)
        return Prediction(full, tuple(flow * (FLOW_SCALE / 2**level) for level, flow in zip((6, 5, 4, 3, 2), flows)))


@torch.no_grad()
def init_as_matcher(model: FastFlowNet) -> None:
    """Changes fresh weights so that every decoder begins as a crude matcher: where the correlation is high, go there.

    From the published initialization the network predicts zero for its first thousands of steps, until a path from the
    correlation to the flow has formed by chance. Here the path is laid out: feature filters without a mean response;
    `conv1` passes each correlation channel less the mean of all; `conv2` sums displacements so weighted; pairs of
    channels of opposite sign carry the two sums through the leaky layers to `conv7`. All other channels stay random,
    and everything is trained. The first plateau, 2,000 steps long, shrinks to 100 (docs/lab/training-log.md).
    """
    for name, layer in model.named_modules():
        if name.startswith("pconv") and isinstance(layer, nn.Conv2d):
            layer.weight.sub_(layer.weight.mean((1, 2, 3), keepdim=True)).mul_(1.3)
    smooth = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
    for level in (6, 5, 4, 3, 2):
        if level > 2:  # enlarge bilinearly
            ramp = torch.tensor([0.25, 0.75, 0.75, 0.25])
            up = getattr(model, f"up{level}").weight.zero_()
            up[0, 0] = up[1, 1] = ramp[:, None] * ramp
        decoder = getattr(model, f"decoder{level}")
        count, gain = len(KEPT), 200.0
        decoder.conv1[0].weight[:count] = 0
        decoder.conv1[0].weight[:count, :count] = (torch.eye(count) - 1 / count)[..., None, None] * gain * smooth
        # In each pair of taps the first is added and the second subtracted; the shuffle moves channel j of group i to
        # 3 j + i, so sums of group 0 and 1 arrive at 0, 3, 6, 9 and 1, 4, 7, 10.
        per_group = 96 // GROUPS
        for row in range(4):  # right, left, down, up
            sign = 0.1 * (1 - 2 * (row % 2))
            for group, channels in ((0, range(per_group)), (1, range(per_group, count))):
                shift = [KEPT[k] % 9 - 4 if row < 2 else KEPT[k] // 9 - 4 for k in channels]
                _set(
                    decoder.conv2[0],
                    per_group * group + row,
                    {k % per_group: sign * d for k, d in zip(channels, shift)},
                )
            pair, sign = 6 * (row // 2), 0.9 * (1 - 2 * (row % 2))
            _set(decoder.conv3[0], row, {pair: sign, pair + 3: -sign, pair + 1: sign, pair + 4: -sign})
            _set(decoder.conv4[0], row, {pair: sign, pair + 3: -sign})
            _set(decoder.conv5[0], row, {pair: sign, pair + 3: -sign})
            pair = 2 * (row // 2)
            _set(decoder.conv6[0], row, {pair: sign, pair + 1: -sign})
        decoder.conv7.weight.mul_(0.1)
        for axis in (0, 1):
            scale = 0.009 * 2**level / FLOW_SCALE
            decoder.conv7.weight[axis, :4] = 0
            _set(decoder.conv7, axis, {2 * axis: scale, 2 * axis + 1: -scale}, keep=True)


def _set(layer: nn.Conv2d, row: int, taps: dict[int, float], keep: bool = False) -> None:
    """Makes output `row` the sum of its inputs at the same pixel, weighted by `taps`; `keep` adds to what it is."""
    if not keep:
        layer.weight[row] = 0
    for channel, value in taps.items():
        layer.weight[row, channel, 1, 1] = value


@models.register
def fastflownet() -> FlowModel:
    """FastFlowNet (ICRA 2021); reads the checkpoints of ltkong218/FastFlowNet."""
    return FastFlowNet()
