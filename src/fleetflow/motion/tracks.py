"""Points followed through a clip: flows over several gaps are chained, and the most certain chain of each point wins.

From every frame flows lead back over 1, 2, 4, ... frames. A point may arrive by any of them from where it was last seen;
each link costs what its forward and backward flow miss each other by, and a little for being a link. Long gaps drift
less and reach over short occlusions; short ones survive fast change. After Neoral, Serych, Matas, "MFT: Long-Term Tracking
of Every Pixel", WACV 2024, with forward-backward consistency in place of learned uncertainty and occlusion.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral
from typing import NamedTuple

import numpy as np

from fleetflow.io.arrays import as_array
from fleetflow.motion.algebra import sample
from fleetflow.motion.consistency import SHARE, SLACK
from fleetflow.types import FleetflowError, checked_size

Network = Callable[[np.ndarray, np.ndarray], np.ndarray]  # two pictures -> flow [H, W, 2]: a `Predictor`, or your own

GAPS = (1, 2, 4, 8)  # frames
LINK = 0.3  # pixels that a link costs besides its miss; chosen on generated clips, split=validation


class Tracks(NamedTuple):
    """Where points are, frame by frame, in the layout of TAP-Vid."""

    points: np.ndarray  # float32 [N, T, 2] x and y in pixels; (0, 0) is the middle of the first pixel
    visible: np.ndarray  # bool [N, T]
    uncertainty: np.ndarray  # float32 [N, T] pixels: the cost of the chain; infinite where the point is not seen

    @classmethod
    def of(cls, moments: Sequence["Moment"]) -> "Tracks":
        """Returns the tracks through consecutive frames."""
        return cls(*(np.stack(parts, 1) for parts in zip(*moments)))


class Moment(NamedTuple):
    """Where the points are in one frame."""

    points: np.ndarray  # float32 [N, 2]
    visible: np.ndarray  # bool [N]
    uncertainty: np.ndarray  # float32 [N]


def grid(size: tuple[int, int], every: int) -> np.ndarray:
    """Returns points [N, 2] on every `every`-th pixel of a picture of this height and width, evenly about its middle."""
    if not isinstance(every, Integral) or every < 1:
        raise FleetflowError(f"the grid is {every!r}; expected 1 pixel or more between its points")
    axes = [np.arange((side - 1) % every / 2, side, every) for side in checked_size(size)]
    y, x = np.meshgrid(*axes, indexing="ij")
    return np.stack((x, y), -1).reshape(-1, 2).astype(np.float32)


def track(frames: Iterable[np.ndarray], points: np.ndarray, network: Network, gaps: Sequence[int] = GAPS) -> Tracks:
    """Returns where points of a clip are in each of its frames, and where they are seen.

        tracks = fleetflow.motion.track(fleetflow.read_video("clip.mp4"), points, fleetflow.Predictor("fastflownet"))

    Args:
        frames: uint8 [H, W, 3] RGB, such as `fleetflow.read_video` gives; only the last max(gaps) + 1 are kept.
        points: [N, 2] x and y in pixels of frame 0, or [N, 3] number of the frame, x and y there.
        network: from two pictures to the flow [H, W, 2] between them: a `fleetflow.Predictor`, or any function.
        gaps: frames that the flows reach over, increasing from 1. Each costs two flows a frame.

    Returns:
        `Tracks`. Before its own frame a point lies where it is going to begin, not visible. Where it is hidden the
        position is a guess: the flow from the frame before.

    Raises:
        FleetflowError: for other shapes, points outside the picture or the clip, and gaps that do not grow from 1.
    """
    moments = [moment for _, moment in follow(frames, points, network, gaps)]
    if not moments:
        raise FleetflowError("the clip has no frame; give one with two or more")
    return Tracks.of(moments)


def follow(
    frames: Iterable[np.ndarray], points: np.ndarray, network: Network, gaps: Sequence[int] = GAPS
) -> Iterator[tuple[np.ndarray, Moment]]:
    """Yields each frame as soon as it is there, and where the points are in it: arguments and errors as of `track`."""
    if not callable(network):
        raise FleetflowError(
            f"network is a {type(network).__name__}; expected a Predictor, or a function of two pictures"
        )
    whole = isinstance(gaps, Sequence | np.ndarray) and all(isinstance(gap, Integral) for gap in gaps)
    if not whole or tuple(gaps[:1]) != (1,) or list(gaps) != sorted(set(gaps)):
        raise FleetflowError(f"gaps is {gaps!r}; expected frames that increase from 1, such as 1, 2, 4, 8")
    begins = _queries(points)
    number = -1
    window: deque[tuple[np.ndarray, Moment]] = deque(maxlen=max(gaps))  # the last frames, the newest at the end
    for number, frame in enumerate(frames):
        _check_inside(begins, frame)
        if not window:
            moment = Moment(begins[:, 1:].copy(), np.zeros(len(begins), bool), np.full(len(begins), np.inf, np.float32))
        else:
            links = [_link(window[-gap], frame, network) for gap in gaps if gap <= len(window)]
            moment = _best(links)
        late, now = begins[:, 0] > number, begins[:, 0] == number
        at = np.where((late | now)[:, None], begins[:, 1:], moment.points)
        uncertainty = np.where(now, 0, np.where(late, np.inf, moment.uncertainty))
        moment = Moment(at.astype(np.float32), now | (moment.visible & ~late), uncertainty.astype(np.float32))
        window.append((frame, moment))
        yield frame, moment
    if window and (latest := begins[begins[:, 0].argmax()])[0] > number:
        begin, x, y = latest
        raise FleetflowError(
            f"the point {x:g}, {y:g} begins in frame {begin:g}, but the clip has {number + 1}, the first is 0; leave it out"
        )


def _link(start: tuple[np.ndarray, Moment], frame: np.ndarray, network: Network) -> Moment:
    """Where the flow from an earlier frame leads; visible where it led back and the point was seen there."""
    before, was = start
    there, inside = sample(network(before, frame), was.points)
    back, arrived = sample(network(frame, before), was.points + there)
    missed = np.square(there + back).sum(-1)
    allowed = SHARE * (np.square(there).sum(-1) + np.square(back).sum(-1)) + SLACK
    sound = was.visible & inside & arrived & (missed <= allowed)
    cost = np.where(was.visible, was.uncertainty, 0) + np.sqrt(missed) + LINK
    return Moment(was.points + there, sound, cost.astype(np.float32))


def _best(links: Sequence[Moment]) -> Moment:
    """For each point the cheapest link that holds; where none does, a guess from the frame before (the first link)."""
    costs = np.stack([np.where(link.visible, link.uncertainty, np.inf) for link in links])
    best = costs.argmin(0)  # the first where all are infinite
    each = np.arange(len(best))
    points = np.stack([link.points for link in links])[best, each]
    cost = costs[best, each]
    return Moment(points, np.isfinite(cost), cost)


def _queries(points: np.ndarray) -> np.ndarray:
    """Frame, x and y of each point, float32 [N, 3]."""
    expected = "numbers [N, 2], x and y, or [N, 3], frame, x and y"
    points = as_array(points, "points", expected).astype(np.float32)
    if points.ndim != 2 or points.shape[1] not in (2, 3) or not len(points):
        raise FleetflowError(f"points is {list(points.shape)}; expected {expected}")
    if not (finite := np.isfinite(points).all(1)).all():
        values = ", ".join(f"{value:g}" for value in points[finite.argmin()])
        raise FleetflowError(
            f"point {finite.argmin()} is {values}; expected finite numbers: leave it out, or correct it"
        )
    if points.shape[1] == 2:
        return np.pad(points, ((0, 0), (1, 0)))
    wrong = (points[:, 0] < 0) | (points[:, 0] % 1 > 0)
    if wrong.any():
        raise FleetflowError(f"a point begins in frame {points[wrong.argmax(), 0]:g}; expected 0, 1, 2, ...")
    return points


def _check_inside(begins: np.ndarray, frame: np.ndarray) -> None:
    shape = as_array(frame, "the picture", "uint8 [H, W, 3] RGB").shape
    if len(shape) not in (2, 3) or 0 in shape:
        raise FleetflowError(f"the picture is {list(shape)}; expected uint8 [H, W, 3] RGB")
    height, width = shape[:2]
    outside = ((begins[:, 1:] < -0.5) | (begins[:, 1:] > (width - 0.5, height - 0.5))).any(1)
    if outside.any():
        x, y = begins[outside.argmax(), 1:]
        raise FleetflowError(
            f"the point {x:g}, {y:g} is outside the picture of {height}x{width}; give points within it"
        )
