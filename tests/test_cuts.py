"""Cuts: other shots are found; pans, changes of exposure, noise and plain frames are none."""

import math

import numpy as np
import pytest
from PIL import Image

from fleetflow import FleetflowError
from fleetflow.motion.cuts import START, find_cuts, is_cut, look


def place(number: int, height: int = 90, width: int = 480) -> np.ndarray:
    """A wide picture of colored blobs."""
    generator = np.random.default_rng(number)
    small = generator.uniform(0, 255, (6, 30, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def pan(number: int, count: int, step: int, light: float = 1.0) -> list[np.ndarray]:
    wide, generator = place(number), np.random.default_rng(9)
    frames = []
    for k in range(count):
        frame = wide[:, k * step : k * step + 160] * light ** (k / 4) + generator.normal(0, 4, (90, 160, 3))
        frames.append(np.clip(frame, 0, 255).astype(np.uint8))
    return frames


def test_shots_are_told_apart():
    shots = [pan(1, 6, 2), pan(2, 9, 15), pan(3, 5, 0, light=0.8), pan(4, 12, 8)]
    frames = [frame for shot in shots for frame in shot]
    assert find_cuts(frames) == [6, 15, 20]
    assert find_cuts(iter(frames[:6])) == [] and find_cuts([]) == [] and find_cuts(frames[:1]) == []
    large = [np.asarray(Image.fromarray(frame).resize((640, 360))) for frame in frames]
    assert find_cuts(large) == [6, 15, 20], "whatever the size"


def test_one_shot_has_no_cut():
    noise = np.random.default_rng(2)
    dark = [np.clip(noise.normal(12, 5, (60, 80, 3)), 0, 255).astype(np.uint8) for _ in range(8)]
    flat = [np.full((4, 5, 3), 200, np.uint8)] * 3
    for frames in (pan(5, 14, 22), pan(6, 10, 1, light=0.6), pan(6, 10, 1, light=1.4), dark, flat):
        assert find_cuts(frames) == []


def test_what_swings_or_loops_comes_back():
    """Ten frames a second of a view that swings over half its width, or jumps back to where it began."""
    wide, noise = place(7, width=960), np.random.default_rng(3)

    def filmed(at: list[int]) -> list[np.ndarray]:
        views = [wide[:, 400 + x : 560 + x] + noise.normal(0, 3, (90, 160, 3)) for x in at]
        return [np.clip(view, 0, 255).astype(np.uint8) for view in views]

    swing = filmed([round(40 * math.sin(2 * math.pi * k / 6)) for k in range(40)])
    loop = filmed([16 * (k % 8) for k in range(40)])
    assert find_cuts(swing) == [] and find_cuts(loop) == []
    assert find_cuts([*swing, *pan(2, 6, 2), *swing, *loop, *pan(3, 6, 2)]) == [40, 46, 126]
    there_and_back = [*pan(1, 6, 2), *pan(2, 6, 2), *pan(1, 6, 2)]
    assert find_cuts(there_and_back) == [6, 12], "another shot in between"


@pytest.mark.parametrize("count", [2, 3])
def test_shots_of_a_few_frames(count):
    """The pair of a cut says nothing of what is usual in the shot that begins with it."""
    frames = [frame for number in range(10) for frame in pan(number, count, 8)]
    assert find_cuts(frames) == list(range(count, 10 * count, count))


def test_the_state_is_all_it_knows():
    frames = [*pan(1, 4, 2), *pan(2, 4, 2)]
    state = START
    for frame in frames[:4]:
        cut, state = is_cut(frame, state)
        assert not cut
    assert is_cut(frames[4], state)[0] and is_cut(frames[4], state)[0], "nothing is changed by asking"
    assert not is_cut(frames[3], state)[0]
    assert state.last.pixels.nbytes < 8000 and len(state.recent) == 3 and len(state.shot) == 3
    for frame in 20 * frames[:4]:
        state = is_cut(frame, state)[1]
    assert len(state.shot) == 24, "it does not grow"
    with pytest.raises(FleetflowError, match="uint8"):
        look(frames[0] / 255)
