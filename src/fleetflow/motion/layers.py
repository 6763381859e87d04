"""Two motions in one picture, and which of them lies behind.

What moves before something else covers it: a place of a later picture that both motions lead to shows the one in front.
So a thing that fills most of the picture is not taken for the camera.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.motion.alignment import aligned, apart
from fleetflow.motion.camera import affine_flows, fit_similarity
from fleetflow.ops.warp import warp

STEP = 6  # of the pixels that a fit looks at
DIFFERENT, SHARE = 1.0, 0.1  # pixels, and share of the first motion, by which another motion differs from it at least
FEWEST = 0.01  # share of the weights that another motion needs
NEARBY = 16  # pixels around a place whose mean is its brightness: so far a thing changes what lies beside it
WIDE = 0.15  # share of the picture that what lies behind must have
OWN = 0.4  # share of the way to the other motion, up to which a flow belongs to the one that is nearer
MANY, FEW = 6, 3  # pairs: over many, more is covered; over few, a motion is followed more exactly
# Chosen on generated clips, split=validation. How much likelier pictures must be with one motion in front, and on which
# share of the picture; how much likelier the motion behind must make them than none does, where it is seen.
COVERS, CONTESTED, MOVES = 0.1, 0.0025, 0.1
SHOWN = 0.025  # how much less whole pictures must differ once a motion is taken back


class Layer(NamedTuple):
    """A motion over some pairs, and where it is seen."""

    motions: list[np.ndarray]  # [3, 3] of each pair
    places: list[Tensor]  # bool [h, w] in the first picture of each; as before in pairs that show one motion only


def motion_behind(
    cameras: Sequence[np.ndarray], fits: Sequence[np.ndarray], flows: Tensor, planes: Tensor, weights: Tensor
) -> list[np.ndarray]:
    """Returns the motion of what lies behind, [3, 3] for each pair: `cameras`, unless these cover another motion.

    Where they do, and the pictures do not show that what is covered moves, it is none: the identity; unless they show that
    it moves as what covers it does.

    Args:
        cameras: the motions [3, 3] that are taken for the camera's.
        fits: the motion [3, 3] that most of each flow agrees with; `cameras` may be means of several.
        flows: [T - 1, 2, h, w] pixels from each picture to the next.
        planes: [T, 1, h, w] the pictures.
        weights: [T - 1, h, w] how much each pixel counts.
    """
    if all(np.array_equal(camera, np.eye(3)) for camera in cameras):
        return list(cameras)  # most of the picture stands still: that is the background, whatever it covers
    layers = _layers(fits, flows, planes, weights)
    given = affine_flows(cameras, flows.shape[2:])
    apart_from = [given - affine_flows(layer.motions, flows.shape[2:]) for layer in layers]
    off = [float(torch.hypot(each[:, 0], each[:, 1]).mean()) for each in apart_from]
    front, behind = layers if off[0] < off[1] else layers[::-1]
    if not _covers(front, behind, planes):
        return list(cameras)
    if _shown_behind(behind.motions, front, behind, planes, FEW, MOVES):
        return behind.motions
    together = _shown_behind(front.motions, front, behind, planes, 1, SHOWN)  # then there is one layer
    return list(cameras) if together else [np.eye(3) for _ in cameras]


def followed(motions: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Returns the motions [3, 3] over `count` pairs, from each picture on that has so many behind it."""
    return [
        reduce(lambda before, later: later @ before, motions[k : k + count]) for k in range(len(motions) - count + 1)
    ]


def is_shown(ways: Tensor, planes: Tensor, seen: Tensor, margin: float) -> bool:
    """Returns whether pictures are more alike once motions are taken back than as they are, and than moved the other way.

    Args:
        ways: [N, 2, h, w] pixels from the first N pictures to the last N.
        planes: [T, 1, h, w] the pictures.
        seen: bool [N, 1, h, w], where to look.
        margin: by which share they must be more alike, all of them together.
    """
    first, last = planes[: len(ways)], planes[-len(ways) :]
    as_it_is, back, away = (
        float(apart(first, other)[seen].sum()) for other in (last, warp(last, ways), warp(last, -ways))
    )
    return back < (1 - margin) * min(as_it_is, away)


def _layers(fits: Sequence[np.ndarray], flows: Tensor, planes: Tensor, weights: Tensor) -> list[Layer]:
    """Two layers, each of them the same thing in all pairs; where a pair shows one motion only, the other is guessed."""
    layers = [Layer([], []), Layer([], [])]
    last, beside, order = [torch.zeros(flows.shape[2:], dtype=torch.bool)] * 2, np.eye(3), 1
    for flow, weight, fit in zip(flows, weights, fits):
        motions, places = _two_motions(flow, weight, fit)
        if not places:  # the motion that most agreed with before, and the other one as it was beside that
            motions, places = [fit, beside @ fit][::order], last
        else:
            order = -1 if _common(places[::-1], last) > _common(places, last) else 1
            beside = motions[1] @ np.linalg.pinv(fit)
            motions, places = motions[::order], places[::order]
        last = places
        for layer, motion, place in zip(layers, motions, places):
            layer.motions.append(motion)
            layer.places.append(place)
    return [
        layer._replace(motions=aligned(layer.motions, planes[:-1], planes[1:], _alone(layer, other)))
        for layer, other in zip(layers, layers[::-1])
    ]


def _two_motions(flow: Tensor, weight: Tensor, fit: np.ndarray) -> tuple[list[np.ndarray], list[Tensor]]:
    """The motion given, the one that most of the rest agrees with, and where they are seen; twice the first, and no
    places, if there is no rest."""
    size = flow.shape[1:]
    first = affine_flows([fit], size)[0]
    missed = torch.hypot(*(flow - first))
    rest = weight * (missed > (SHARE * torch.hypot(*first)).clamp(min=DIFFERENT))
    looked = (slice(STEP // 2, None, STEP), slice(STEP // 2, None, STEP))
    if float(rest[looked].sum()) <= FEWEST * float(weight[looked].sum()):
        return [fit, fit], []
    other = fit_similarity(flow.permute(1, 2, 0).numpy(), rest.numpy(), STEP)
    second = affine_flows([other], size)[0]
    second_missed = torch.hypot(*(flow - second))
    near = torch.minimum(missed, second_missed) < OWN * torch.hypot(*(first - second))
    return [fit, other], [near & (missed < second_missed), near & (second_missed < missed)]


def _common(one: Sequence[Tensor], other: Sequence[Tensor]) -> int:
    return sum(int((now & before).sum()) for now, before in zip(one, other))


def _covers(front: Layer, behind: Layer, planes: Tensor) -> bool:
    """Whether later pictures show `front` where both motions lead."""
    count = min(MANY, len(front.motions))
    first, last = planes[: len(planes) - count], planes[count:]
    both = _later(front, count) & _later(behind, count)
    in_front, at_back = (float(apart(last, warp(first, _back(layer, count)))[both].sum()) for layer in (front, behind))
    wide = float(torch.stack(behind.places).float().mean()) > WIDE
    return wide and float(both.float().mean()) > CONTESTED and at_back - in_front > COVERS * (at_back + in_front)


def _shown_behind(
    motions: Sequence[np.ndarray], front: Layer, behind: Layer, planes: Tensor, count: int, margin: float
) -> bool:
    """Whether pictures `count` pairs apart show motions where `behind` is seen, beside what `front` comes to cover."""
    count = min(count, len(motions))
    ways = affine_flows(followed(motions, count), planes.shape[2:])
    front_places, places = (torch.stack(layer.places[: len(ways)])[:, None] for layer in (front, behind))
    covered = (_later(front, count) | front_places).float()
    free = 1 - _nearby(covered)
    in_the_open = torch.stack([warp(free, way) > 0.999 for way in (torch.zeros_like(ways), ways, -ways)]).all(0)
    return is_shown(ways, planes, in_the_open & places, margin)


def _alone(layer: Layer, other: Layer) -> Tensor:
    """[N, 1, h, w] bool: where a layer is seen, beside what the other one changes."""
    own, others = (torch.stack(each.places)[:, None] for each in (layer, other))
    return own & (_nearby(others.float()) == 0)


def _nearby(places: Tensor) -> Tensor:
    """[N, 1, h, w] the largest value up to NEARBY away."""
    for window, around in (((2 * NEARBY + 1, 1), (NEARBY, 0)), ((1, 2 * NEARBY + 1), (0, NEARBY))):
        places = F.max_pool2d(places, window, stride=1, padding=around)
    return places


def _later(layer: Layer, count: int) -> Tensor:
    """[N, 1, h, w] bool: where what is seen of a layer is after `count` pairs."""
    places = torch.stack(layer.places[: len(layer.places) - count + 1])[:, None].float()
    return warp(places, _back(layer, count)) > 0.5


def _back(layer: Layer, count: int) -> Tensor:
    """[N, 2, h, w] pixels from each picture that has `count` pairs before it to where things were."""
    motions = [np.linalg.pinv(motion) for motion in followed(layer.motions, count)]
    return affine_flows(motions, tuple(layer.places[0].shape))
