"""What deq-flow calls its tools, as thin adapters to ours: code written for it runs, and reads like its own."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fleetflow.deq.regularize import LAYERS, weight_norm
from fleetflow.deq.vectors import Layout


def apply_weight_norm(module: nn.Module, filter_out: str | Sequence[str] | None = None) -> nn.Module:
    """Returns the module with weight norm in every linear and convolution layer, as `weight_norm` does.

    Args:
        filter_out: layers whose name contains one of these words keep plain weights.
    """
    words = [filter_out] if isinstance(filter_out, str) else list(filter_out or ())
    if not words:
        return weight_norm(module)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, LAYERS) and not any(word in name for word in words):
            weight_norm(layer)
    return module


def reset_weight_norm(module: nn.Module) -> nn.Module:
    """Returns the module as it is: normalized weights are made of their parts whenever they are used."""
    return module


class DEQWrapper:
    """A function of several tensors as one of a vector [N, D].

    Args:
        func: (z1, z2, ...) -> the same number of tensors, each of its shape; one tensor may come without a tuple.
        z0: the tensors it begins with, which give the shapes.
    """

    def __init__(self, func: Callable[..., Tensor | Sequence[Tensor]], z0: Sequence[Tensor]):
        self.func = func
        self._layout = Layout(tuple(z0))

    def list2vec(self, *tensors: Tensor) -> Tensor:
        """Returns [N, D], float32 or wider."""
        return self._layout.pack(tensors)

    def vec2list(self, vector: Tensor) -> list[Tensor]:
        """Returns the tensors of a vector."""
        return list(self._layout.unpack(vector))

    def __call__(self, vector: Tensor) -> Tensor:
        """Returns func's value for the tensors of a vector, as a vector."""
        value = self.func(*self.vec2list(vector))
        return self.list2vec(*([value] if isinstance(value, Tensor) else value))
