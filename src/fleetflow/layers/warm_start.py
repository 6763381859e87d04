"""Where a recurrent network begins: at rest, with the last pair's flow moved along by itself, or with a given flow.

RAFT (arXiv 2003.12039, section 3.3) calls the second one warm start. Where few iterations are to follow, RAFT goes on from
the last pair's whole state instead, hidden part and flow as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.ops.constant import constant
from fleetflow.ops.warp import pixel_grid
from fleetflow.types import FleetflowError, Prediction, Size, size_of

SHORT = 4  # iterations up to which the whole state goes on; with more it was not measured
CHUNK = 2**24  # distances at a time, 64 MB


def starting_flow(previous: Prediction | None, features: Tensor) -> Tensor:
    """Returns [N, 2, h, w] float32 in pixels of the features' grid: 0, a given flow, or the last one moved along.

    Args:
        previous: a prediction whose state is (hidden, flow) or the flow alone, on this grid; or one without a state,
            whose flow is given for this pair.

    Raises:
        FleetflowError: Where the state is another's.
    """
    shape = (features.shape[0], 2, *features.shape[-2:])
    if previous is None:
        return torch.zeros(shape, device=features.device)
    if previous.state is None:
        return reduced(previous.flow, size_of(features))
    flow = previous.state[1] if isinstance(previous.state, tuple) and len(previous.state) == 2 else previous.state
    if not isinstance(flow, Tensor) or flow.shape != shape:
        was = list(flow.shape) if isinstance(flow, Tensor) else type(previous.state).__name__
        raise FleetflowError(
            f"the previous prediction's flow is {was}; expected {list(shape)}: pass that of the same network and size"
        )
    return carry_forward(flow.float())


def starting_state(previous: Prediction | None, rest: tuple[Tensor, Tensor], iterations: int) -> tuple[Tensor, Tensor]:
    """Returns the state (hidden, flow) for a search of so many iterations; `rest` is the one that knows nothing.

    Raises:
        FleetflowError: as `starting_flow`.
    """
    if previous is None or previous.state is None or iterations > SHORT:
        return rest[0], starting_flow(previous, rest[0])
    state, shapes = previous.state, [list(part.shape) for part in rest]
    fits = isinstance(state, tuple) and all(isinstance(part, Tensor) for part in state)
    was = [list(part.shape) for part in state] if fits else type(state).__name__
    if was != shapes:
        raise FleetflowError(
            f"the previous prediction's state is {was}; expected {shapes}: pass that of the same network and size"
        )
    return state[0].to(rest[0]), state[1].to(rest[1])


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
