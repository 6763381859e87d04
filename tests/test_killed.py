"""Runs that are killed before and after every rename: the next run finishes, and leaves nothing but its results."""

import os
from functools import partial

import numpy as np
import pytest
import torch
from conftest import kill_points, killed_at
from test_predict import Brightness, video_of

from fleetflow.cli.main import main
from fleetflow.export import write as exporting
from fleetflow.export.graph import Sizes
from fleetflow.inference import files as job
from fleetflow.inference.predictor import Predictor
from fleetflow.io.flow import read_flow
from fleetflow.io.images import write_image
from fleetflow.io.note import NAME
from fleetflow.io.video import VideoReader
from fleetflow.models import weights
from fleetflow.models.base import FlowModel
from fleetflow.registry import models
from fleetflow.training import adapt
from fleetflow.types import Prediction

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Mini(FlowModel):
    """Two layers that learn, and can be saved."""

    stride, fit = 1, "pad"

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.Conv2d(4, 2, 1, bias=False))

    def prepare(self, frame1, frame2):
        return frame1, frame2

    def estimate(self, frame1, frame2, previous, iterations):
        return Prediction(self.layers(frame2 - frame1))


@pytest.fixture
def mini(tmp_path, monkeypatch):
    """A checkpoint of a small network."""
    monkeypatch.setitem(models._functions, "mini", Mini)
    torch.save(Mini().state_dict(), tmp_path / "mini.pth")
    return tmp_path / "mini.pth"


def kill_everywhere(run, check, folder, monkeypatch) -> int:
    """Kills `run(output)` at every rename, runs it again, and lets `check(output)` look at what is there then.

    Returns the number of renames.
    """
    made, real = [], os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: (made.append(paths), real(*paths)))
        run(folder / "whole")
        check(folder / "whole")
    for number, when in kill_points(len(made)):
        output = folder / f"{number}-{when}"
        assert killed_at(number, when, partial(run, output))
        run(output)
        check(output)
    return len(made)


@pytest.mark.parametrize("kind,renames", [("folder", 5), ("pair", 3)])
def test_predict(kind, renames, tmp_path, monkeypatch):
    predictor = Predictor(Brightness(), device="cpu", precision="fp32")
    for k in range(3):
        write_image(tmp_path / "frames" / f"f{k}.png", np.full((20, 30, 3), 20 * k + 10, np.uint8))
    pair = tmp_path / "frames" / "f0.png", tmp_path / "frames" / "f1.png"
    written = []

    def run(output):
        source = (tmp_path / "frames",) if kind == "folder" else pair
        predict = job.predict_folder if kind == "folder" else job.predict_pair
        written[:] = predict(predictor, *source, output, ["flo", "color"])

    def check(output):
        assert {path.name for path in output.iterdir()} == {path.name for path in written} | {NAME}
        assert all(read_flow(path)[0].any() for path in written if path.suffix == ".flo")

    assert kill_everywhere(run, check, tmp_path / "out", monkeypatch) == renames


def test_predict_video(tmp_path, monkeypatch):
    """Two parts and their numbered files, the note, and the film of both parts."""
    monkeypatch.setattr(job, "PART_FRAMES", 2)
    predictor = Predictor(Brightness(), device="cpu", precision="fp32")
    clip, written = video_of(tmp_path / "clip.mp4", 4), []

    def run(output):
        written[:], problem = job.predict_video(predictor, clip, output, ["color", "npy"], scale=40)
        assert problem is None

    def check(output):
        assert {path.name for path in output.iterdir()} == {path.name for path in written} | {NAME}
        assert len(list(VideoReader(written[0]))) == 3 and all(read_flow(path)[0].any() for path in written[1:])

    assert kill_everywhere(run, check, tmp_path / "out", monkeypatch) == 8


def test_adapt(mini, tmp_path, monkeypatch):
    """The checkpoint and the weights of the start, then of a step."""
    whole = {}
    noise = np.random.default_rng(0).integers(0, 256, (6, 16, 24, 3), dtype=np.uint8)
    pairs = list(zip(noise, noise[1:]))

    def run(output):
        options = {"steps": 1, "batch": 1, "size": (16, 24), "measure_every": 1, "device": "cpu", "precision": "fp32"}
        adapt.adapt(pairs, output / "new.safetensors", start=f"mini:{mini}", report=lambda line: None, **options)

    def check(output):
        assert [path.name for path in output.iterdir()] == ["new.safetensors"]
        found = weights.read_state(output / "new.safetensors")
        assert all(torch.equal(value, whole.setdefault(key, value)) for key, value in found.items())

    assert kill_everywhere(run, check, tmp_path / "out", monkeypatch) >= 3


def test_convert(mini, tmp_path, monkeypatch):
    def run(output):
        output.mkdir(parents=True, exist_ok=True)
        assert main(["convert", str(mini), "mini", str(output / "new.safetensors")]) == 0

    def check(output):
        assert [path.name for path in output.iterdir()] == ["new.safetensors"]

    assert kill_everywhere(run, check, tmp_path / "out", monkeypatch) == 1


@pytest.mark.parametrize("parts", [False, True])
def test_export(parts, tmp_path, monkeypatch):
    """What is written into the files takes seconds and is left out here; the way they get there is not."""
    names = ("decode.onnx", "encode.onnx", "parity.json") if parts else ("new.onnx", "new.parity.json")

    def put(model, file, *_):
        place = file if parts else file.parent
        place.mkdir(exist_ok=True)
        for name in names:
            (place / name).write_text("new")
        return []

    monkeypatch.setattr(exporting, "_write_parts" if parts else "_write", put)

    def run(output):
        output.mkdir(parents=True, exist_ok=True)
        about = {"network": "mini", "license": "none", "target": "onnx", "sizes": Sizes(128, 128, 1)}
        exporting.export(Mini(), output / ("new" if parts else "new.onnx"), **about, parts=parts)

    def check(output):
        place = output / "new" if parts else output
        assert sorted(path.name for path in place.iterdir()) == list(names)
        assert len(list(output.iterdir())) == (1 if parts else 2)
        assert all((place / name).read_text() == "new" for name in names)

    assert kill_everywhere(run, check, tmp_path / "out", monkeypatch) == len(names)
