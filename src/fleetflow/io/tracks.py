"""Files of tracked points: read as what is to be followed, written in the layout of TAP-Vid."""

import os
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from fleetflow.io.arrays import read_npy
from fleetflow.io.atomic import existing, reading, write_atomically
from fleetflow.types import FleetflowError

SUFFIXES = (".npz", ".csv")
LARGEST = 2**26  # bytes of a .csv file of points


def read_points(path: str | os.PathLike) -> np.ndarray:
    """Returns the points in a file: [N, 2] x and y, or [N, 3] frame, x and y.

    Args:
        path: a .npy array, or text with a line for each point, numbers separated by commas or blanks; a first line of
            names, and lines that begin with #, are left out.

    Raises:
        FleetflowError: if the file is missing or holds anything else.
    """
    path = existing(path)
    with reading(path, "points"):
        if path.suffix.lower() == ".npy":
            points = read_npy(path)
        else:
            if path.stat().st_size > LARGEST:
                raise FleetflowError(f"{path} has over {LARGEST >> 20} MB; expected a line for each point")
            text = path.read_text("utf-8-sig").replace(",", " ").replace(";", " ")
            lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
            if lines and not any(_is_number(word) for word in lines[0].split()):
                lines = lines[1:]
            points = np.loadtxt(lines, ndmin=2) if lines else np.empty((0, 2))
    if points.ndim != 2 or points.shape[1] not in (2, 3) or not len(points):
        raise FleetflowError(f"{path} holds {list(points.shape)}; expected lines of x y, or of frame x y")
    return points


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def write_tracks(
    path: str | os.PathLike, points: np.ndarray, visible: np.ndarray, uncertainty: np.ndarray | None = None
) -> None:
    """Writes tracks as .npz (`tracks`, `occluded`, `uncertainty`) or .csv (point, frame, x, y, occluded, uncertainty).

    Args:
        path: the file, which ends in .npz or .csv.
        points: [N, T, 2] x and y in pixels.
        visible: bool [N, T].
        uncertainty: [N, T] pixels, infinite where the point is hidden.

    Raises:
        FleetflowError: for another suffix, shapes that do not fit, or a file that cannot be written.
    """
    path = Path(os.path.expanduser(path))
    points, occluded = np.asarray(points, np.float32), ~np.asarray(visible, bool)
    if path.suffix.lower() not in SUFFIXES:
        raise FleetflowError(f'{path} has the suffix "{path.suffix}"; expected {" or ".join(SUFFIXES)}')
    if points.shape != (*occluded.shape, 2) or occluded.ndim != 2:
        raise FleetflowError(
            f"the tracks are {list(points.shape)} and {list(occluded.shape)}; expected [N, T, 2], [N, T]"
        )
    extra: dict[str, Any] = {} if uncertainty is None else {"uncertainty": np.asarray(uncertainty, np.float32)}
    if path.suffix.lower() == ".npz":
        write_atomically(
            path, lambda temporary: np.savez_compressed(temporary, tracks=points, occluded=occluded, **extra)
        )
        return
    number, frame = np.indices(occluded.shape)
    columns = [number, frame, points[..., 0], points[..., 1], occluded, *extra.values()]
    kinds = ["%d", "%d", "%.3f", "%.3f", "%d", "%.3f"][: len(columns)]
    names = "point,frame,x,y,occluded" + ",uncertainty" * bool(extra)
    text = StringIO()
    np.savetxt(text, np.stack([column.ravel() for column in columns], 1), kinds, ",", header=names, comments="")
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue()))
