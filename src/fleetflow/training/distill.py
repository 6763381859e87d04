"""Distillation: a small network learns the flow of a larger one, which is known at every pixel.

A teacher's flow is what a network can see: smooth where nothing tells, without the truth of what no frame shows. Where
the teacher is wrong, generated pairs know better.
"""

import torch

from fleetflow.models.base import FlowModel
from fleetflow.types import Sample

TRUSTED = (
    3.0  # pixels: a teacher farther from the truth than that teaches nothing there (what benchmarks count as wrong)
)


@torch.no_grad()
def taught(teacher: FlowModel | None, sample: Sample) -> Sample:
    """Returns the sample with the teacher's flow in place of the truth, known at every pixel.

    Args:
        teacher: in evaluation mode, on the device of the sample; None returns the sample as it is.
        sample: a batch. Where its flow is known and the teacher's is more than TRUSTED pixels away, it stays.
    """
    if teacher is None:
        return sample
    flow = teacher(sample.frame1, sample.frame2).flow.float()
    wrong = sample.valid & ((flow - sample.flow).norm(dim=1) > TRUSTED)
    flow = torch.where(wrong[:, None], sample.flow, flow)
    return sample._replace(flow=flow, valid=torch.ones_like(sample.valid))
