"""Numbers for a flow: (flow, Sample) -> numbers. The name of each number says its protocol.

What is a mean over pixels comes as a `Mean`, a sum and a count, so that pairs and sets are pooled exactly. A vector of
the network that is not finite counts as an infinite error, over every limit, and has a number of its own, `not_finite`.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fleetflow.types import FleetflowError, Sample

LIMITS = (1, 3, 5)  # pixels
FALSE_LIMITS = (1, 3)  # pixels
FL_PIXELS, FL_SHARE = 3.0, 0.05  # KITTI 2015: wrong is an error over 3 pixels and over 5 % of the true length
SPEED_BANDS = {"s0-10": (0, 10), "s10-40": (10, 40), "s40+": (40, math.inf)}  # pixels of true motion (Sintel)
DISTANCE_BANDS = {"d0-10": (0, 10), "d10-60": (10, 60), "d60-140": (60, 140)}  # pixels to a boundary (Sintel)
MOTION_EDGE = 1.0  # pixels: neighbors whose true motions differ by more have a boundary between them
BESIDE_EDGE = 5  # pixels from a boundary of motion that count as beside it
STILL = 0.1  # pixels of true motion below which a pixel is still
DENSE = 0.5  # share of known pixels from which the distance to boundaries means something
WAUC_STEPS, WAUC_REACH = 100, 5.0  # limits up to 5 pixels (VIPER, Richter et al., ICCV 2017)
SPEED_EDGES = (0, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, math.inf)  # pixels, of the curve of error against speed
BINS_PER_DECADE, DECADES = 200, (-4, 4)  # of the histogram of errors, 1e-4 to 1e4 pixels: each 1.2 % wide
SPARSE_STEPS = 20  # the sparsification curve leaves out 0, 5, ..., 95 % of the pixels


class Mean(NamedTuple):
    """A mean that can be pooled: the sum over some pixels, and how many they are."""

    total: float
    count: int

    @property
    def value(self) -> float:
        """The mean; not-a-number where there is no pixel."""
        return self.total / self.count if self.count else math.nan


def end_point_error(flow: Tensor, truth: Tensor) -> Tensor:
    """Returns [..., H, W] pixels, the length of flow - truth (both [..., 2, H, W] pixels); infinite if not finite."""
    error = (flow - truth).square().sum(-3).sqrt()
    return torch.where(error.isnan(), math.inf, error)


class Judged(NamedTuple):
    """A flow beside the truth of its pair."""

    error: Tensor  # [H, W] pixels, the end-point error; infinite where the flow is not finite
    nearest: Tensor  # [2, H, W] pixels, the true vector that it is measured against
    speed: Tensor  # [H, W] pixels, length of the true motion
    longest: Tensor  # [H, W] pixels, the length that the 5 % of Fl are taken of


def judge(flow: Tensor, sample: Sample) -> Judged:
    """Returns the flow [2, H, W] pixels beside its truth, in the precision of the flow.

    Where a pixel has several true vectors (`sample.truths`) it is measured against the nearest, Fl takes 5 % of the
    longest, and the speed is the mean of their lengths: the rule of Spring's server.
    """
    if sample.truths is None:
        truth = sample.flow.to(flow.dtype)
        length = truth.square().sum(0).sqrt()
        return Judged(end_point_error(flow, truth), truth, length, length)
    truths = sample.truths.to(flow.dtype)
    error, place = end_point_error(flow, truths).min(0)
    nearest = truths.gather(0, place.expand(1, 2, *place.shape))[0]
    lengths = truths.square().sum(1).sqrt()
    return Judged(error, nearest, lengths.mean(0), lengths.amax(0))


def pair_errors(flow: Tensor, sample: Sample) -> dict[str, float]:
    """Returns the errors of one pair: flow [2, H, W] pixels against its truth (see `judge`), over sample.valid.

    epe: mean end-point error, pixels. out1, out3, out5: percentage of pixels with an error over 1, 3, 5 pixels.
    fl: percentage with an error over 3 pixels and over 5 % of the true length (KITTI 2015). Over one image.

    Raises:
        FleetflowError: Where no pixel is known.
    """
    if not bool(sample.valid.any()):
        raise FleetflowError("the truth of this pair has no known pixel; leave the pair out")
    judged = judge(flow, sample)
    error, length = judged.error[sample.valid], judged.longest[sample.valid]
    numbers = {"epe": error.mean().item()}
    for limit in LIMITS:
        numbers[f"out{limit}"] = 100 * (error > limit).float().mean().item()
    numbers["fl"] = 100 * ((error > FL_PIXELS) & (error > FL_SHARE * length)).float().mean().item()
    return numbers


def mean_over_sets(rows: list[tuple[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Returns per set the mean over its pairs, and under "mean of sets" the mean of those: the house score."""
    sets: dict[str, list[dict[str, float]]] = {}
    for name, numbers in rows:
        sets.setdefault(name, []).append(numbers)
    table = {name: _mean(members) for name, members in sets.items()}
    return {**table, "mean of sets": _mean(list(table.values()))}


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


# ---- means over pixels, which can be pooled ----


def pixel_sums(flow: Tensor, sample: Sample, *, foreground: Tensor | None = None) -> dict[str, Mean]:
    """Returns sums over the known pixels of a pair: flow [2, H, W] pixels against its truth, in double precision.

    Where a pixel has several true vectors, `judge` says which of them counts.

    epe             end-point error, pixels; also over occluded and visible pixels where sample.occluded is known
    out1 out3 out5  percentage of pixels with an error over 1, 3, 5 pixels
    fl              KITTI 2015: percentage with an error over 3 pixels and over 5 % of the true length; pooled it is the
                    official figure; fl_visible without occluded pixels ("noc"); fl_bg and fl_fg off and on
                    `foreground` [H, W] bool
    s0-10 s10-40 s40+       end-point error of pixels that move so fast, lower bound included
    d0-10 d10-60 d60-140    end-point error of pixels so far from a boundary (see `boundary_distance`), dense truth only
    edge0-5         end-point error of pixels under 5 px from a boundary of motion (`motion_edges`), dense truth only
    false1 false3   false motion: percentage of still pixels (true motion under 0.1 px) with an error over 1, 3 pixels
    angle           between (u, v, 1) and its truth, degrees; 180 where the flow is not finite
    wauc            VIPER: percentage within a limit, weighted mean over 100 limits up to 5 pixels; 100 is best
    not_finite      percentage of vectors that are infinite or not a number
    """
    valid = sample.valid
    flow = flow.double()
    error, truth, speed, longest = judge(flow, sample)
    wrong = 100.0 * ((error > FL_PIXELS) & (error > FL_SHARE * longest))
    sums = {"epe": over(error, valid)}
    for limit in LIMITS:
        sums[f"out{limit}"] = over(100.0 * (error > limit), valid)
    sums["fl"] = over(wrong, valid)
    if foreground is not None:
        sums["fl_bg"], sums["fl_fg"] = over(wrong, valid & ~foreground), over(wrong, valid & foreground)
    if sample.occluded is not None:
        visible, hidden = valid & ~sample.occluded, valid & sample.occluded
        sums["epe_visible"], sums["epe_occluded"] = over(error, visible), over(error, hidden)
        sums["fl_visible"], sums["out3_visible"] = over(wrong, visible), over(100.0 * (error > 3), visible)
    for name, (low, high) in SPEED_BANDS.items():
        sums[name] = over(error, valid & (speed >= low) & (speed < high))
    if boundary_rule(sample):
        distance = boundary_distance(sample)
        for name, (low, high) in DISTANCE_BANDS.items():
            sums[name] = over(error, valid & (distance >= low) & (distance < high))
        beside = edge_distance(motion_edges(sample), BESIDE_EDGE) < BESIDE_EDGE
        sums["edge0-5"] = over(error, valid & beside)
    for limit in FALSE_LIMITS:
        sums[f"false{limit}"] = over(100.0 * (error > limit), valid & (speed < STILL))
    sums["angle"] = over(angular_error(flow, truth), valid)
    sums["wauc"] = over(100 * wauc_score(error), valid)
    sums["not_finite"] = over(100.0 * ~flow.isfinite().all(0), valid)
    return sums


def over(values: Tensor, mask: Tensor) -> Mean:
    """Returns the sum and the number of the values [H, W] where the mask [H, W] is True."""
    chosen = values[mask]
    return Mean(chosen.double().sum().item(), chosen.numel())


def pool(rows: Iterable[dict[str, Mean]]) -> dict[str, Mean]:
    """Returns the sums of several pairs together; a name that some pairs lack is pooled over those that have it."""
    pooled: dict[str, Mean] = {}
    for row in rows:
        for name, mean in row.items():
            before = pooled.get(name, Mean(0.0, 0))
            pooled[name] = Mean(before.total + mean.total, before.count + mean.count)
    return pooled


def angular_error(flow: Tensor, truth: Tensor) -> Tensor:
    """Returns [H, W] degrees between (u, v, 1) of flow and of truth, [2, H, W] pixels (Barron et al., IJCV 1994)."""
    (u, v), (a, b) = flow, truth
    cross = ((v - b).square() + (a - u).square() + (u * b - v * a).square()).sqrt()
    angle = torch.rad2deg(torch.atan2(cross, u * a + v * b + 1))
    return torch.where(flow.isfinite().all(0), angle, 180.0)


def wauc_score(error: Tensor) -> Tensor:
    """Returns for each error [H, W] pixels its share of the weighted area under the curve, in [0, 1].

    VIPER counts the pixels with an error of at most k / 20 pixels, k = 1 to 100, with weights 1 - (k - 1) / 100.
    """
    weights = 1 - torch.arange(WAUC_STEPS, dtype=torch.float64, device=error.device) / WAUC_STEPS
    rest = torch.cat((weights.flip(0).cumsum(0).flip(0), weights.new_zeros(1))) / weights.sum()
    first = (error.double() * (WAUC_STEPS / WAUC_REACH)).ceil().clamp(1, WAUC_STEPS + 1).long() - 1
    return rest[first]


# ---- boundaries ----


def boundary_rule(sample: Sample) -> str:
    """Returns what counts as a boundary in this pair (see `boundaries`); "" where too few pixels are known for any."""
    if sample.valid.float().mean() < DENSE:
        return ""
    return f"motion that differs by over {MOTION_EDGE:g} px" if sample.occluded is None else "edges of occlusion"


def boundaries(sample: Sample) -> Tensor:
    """Returns [H, W] bool, pixels at a boundary of occlusion or motion.

    With sample.occluded: the pixels on both sides of an edge of the occluded regions, which is what Sintel's bands are
    named after. Without: `motion_edges`. Sintel's own boundaries of the test set are not public, so d-bands elsewhere
    compare only with ours.
    """
    if sample.occluded is None:
        return motion_edges(sample)
    return _edges(sample.valid, lambda first, second: first(sample.occluded) != second(sample.occluded))


def motion_edges(sample: Sample) -> Tensor:
    """Returns [H, W] bool, known pixels whose true motion differs by over 1 pixel from a known neighbor's (of 4)."""

    def differ(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Tensor:
        apart = end_point_error(first(sample.flow), second(sample.flow)) > MOTION_EDGE
        return apart & first(sample.valid) & second(sample.valid)

    return _edges(sample.valid, differ)


def _edges(like: Tensor, differ: Callable) -> Tensor:
    """[H, W] bool, the pixels of all neighboring pairs for which `differ(first, second)`, two views, is True."""
    edges = torch.zeros_like(like)
    for axis in (-2, -1):
        count = like.shape[axis] - 1
        if not count:
            continue
        first, second = (partial(torch.narrow, dim=axis, start=start, length=count) for start in (0, 1))
        edge = differ(first, second)
        first(edges).logical_or_(edge)
        second(edges).logical_or_(edge)
    return edges


def boundary_distance(sample: Sample, limit: int = 140) -> Tensor:
    """Returns [H, W] pixels, the Euclidean distance to the nearest of `boundaries`; infinite from `limit` on."""
    return edge_distance(boundaries(sample), limit)


def edge_distance(edges: Tensor, limit: int) -> Tensor:
    """Returns [H, W] pixels, the Euclidean distance to the nearest True of [H, W]; infinite from `limit` on."""
    height, width = edges.shape
    if not edges.any():
        return torch.full((height, width), math.inf, device=edges.device)
    rows = torch.arange(height, device=edges.device, dtype=torch.float32)[:, None]
    above = torch.where(edges, rows, -math.inf).cummax(0).values
    below = torch.where(edges, rows, math.inf).flip(0).cummin(0).values.flip(0)
    column = torch.minimum(rows - above, below - rows).square()  # to the nearest edge in the same column, squared
    nearest = column.clone()
    for shift in range(1, min(limit, width)):
        left, right = nearest[:, shift:], nearest[:, :-shift]
        torch.minimum(left, column[:, :-shift] + shift**2, out=left)
        torch.minimum(right, column[:, shift:] + shift**2, out=right)
    return torch.where(nearest < limit**2, nearest.sqrt(), math.inf)


# ---- clips ----


def flicker(flow: Tensor, sample: Sample, next_flow: Tensor, next_sample: Sample) -> Mean:
    """Returns how much the error of a surface point changes from one pair of a clip to the next, in pixels.

    The error vector (flow minus truth) of a visible known pixel x is compared with that of the next pair at the pixel
    nearest to x + truth(x), where the point has gone; the mean of the length of the difference. An error that stays
    the same does not flicker; one that comes and goes does. Infinite where a flow is not finite.

    Args:
        flow, next_flow: [2, H, W] pixels of two pairs that follow each other, with their truth.
    """
    height, width = sample.valid.shape
    y, x = torch.meshgrid(*(torch.arange(size, device=flow.device) for size in (height, width)), indexing="ij")
    to_x, to_y = (place.round().long() for place in (x + sample.flow[0], y + sample.flow[1]))
    seen = sample.valid & (to_x >= 0) & (to_x < width) & (to_y >= 0) & (to_y < height)
    if sample.occluded is not None:
        seen &= ~sample.occluded
    place = (to_y * width + to_x)[seen]
    known = next_sample.valid.flatten()[place]
    before = (flow.double() - sample.flow)[:, seen][:, known]
    after = (next_flow.double() - next_sample.flow).flatten(1)[:, place[known]]
    change = (after - before).square().sum(0).sqrt()
    return over(torch.where(change.isnan(), math.inf, change), torch.ones_like(change, dtype=torch.bool))


# ---- distributions ----


def still_histogram(judged: Judged, valid: Tensor) -> Tensor:
    """Returns the `error_histogram` of the still pixels: known ones with a true motion under 0.1 pixels."""
    return error_histogram(judged.error[valid & (judged.speed < STILL)])


def error_histogram(error: Tensor) -> Tensor:
    """Returns int64 [1602], how many of the errors (pixels, any shape) fall into each bin; add them to pool.

    The first bin holds errors under 1e-4, the last those from 1e4 on and infinite ones; the others are logarithmic.
    """
    low, high = DECADES
    bins = (high - low) * BINS_PER_DECADE
    place = ((error.double().log10() - low) * BINS_PER_DECADE).floor() + 1
    return torch.bincount(place.clamp(0, bins + 1).long().flatten(), minlength=bins + 2)


def quantile(histogram: Tensor, share: float) -> float:
    """Returns the error in pixels that `share` (0 to 1) of the pixels do not exceed, to 0.6 %.

    0 in the first bin, infinite in the last, not-a-number where there is no pixel.
    """
    counts = histogram.cumsum(0)
    if counts[-1] == 0:
        return math.nan
    place = int(torch.searchsorted(counts, max(1, math.ceil(share * int(counts[-1])))))
    if place in (0, len(counts) - 1):
        return 0.0 if place == 0 else math.inf
    return 10 ** (DECADES[0] + (place - 0.5) / BINS_PER_DECADE)


def speed_profile(error: Tensor, speed: Tensor, valid: Tensor) -> Tensor:
    """Returns float64 [2, 10], the sum of errors [H, W] and the number of pixels in each interval of SPEED_EDGES.

    Args:
        speed: [H, W] pixels, the length of the true motion.
        valid: [H, W] bool. Add them to pool.
    """
    speed = speed[valid].double()
    inner = torch.tensor(SPEED_EDGES[1:-1], dtype=torch.float64, device=speed.device)
    place = torch.bucketize(speed, inner, right=True)
    sums = [torch.bincount(place, weights, len(inner) + 1) for weights in (error[valid].double(), None)]
    return torch.stack([part.double() for part in sums])


# ---- confidence ----


def sparsification(error: Tensor, uncertainty: Tensor) -> Tensor:
    """Returns float64 [2, 20], the mean error of the pixels left: by uncertainty, and by error itself (the oracle).

    Left out are the highest 0, 5, ..., 95 %. error, uncertainty: [n], of the known pixels of one pair; the
    higher, the less certain. Both curves are divided by the mean error of all pixels, so they begin at 1 (Ilg et al.,
    ECCV 2018). Average them over pairs.

    Raises:
        FleetflowError: Where there is no pixel.
    """
    if not error.numel():
        raise FleetflowError("sparsification needs at least one known pixel; leave the pair out")
    error = error.double()
    curves = []
    for order in (uncertainty, error):
        kept = error[order.argsort(stable=True)].cumsum(0)
        counts = [max(1, round(len(kept) * (1 - k / SPARSE_STEPS))) for k in range(SPARSE_STEPS)]
        curves.append(torch.stack([kept[count - 1] / count for count in counts]))
    whole = curves[1][0]
    return torch.stack(curves) / (whole if whole > 0 else 1)


def ause(curves: Tensor) -> float:
    """Returns the area between the curve and its oracle in `sparsification` [2, 20]; 0 is a perfect confidence."""
    return (curves[0] - curves[1]).mean().item()
