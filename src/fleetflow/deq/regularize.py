"""Weight and spectral norm for all layers of a module at once, and dropout whose mask outlives the evaluations of f."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.utils import parametrizations, parametrize

from fleetflow.deq.checks import flag, number

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
M = TypeVar("M", bound=nn.Module)


def _unknown(weight: Tensor) -> bool:
    """Whether it has a shape but no values, as on the meta device and while operations are counted."""
    return weight.is_meta or isinstance(weight, FakeTensor)


def weight_norm(module: M) -> M:
    """Returns the module with every linear and convolution weight as length times direction, per output channel.

    Transposed convolutions, too; in groups, their channels of one number in each group share a length.
    No value changes (Salimans & Kingma 2016). State dicts with the older names `weight_g`, `weight_v` can be loaded.

    Raises:
        ValueError: For a channel whose weights are all zero, because they have no direction.
    """
    layers = _plain_layers(module)
    for name, layer in layers.items():
        if not _unknown(layer.weight) and not bool(_matrix(layer.weight, _axis(layer)).any(1).all()):
            raise ValueError(f"layer {name} has a channel of zeros, which has no direction; give it small weights")
    for layer in layers.values():
        parametrizations.weight_norm(layer, dim=_axis(layer))
    return module


def spectral_norm(module: M, *, limit: float = 1.0, clip: bool = False) -> M:
    """Returns the module with every linear and convolution weight, as a matrix [out, rest], scaled to norm `limit`.

    A change through `weight.data` goes unseen, as torch does not count it: use `weight.copy_` under torch.no_grad().

    Args:
        clip: scales only the weights whose norm is above the limit. The norm follows the weight when an optimizer
            changes it, and never changes between, so f remains one map during a solve (unlike with torch's own
            `spectral_norm`).
    """
    number("limit", limit, lambda limit: limit > 0, "above 0")
    flag("clip", clip)
    for layer in _plain_layers(module).values():
        norm = SpectralNorm(layer.weight, limit, clip, _axis(layer))
        parametrize.register_parametrization(layer, "weight", norm)
    return module


def remove_norm(module: M) -> M:
    """Returns the module with plain weights again, at their normalized values and in their old order."""
    for layer in module.modules():
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if name != "weight":  # which comes first in every one of LAYERS
                    delattr(layer, name)
                    layer.register_parameter(name, parameter)
    return module


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """A context in which the normalized weights are computed once, with their graph, however often f is evaluated.

    Use it around the solve. Backward passes outside it need Implicit(order=1), because order 2 evaluates f once more.
    """
    if is_tracing():  # which refuses what is computed once
        yield
        return
    with parametrize.cached():
        for layer in module.modules():
            if parametrize.is_parametrized(layer, "weight"):
                _ = layer.weight
        yield


class SpectralNorm(nn.Module):
    """The parametrisation behind `spectral_norm`: largest singular value by the power method (Miyato et al. 2018)."""

    left: Tensor  # singular vector

    def __init__(self, weight: Tensor, limit: float, clip: bool, axis: int = 0):
        super().__init__()
        self.limit, self.clip, self.axis = limit, clip, axis
        self.register_buffer("left", torch.ones_like(_matrix(weight, axis)[:, 0]))
        self._follow(weight, 100)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight, scaled."""
        if weight._version != self.version:
            self._follow(weight, 10)
        matrix = _matrix(weight, self.axis)
        right = nn.functional.normalize(_pulled(matrix.detach(), self.left), dim=0)
        norm = (self.left * _pushed(matrix, right)).sum()
        scale = self.limit / norm.clamp_min(torch.finfo(weight.dtype).tiny)
        return weight * (scale.clamp(max=1) if self.clip else scale)

    @torch.inference_mode(False)  # the buffer is used in training, too
    @torch.no_grad()
    def _follow(self, weight: Tensor, steps: int) -> None:
        matrix, left, self.version = _matrix(weight, self.axis), self.left, weight._version
        for _ in range(steps):
            left = nn.functional.normalize(_pushed(matrix, _pulled(matrix, left)), dim=0)
        self.left.copy_(left)


class VariationalDropout(nn.Module):
    """Dropout of whole channels with one mask for each sample from `reset_dropout` to the next (Gal 2016).

    The input is [N, C, ...]; a fixed mask keeps f one map during a solve. Call `reset_dropout` before every solve;
    before the first call there is no mask, and training raises ValueError.
    """

    def __init__(self, rate: float = 0.1):
        super().__init__()
        number("rate", rate, lambda rate: 0 <= rate < 1, "from 0 to below 1")
        self.rate = rate
        self.seed: int | None = None
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Returns x with the dropped channels 0 and the others scaled up; x itself in evaluation."""
        if not self.training or self.rate == 0:
            return x
        shape = (*x.shape[:2], *[1] * (x.ndim - 2))
        if self.mask is None:
            if self.seed is None:
                raise ValueError("VariationalDropout has no mask yet; call reset_dropout before a solve")
            with torch.inference_mode(False):  # the mask is used in training, too
                chance = torch.rand(shape, generator=torch.Generator().manual_seed(self.seed))
                self.mask = (chance >= self.rate).to(x) / (1 - self.rate)
        if self.mask.shape != shape:
            raise ValueError(
                f"the dropout mask is {list(self.mask.shape)}, x needs {list(shape)}; "
                "call reset_dropout before a solve, and do not compact it"
            )
        return x * self.mask.to(x)


def reset_dropout(module: nn.Module, generator: Generator | None = None) -> None:
    """Gives every `VariationalDropout` in the module a new mask; its seed is drawn now, from the generator."""
    for layer in module.modules():
        if isinstance(layer, VariationalDropout):
            layer.seed, layer.mask = int(torch.randint(2**62, (), generator=generator)), None


def _axis(layer: nn.Module) -> int:
    """The axis of a layer's weight that counts its output channels."""
    return 1 if isinstance(layer, TRANSPOSED) else 0


def _matrix(weight: Tensor, axis: int) -> Tensor:
    """The weight as a matrix [out, rest]."""
    return weight.movedim(axis, 0).flatten(1)


def _pulled(matrix: Tensor, left: Tensor) -> Tensor:
    return (matrix * left[:, None]).sum(0)  # no matrix product: autocast would round that


def _pushed(matrix: Tensor, right: Tensor) -> Tensor:
    return (matrix * right).sum(1)


def _plain_layers(module: nn.Module) -> dict[str, Any]:
    """Returns name -> layer to normalize; raises ValueError if there is none, or if that would change the module."""
    layers: dict[str, Any] = {
        name or "module": layer for name, layer in module.named_modules() if isinstance(layer, LAYERS)
    }
    if not layers:
        raise ValueError(f"module is {type(module).__name__} without linear or convolution layers to normalize")
    if any(parametrize.is_parametrized(layer, "weight") for layer in layers.values()):
        raise ValueError("module is normalized already; call remove_norm first")
    owners = [(name, weight) for name, part in module.named_modules() for weight in part.parameters(recurse=False)]
    for layer in layers.values():
        users = [name for name, weight in owners if weight is layer.weight]
        if len(users) > 1:
            raise ValueError(f"layers {', '.join(users)} share a weight, which a norm would part; use one layer twice")
    return layers
