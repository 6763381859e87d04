"""Channels that weights put in order: a program computes what it did, without moving them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fleetflow.export.channels import order_by_weights


def convolution(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups)


class Colors(nn.Module):
    """Two pictures [N, H, W, 3] as one batch in BGR."""

    def __init__(self):
        super().__init__()
        self.layer = convolution(3, 4)

    def forward(self, one, two):
        return self.layer(torch.cat([picture.permute(0, 3, 1, 2).flip(1) for picture in (one, two)]))


class Shuffled(nn.Module):
    """Shuffles that convolutions read, one in groups and one not."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped, self.last = convolution(3, 12), convolution(12, 12, 3), convolution(12, 2)

    def forward(self, one, two):
        x = F.channel_shuffle(self.first((one - two).permute(0, 3, 1, 2)), 3)
        return self.last(F.channel_shuffle(self.grouped(x), 3))


class Elsewhere(nn.Module):
    """A flip that is read by others, too, pictures that are upside down, and frames that are changed differently."""

    def __init__(self):
        super().__init__()
        self.layer = convolution(3, 4)

    def forward(self, one, two):
        one, two = one.permute(0, 3, 1, 2), two.permute(0, 3, 1, 2)
        turned = one.flip(1)
        both = torch.cat((turned, two))
        return self.layer(both) + self.layer(torch.cat((one.flip(2), two.flip(0)))) + self.layer(turned).mean()


@pytest.mark.parametrize(
    "kind, products, left",
    [
        (Colors, False, {"flip": 0, "permute": 1, "conv2d": 1}),
        (Shuffled, False, {"channel_shuffle": 1, "conv2d": 3}),
        (Shuffled, True, {"channel_shuffle": 0, "conv2d": 4}),
        (Elsewhere, True, {"flip": 3, "conv2d": 3}),
    ],
)
def test_weights_are_put_in_order(kind, products, left):
    torch.manual_seed(1)
    module, pictures = kind().eval(), (torch.rand(2, 6, 7, 3), torch.rand(2, 6, 7, 3))
    program = torch.export.export(module, pictures, strict=False)
    order_by_weights(program, products=products)
    with torch.no_grad():
        for compute in (program.module(), program.run_decompositions({}).module()):
            torch.testing.assert_close(compute(*pictures), module(*pictures), atol=2e-6, rtol=1e-5)
    calls = [node for node in program.graph.nodes if node.op == "call_function" and not of_weights(node)]
    assert {name: sum(name in str(node.target) for node in calls) for name in left} == left


def of_weights(node) -> bool:
    """Whether a node computes weights, of other weights or of ones."""
    if node.op == "placeholder":
        return node.name.startswith("p_")
    return "conv" not in node.name and all(of_weights(source) for source in node.all_input_nodes)
