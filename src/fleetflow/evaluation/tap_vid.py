"""How good tracks are, as TAP-Vid measures it.

Doersch et al., "TAP-Vid: A Benchmark for Tracking Any Point in a Video", NeurIPS 2022.
"""

from typing import NamedTuple

import numpy as np

from fleetflow.types import FleetflowError

THRESHOLDS = (1, 2, 4, 8, 16)  # pixels of a picture of 256x256


class TapVid(NamedTuple):
    """The three scores, 0 to 1."""

    average_jaccard: float  # right positions of visible points among all that are visible or said to be
    position_accuracy: float  # share of the visible points within a threshold, mean over the thresholds
    occlusion_accuracy: float  # share of the points whose visibility is told right


def tap_vid(
    points: np.ndarray,
    visible: np.ndarray,
    true_points: np.ndarray,
    true_visible: np.ndarray,
    *,
    size: tuple[int, int] | None = None,
    queried: np.ndarray | int = 0,
) -> TapVid:
    """Returns the scores of tracks, pooled over all points and all frames behind the one they were asked for in.

    Args:
        points: [N, T, 2] x and y in pixels.
        visible: bool [N, T].
        true_points: the truth, in the same layout.
        true_visible: bool [N, T].
        size: height and width of the frames: positions are scaled to 256x256 first, as TAP-Vid does. None: as they are.
        queried: [N], or one number for all: the frame in which each point was given.

    Raises:
        FleetflowError: for shapes that do not fit together.
    """
    points, truth = np.asarray(points, np.float64), np.asarray(true_points, np.float64)
    if (
        points.shape != truth.shape
        or points.shape != (*np.shape(visible), 2)
        or np.shape(true_visible) != np.shape(visible)
    ):
        raise FleetflowError(
            f"the tracks are {list(points.shape)} and {list(np.shape(visible))}, the truth {list(truth.shape)} and "
            f"{list(np.shape(true_visible))}; expected [N, T, 2] and [N, T] of both"
        )
    scale = np.ones(2) if size is None else np.array([256 / size[1], 256 / size[0]])
    apart = np.linalg.norm((points - truth) * scale, axis=-1)
    asked = np.arange(points.shape[1])[None] > np.broadcast_to(np.reshape(queried, (-1, 1)), (len(points), 1))
    said, seen = np.asarray(visible, bool) & asked, np.asarray(true_visible, bool) & asked
    accuracies, jaccards = [], []
    for threshold in THRESHOLDS:
        near = apart < threshold
        hits = (near & seen & said).sum()
        false = (said & ~(near & seen)).sum()
        accuracies.append((near & seen).sum() / max(seen.sum(), 1))
        jaccards.append(hits / max(seen.sum() + false, 1))
    told = (said == seen)[asked].mean() if asked.any() else 0.0
    return TapVid(float(np.mean(jaccards)), float(np.mean(accuracies)), float(told))
