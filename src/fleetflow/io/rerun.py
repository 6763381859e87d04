"""Recordings for the viewer of Rerun (rerun.io): frames, flow and points on one time line. Needs the extra "rerun"."""

import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from fleetflow.io.atomic import held, temporary_name, writing
from fleetflow.types import FleetflowError
from fleetflow.visualise import flow_to_color

QUALITY = 90  # of the frames, which are JPEG; flow, as colors, occlusion and uncertainty are kept exactly
ARROWS = 32  # pixels from arrow to arrow


class Recording:
    """A .rrd file that `rerun FILE` shows::

        with Recording("clip.rrd") as recording:
            for frame in fleetflow.read_video("clip.mp4"):
                step = stream(frame)
                recording.write(frame, frame.time, flow=step and step.flow)

    The file appears, under its name, when the recording ends without an error.
    """

    def __init__(self, path: str | os.PathLike):
        """Begins a recording.

        Raises:
            FleetflowError: the suffix is not .rrd, or Rerun is not installed.
        """
        self.path, self._frames = Path(os.path.expanduser(path)), 0
        if self.path.suffix.lower() != ".rrd":
            raise FleetflowError(f'{self.path} has the suffix "{self.path.suffix}"; expected .rrd')
        self._library = _library()
        self._temporary, self._held = temporary_name(self.path), ExitStack()
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(held(self._temporary))
            self._stream = self._library.RecordingStream("fleetflow")  # pyright: ignore[reportAttributeAccessIssue]
            self._stream.save(str(self._temporary))

    def write(
        self,
        frame: np.ndarray,
        time: float = math.nan,
        *,
        flow: np.ndarray | None = None,
        occlusion: np.ndarray | None = None,
        uncertainty: np.ndarray | None = None,
        points: np.ndarray | None = None,
        visible: np.ndarray | None = None,
    ) -> None:
        """Adds a frame and what is known of it, to the time lines "frame" (from 0) and "time" (seconds).

        Args:
            frame: uint8 [H, W, 3] RGB.
            time: seconds; not a number: it has none.
            flow: [H, W, 2] pixels, shown as colors and as arrows. A stream's flow starts at the frame before.
            occlusion: [H, W] from 0 to 1.
            uncertainty: [H, W] pixels.
            points: [N, 2] x and y in pixels, the middle of the first pixel is (0, 0).
            visible: bool [N] which of them are shown; None: all.
        """
        rr, log = self._library, self._stream.log
        self._stream.set_time("frame", sequence=self._frames)
        if math.isfinite(time):
            self._stream.set_time("time", duration=float(time))
        self._frames += 1
        log("frame", rr.Image(np.asarray(frame)).compress(jpeg_quality=QUALITY))
        if flow is not None:
            rows, columns = (np.arange(ARROWS // 2, side, ARROWS) for side in flow.shape[:2])
            x, y = (part.ravel() for part in np.meshgrid(columns, rows))
            log("flow", rr.Image(flow_to_color(flow)))
            log("frame/arrows", rr.Arrows2D(origins=np.stack((x, y), 1) + 0.5, vectors=flow[y, x]))
        if occlusion is not None:
            log("occlusion", rr.Image(np.asarray(occlusion, np.float32), color_model="L"))
        if uncertainty is not None:
            log("uncertainty", rr.Tensor(np.asarray(uncertainty, np.float32), dim_names=("y", "x")))
        if points is not None:
            shown = np.ones(len(points), bool) if visible is None else np.asarray(visible, bool)
            log("frame/points", rr.Points2D(points[shown] + 0.5, keypoint_ids=np.flatnonzero(shown)))

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, kind: Any, *_) -> None:
        self._stream.flush()
        self._stream.disconnect()
        with writing(self.path), self._held:
            if kind is None:
                os.replace(self._temporary, self.path)
            else:
                self._temporary.unlink(missing_ok=True)


def _library():
    try:
        import rerun
    except ImportError as error:
        raise FleetflowError('.rrd files need Rerun, which is missing; run: pip install "fleetflow[rerun]"') from error
    return rerun
