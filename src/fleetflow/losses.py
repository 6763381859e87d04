"""Training losses: (Prediction, Sample) -> scalar. NaN-safe: unknown pixels have no weight and no gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.types import Prediction, Sample


def shrink_flow(flow: Tensor, valid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns the truth on a coarser grid, in pixels of that grid, and the share of known pixels in each cell.

    flow: [N, 2, H, W] pixels; valid: [N, H, W] bool; size: (h, w) that divides (H, W).
    Result: [N, 2, h, w], the mean over the known pixels of each cell, and [N, h, w] in [0, 1].
    """
    height, width = flow.shape[-2:]
    cell = (height // size[0], width // size[1])
    known = valid[:, None].to(flow.dtype)
    share = F.avg_pool2d(known, cell)
    mean = F.avg_pool2d(torch.where(valid[:, None], flow, 0), cell) / share.clamp(min=1e-6)
    return mean / flow.new_tensor((cell[1], cell[0]))[:, None, None], share[:, 0]


def multi_scale(
    prediction: Prediction,
    sample: Sample,
    *,
    weights: tuple[float, ...] = (0.25, 0.25, 0.25, 0.5),
    power: float = 0.75,
    epsilon: float = 0.01,
) -> Tensor:
    """Returns the mean of (EPE + epsilon)^power, EPE in pixels of the full resolution: final flow plus coarser ones.

    The final flow has weight 1 and is compared at full resolution; `weights` belong to `prediction.steps`, coarsest
    first, without the last step (which the final flow is an enlargement of). The robust power is that of PWC-Net's
    fine-tuning loss (arXiv 1709.02371, eq. 2) with a milder exponent, as published for mixtures of data sets.
    """
    if len(prediction.steps) != len(weights) + 1:
        raise ValueError(
            f"{len(prediction.steps)} steps for {len(weights)} weights; expected one step more than weights"
        )
    total = _robust(prediction.flow, sample.flow, sample.valid.float(), power, epsilon)
    for step, weight in zip(prediction.steps[:-1], weights, strict=True):
        truth, share = shrink_flow(sample.flow, sample.valid, tuple(step.shape[-2:]))
        stride = sample.flow.shape[-1] / step.shape[-1]
        total = total + weight * _robust(step * stride, truth * stride, share, power, epsilon)
    return total


def _robust(flow: Tensor, truth: Tensor, weight: Tensor, power: float, epsilon: float) -> Tensor:
    error = torch.where(weight[:, None] > 0, flow.float() - truth, 0)
    length = (error.square().sum(1) + 1e-8).sqrt()
    return ((length + epsilon) ** power * weight).sum() / weight.sum().clamp(min=1)
