"""Cuts: other shots are found; pans, changes of exposure, noise and plain frames are none."""

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


def test_the_state_is_all_it_knows():
    frames = [*pan(1, 4, 2), *pan(2, 4, 2)]
    state = START
    for frame in frames[:4]:
        cut, state = is_cut(frame, state)
        assert not cut
    assert is_cut(frames[4], state)[0] and is_cut(frames[4], state)[0], "nothing is changed by asking"
    assert not is_cut(frames[3], state)[0]
    assert state.last.pixels.nbytes < 8000 and len(state.recent) == 3
    with pytest.raises(FleetflowError, match="uint8"):
        look(frames[0] / 255)
