"""Optimizers. Muon: momentum whose update is made orthogonal, one matrix per convolution; AdamW for all else.

Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). Its only state is one momentum
buffer per weight. On generated pairs it reached a given error in about two thirds of the steps of AdamW
(docs/lab/training-log.md).
"""

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates for weights of two or more axes (`torch.optim.Muon` takes 2-D weights only).

    A weight [outputs, ...] counts as the matrix [outputs, everything else]. The update has spectral norm about 1 and is
    scaled by sqrt(rows / columns) where that is over 1, so `learning_rate` means the same for every layer.
    """

    def __init__(self, weights, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].mul_(group["momentum"]).add_(weight.grad)
                update = weight.grad.add(momentum, alpha=group["momentum"])  # Nesterov
                rows, columns = len(weight), weight[0].numel()
                update = orthogonal(update.reshape(rows, columns)).reshape(weight.shape)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Returns the matrix [R, C] with all singular values moved to about 1 (0.7 to 1.2), by Newton-Schulz iteration.

    The coefficients are those of the Muon article: steep at 0, so that five rounds are enough.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def optimizers(
    model: nn.Module, learning_rate: float, weight_decay: float, *, slow: str | None = None, share: float = 0.1
) -> list[torch.optim.Optimizer]:
    """Returns Muon for the inner convolutions and AdamW for biases, enlargements and the layers that give the flow.

    learning_rate is Muon's; AdamW takes a twentieth of it. Where weights are normalized, Muon moves their directions.

    Args:
        slow: a part of the model that has been trained before; its weights take `share` of either rate. With a share of
            0 they are frozen: `requires_grad` is set to False.
    """
    if slow and share == 0:
        model.get_submodule(slow).requires_grad_(False)
    slower = set(map(id, model.get_submodule(slow).parameters())) if slow else set()
    inner, other, seen = [], [], set()
    for module in model.modules():
        plain = isinstance(module, nn.Conv2d) and module.out_channels > 2
        for weight in module.parameters(recurse=plain):
            if id(weight) not in seen and weight.requires_grad:
                matrix = weight.dim() == 4 and weight[0].numel() > 1  # a length for each output is none
                (inner if plain and matrix else other).append(weight)
                seen.add(id(weight))

    def by_rate(weights: list[Tensor], rate: float) -> list[dict]:
        groups = ([weight for weight in weights if (id(weight) in slower) == late] for late in (False, True))
        return [{"params": group, "lr": r} for group, r in zip(groups, (rate, share * rate)) if group]

    made: list[torch.optim.Optimizer] = []
    if inner:
        made.append(Muon(by_rate(inner, learning_rate), learning_rate, weight_decay=weight_decay))
    if other:
        made.append(torch.optim.AdamW(by_rate(other, learning_rate / 20), weight_decay=0.0))
    return made


def adam(
    model: nn.Module, learning_rate: float, weight_decay: float, *, bias_decay: float | None = None
) -> list[torch.optim.Optimizer]:
    """Returns Adam whose weight decay is part of the gradient (L2), as FlowNet, PWC-Net and LiteFlowNet2 are trained.

    Args:
        bias_decay: that of the biases; None takes weight_decay. Light Flow has 4e-5 and 0. Scales of a normalization
            are weights. Frozen weights are left out.
    """
    return [torch.optim.Adam(_groups(model, weight_decay, bias_decay), learning_rate)]


def adamw(
    model: nn.Module, learning_rate: float, weight_decay: float, *, bias_decay: float | None = None
) -> list[torch.optim.Optimizer]:
    """Returns AdamW, whose weight decay stands beside the gradient, as RAFT, GMA and DEQ-Flow are trained.

    Args:
        bias_decay: that of the biases; None takes weight_decay, as they do. Frozen weights are left out.
    """
    return [torch.optim.AdamW(_groups(model, weight_decay, bias_decay), learning_rate, eps=1e-8)]


def _groups(model: nn.Module, weight_decay: float, bias_decay: float | None) -> list[dict]:
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    biases = [weight for name, weight in trained if name.rpartition(".")[2].startswith("bias")]
    weights = [weight for name, weight in trained if not name.rpartition(".")[2].startswith("bias")]
    decays = (weight_decay, weight_decay if bias_decay is None else bias_decay)
    return [{"params": group, "weight_decay": decay} for group, decay in zip((weights, biases), decays) if group]
