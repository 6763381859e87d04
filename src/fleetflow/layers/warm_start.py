"""Where a recurrent network begins: at rest, with the last pair's flow moved along by itself, or with a given flow.

RAFT (arXiv 2003.12039, section 3.3) calls the second one warm start.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.ops.constant import constant
from fleetflow.ops.warp import pixel_grid
from fleetflow.types import FleetflowError, Prediction, Size, size_of

CHUNK = 2**24  # distances at a time, 64 MB


def starting_flow(previous: Prediction | None, features: Tensor) -> Tensor:
    """Returns [N, 2, h, w] float32 in pixels of the features' grid: 0, a given flow, or the last one moved along.

    Args:
        previous: a prediction whose memory is the last flow on this grid, or one without a state, whose flow is given
            for this pair.

    Raises:
        FleetflowError: Where the memory is another's.
    """
    shape = (features.shape[0], 2, *features.shape[-2:])
    if previous is None:
        return torch.zeros(shape, device=features.device)
    if previous.state is None:
        return reduced(previous.flow, size_of(features))
    if not isinstance(previous.state, Tensor) or previous.state.shape != shape:
        was = list(previous.state.shape) if isinstance(previous.state, Tensor) else type(previous.state).__name__
        raise FleetflowError(
            f"the previous prediction's memory is {was}; expected {list(shape)}: pass that of the same network and size"
        )
    return carry_forward(previous.state.float())


def reduced(flow: Tensor, size: Size) -> Tensor:
    """Returns the flow [N, 2, H, W] averaged on a coarser grid, [N, 2, *size] float32 in its pixels; NaN is 0."""
    factors = constant((size[1] / flow.shape[3], size[0] / flow.shape[2]), flow.float())
    flow = flow.detach().float().nan_to_num(0, 0, 0)
    return F.interpolate(flow, size=size, mode="area") * factors[:, None, None]


@torch.no_grad()
def carry_forward(flow: Tensor) -> Tensor:
    """Returns [N, 2, h, w]: at each pixel the flow of the pixel that arrives nearest to it (section 3.3, warm start).

    Args:
        flow: [N, 2, h, w] pixels. Pixels that leave the picture are lost; where all do, the result is 0. All (h w)^2
            distances are compared, a hundredth of the work of the correlation of all pairs.
    """
    count, _, height, width = flow.shape
    grid = pixel_grid(height, width, flow)
    arrival = (grid + flow).nan_to_num(-1.0, -1.0, -1.0).flatten(2)
    stays = ((arrival > 0) & (arrival < constant((width, height), arrival)[:, None])).all(1)  # [N, P]
    square = (arrival**2).sum(1).masked_fill(~stays, torch.inf)[:, None]
    carried = []
    for cells in grid.flatten(1).split(max(CHUNK // (count * height * width), 1), 1):
        nearest = torch.baddbmm(square, (-2 * cells).mT.expand(count, -1, -1), arrival).argmin(2)
        carried.append(flow.flatten(2).gather(2, nearest[:, None].expand(-1, 2, -1)))
    return torch.cat(carried, 2).view_as(flow).masked_fill(~stays.any(1)[:, None, None, None], 0)
