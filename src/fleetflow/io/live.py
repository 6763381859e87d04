"""Cameras and network streams: pictures that arrive while they are read."""

import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer
from av.error import FFmpegError

from fleetflow.io.atomic import reading, reason
from fleetflow.io.display import displayed
from fleetflow.io.frame import Frame, as_frame
from fleetflow.io.limits import check_size
from fleetflow.types import FleetflowError

_CAMERAS = {"linux": ("video4linux2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}
_PATIENCE = 10.0  # seconds without a picture after which a stream has ended


class LiveReader:
    """Iterates once over the pictures of a camera or stream, each a `Frame`; its time is 0 for the first one.

    Attributes:
        fps: Fraction, the rate that the source announces.
        height: pixels.
        width: pixels.
        problem: None, or one line on why the stream ended.

    Args:
        source: the index of a camera, or an address such as "rtsp://..." or "tcp://...".

    Raises:
        FleetflowError: there is no such camera or stream.
    """

    def __init__(self, source: int | str):
        self.name, self.problem = f"camera {source}" if isinstance(source, int) else source, None
        with reading(Path(self.name), "a live video"):
            self._container = _opened(source)
            stream = self._container.streams.video[0]
            self.fps = Fraction(stream.average_rate or stream.guessed_rate or 25)
            self.height, self.width = stream.height, stream.width
            check_size(Path(self.name), self.height, self.width)

    def __iter__(self) -> Iterator[Frame]:
        first = None
        try:
            for index, frame in enumerate(self._container.decode(video=0)):
                seconds = index / float(self.fps) if frame.time is None else frame.time
                first = seconds if first is None else first
                yield as_frame(displayed(frame), seconds - first, index)
        except FFmpegError as error:
            self.problem = f"{self.name} ended ({reason(error)})"
        finally:
            self.close()

    def close(self) -> None:
        """Lets go of the camera or the connection."""
        self._container.close()

    def __enter__(self) -> "LiveReader":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _opened(source: int | str) -> InputContainer:
    if isinstance(source, str):
        return av.open(source, timeout=_PATIENCE)
    if sys.platform not in _CAMERAS:
        raise FleetflowError(f"cameras are not known on {sys.platform}; give the address of a stream")
    kind, place = _CAMERAS[sys.platform]
    return av.open(place.format(source), format=kind)
