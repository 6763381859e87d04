"""Arithmetic of flows: composed, inverted, resized, cropped, read at points. Each result comes with where it is valid.

A flow from a to b is [H, W, 2] or [N, 2, H, W], pixels on the grid of a: a(x) ~ b(x + flow(x)). Numpy arrays and tensors
alike; for tensors everything is differentiable.
"""

from operator import index

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.motion.arrays import Masked, Picture, as_tensor, check_sizes, like, mask_of
from fleetflow.motion.splatting import splat_tensors
from fleetflow.ops import warp as operator
from fleetflow.types import FleetflowError, checked_size

WHOLE = 0.999  # of a bilinear sample must be of valid pixels
ROUNDS = 12  # of the fixed point of `invert`; a flow whose slope is 0.3 is then exact to 1e-6 of its start
CLOSED = 0.5  # pixels by which there and back may differ where an inverse counts as found


def inside(flow: Picture) -> Picture:
    """Returns where the flow a -> b stays within the picture b: bool [H, W], or [N, H, W]; the mask of `warp`."""
    return like(operator.inside(_exact(flow, "flow")), flow)


def compose(
    first: Picture, second: Picture, first_valid: Picture | None = None, second_valid: Picture | None = None
) -> Masked:
    """Returns the flow a -> c of the flows a -> b and b -> c: first(x) + second(x + first(x)), bilinear.

    Args:
        first: a -> b, [H, W, 2] numpy array or tensor [N, 2, H, W], pixels.
        second: b -> c, of the same size.
        first_valid: bool [H, W] or [N, H, W], where `first` may be trusted (it is not where the pixel is hidden in b);
            None: everywhere.
        second_valid: the same of `second`, on the grid of b.

    Returns:
        The flow on the grid of a, valid where both are and `first` stays within b.
    """
    there, on = _exact(first, "first"), _exact(second, "second")
    check_sizes({"first": there, "second": on})
    known, known_on = mask_of(first_valid, there, "first_valid"), mask_of(second_valid, on, "second_valid")
    there, on = _cleared(there, known), _cleared(on, known_on)
    whole = operator.warp(known_on[:, None].to(there.dtype), there.detach())[:, 0] > WHOLE
    value = there + operator.warp(on.to(there), there)
    return Masked(like(value, first), like(known & whole & operator.inside(there.detach()), first))


def invert(flow: Picture, valid: Picture | None = None, importance: Picture | None = None) -> Masked:
    """Returns the flow b -> a of the flow a -> b.

    It solves g(y) = -flow(y + g(y)) by fixed-point iteration from the flow that is thrown onto b (`splat`), and keeps at
    each pixel whichever was better. Where nothing of a arrives, or there and back differ by over 0.5 px (something is
    hidden), it is not valid.

    Args:
        flow: a -> b, [H, W, 2] numpy array or tensor [N, 2, H, W], pixels.
        valid: bool [H, W] or [N, H, W], where it may be trusted; None: everywhere.
        importance: as of `splat`: the larger wins where two pixels of a meet in b, as what is nearer does.

    Returns:
        The flow on the grid of b.
    """
    there = _exact(flow, "flow")
    known = mask_of(valid, there)
    weight = None if importance is None else as_tensor(importance, "importance", 1)
    check_sizes({"flow": there, "importance": weight})
    there = _cleared(there, known)
    lost = torch.where(known[:, None], there, torch.nan)  # splat leaves out what is no number
    back, reached = splat_tensors(-there, lost, weight)
    error = _gap(there, back)
    for _ in range(ROUNDS):
        tried = -operator.warp(there, back)
        left = _gap(there, tried)
        back, error = torch.where((left < error)[:, None], tried, back), torch.minimum(left, error)
    whole = operator.warp(known[:, None].to(there.dtype), back.detach())[:, 0] > WHOLE
    found = reached & whole & (error <= CLOSED) & operator.inside(back.detach())
    return Masked(like(back, flow), like(found, flow))


def resize(flow: Picture, size: tuple[int, int], valid: Picture | None = None) -> Masked:
    """Returns the flow between the frames resized to `size`: in their pixels, on their grid.

    Pixel edges stay aligned. Made smaller, it is the mean over the pixels that become one; made larger, bilinear.
    Pixels that are not valid have no weight.

    Args:
        flow: [H, W, 2] numpy array or tensor [N, 2, H, W], pixels.
        size: new height and width.
        valid: bool [H, W] or [N, H, W], where the flow is known; None: everywhere.

    Returns:
        The flow; valid where half of what it was made of is.
    """
    vectors = _exact(flow, "flow")
    size = checked_size(size)
    known = mask_of(valid, vectors)
    height, width = vectors.shape[-2:]
    both = torch.cat((_cleared(vectors, known), known[:, None].to(vectors)), 1)
    smaller = size[0] < height or size[1] < width
    both = F.interpolate(both, size=size, mode="bilinear", align_corners=False, antialias=smaller)
    share = both[:, 2:]
    factors = both.new_tensor((size[1] / width, size[0] / height))[:, None, None]
    value = both[:, :2] / share.clamp(min=1e-6) * factors
    return Masked(like(value, flow), like(share[:, 0] >= 0.5, flow))


def crop(flow: Picture, top: int, left: int, size: tuple[int, int], valid: Picture | None = None) -> Masked:
    """Returns the flow between two frames that are both cropped to the same box.

    Args:
        flow: [H, W, 2] numpy array or tensor [N, 2, H, W], pixels.
        top: first row that is kept.
        left: first column that is kept.
        size: height and width of the box, which lies within the picture.
        valid: bool [H, W] or [N, H, W], where the flow is known; None: everywhere.

    Returns:
        The flow; valid where it stays within the box.
    """
    vectors = as_tensor(flow, "flow", 2)
    size = checked_size(size)
    try:
        top, left = index(top), index(left)
    except TypeError:
        raise FleetflowError(f"top is {top!r} and left {left!r}; expected a row and a column, 0 or more") from None
    bottom, right = top + size[0], left + size[1]
    if not (0 <= top < bottom <= vectors.shape[2] and 0 <= left < right <= vectors.shape[3]):
        raise FleetflowError(
            f"the box from row {top}, column {left} to {bottom}, {right} is not within {list(vectors.shape[-2:])}"
        )
    box = (..., slice(top, bottom), slice(left, right))
    known = mask_of(valid, vectors)[box] & operator.inside(vectors[box].detach())
    return Masked(like(vectors[box], flow), like(known, flow))


def sample(picture: Picture, points: Picture, valid: Picture | None = None) -> Masked:
    """Returns what a flow, or any picture, holds at points between its pixels, bilinear.

    Args:
        picture: [H, W, C] numpy array, such as a flow, or tensor [N, C, H, W].
        points: [P, 2] numpy array or tensor [N, P, 2]: x and y in pixels, (0, 0) is the middle of the first pixel.
        valid: bool [H, W] or [N, H, W], where the picture is known; None: everywhere.

    Returns:
        value: [P, C] or [N, P, C]; outside the picture that of the nearest pixel of its edge.
        valid: bool [P] or [N, P]: within the picture, between pixels that are known.
    """
    values = _exact(picture, "picture", None)
    at = points if isinstance(points, Tensor) else torch.from_numpy(np.array(points, np.float64))[None]
    if at.ndim != 3 or at.shape[0] != len(values) or at.shape[2] != 2:
        raise FleetflowError(f"points is {list(np.shape(points))}; expected a numpy array [P, 2] or a tensor [N, P, 2]")
    known = mask_of(valid, values)
    values, at = _cleared(values, known), at.to(values)
    height, width = values.shape[-2:]
    ends = at.new_tensor((width - 1, height - 1))
    grid = 2 * at / ends.clamp(min=1) - 1
    stacked = torch.cat((values, known[:, None].to(values)), 1)
    read = F.grid_sample(stacked, grid[:, None], mode="bilinear", padding_mode="border", align_corners=True)[:, :, 0]
    within = ((at >= 0) & (at <= ends)).all(-1)
    value, whole = read[:, :-1].mT, read[:, -1].detach() > WHOLE
    if isinstance(points, Tensor):
        return Masked(value, within & whole)
    return Masked(value[0].detach().cpu().numpy(), (within & whole)[0].cpu().numpy())


def _exact(picture: Picture, name: str, channels: int | None = 2) -> Tensor:
    """The tensor, float32 at least: bfloat16 cannot tell positions apart."""
    tensor = as_tensor(picture, name, channels)
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _cleared(flow: Tensor, known: Tensor) -> Tensor:
    return torch.where(known[:, None], flow, 0.0)


@torch.no_grad()
def _gap(there: Tensor, back: Tensor) -> Tensor:
    """[N, H, W] pixels by which back and then there miss the start."""
    return (back + operator.warp(there, back)).square().sum(1).sqrt()
