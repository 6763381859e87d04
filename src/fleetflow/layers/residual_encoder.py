"""The residual encoders of RAFT (arXiv 2003.12039, section 3.1) and its descendants: pictures to stride 8.

Layers are registered in the published order; `chains` says which of them follow one another (see `layers.fused`).
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleetflow.ops.kernels import is_reference

WIDTH = 32  # channels that a batch norm on a CPU treats at once


class InstanceNorm(nn.InstanceNorm2d):
    """Without parameters. On a CPU a batch norm of every sample, which does not change the layout in memory."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or is_reference():
            return super().forward(x)
        narrow = x.shape[1] <= WIDTH // 4 and WIDTH % x.shape[1] == 0 and x[0].numel() % WIDTH == 0
        if narrow and not torch.is_grad_enabled() and x.is_contiguous(memory_format=torch.channels_last):
            samples = [_widened(sample, self.eps) for sample in x.split(1)]
        else:
            samples = [F.batch_norm(sample, None, None, training=True, eps=self.eps) for sample in x.split(1)]
        return samples[0] if len(samples) == 1 else torch.cat(samples)


def _widened(x: Tensor, eps: float) -> Tensor:
    """[1, C, H, W] channels-last, normalized as WIDTH channels; a batch norm of 8 takes five times as long."""
    count = WIDTH // x.shape[1]
    wide = x.permute(0, 2, 3, 1).reshape(1, 1, -1, WIDTH).permute(0, 3, 1, 2)
    _, means, scales = torch.native_batch_norm(wide, None, None, None, None, True, 0.0, eps)
    means, squares = means.view(count, -1), scales.view(count, -1) ** -2 - eps + means.view(count, -1) ** 2
    mean = means.mean(0)
    variance = (squares.mean(0) - mean**2).clamp(min=0)
    wide = F.batch_norm(wide, mean.repeat(count), variance.repeat(count), training=False, eps=eps)
    return wide.permute(0, 2, 3, 1).reshape(1, *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)


NORMS = {"instance": InstanceNorm, "batch": nn.BatchNorm2d, "none": lambda channels: nn.Sequential()}


class ResidualBlock(nn.Module):
    """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]: two 3x3 convolutions beside a shortcut."""

    chains: ClassVar = (("conv1", "norm1", "relu1"), ("conv2", "norm2", "relu2"))

    def __init__(self, inputs: int, outputs: int, norm: str, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.norm1 = NORMS[norm](outputs)
        self.norm2 = NORMS[norm](outputs)
        if stride == 1:
            self.downsample = None
        else:
            self.norm3 = NORMS[norm](outputs)  # published checkpoints name it twice, here and in the shortcut
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), self.norm3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.relu2(self.norm2(self.conv2(y)))
        return (y + (x if self.downsample is None else self.downsample(x))).relu_()


class BottleneckBlock(nn.Module):
    """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]: 1x1, 3x3 and 1x1 at a quarter of the channels."""

    chains: ClassVar = (*ResidualBlock.chains, ("conv3", "norm3", "relu3"))

    def __init__(self, inputs: int, outputs: int, norm: str, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs // 4, 1)
        self.conv2 = nn.Conv2d(outputs // 4, outputs // 4, 3, stride, 1)
        self.conv3 = nn.Conv2d(outputs // 4, outputs, 1)
        self.relu1, self.relu2, self.relu3 = (nn.ReLU(inplace=True) for _ in range(3))
        self.norm1 = NORMS[norm](outputs // 4)
        self.norm2 = NORMS[norm](outputs // 4)
        self.norm3 = NORMS[norm](outputs)
        if stride == 1:
            self.downsample = None
        else:
            self.norm4 = NORMS[norm](outputs)
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), self.norm4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.relu2(self.norm2(self.conv2(y)))
        y = self.relu3(self.norm3(self.conv3(y)))
        return (y + (x if self.downsample is None else self.downsample(x))).relu_()


class ResidualEncoder(nn.Module):
    """[N, 3, H, W] -> [N, outputs, H / 8, W / 8] features; H and W multiples of 8.

    Args:
        norm: "instance" (without parameters), "batch" or "none".
        block, widths: ResidualBlock at (64, 96, 128) channels for RAFT, BottleneckBlock at (32, 64, 96) for its small
            one.
    """

    chains: ClassVar = (("conv1", "norm1", "relu1"),)

    def __init__(
        self, outputs: int, norm: str, block: type[nn.Module] = ResidualBlock, widths: tuple[int, ...] = (64, 96, 128)
    ):
        super().__init__()
        first, second, third = widths
        self.norm1 = NORMS[norm](first)
        self.conv1 = nn.Conv2d(3, first, 7, 2, 3)
        self.relu1 = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(block(first, first, norm, 1), block(first, first, norm, 1))
        self.layer2 = nn.Sequential(block(first, second, norm, 2), block(second, second, norm, 1))
        self.layer3 = nn.Sequential(block(second, third, norm, 2), block(third, third, norm, 1))
        self.conv2 = nn.Conv2d(third, outputs, 1)
        for layer in self.modules():  # as published
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, frame: Tensor) -> Tensor:
        x = self.relu1(self.norm1(self.conv1(frame)))
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))
