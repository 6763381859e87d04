"""Convolutions made ready for prediction on the CPU: weights packed once, the activation computed in the same pass.

oneDNN, which torch's CPU convolutions are, takes weights in blocks that suit the processor and can apply an activation
while a result is still in registers. `F.conv2d` packs at every call and leaves the activation to a second pass over
memory; here the weights are packed at the first call. Nothing is compiled. For inference only: no gradients.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval


class FusedConvolution(nn.Module):
    """What `convolution`, followed by `activation`, computes, in `dtype`."""

    def __init__(self, convolution: nn.Conv2d, activation: nn.Module | None, dtype: torch.dtype):
        super().__init__()
        self.weight = convolution.weight.detach().to(dtype)
        self.bias = None if convolution.bias is None else convolution.bias.detach().to(dtype)
        self.geometry = (
            list(convolution.padding),
            list(convolution.stride),
            list(convolution.dilation),
            convolution.groups,
        )
        self.activation = _activation(activation)
        self.packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W] of any float dtype; the result has the dtype of the layer, and is channels-last."""
        x = x.to(self.weight.dtype, memory_format=torch.channels_last)
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, list(x.shape))
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed, self.bias, *self.geometry, *self.activation)


def _activation(layer: nn.Module | None) -> tuple[str, list[float], str]:
    if layer is None:
        return "none", [], ""
    return ("leaky_relu", [layer.negative_slope], "") if isinstance(layer, nn.LeakyReLU) else ("relu", [], "")


def available() -> bool:
    """Returns True where this build of torch has the fused convolutions."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def fuse(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces the plain convolutions of `model` (in evaluation) in place.

    In a Sequential, batch normalisation behind a convolution is folded into its weights, and a LeakyReLU or ReLU
    behind that is computed with it.
    """
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for k, (name, layer) in enumerate(children):
            normed = isinstance(layer, nn.Conv2d) and parametrize.is_parametrized(layer, "weight")
            if (
                not (type(layer) is nn.Conv2d or normed)
                or layer.padding_mode != "zeros"
                or isinstance(layer.padding, str)
            ):
                continue
            if layer._forward_hooks or layer._forward_pre_hooks:
                continue
            after = children[k + 1 : k + 3] if isinstance(parent, nn.Sequential) else []
            if after and type(after[0][1]) is nn.BatchNorm2d and after[0][1].track_running_stats:
                norm, normalisation = after.pop(0)
                layer = fuse_conv_bn_eval(layer, normalisation)
                setattr(parent, norm, nn.Identity())
            activation = None
            if after and type(after[0][1]) in (nn.LeakyReLU, nn.ReLU):
                behind, activation = after[0]
                setattr(parent, behind, nn.Identity())
            setattr(parent, name, FusedConvolution(layer, activation, dtype))
