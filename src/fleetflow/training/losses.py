"""Training losses: (Prediction, Sample) -> scalar. NaN-safe: unknown pixels have no weight and no gradient.

`multi_scale` is ours. `pyramid` is the loss of the coarse-to-fine networks and takes three parts, plain functions all:

how a step meets the truth    at_known, at_mean, enlarged
length of a difference        end_point, absolute, robust, charbonnier
weights                       FLOWNET2, LITEFLOWNET2, ...: one for each step, coarsest first

`sequence` and `correction` are the losses of the networks that refine one full-resolution flow.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.types import FleetflowError, Prediction, Sample, size_of

# A step [N, 2, h, w] in pixels of its own grid, and the truth -> step - truth in pixels of the full resolution, 0 where
# nothing is known, and the weight of every pixel [N, h', w'] in [0, 1].
Compare = Callable[[Tensor, Sample], tuple[Tensor, Tensor]]
Measure = Callable[[Tensor], Tensor]  # difference [N, 2, h, w] -> [N, h, w], with finite gradients at 0

UNIT = 20.0  # pixels: the FlowNet family predicts flow / 20, and its losses are counted so ("div_flow")
FLOWNET2 = (0.32, 0.08, 0.02, 0.01, 0.005)  # levels 6 to 2: FlowNet 2.0 in Caffe, PWC-Net (arXiv 1709.02371)
LITEFLOWNET2 = (0.32, 0.08, 0.02, 0.01, 6.25e-4)  # levels 6 to 3, and the enlarged flow (arXiv 1903.07414, mmflow)
MAX_FLOW = 400.0  # pixels: RAFT does not learn from faster motion


def shrink_flow(flow: Tensor, valid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns the truth on a coarser grid, in pixels of that grid, and the share of known pixels in each cell.

    Result: [N, 2, h, w], the mean over the known pixels of each cell, and [N, h, w] in [0, 1].

    Args:
        flow: [N, 2, H, W] pixels.
        valid: [N, H, W] bool.
        size: (h, w) that divides (H, W).
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
    weights: tuple[float, ...] | float = (0.25, 0.25, 0.25, 0.5),
    power: float = 0.75,
    epsilon: float = 0.01,
    max_flow: float = MAX_FLOW,
) -> Tensor:
    """Returns the mean of (EPE + epsilon)^power, EPE in pixels of the full resolution: final flow plus coarser ones.

    The final flow has weight 1 and is compared at full resolution; `weights` belong to `prediction.intermediate_flows`, coarsest
    first, without the last step (which the final flow is an enlargement of). A number w counts each flow w
    times as much as the one after it. The robust power is that of PWC-Net's
    fine-tuning loss (arXiv 1709.02371, eq. 2) with a milder exponent, as published for mixtures of data sets.
    Pixels that move by max_flow or more have no weight.
    """
    if isinstance(weights, float | int):
        weights = tuple(weights**k for k in range(len(prediction.intermediate_flows) - 1, 0, -1))
    if len(prediction.intermediate_flows) != len(weights) + 1:
        raise FleetflowError(
            f"{len(prediction.intermediate_flows)} steps for {len(weights)} weights; expected one step more than weights "
            "(of a network that scales, frames that its stride does not divide give none)"
        )
    known, flow = _known(sample, max_flow)
    total = _robust(prediction.flow, flow, known.float(), power, epsilon)
    for step, weight in zip(prediction.intermediate_flows[:-1], weights, strict=True):
        truth, share = shrink_flow(flow, known, size_of(step))
        stride = sample.flow.shape[-1] / step.shape[-1]
        total = total + weight * _robust(step * stride, truth * stride, share, power, epsilon)
    return total


def _robust(flow: Tensor, truth: Tensor, weight: Tensor, power: float, epsilon: float) -> Tensor:
    error = torch.where(weight[:, None] > 0, flow.float() - truth, 0)
    length = (error.square().sum(1) + 1e-8).sqrt()
    return ((length + epsilon) ** power * weight).sum() / weight.sum().clamp(min=1)


def end_point(difference: Tensor) -> Tensor:
    """Returns [N, h, w], the length of the difference [N, 2, h, w]."""
    return torch.linalg.vector_norm(difference, dim=1)


def absolute(difference: Tensor) -> Tensor:
    """Returns [N, h, w], the mean of |u| and |v| of the difference [N, 2, h, w] (an L1 over all elements)."""
    return difference.abs().mean(1)


def robust(difference: Tensor, *, power: float = 0.4, epsilon: float = 0.01) -> Tensor:
    """Returns [N, h, w]: (|u| + |v| + epsilon)^power, with which PWC-Net is fine-tuned (arXiv 1709.02371, eq. 2)."""
    return (difference.abs().sum(1) + epsilon) ** power


def charbonnier(difference: Tensor, *, power: float = 0.2, epsilon: float = 0.01) -> Tensor:
    """Returns [N, h, w]: (u^2 + v^2 + epsilon)^power, with which LiteFlowNet2 is fine-tuned (arXiv 1903.07414)."""
    return (difference.square().sum(1) + epsilon) ** power


def at_known(step: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
    """Compares a step with the mean over the known pixels of each cell, weighed with their share (ours)."""
    known, truth = _known(sample)
    target, share = shrink_flow(truth, known, size_of(step))
    return _difference(step, target, share, sample)


def at_mean(step: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
    """Compares a step with the mean over each cell; a cell with any known pixel has weight 1.

    The dense rule of FlowNet2, LightFlow and mmflow (average, area and adaptive pooling are one where sizes divide).
    Unknown pixels count with what is stored there (0, and 0 for NaN), as published: sparse truth shrinks towards 0.
    """
    size = size_of(step)
    target = F.adaptive_avg_pool2d(sample.flow.nan_to_num(0, 0, 0), size) / _stride(step, sample)
    return _difference(step, target, _any_known(sample, size), sample)


def enlarged(step: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
    """Compares a step, bilinearly enlarged, with the truth at full resolution: mmflow's fine-tuning of LiteFlowNet2."""
    known, truth = _known(sample)
    full = F.interpolate(step.float(), size=truth.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(known[:, None], full * _stride(step, sample) - truth, 0), known.to(truth.dtype)


def pyramid(
    prediction: Prediction,
    sample: Sample,
    *,
    weights: tuple[float, ...] = FLOWNET2,
    measure: Measure = end_point,
    compare: Compare = at_mean,
    mean: bool = False,
    unit: float = UNIT,
) -> Tensor:
    """Returns the weighted sum over the steps of the length of (step - truth) / unit.

    Args:
        weights: one for each of `prediction.intermediate_flows`, coarsest first, and one more where `prediction.flow`
            counts too.
        measure: length of a difference.
        compare: how a step meets the truth.
        mean: mean over all pixels of the batch, known or not (FlowNet2 in PyTorch, LightFlow); else the sum over the
            pixels divided by N (Caffe, TensorFlow, mmflow; the TensorFlow port divides by the number of weights as
            well).
        unit: pixels of the full resolution; 20 for networks that predict flow / 20, 1 / 20 for FlowNet-SD, else 1.

    Raises:
        FleetflowError: Where steps and weights do not match.
    """
    flows = (*prediction.intermediate_flows, prediction.flow)
    if len(weights) not in (len(flows) - 1, len(flows)):
        raise FleetflowError(
            f"{len(flows) - 1} steps for {len(weights)} weights; expected a weight for each step (and the final flow); "
            "of a network that scales, frames that its stride does not divide give none"
        )
    terms = []
    for flow, weight in zip(flows, weights):
        if weight:
            difference, known = compare(flow, sample)
            lengths = measure(difference / unit) * known
            terms.append(weight * (lengths.mean() if mean else lengths.sum() / len(lengths)))
    if not terms:
        raise FleetflowError("all weights of the loss are 0; give at least one step a weight")
    return torch.stack(terms).sum()


def lightflow(prediction: Prediction, sample: Sample) -> Tensor:
    """Returns LightFlow's loss: mean |u| and |v| of the last step alone, in units of 20 px (arXiv 1804.05830)."""
    weights = (*(0.0 for _ in prediction.intermediate_flows[1:]), 1.0)
    return pyramid(prediction, sample, weights=weights, measure=absolute, mean=True)


def sequence(prediction: Prediction, sample: Sample, *, gamma: float = 0.8, max_flow: float = MAX_FLOW) -> Tensor:
    """Returns RAFT's loss: the mean of |u| and |v| after each of n steps, step i weighed with gamma^(n - 1 - i).

    steps: full-resolution flows. The mean goes over all elements of the batch; pixels that are unknown or move by
    max_flow pixels and more count as 0. gamma: 0.8, in fine-tuning 0.85 (arXiv 2003.12039; GMA and SEA-RAFT too).

    Raises:
        FleetflowError: For a prediction without steps (the network is not in training mode).
    """
    if not prediction.intermediate_flows:
        raise FleetflowError("the prediction has no steps; put the network in training mode with model.train()")
    known, truth = _known(sample, max_flow)
    known = known[:, None].expand_as(truth)
    total = truth.new_zeros(())
    for k, step in enumerate(reversed(prediction.intermediate_flows)):
        total = total + gamma**k * torch.where(known, (step.float() - truth).abs(), 0).sum() / known.numel()
    return total


def correction(prediction: Prediction, sample: Sample, *, gamma: float = 0.8, max_flow: float = MAX_FLOW) -> Tensor:
    """Returns DEQ-Flow's fixed-point correction: the loss of `sequence` over the flows on the way to the fixed point.

    steps: the flows of the states that the solver passed, the fixed point's own last (arXiv 2204.08442).
    """
    return sequence(prediction, sample, gamma=gamma, max_flow=max_flow)


def _known(sample: Sample, max_flow: float = math.inf) -> tuple[Tensor, Tensor]:
    """Pixels whose truth is a number and shorter than max_flow, [N, H, W] bool; the truth, 0 elsewhere."""
    known = sample.valid & (sample.flow.square().sum(1).sqrt() < max_flow)  # NaN is not smaller
    return known, torch.where(known[:, None], sample.flow, 0)


def _any_known(sample: Sample, size: tuple[int, int]) -> Tensor:
    known, _ = _known(sample)
    return F.adaptive_max_pool2d(known[:, None].to(sample.flow.dtype), size)[:, 0]


def _stride(step: Tensor, sample: Sample) -> Tensor:
    """[2, 1, 1]: pixels of the full resolution in one pixel of the step's grid, to the right and downwards."""
    (height, width), (own_height, own_width) = sample.flow.shape[-2:], step.shape[-2:]
    return sample.flow.new_tensor((width / own_width, height / own_height))[:, None, None]


def _difference(step: Tensor, target: Tensor, weight: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
    difference = (step.float() - target) * _stride(step, sample)
    return torch.where(weight[:, None] > 0, difference, 0), weight
