"""Blend: several networks asked about one pair, their flows mixed pixel by pixel by how well each explains the frames.

Ours. Networks err in different places, and where one is wrong frame2, brought back by its flow, does not look like
frame1. FlowNet 2.0 (CVPR 2017) trains a network that chooses between two flows so; here nothing is trained, so any
networks can be mixed, published weights too. docs/weights.md says what it brings.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleetflow.models.base import FlowModel, resize
from fleetflow.ops.census import census_distance
from fleetflow.ops.constant import constant
from fleetflow.ops.warp import inside, warp
from fleetflow.types import FleetflowError, Prediction

SHARPNESS = 15.0  # a census distance smaller by 1 / 15 counts e times as much
OUTSIDE = 0.35  # census distance that a flow is given where it leaves the picture, and nothing can be compared
PATCH, WINDOW = 5, 7  # of the census, and the square it is averaged over, in pixels of half the size


class Blend(FlowModel):
    """The flow of several networks; `fleetflow.load("fastflownet+raft_small")` makes one.

    Its residual is how far they disagree: the weighted mean distance in pixels of their flows from the blended one. Its
    memory holds those of the networks that have one. Each takes its own number of steps and fits frames its own way.
    """

    stride = 1
    fit = "pad"

    def __init__(self, members: Sequence[FlowModel]):
        super().__init__()
        if len(members) < 2:
            raise FleetflowError(f"a blend of {len(members)} networks; expected two or more")
        self.members = nn.ModuleList(members)

    def prepare(self, frame1: Tensor, frame2: Tensor) -> tuple[Tensor, Tensor]:
        return frame1, frame2

    def estimate(self, frame1: Tensor, frame2: Tensor, previous: Prediction | None, steps: int | None) -> Prediction:
        if self.training:
            raise FleetflowError("a blend is not trained; train its networks one by one")
        found = [member(frame1, frame2, last) for member, last in zip(self.members, self._memories(previous))]
        flows = torch.stack([each.flow.float() for each in found], 1)  # [N, K, 2, H, W]
        shares = resize(_shares(frame1, frame2, flows), flows.shape[-2:])[:, :, None]
        flow = (shares * flows).sum(1)
        apart = (shares[:, :, 0] * (flows - flow[:, None]).square().sum(2).sqrt()).sum(1)
        memories = tuple(each.memory for each in found)
        return Prediction(flow, memory=memories if any(each is not None for each in memories) else None, residual=apart)

    def _memories(self, previous: Prediction | None) -> list[Prediction | None]:
        """What each network is told about the pair before this one."""
        if previous is None or previous.memory is None:
            return [None] * len(self.members)
        if not isinstance(previous.memory, tuple) or len(previous.memory) != len(self.members):
            raise FleetflowError("the previous prediction is not that of this blend: pass what it returned itself")
        return [None if memory is None else previous._replace(memory=memory) for memory in previous.memory]


def _shares(frame1: Tensor, frame2: Tensor, flows: Tensor) -> Tensor:
    """Returns what each of the flows [N, K, 2, H, W] counts, [N, K, h, w] at half the size; the sum over K is 1."""
    height, width = frame1.shape[-2:]
    size = (-(-height // 2), -(-width // 2))
    factors = constant((size[1] / width, size[0] / height), flows)[:, None, None]
    frame1, frame2 = (F.interpolate(frame.float(), size, mode="area") for frame in (frame1, frame2))
    margin = (WINDOW // 2,) * 4
    costs = []
    for flow in flows.unbind(1):
        flow = F.interpolate(flow, size, mode="area") * factors
        distance = census_distance(frame1, warp(frame2, flow), PATCH)
        mean = F.avg_pool2d(F.pad(distance[:, None], margin, mode="replicate"), WINDOW, 1)[:, 0]
        costs.append(mean.masked_fill(~inside(flow), OUTSIDE))
    return torch.softmax(-SHARPNESS * torch.stack(costs, 1), 1)
