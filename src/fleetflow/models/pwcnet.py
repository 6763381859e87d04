"""PWC-Net: Sun, Yang, Liu, Kautz, "PWC-Net: CNNs for Optical Flow Using Pyramid, Warping, and Cost Volume", CVPR 2018.

arXiv 1709.02371. A pyramid of six levels; at each level from 6 to 2 the features of frame2 are warped by the flow so
far and correlated with those of frame1 at 81 displacements, and a densely connected decoder reads the flow from that,
anew at each level: the flow so far is only an input. Dilated convolutions around it correct the last one. Inside, flow
is in units of 20 px at every level; the result has stride 4 and is enlarged bilinearly.

`pwcnet` (9,374,340 parameters) is the network of the published PyTorch checkpoint, `pwcnet_old` (8,749,280) that of
the paper, whose "8.75 M" the tables of others repeat. Kept as published (NVlabs/PWC-Net, PyTorch):
* warping aligns the corner pixels, PyTorch 0.2's only way; warped features that mix with the outside by more than
  1e-4 (`pwcnet_old`: 1e-3) count as outside, 0;
* the enlargement of the last flow, `deconv2`, is part of every checkpoint and leads nowhere; it is not trained;
* frames of other sizes are resized to multiples of 64 as 8-bit pictures, by the arithmetic of OpenCV (in floating
  point the flow differs by some 0.002 px); the flow of stride 4 is resized to theirs in one go.
FastFlowNet's table gives it 90.8 "GFLOPs"; convolutions and correlations are 84.3 G multiply-adds at 448x1024.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleetflow.layers.masked_warp import masked_warp
from fleetflow.layers.resize_8bit import resize_8bit
from fleetflow.models.base import FlowModel, rounded_up
from fleetflow.ops.correlation import local_correlation
from fleetflow.ops.widened import widened
from fleetflow.registry import models
from fleetflow.types import Prediction, size_of

FLOW_SCALE = 20.0  # pixels of the full resolution per unit of the network's flow
LEVELS = (6, 5, 4, 3, 2)  # of the flows, coarsest first; level k has stride 2^k
RADIUS = 4
CHANNELS = (3, 16, 32, 64, 96, 128, 196)  # of the frame and of the features of levels 1 to 6
DENSE = (128, 128, 96, 64, 32)  # channels that each layer of a decoder adds
DILATIONS = ((128, 1), (128, 2), (128, 4), (96, 8), (64, 16), (32, 1))  # of the last layers: channels, dilation


def _convolution(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation), nn.LeakyReLU(0.1, inplace=True)
    )


def _flow(inputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, 2, 3, 1, 1)


class PWCNet(FlowModel):
    """pyramid: letters of each level's convolutions in their order, the first of stride 2.

    Args:
        ahead: the layers of a decoder that put their new features before what they read; the others put them behind.
        threshold: share of a warped sample that must be of the picture, else it counts as 0.
    """

    stride = 64
    fit = "scale"
    grid = 4
    paper = "Sun et al., CVPR 2018, arXiv 1709.02371"
    license = "CC BY-NC-SA 4.0"

    def __init__(
        self,
        pyramid: tuple[tuple[str, ...], ...] = (("a", "aa", "b"),) * 5 + (("aa", "a", "b"),),
        *,
        ahead: tuple[int, ...] = (0, 1, 2, 3, 4),
        threshold: float = 0.9999,
    ):
        super().__init__()
        self.ahead, self.threshold = ahead, threshold
        self.names = tuple([f"conv{level}{letters}" for letters in row] for level, row in enumerate(pyramid, 1))
        for level, names in enumerate(self.names, 1):
            for k, name in enumerate(names):
                inputs, stride = (CHANNELS[level - 1], 2) if k == 0 else (CHANNELS[level], 1)
                self.add_module(name, _convolution(inputs, CHANNELS[level], stride))
        for level in LEVELS:
            width = (2 * RADIUS + 1) ** 2
            if level < LEVELS[0]:
                width += CHANNELS[level] + 2 + 2
            for k, outputs in enumerate(DENSE):
                self.add_module(f"conv{level}_{k}", _convolution(width, outputs))
                width += outputs
            self.add_module(f"predict_flow{level}", _flow(width))
            self.add_module(f"deconv{level}", nn.ConvTranspose2d(2, 2, 4, 2, 1))
            if level > LEVELS[-1]:
                self.add_module(f"upfeat{level}", nn.ConvTranspose2d(width, 2, 4, 2, 1))
        for k, (outputs, dilation) in enumerate(DILATIONS, 1):
            self.add_module(f"dc_conv{k}", _convolution(width, outputs, 1, dilation))
            width = outputs
        self.dc_conv7 = _flow(width)
        for layer in self.modules():  # as published
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.deconv2.requires_grad_(False)

    def prepare(self, frame1: Tensor, frame2: Tensor) -> tuple[Tensor, Tensor]:
        frames = frame1.flip(1), frame2.flip(1)  # BGR
        size = rounded_up(size_of(frame1), self.stride)
        return resize_8bit(frames[0], size), resize_8bit(frames[1], size)

    def frame_features(self, frame: Tensor) -> list[Tensor]:
        """Returns the features of levels 1 (stride 2, 16 channels) to 6 (stride 64, 196 channels)."""
        levels = []
        for names in self.names:
            for name in names:
                frame = getattr(self, name)(frame)
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
        """Returns the prediction with a flow of stride 4, which `forward` enlarges; its intermediate flows are the five flows."""
        first, second = self.seen(frame1, frame2, features)
        flows: list[Tensor] = []  # coarsest first
        x: Any = None  # what the last decoder knew
        for level in LEVELS:
            features1, features2 = first[level - 1], second[level - 1]
            known = ()
            if x is not None:
                flow = getattr(self, f"deconv{level + 1}")(flows[-1].to(features1.dtype))
                known = (features1, flow, getattr(self, f"upfeat{level + 1}")(x))
                shift = widened(flow) * (FLOW_SCALE / 2**level)
                features2 = masked_warp(features2, shift, self.threshold)
            volume = F.leaky_relu(local_correlation(features1, features2, RADIUS), 0.1)
            x = torch.cat((volume, *known), 1)
            for k in range(len(DENSE)):
                new = getattr(self, f"conv{level}_{k}")(x)
                x = torch.cat((new, x) if k in self.ahead else (x, new), 1)
            flows.append(widened(getattr(self, f"predict_flow{level}")(x)))
        for k in range(1, 8):
            x = getattr(self, f"dc_conv{k}")(x)
        flows[-1] = flows[-1] + widened(x)
        # Two channels are enlarged three times faster as planes than channels-last.
        full = (FLOW_SCALE * flows[-1]).contiguous()
        if not self.training:
            return Prediction(full)
        return Prediction(full, tuple(flow * (FLOW_SCALE / 2**level) for level, flow in zip(LEVELS, flows)))


@models.register
def pwcnet() -> FlowModel:
    """PWC-Net as released for PyTorch (9,374,340 parameters); reads the checkpoints of NVlabs/PWC-Net (.pth.tar)."""
    return PWCNet()


@models.register
def pwcnet_old() -> FlowModel:
    """PWC-Net of the paper (CVPR 2018, 8,749,280 parameters); reads NVlabs' checkpoints of PWCDCNet_old (.pth.tar)."""
    return PWCNet((("a", "b"),) * 6, ahead=(1,), threshold=0.999)
