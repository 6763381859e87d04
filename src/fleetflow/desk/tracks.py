"""Clicked points followed along a finished job, by chaining its flows from pair to pair."""

import numpy as np

from fleetflow.desk.jobs import Job
from fleetflow.motion import sample


def follow(job: Job, points: list[tuple[int, float, float]]) -> list[list[list[float]]]:
    """Returns for each point its [x, y, visible] in every frame of the clip.

    Args:
        job: finished.
        points: (frame, x, y) in pixels; a point is followed from its frame on, before it stands still and is not
            visible. Once it has left the picture or is hidden it moves on with the flow, but is not visible.
    """
    frames = job.done + 1
    tracks = np.zeros((len(points), frames, 3))
    begins = np.array([frame for frame, _, _ in points], dtype=int)
    places = np.array([place for _, *place in points], dtype=np.float32).reshape(-1, 2)
    visible = np.ones(len(points), dtype=bool)
    for k in range(frames):
        tracks[:, k, :2] = places
        tracks[:, k, 2] = visible & (begins <= k)
        if k == job.done or not (begins <= k).any():
            continue
        moved, inside = sample(job.array("flow", k), places)
        seen = inside
        if "occlusion" in job.planes:
            hidden, _ = sample(job.array("occlusion", k)[..., None].astype(np.float32), places)
            seen = inside & (hidden[:, 0] < 128)
        active = begins <= k
        places = np.where(active[:, None], places + np.where(inside[:, None], moved, 0), places).astype(np.float32)
        visible = np.where(active, visible & seen & _within(places, job.size), visible)
    return np.round(tracks, 3).tolist()


def _within(places: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray((places >= 0).all(-1) & (places <= np.array(size[::-1]) - 1).all(-1))
