"""Forward warping: frame1 thrown onto frame2's grid along the flow, where several pixels may land on one."""

import torch
from torch import Tensor

from fleetflow.motion.arrays import Masked, Picture, as_tensor, check_sizes, like
from fleetflow.ops.warp import pixel_grid

LEAST = 1e-3  # share of one pixel that must arrive for a place to count as reached


def splat(image: Picture, flow: Picture, importance: Picture | None = None) -> Masked:
    """Returns frame1 as frame2 would see it, and which places anything of it reaches.

    Each pixel x is thrown to x + flow(x) and shared bilinearly between the four pixels around. What arrives at one place
    is averaged, with weights exp(importance): softmax splatting (Niklaus and Liu, "Softmax Splatting for Video Frame
    Interpolation", CVPR 2020). Differentiable for tensors.

        last_flow_moved_on, known = splat(flow, flow)

    Args:
        image: [H, W, C] or [H, W] numpy array, or tensor [N, C, H, W], of frame1; anything that moves with it.
        flow: [H, W, 2] numpy array or tensor [N, 2, H, W], pixels from frame1 to frame2. Pixels where it is no number
            are left out.
        importance: [H, W] numpy array or tensor [N, 1, H, W]: the larger wins where two meet, by the factor
            exp(difference). None: all count alike.

    Returns:
        value: float of the kind of `image` (integers become float32), 0 where nothing arrives.
        valid: bool [H, W] or [N, H, W].

    Raises:
        FleetflowError: for other shapes, or sizes that differ.
    """
    frame, vectors = as_tensor(image, "image"), as_tensor(flow, "flow", 2)
    weight = None if importance is None else as_tensor(importance, "importance", 1)
    check_sizes({"image": frame, "flow": vectors, "importance": weight})
    frame = frame if frame.is_floating_point() else frame.float()
    value, reached = splat_tensors(frame, vectors.to(frame.device), weight)
    return Masked(like(value, image), like(reached, flow))


def splat_tensors(image: Tensor, flow: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns what `splat` does for tensors: [N, C, H, W] and bool [N, H, W]."""
    count, channels, height, width = image.shape
    flow = flow.to(torch.promote_types(flow.dtype, torch.float32))
    known = flow.isfinite().all(1) & (flow.abs().amax(1) < 1e9)
    target = pixel_grid(height, width, flow) + torch.where(known[:, None], flow, 0.0)
    x, y = target.unbind(1)
    left, top = x.detach().floor(), y.detach().floor()
    places, shares = [], []
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = left + dx, top + dy
        share = (1 - (x - column).abs()) * (1 - (y - row).abs())
        hit = known & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        place = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
        places.append(place.flatten(1))
        shares.append((share * hit).flatten(1))
    place, share = torch.cat(places, 1), torch.cat(shares, 1)  # [N, 4P]
    arrived = share.new_zeros(count, height * width).scatter_add(1, place, share)
    reached = arrived.detach() > LEAST
    if importance is not None:
        share = share * _softmax_weight(importance.to(share).flatten(1).repeat(1, 4), place, share, height * width)
        arrived = share.new_zeros(count, height * width).scatter_add(1, place, share)
    sources = torch.cat([image.flatten(2)] * 4, 2).to(share.dtype) * share[:, None]
    total = sources.new_zeros(count, channels, height * width)
    total = total.scatter_add(2, place[:, None].expand(-1, channels, -1), sources)
    value = torch.where(reached[:, None], total / torch.where(reached, arrived, 1.0)[:, None], 0.0)
    return value.view(image.shape).to(image.dtype), reached.view(count, height, width)


def _softmax_weight(importance: Tensor, place: Tensor, share: Tensor, places: int) -> Tensor:
    """Returns exp(importance - the largest that arrives at the place) [N, 4P], so that no weight overflows."""
    seen = importance.detach().masked_fill(share.detach() <= LEAST, -torch.inf)
    largest = seen.new_full((len(seen), places), -torch.inf).scatter_reduce(1, place, seen, "amax")
    largest = largest.gather(1, place)
    return (importance - torch.where(largest.isfinite(), largest, importance.detach())).clamp(max=0.0).exp()
