"""Convolutions made ready for prediction on the CPU: weights packed once, the activation computed in the same pass.

oneDNN, which torch's CPU convolutions are, takes weights in blocks that suit the processor and can apply an activation
while a result is still in registers. `F.conv2d` packs at every call and leaves the activation to a second pass over
memory; here the weights are packed at the first call. Nothing is compiled. For inference only: no gradients.
"""

import threading
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fleetflow.layers.update import GRU, ConvReLU

_packing = threading.Lock()  # one for all layers: it is held at their first calls only


def _packed(weight: Tensor, geometry: tuple, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape))


class _Packing(nn.Module):
    """A layer that packs its weights at its first call, as they suit the frames; copies pack their own."""

    packed: Any = None

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "packed"}


class FusedConvolution(_Packing):
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
        self.activation = ("none", [], "")
        if isinstance(activation, nn.LeakyReLU):
            self.activation = ("leaky_relu", [activation.negative_slope], "")
        elif activation is not None or isinstance(convolution, ConvReLU):
            self.activation = ("relu", [], "")

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W] of any float dtype; the result has the dtype of the layer, and is channels-last."""
        x = x.to(self.weight.dtype, memory_format=torch.channels_last)
        if self.packed is None:
            with _packing:
                if self.packed is None:
                    self.packed = _packed(self.weight, self.geometry, x)
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed, self.bias, *self.geometry, *self.activation)


class FusedGRU(_Packing):
    """What `gru` computes: what its convolutions see of the context is computed once, for all iterations.

    Update and reset, which see the same, are one convolution.
    """

    def __init__(self, gru: GRU, dtype: torch.dtype):
        super().__init__()
        self.layers = []  # weight, bias and geometry: of update and reset, then of the candidate, of each unit
        for update, reset, candidate in gru.units():
            geometry = (list(update.padding), [1, 1], [1, 1], 1)
            for gates in ((update, reset), (candidate,)):
                weight, bias = (torch.cat([getattr(gate, name) for gate in gates]) for name in ("weight", "bias"))
                self.layers.append((weight.detach().to(dtype), bias.detach().to(dtype), geometry))

    def prepare(self, context: Tensor) -> list[Tensor]:
        """Returns for each convolution what it adds for the context [N, C, h, w]."""
        width = len(self.layers[1][0])
        context = context.to(self.layers[0][0].dtype, memory_format=torch.channels_last)
        part = slice(width, width + context.shape[1])
        terms = [F.conv2d(context, weight[:, part], bias, padding=how[0]) for weight, bias, how in self.layers]
        if self.packed is None:
            with _packing:
                if self.packed is None:
                    self.packed = [self._pack(weight, geometry, part, context) for weight, _, geometry in self.layers]
        return [term.contiguous(memory_format=torch.channels_last) for term in terms]

    @staticmethod
    def _pack(weight: Tensor, geometry: tuple, part: slice, context: Tensor) -> Tensor:
        """What of a weight is multiplied with state and motion, packed."""
        rest = torch.cat((weight[:, : part.start], weight[:, part.stop :]), 1)
        return _packed(rest, geometry, context.new_empty(context.shape[0], rest.shape[1], *context.shape[2:]))

    def forward(self, hidden: Tensor, terms: list[Tensor], motion: Tensor) -> Tensor:
        """Returns the next state, [N, hidden, h, w], for terms from `prepare`."""
        width, dtype = hidden.shape[1], terms[0].dtype
        seen = torch.cat((hidden.to(dtype), motion.to(dtype)), 1)
        seen = seen.contiguous(memory_format=torch.channels_last)
        assert self.packed is not None  # by `prepare`
        layers = list(zip(self.packed, terms, (geometry for *_, geometry in self.layers)))
        for gates, candidate in zip(layers[::2], layers[1::2]):
            z, r = _plus(seen, *gates).sigmoid_().chunk(2, 1)
            state = seen[:, :width]  # of this step; in `seen` the candidate finds what is not reset, and then the next
            state.mul_(r)
            change = _plus(seen, *candidate).tanh_()
            hidden = torch.lerp(hidden, change.to(hidden.dtype), z.to(hidden.dtype))  # as wide as it is given
            state.copy_(hidden)
        return hidden


def _plus(x: Tensor, packed: Tensor, term: Tensor, geometry: tuple) -> Tensor:
    """The convolution of x, plus `term`."""
    return torch.ops.mkldnn._convolution_pointwise.binary(x, term, packed, None, *geometry, "add", 1.0, None, [], "")


def available(dtype: torch.dtype) -> bool:
    """Returns True where this build of torch has the fused convolutions, and this processor has them in `dtype`."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fuse(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces the plain convolutions and recurrent units of `model` (in evaluation) in place.

    In a Sequential, and where a module names children that follow one another (its `chains`), batch normalization
    behind a convolution is folded into its weights, and a LeakyReLU or ReLU behind that is computed with it.
    """
    for parent in list(model.modules()):
        children = dict(parent.named_children())
        chains = [tuple(children)] if isinstance(parent, nn.Sequential) else getattr(parent, "chains", ())
        follow = {name: chain[k + 1 :] for chain in chains for k, name in enumerate(chain)}
        for name, layer in children.items():
            after = [(other, children[other]) for other in follow.get(name, ()) if not _empty(children[other])]
            if type(layer) is GRU:
                setattr(parent, name, FusedGRU(layer, dtype))
            elif _plain(layer):
                convolution = layer
                norm, normalization = after[0] if after else ("", None)
                if type(normalization) is nn.BatchNorm2d and normalization.track_running_stats:
                    convolution = fuse_conv_bn_eval(layer, normalization)
                    setattr(parent, norm, nn.Identity())
                    after = after[1:]
                activation = _absorbed(parent, after, nn.LeakyReLU, nn.ReLU)
                setattr(parent, name, FusedConvolution(convolution, activation, dtype))


def _plain(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution that can be replaced."""
    normed = isinstance(layer, nn.Conv2d) and parametrize.is_parametrized(layer, "weight")
    if not (type(layer) in (nn.Conv2d, ConvReLU) or normed):
        return False
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and not hooked


def _empty(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Sequential) and len(layer) == 0


def _absorbed(parent: nn.Module, after: list[tuple[str, nn.Module]], *kinds: type) -> nn.Module | None:
    """The activation that comes next, taken out of its parent; None where another layer comes next."""
    if not after or type(after[0][1]) not in kinds:
        return None
    name, activation = after[0]
    setattr(parent, name, nn.Identity())
    return activation
