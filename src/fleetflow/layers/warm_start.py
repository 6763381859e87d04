"""Warm start: a recurrent network begins with the last pair's flow, moved along by itself (RAFT, arXiv 2003.12039)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.ops.warp import pixel_grid
from fleetflow.types import FleetflowError, Prediction


def starting_flow(previous: Prediction | None, features: Tensor) -> Tensor:
    """Returns [N, 2, h, w] float32 in pixels of the features' grid: 0, or the previous flow moved along by itself.

    previous: a prediction whose memory is the last flow on this grid. Raises FleetflowError where it is another's.
    """
    shape = (features.shape[0], 2, *features.shape[-2:])
    if previous is None or previous.memory is None:
        return torch.zeros(shape, device=features.device)
    if not isinstance(previous.memory, Tensor) or previous.memory.shape != shape:
        was = list(previous.memory.shape) if isinstance(previous.memory, Tensor) else type(previous.memory).__name__
        raise FleetflowError(
            f"the previous prediction's memory is {was}; expected {list(shape)}: pass that of the same network and size"
        )
    return carry_forward(previous.memory.float())


@torch.no_grad()
def carry_forward(flow: Tensor) -> Tensor:
    """Returns [N, 2, h, w]: at each pixel the flow of the one that arrives nearest to it (section 3.3, warm start).

    flow: [N, 2, h, w] pixels. Pixels that leave the picture are lost; where all do, the result is 0. The nearest
    arrival is found by jump flooding (Rong and Tan, I3D 2006), which in rare cells takes the second nearest.
    """
    count, _, height, width = flow.shape
    grid = pixel_grid(height, width, flow)
    arrival = (grid + flow).nan_to_num(-1.0, -1.0, -1.0)
    x, y = arrival.unbind(1)
    stays = (x > 0) & (x < width) & (y > 0) & (y < height)
    pixels = height * width
    numbers = torch.arange(pixels, device=flow.device).expand(count, pixels)
    spots = (y.round().clamp(0, height - 1) * width + x.round().clamp(0, width - 1)).long().flatten(1)
    points = arrival.flatten(2)

    def distance(candidates: Tensor) -> Tensor:
        """Squared distance [N, h, w] from each cell to the arrival of its candidate; infinite without one."""
        place = points.gather(2, candidates.clamp(min=0).flatten(1)[:, None].expand(-1, 2, -1)).view_as(flow)
        return ((place - grid) ** 2).sum(1).masked_fill(candidates < 0, torch.inf)

    seeds = torch.full_like(numbers, -1)
    own = ((points - grid.flatten(1).expand(count, -1, -1).gather(2, spots[:, None].expand(-1, 2, -1))) ** 2).sum(1)
    own = own.masked_fill(~stays.flatten(1), torch.inf)
    closest = torch.full_like(own, torch.inf).scatter_reduce(1, spots, own, "amin")
    winners = (own == closest.gather(1, spots)) & stays.flatten(1)
    seeds = seeds.scatter_reduce(1, spots, numbers.masked_fill(~winners, -1), "amax").view(count, height, width)

    best = distance(seeds)
    stride = 1 << max(height - 1, width - 1, 1).bit_length() - 1
    for jump in (*(stride >> k for k in range(stride.bit_length())), 1):
        padded = F.pad(seeds, (jump, jump, jump, jump), value=-1)
        for dy in (0, jump, 2 * jump):
            for dx in (0, jump, 2 * jump):
                other = padded[:, dy : dy + height, dx : dx + width]
                far = distance(other)
                nearer = far < best
                seeds, best = torch.where(nearer, other, seeds), torch.where(nearer, far, best)
    carried = flow.flatten(2).gather(2, seeds.clamp(min=0).flatten(1)[:, None].expand(-1, 2, -1)).view_as(flow)
    return carried.masked_fill((seeds < 0)[:, None], 0)
