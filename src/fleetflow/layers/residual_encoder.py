"""The residual encoders of RAFT (arXiv 2003.12039, section 3.1) and its descendants: pictures to stride 8.

Layers are registered in the published order; `chains` says which of them follow one another (see `layers.fused`).
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleetflow.ops.kernels import is_captured, is_reference

AT_ONCE = 2**18  # numbers that are summed at once, so that what is computed of them stays in the processor's cache


class InstanceNorm(nn.InstanceNorm2d):
    """Without parameters. On a CPU it does not change the layout in memory, nor depend on the number of threads."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or is_reference():
            return super().forward(x)
        norm = _trained_norm if torch.is_grad_enabled() or is_captured() else _norm
        samples = [norm(sample, self.eps) for sample in x.split(1)]
        return samples[0] if len(samples) == 1 else torch.cat(samples)


def _trained_norm(x: Tensor, eps: float) -> Tensor:
    """[1, C, H, W] normalized, with a gradient."""
    return F.batch_norm(x, None, None, training=True, eps=eps)


def _norm(x: Tensor, eps: float) -> Tensor:
    """[1, C, H, W] normalized. A batch norm sums by threads, in bfloat16 coarsely; in one order this is exact."""
    wide, count = torch.promote_types(x.dtype, torch.float32), x[0, 0].numel()
    total = squares = x.new_zeros((), dtype=torch.float64)
    for strip in x.split(max(AT_ONCE // x[0, :, 0].numel(), 1), 2):
        strip = strip.to(wide)
        total = total + strip.sum((0, 2, 3)).double()
        squares = squares + strip.square().sum((0, 2, 3)).double()
    mean = total / count
    variance = (squares / count - mean**2).clamp(min=0)
    return F.batch_norm(x, mean.to(wide), variance.to(wide), training=False, eps=eps)


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
