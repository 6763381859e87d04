"""A picture of a video that knows its time."""

import math

import numpy as np


class Frame(np.ndarray):
    """A picture of a video: an ordinary array uint8 [H, W, 3] RGB that knows where it comes from.

    Attributes:
        time: seconds on the clock of the video (see `VideoReader`); not-a-number if the array is of other origin.
        index: its place among all the pictures of the video, from 0; -1 if the array is of other origin.
    """

    time: float = math.nan
    index: int = -1

    def __array_finalize__(self, source: np.ndarray | None) -> None:
        self.time, self.index = getattr(source, "time", math.nan), getattr(source, "index", -1)


def as_frame(picture: np.ndarray, time: float, index: int) -> Frame:
    """Returns the picture as a `Frame`, without copying it."""
    frame = picture.view(Frame)
    frame.time, frame.index = time, index
    return frame
