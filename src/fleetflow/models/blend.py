"""Blend: several networks asked about one pair, their flows mixed pixel by pixel by how well each explains the frames.

Ours. Networks err in different places, and where one is wrong frame2, brought back by its flow, does not look like
frame1. Those that refine begin with what the networks before them found, so large motion need not be found again.
FlowNet 2.0 (CVPR 2017) trains networks for both; here nothing is trained, and any networks can be mixed, published
weights too. Where the frames are plain, a plane takes the place of what networks guess (`layers/planes.py`).
docs/weights.md says what each brings.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fleetflow.layers.planes import halved, matching_cost, with_planes
from fleetflow.layers.warm_start import reduced
from fleetflow.models.base import FlowModel, resize
from fleetflow.types import FleetflowError, Prediction

SHARPNESS = 15.0  # a census distance smaller by 1 / 15 counts e times as much
FOLLOWS = 0.25  # of its own number of iterations takes a network that begins with the blend: it has not far to go
ROUNDS = 2  # it goes on from the blend, then from the blend of that and those before
EARLIER, MOST = 0.004, 0.12  # census distance that those before it cost more, for each pixel that it moves; at most


class Blend(FlowModel):
    """The flow of several networks; `fleetflow.load("fastflownet+deq_flow_tiny")` makes one.

    A network that refines begins with the blend of those before it, and takes a quarter of its own number of iterations,
    and as many from the blend with what it found; or with its own state of the pair before, and takes them all.
    Those before it count less where motion is large: there the census says little, and it has seen their flows.
    `iterations` is for both. Each fits frames its own way. The uncertainty is how far they disagree: the weighted mean
    distance in pixels of their flows from the blended one. The memory holds those of the networks that have one.

    planes: whether plain regions take the flow of a plane in the end.
    """

    stride = 1
    fit = "pad"

    def __init__(self, members: Sequence[FlowModel], planes: bool = True):
        super().__init__()
        if len(members) < 2:
            raise FleetflowError(f"a blend of {len(members)} networks; expected two or more")
        self.members = nn.ModuleList(members)
        self.planes = planes
        self.recordable = not planes  # their number is the frames'

    def iterations_of(self, iterations: int | None) -> int | None:
        """Returns the iterations asked for, which all networks take that refine; None lets each choose."""
        if iterations is None:
            return None
        refining = [member for member in self.members if member.iterations is not None]
        return [member.iterations_of(iterations) for member in refining or self.members][0]

    def prepare(self, frame1: Tensor, frame2: Tensor) -> tuple[Tensor, Tensor]:
        return frame1, frame2

    def estimate(
        self, frame1: Tensor, frame2: Tensor, previous: Prediction | None, iterations: int | None
    ) -> Prediction:
        if self.training:
            raise FleetflowError("a blend is not trained; train its networks one by one")
        costs, matching, flows, memories = [], [], [], []
        half1, half2 = halved(frame1), halved(frame2)

        def half(flow: Tensor) -> Tensor:
            return reduced(flow.float(), half1.shape[-2:])

        for member, last in zip(self.members, self._memories(previous)):
            if member.iterations is None or last is not None or not flows:
                found = member(frame1, frame2, last, None if member.iterations is None else iterations)
                cost = matching_cost(half1, half2, half(found.flow))
            else:
                blended, takes = _mixed(costs, flows)[0], iterations or max(round(FOLLOWS * member.iterations), 1)
                for _ in range(ROUNDS):
                    found = member(frame1, frame2, Prediction(blended), takes)
                    cost = matching_cost(half1, half2, half(found.flow))
                    handicap = (2 * EARLIER * half(found.flow).norm(dim=1)).clamp(max=MOST)
                    after = [each + handicap for each in costs]
                    blended = _mixed([*after, cost], [*flows, found.flow.float()])[0]
                costs = after
            costs.append(cost)
            matching.append(cost)
            flows.append(found.flow.float())
            memories.append(found.state)
        flow, apart = _mixed(costs, flows)
        if self.planes:
            flow = with_planes(frame1, frame2, flow, [_mixed(matching, flows)[0], *flows])
        kept = tuple(memories) if any(memory is not None for memory in memories) else None
        return Prediction(flow, state=kept, uncertainty=apart)

    def _memories(self, previous: Prediction | None) -> list[Prediction | None]:
        """What each network is told about the pair before this one."""
        if previous is None or previous.state is None:
            return [previous] * len(self.members)
        if not isinstance(previous.state, tuple) or len(previous.state) != len(self.members):
            raise FleetflowError("the previous prediction is not that of this blend: pass what it returned itself")
        return [None if memory is None else previous._replace(state=memory) for memory in previous.state]


def _mixed(costs: list[Tensor], flows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the flow [N, 2, H, W] mixed from several, the cheaper the more, and their distance from it, [N, H, W]."""
    shares = resize(torch.softmax(-SHARPNESS * torch.stack(costs, 1), 1), flows[0].shape[-2:])
    flow = sum(share[:, None] * each for share, each in zip(shares.unbind(1), flows))
    apart = sum(share * (each - flow).norm(dim=1) for share, each in zip(shares.unbind(1), flows))
    return flow, apart
