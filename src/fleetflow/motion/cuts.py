"""Cuts: where a clip goes on with another shot. Told from two small pictures and what was usual just before."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fleetflow.io.images import checked_picture
from fleetflow.types import FleetflowError

ROWS, COLUMNS = 18, 32  # of the small picture in which places are compared
REACH = 5  # of its pixels (a sixth of the width) that things may move between two frames
BINS = 16  # of the histograms of brightness and both color differences
# Log-odds of a cut: logistic regression on edits of generated clips, split=validation (benchmarks/motion_score.py)
UNMATCHED, RECOLORED, SURGE, CONSTANT = 5.0, 3.1, 7.6, 12.0
USUAL = 3  # pairs that show what is usual in the shot: a cut stands out from them
KEPT = 24  # frames of the shot that a swing or a loop may return to: two seconds at 12 a second


class Look(NamedTuple):
    """What is kept of a frame: little, whatever its size."""

    pixels: np.ndarray  # float32 [ROWS, COLUMNS, 3], each channel with mean 0 and deviation 1
    colors: np.ndarray  # [3, BINS] histograms that sum to 1


class CutState(NamedTuple):
    """What `is_cut` carries from frame to frame."""

    last: Look | None = None
    recent: tuple[float, ...] = ()  # of the last pairs, how much found no match
    shot: tuple[Look, ...] = ()  # frames of the shot before the last one


START = CutState()


def is_cut(frame: np.ndarray, state: CutState = START) -> tuple[bool, CutState]:
    """Returns whether a new shot begins with this frame, and the state for the next one.

    It does where places find no match nearby, more so than in the pairs before, and the colors change: a fast pan or a
    change of exposure is no cut. Nor is a frame that is as like an earlier one of its shot as neighbors are: what
    swings or loops comes back. A dissolve is not found::

        state = START
        for frame in clip:
            cut, state = is_cut(frame, state)

    Args:
        frame: uint8 [H, W, 3] RGB.
        state: what the call for the frame before returned; START for the first frame, which begins no new shot.
    """
    if not isinstance(state, CutState):
        raise FleetflowError(f"state is a {type(state).__name__}; expected what the call before returned, or START")
    now = look(frame)
    if state.last is None:
        return False, CutState(now)
    unmatched, recolored = differences(state.last, now)
    surge = np.log(unmatched / max(state.recent)) if state.recent else 0.0
    odds = UNMATCHED * np.log(unmatched) + RECOLORED * np.log(recolored) + SURGE * surge + CONSTANT
    cut = bool(odds > 0) and not _returns(now, state)
    shot = () if cut else (*state.shot, state.last)[-KEPT:]
    return cut, CutState(now, (*state.recent, unmatched)[-USUAL:], shot)


def _returns(now: Look, state: CutState) -> bool:
    """Whether a frame is as like an earlier one of its shot as the last neighbors in it were like each other."""
    usual = max(state.recent[-len(state.shot) :], default=0.0)  # not the pair of the cut with which the shot began
    return any(differences(earlier, now)[0] <= usual for earlier in reversed(state.shot))


def find_cuts(frames: Iterable[np.ndarray]) -> list[int]:
    """Returns the numbers of the frames, from 1, with which a new shot begins. Frames are uint8 [H, W, 3] RGB."""
    state, found = START, []
    for number, frame in enumerate(frames):
        cut, state = is_cut(frame, state)
        if cut:
            found.append(number)
    return found


def look(frame: np.ndarray) -> Look:
    """Returns what is kept of a frame uint8 [H, W, 3] RGB."""
    small = _reduced(checked_picture(frame), 2 * ROWS, 2 * COLUMNS)
    pixels = small.reshape(ROWS, 2, COLUMNS, 2, 3).mean((1, 3))
    pixels = (pixels - pixels.mean((0, 1))) / (
        pixels.std((0, 1)) + 4
    )  # 4 of 255 is what noise makes of a plain picture
    bright = small @ np.array((0.299, 0.587, 0.114), np.float32)
    blue, red = 0.564 * (small[..., 2] - bright), 0.713 * (small[..., 0] - bright)  # ITU-R BT.601
    colors = [_histogram(bright / 256), _histogram(blue / 128 + 0.5), _histogram(red / 128 + 0.5)]
    return Look(pixels, np.stack(colors))


def differences(before: Look, after: Look) -> tuple[float, float]:
    """Returns how much of a frame finds no match in the one before (deviations of its pixels), and the share recolored.

    Neither goes under 0.01.
    """
    recolored = 1 - float(np.minimum(before.colors, after.colors).sum(1).mean())
    return max(_unmatched(before.pixels, after.pixels), 0.01), max(recolored, 0.01)


def _unmatched(before: np.ndarray, after: np.ndarray) -> float:
    """The mean difference of each 3x3 pixels from the likest ones within REACH."""
    reach = ((REACH, REACH), (REACH, REACH))
    wide = np.pad(before, (*reach, (0, 0)), mode="edge")
    moved = np.lib.stride_tricks.sliding_window_view(wide, (2 * REACH + 1, 2 * REACH + 1), (0, 1))
    apart = np.abs(moved - after[..., None, None]).mean(2)  # [ROWS, COLUMNS, shifts down, shifts to the right]
    sides = np.pad(apart, ((1, 1), (1, 1), (0, 0), (0, 0)), mode="edge")
    rows = sides[:-2] + sides[1:-1] + sides[2:]
    blocks = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    return float(blocks.min((2, 3)).mean()) / 9


def _reduced(frame: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The frame as float32 [rows, columns, 3]: means of up to some 4x4 of its pixels, evenly taken."""
    taken = []
    for size, cells in zip(frame.shape[:2], (rows, columns)):
        each = min(max(size // cells, 1), 4)
        taken.append(((np.arange(cells * each) + 0.5) * size / (cells * each)).astype(int))
    picked = frame[taken[0]][:, taken[1]].astype(np.float32)
    return picked.reshape(rows, len(taken[0]) // rows, columns, len(taken[1]) // columns, 3).mean((1, 3))


def _histogram(values: np.ndarray) -> np.ndarray:
    """The shares [BINS] of values in 0..1, each shared by the two bins nearest to it."""
    place = np.clip(values.ravel() * BINS - 0.5, 0, BINS - 1.001)
    low = place.astype(int)
    share = place - low
    bins = np.bincount(low, 1 - share, BINS) + np.bincount(low + 1, share, BINS)
    return bins / len(place)
