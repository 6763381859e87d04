"""float16 where it is safe: in convolutions. Positions, correlations and flows stay in float32."""

import copy

from torch import Tensor, nn

from fleetflow.layers.update import ConvReLU
from fleetflow.models.base import FlowModel


class Half(nn.Module):
    """A convolution in float16 between layers of float32."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer.half()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.half()).float()


def with_half_convolutions(model: FlowModel) -> FlowModel:
    """Returns a copy of the network whose convolutions compute in float16.

    Convolutions that a unit reads by their attributes (a GRU's) are called as modules, too, so they can be replaced.
    """
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) in (nn.Conv2d, nn.ConvTranspose2d, ConvReLU):
                setattr(parent, name, Half(layer))
    return model
