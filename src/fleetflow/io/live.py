"""Cameras and network streams: pictures that arrive while they are read."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError

from fleetflow.io.atomic import reason
from fleetflow.io.display import displayed
from fleetflow.io.frame import Frame, as_frame
from fleetflow.io.limits import check_size
from fleetflow.types import FleetflowError

_CAMERAS = {"linux": ("video4linux2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}
_GRACE = 2 * 10.0  # seconds in which a thread that reads must have ended after it was told to
_PATIENCE = 10.0  # seconds without a picture after which a stream has ended
_KEPT = 16  # pictures that a decoder keeps back until it knows that no more come
_SILENCE = 2.0  # seconds without a picture before an end that tell a sender which was lost from one which has finished


class LiveReader:
    """Iterates once over the pictures of a camera or stream, each a `Frame`; its time is 0 for the first one.

    Where the clock of the source jumps back, as that of a sender which begins its film again, times go on evenly.

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
        try:
            self._container = _opened(source)
        except FFmpegError as error:
            raise FleetflowError(f"{self.name} cannot be opened ({reason(error)}); check that it is there") from error
        streams = self._container.streams.video
        if not streams or not streams[0].height:
            self.close()
            raise FleetflowError(
                f"{self.name} sends no picture that can be decoded; check what it sends, and try again"
            )
        self.fps = Fraction(streams[0].average_rate or streams[0].guessed_rate or 25)
        self.height, self.width = streams[0].height, streams[0].width
        check_size(self.name, self.height, self.width)

    def __iter__(self) -> Iterator[Frame]:
        step = 1 / float(self.fps)
        origin, at = None, -step
        long = max(_SILENCE, 3 * step)
        silence, since = 0.0, 0  # the last one that was long, and the pictures since
        asked = time.monotonic()
        try:
            for index, frame in enumerate(self._container.decode(video=0)):
                waited = time.monotonic() - asked
                silence, since = (waited, 0) if waited > long and index else (silence, since + 1)
                seconds = index * step if frame.time is None else frame.time
                if origin is None or seconds - origin <= at:
                    origin = seconds - (at + step)
                at = seconds - origin
                yield as_frame(displayed(frame), at, index)
                asked = time.monotonic()
            waited = time.monotonic() - asked
            if waited > long or silence and since < _KEPT:
                wait = max(waited, silence)
                self.problem = f"{self.name} sent no picture for {wait:.0f} s, and then ended; its sender may be gone"
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


class Newest:
    """Iterates over the pictures of a live source, always the newest one, as (picture, how many came and went before it).

    A thread of its own reads the source, so that pictures do not queue up while the last one is worked on. A context
    manager; `close` ends the iteration from any thread, and closes the source if it can be closed.

    Args:
        source: an iterable of pictures, such as a `LiveReader`.
    """

    def __init__(self, source: Iterable[np.ndarray]):
        self._source, self._changed = source, threading.Condition()
        self._picture: np.ndarray | None = None
        self._dropped, self._ended, self._error = 0, False, None
        self._thread = threading.Thread(target=self._read, name="fleetflow live", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        error = None
        try:
            for picture in self._source:
                with self._changed:
                    if self._ended:
                        return
                    self._dropped += self._picture is not None
                    self._picture = picture
                    self._changed.notify_all()
        except BaseException as caught:  # is raised where the pictures are taken
            error = caught
        finally:
            close = getattr(self._source, "close", None)
            if close:
                with suppress(Exception):
                    close()
            with self._changed:
                self._error, self._ended = error, True
                self._changed.notify_all()

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._picture is not None)
                picture, dropped, error = self._picture, self._dropped, self._error
                self._picture, self._dropped = None, 0
            if picture is None:
                if error is not None:
                    raise error
                return
            yield picture, dropped

    def close(self) -> None:
        """Ends the iteration, at once; the source is closed by the thread that reads it, after its next picture."""
        with self._changed:
            self._ended, self._picture = True, None
            self._changed.notify_all()

    def __enter__(self) -> "Newest":
        return self

    def __exit__(self, *_) -> None:
        self.close()
        self._thread.join(_GRACE)


def _opened(source: int | str) -> InputContainer:
    if isinstance(source, str):
        return av.open(source, timeout=_PATIENCE)
    if sys.platform not in _CAMERAS:
        raise FleetflowError(f"cameras are not known on {sys.platform}; give the address of a stream")
    kind, place = _CAMERAS[sys.platform]
    return av.open(place.format(source), format=kind)
