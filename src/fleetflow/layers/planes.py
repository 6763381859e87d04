"""Plain regions: where a frame has no texture, the flow of a plane, fitted to what the region's borders tell.

Ours. Inside a wall, a road or a sky of one color nothing can be matched, and networks guess there. But such a region
is often one plane, and a plane that moves by little has a flow of eight numbers (Longuet-Higgins and Prazdny, Proc. R.
Soc. B 1980; Bergen et al., ECCV 1992):

    u = a0 + a1 x + a2 y + (g x + h y) x
    v = b0 + b1 x + b2 y + (g x + h y) y

They are fitted, robustly, to the flow that is there, or to several, of which the frames choose. A region that they do
not explain about as well as the flow did is left as it was. All of it happens at half the size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.layers.warm_start import reduced
from fleetflow.ops.census import census_distance
from fleetflow.ops.constant import constant
from fleetflow.ops.warp import inside, pixel_grid, warp

PLAIN = 3.0  # gray levels of 255 from one pixel to the next: below it there is no texture
SMALLEST = 0.005  # of the picture: smaller regions are left as they are
SAMPLES, ROUNDS = 1024, 15  # pixels of a region that its plane is fitted to, and how often they are weighed anew
WORTH = 0.025  # census distance that a plane may cost more than the flow it takes the place of
OUTSIDE = 0.35  # census distance that a flow is given where it leaves the picture, and nothing can be compared
PATCH, WINDOW = 5, 7  # of the census, and the square it is averaged over, in pixels of half the size


def halved(frame: Tensor) -> Tensor:
    """Returns the frame [N, C, H, W] at half the size, rounded up, each pixel the mean of those it covers."""
    return F.interpolate(frame.float(), [-(-side // 2) for side in frame.shape[-2:]], mode="area")


def matching_cost(half1: Tensor, half2: Tensor, flow: Tensor) -> Tensor:
    """Returns [N, h, w]: how little half2, brought back by the flow, agrees with half1, all of one size."""
    distance = census_distance(half1, warp(half2, flow), PATCH)
    return _mean(distance, WINDOW).masked_fill(~inside(flow), OUTSIDE)


def with_planes(frame1: Tensor, frame2: Tensor, flow: Tensor, guides: Sequence[Tensor] = ()) -> Tensor:
    """Returns the flow [N, 2, H, W], in pixels, with planes in those plain regions of frame1 that they suit.

    guides: other flows like it. A plane is fitted to each of them, and the one that the frames agree with most is
    taken; without any, to the flow itself.
    """
    with torch.autocast(flow.device.type, enabled=False):
        return _with_planes(frame1, frame2, flow, guides or [flow])


def _with_planes(frame1: Tensor, frame2: Tensor, flow: Tensor, guides: Sequence[Tensor]) -> Tensor:
    half1, half2 = halved(frame1), halved(frame2)
    region, texture = plain_regions(half1)
    count = int(region.max())
    if not count:
        return flow
    coarse = reduced(flow, half1.shape[-2:])
    wide = F.max_pool2d(region[:, None].float(), 5, 1, 2)[:, 0].long()  # with its borders, which tell how it moves
    wide = torch.where(region > 0, region, wide)

    order = wide.flatten().argsort(stable=True)
    sizes = wide.flatten().bincount(minlength=count + 1)
    first = sizes.cumsum(0)[:-1, None]
    sample = order[first + torch.arange(SAMPLES, device=order.device) * sizes[1:, None] // SAMPLES]  # [S, P]
    at = pixel_grid(*half1.shape[-2:], coarse).movedim(0, -1).expand(len(flow), -1, -1, -1)  # [N, h, w, 2]
    points = at.reshape(-1, 2)[sample]
    center, reach = points.mean(1, keepdim=True), points.std(1, keepdim=True).amax(2, keepdim=True).clamp(min=1)
    terms = _terms((points - center) / reach)
    member = (region - 1).clamp(min=0)
    everywhere = _terms((at - center[member, 0]) / reach[member, 0])

    def cost(flow: Tensor) -> Tensor:
        """Returns the mean cost in each region and its borders, and first that outside of all, [S + 1]."""
        each = matching_cost(half1, half2, flow).flatten()
        return torch.zeros(count + 1, device=each.device).index_add_(0, wide.flatten(), each) / sizes

    best, least = coarse, cost(coarse) + WORTH
    takes = torch.zeros(count + 1, dtype=torch.bool, device=flow.device)
    for guide in guides:
        vectors = reduced(guide.float(), half1.shape[-2:]).movedim(1, -1).reshape(-1, 2)[sample]
        numbers = _fitted(terms, vectors, texture.flatten()[sample])  # [S, 8]
        plane = (everywhere @ numbers[member][..., None])[..., 0].movedim(-1, 1)
        plane = torch.where(region[:, None] > 0, plane, coarse)
        costs = cost(plane)
        cheaper = costs <= least
        best = torch.where(cheaper[region][:, None], plane, best)
        least = torch.where(cheaper, costs, least)
        takes = takes | cheaper
    takes = takes[region] & (region > 0)
    factors = constant([full / half for full, half in zip(flow.shape[:1:-1], coarse.shape[:1:-1])], coarse)
    fine = F.interpolate(best, flow.shape[-2:], mode="bilinear", align_corners=False) * factors[:, None, None]
    takes = F.interpolate(takes[:, None].float(), flow.shape[-2:], mode="nearest") > 0
    return torch.where(takes, fine.to(flow.dtype), flow)


def plain_regions(frame: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the regions of a frame [N, 3, H, W] in [0, 1] that have no texture, and how much texture there is.

    Both are [N, H, W]: 0 or the number of the region, counted over the batch; and a weight in (0, 1], large where the
    frame changes both ways within 5x5 pixels (the smaller eigenvalue of its structure tensor).
    """
    wide = F.pad(255 * frame, (1, 1, 1, 1), mode="replicate")
    across = (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2
    down = (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2
    steep = (across.square() + down.square()).amax(1)
    steep = F.max_pool2d(steep[:, None], 3, 1, 1)[:, 0]
    label = components(steep < PLAIN**2)
    number = label.flatten().bincount(minlength=1)
    kept = number >= SMALLEST * frame[0, 0].numel()
    kept[0] = False
    region = (kept.cumsum(0) * kept)[label]
    xx, yy, xy = (_mean(part.mean(1), 5) for part in (across.square(), down.square(), across * down))
    least = (xx + yy) / 2 - (((xx - yy) / 2).square() + xy.square()).sqrt()
    return region, 0.02 + 0.98 * least / (least + 1)


def components(mask: Tensor) -> Tensor:
    """Returns [N, H, W] long: 0 outside of the mask, and one number > 0 for each of its parts that hang together.

    Each pixel points at one of its part, at first at itself; neighbors take the smaller of what they point at, and
    all go on to what that points at (pointer jumping; Zhang, Azad, Hu, "FastSV", SIAM PP 2020).
    """
    pixel = torch.arange(1, mask.numel() + 1, device=mask.device).view_as(mask)
    both = mask[..., 1:] & mask[..., :-1], mask[:, 1:] & mask[:, :-1]
    one = torch.cat((pixel[..., 1:][both[0]], pixel[:, 1:][both[1]]))
    two = torch.cat((pixel[..., :-1][both[0]], pixel[:, :-1][both[1]]))
    parent = torch.arange(mask.numel() + 1, device=mask.device)
    while True:
        low = torch.minimum(parent[one], parent[two])
        new = parent.clone()
        for end in (one, two):
            new.scatter_reduce_(0, parent[end], low, "amin").scatter_reduce_(0, end, low, "amin")
        new = new[new]
        if torch.equal(new, parent):
            return parent[pixel] * mask
        parent = new


def _terms(at: Tensor) -> Tensor:
    """[..., 2] positions -> [..., 2, 8], what the eight numbers are multiplied with: a0 a1 a2 b0 b1 b2 g h."""
    one, none = torch.ones_like(at[..., :1]), torch.zeros_like(at[..., :1].expand(*at.shape[:-1], 3))
    linear = torch.cat((one, at), -1)
    rows = torch.cat((linear, none), -1), torch.cat((none, linear), -1)
    return torch.cat((torch.stack(rows, -2), at[..., None] * at[..., None, :]), -1)


def _fitted(terms: Tensor, flow: Tensor, weight: Tensor) -> Tensor:
    """Least squares [S, K], reweighted after Geman and McClure: terms [S, P, 2, K], flow [S, P, 2], weight [S, P].

    Its scale is the median distance, but at least half a pixel.
    """
    count = terms.shape[-1]
    ridge = 1e-6 * torch.eye(count, device=terms.device)
    now = weight
    for _ in range(ROUNDS):
        heavy = (terms * now[..., None, None]).flatten(1, 2)
        total = now.sum(1)[:, None, None]
        left = heavy.mT @ terms.flatten(1, 2) / total + ridge
        numbers = torch.linalg.solve(left, heavy.mT @ flow.flatten(1)[..., None] / total)[..., 0]
        apart = ((terms @ numbers[:, None, :, None])[..., 0] - flow).norm(dim=-1)
        scale = apart.median(1, keepdim=True).values.clamp(min=0.5)
        now = weight / (1 + (apart / scale).square()).square()
    return numbers


def _mean(values: Tensor, window: int) -> Tensor:
    """[N, H, W] averaged over a square, the edge pixels continued."""
    return F.avg_pool2d(F.pad(values[:, None], (window // 2,) * 4, mode="replicate"), window, 1)[:, 0]
