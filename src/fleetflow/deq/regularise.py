"""Weight and spectral norm for all layers of a module at once, and dropout whose mask outlives the evaluations of f."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrizations, parametrize

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def weight_norm(module: nn.Module) -> nn.Module:
    """Returns the module with every linear and convolution weight as length times direction, per output channel.

    No value changes (Salimans & Kingma 2016). State dicts with the older names `weight_g`, `weight_v` can be loaded.
    """
    for layer in _plain_layers(module):
        parametrizations.weight_norm(layer)
    return module


def spectral_norm(module: nn.Module, *, limit: float = 1.0, clip: bool = False) -> nn.Module:
    """Returns the module with every linear and convolution weight, as a matrix [out, rest], scaled to norm `limit`.

    clip: scales only the weights whose norm is above the limit. The norm follows the weight when an optimiser changes
    it, and never changes between, so f remains one map during a solve (unlike with torch's own `spectral_norm`).
    """
    if not limit > 0:
        raise ValueError(f"limit is {limit}; it must be above 0")
    for layer in _plain_layers(module):
        parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight, limit, clip))
    return module


def remove_norm(module: nn.Module) -> nn.Module:
    """Returns the module with plain weights again, at their normalised values."""
    for layer in module.modules():
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
    return module


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """A context in which the normalised weights are computed once, with their graph, however often f is evaluated.

    Use it around the solve. Backward passes outside it need Implicit(order=1), because order 2 evaluates f once more.
    """
    with parametrize.cached():
        for layer in module.modules():
            if parametrize.is_parametrized(layer, "weight"):
                _ = layer.weight
        yield


class SpectralNorm(nn.Module):
    """The parametrisation behind `spectral_norm`: largest singular value by the power method (Miyato et al. 2018)."""

    def __init__(self, weight: Tensor, limit: float, clip: bool):
        super().__init__()
        self.limit, self.clip = limit, clip
        self.register_buffer("left", torch.ones_like(weight[:, :1].flatten(1)[:, 0]))
        self._follow(weight, 100)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the weight, scaled."""
        if weight._version != self.version:
            self._follow(weight, 10)
        matrix = weight.flatten(1)
        right = nn.functional.normalize(matrix.detach().mT @ self.left, dim=0)
        scale = self.limit / (self.left @ matrix @ right).clamp_min(torch.finfo(weight.dtype).tiny)
        return weight * (scale.clamp(max=1) if self.clip else scale)

    @torch.no_grad()
    def _follow(self, weight: Tensor, steps: int) -> None:
        matrix, left, self.version = weight.flatten(1), self.left, weight._version
        for _ in range(steps):
            left = nn.functional.normalize(matrix @ (matrix.mT @ left), dim=0)
        self.left = left


class VariationalDropout(nn.Module):
    """Dropout of whole channels with one mask for each sample from `reset_dropout` to the next (Gal 2016).

    The input is [N, C, ...]; a fixed mask keeps f one map during a solve. Call `reset_dropout` before every solve.
    """

    def __init__(self, rate: float = 0.1):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"rate is {rate}; it must be in [0, 1)")
        self.rate, self.seed, self.mask = rate, 0, None

    def forward(self, x: Tensor) -> Tensor:
        """Returns x with the dropped channels 0 and the others scaled up; x itself in evaluation."""
        if not self.training or self.rate == 0:
            return x
        shape = (*x.shape[:2], *[1] * (x.ndim - 2))
        if self.mask is None:
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


def _plain_layers(module: nn.Module) -> list[nn.Module]:
    layers = [layer for layer in module.modules() if isinstance(layer, LAYERS)]
    if not layers:
        raise ValueError(f"module is {type(module).__name__} without linear or convolution layers to normalise")
    if any(parametrize.is_parametrized(layer, "weight") for layer in layers):
        raise ValueError("module is normalised already; call remove_norm first")
    return layers
