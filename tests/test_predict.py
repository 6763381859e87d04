"""Predict: the Predictor, and the jobs on pairs, folders and videos, whole, interrupted and damaged."""

import hashlib
import json
import shutil
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from fleetflow.cli.main import main
from fleetflow.data.datasets.pairs import pairs
from fleetflow.inference import color_scale, memory
from fleetflow.inference import files as job
from fleetflow.inference.pairing import described, scenes
from fleetflow.inference.predictor import Predictor
from fleetflow.inference.results import BOTH_WAYS
from fleetflow.inference.stream import Stream
from fleetflow.io.atomic import LOCK, lock_folder
from fleetflow.io.exr import read_stmap, read_vectors
from fleetflow.io.flow import read_flow, write_flow
from fleetflow.io.images import list_frames, read_image, write_image
from fleetflow.io.note import NAME
from fleetflow.io.video import VideoReader, VideoWriter
from fleetflow.models.base import FlowModel
from fleetflow.models.fastflownet import FastFlowNet
from fleetflow.registry import models
from fleetflow.types import FleetflowError, Prediction
from fleetflow.visualise import flow_to_color


class Brightness(FlowModel):
    """A flow one can foresee: u is the mean of frame1 times 100, v that of frame2. Counts its calls."""

    stride = 1
    fit = "pad"
    calls = 0

    def __init__(self, gain=100.0):
        super().__init__()
        self.register_buffer("gain", torch.tensor(gain))

    def forward(self, frame1, frame2, previous=None, iterations=None):
        return self.estimate(frame1, frame2, previous, iterations)  # frames of one color move here, too

    def prepare(self, frame1, frame2):
        return frame1, frame2

    def estimate(self, frame1, frame2, previous, iterations):
        self.calls += 1
        means = torch.stack((frame1.mean((1, 2, 3)), frame2.mean((1, 2, 3))), 1) * self.gain
        return Prediction(means[:, :, None, None].expand(-1, -1, *frame1.shape[-2:]))


@pytest.fixture
def predictor():
    return Predictor(Brightness(), device="cpu", precision="fp32")


@pytest.fixture
def folder(tmp_path):
    for k in range(1, 12, 2):
        write_image(tmp_path / "frames" / f"f{k}.png", np.full((20, 30, 3), 10 * k, np.uint8))
    return tmp_path / "frames"


def video_of(path, frames, size=(32, 48)):
    with VideoWriter(path, 10) as writer:
        for k in range(frames):
            writer.write(np.full((*size, 3), (20 + 8 * k) % 250, np.uint8))
    return path


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 1, 3), (70, 33, 3), (64, 64), (64, 64, 1), (40, 50, 4)])
def test_predictor_takes_pictures_of_any_size_and_kind(shape):
    torch.manual_seed(0)
    predictor = Predictor(FastFlowNet(), device="cpu")
    images = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
    flow = predictor(*images)
    assert flow.shape == (*shape[:2], 2) and flow.dtype == np.float32 and np.isfinite(flow).all()


def test_predictor_refuses():
    predictor = Predictor(Brightness(), device="cpu")
    good = np.zeros((8, 9, 3), np.uint8)
    for image1, image2, words in (
        (good, good[:, :8], "same size"),
        (good.astype(np.float32), good, "uint8"),
        (good[..., :2], good, "RGB"),
    ):
        with pytest.raises(FleetflowError, match=words):
            predictor(image1, image2)
    for device in ("cuda:99", "hpu", "meta"):
        with pytest.raises(FleetflowError, match="cannot be used"):
            Predictor(Brightness(), device=device)
    with pytest.raises(FleetflowError, match="precision"):
        Predictor(Brightness(), device="cpu", precision="fp64")


def test_frames_made_of_bytes_are_not_looked_at_again(monkeypatch):
    """Their values are in [0, 1] unless somebody has written into them, and two looks at each cost time."""
    predictor = Predictor(FastFlowNet(), device="cpu")
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    frame, other = predictor.frame(picture), predictor.frame(picture)
    copied = frame.clone()
    monkeypatch.setattr("fleetflow.models.base.HIGHEST", -1.0)  # every look finds the values too high
    predictor.predict_frames(frame, other)
    with pytest.raises(FleetflowError, match=r"expected values in \[0, 1\]"):
        predictor.predict_frames(frame, copied)
    other[0, 0, 3, 4] = float("nan")
    with pytest.raises(FleetflowError, match="frame2 has values that are not finite"):
        predictor.predict_frames(frame, other)


def test_a_label_tells_results_apart():
    def label(model, precision="fp32"):
        label = Predictor(model, device="cpu", precision=precision).label()
        assert all(isinstance(value, str) for value in label.values())
        return label

    torch.manual_seed(0)
    model, other = FastFlowNet(), FastFlowNet()
    own = label(model)
    assert own == label(model) and own["network"] == "FastFlowNet" and own["device"] == "cpu"
    assert label(model, "bf16") == {**own, "dtype": "bfloat16"}, "the weights are those before they are converted"
    assert label(other)["sha256"] != own["sha256"]
    assert label(models["raft_small"](iterations=3))["iterations"] == "3"


@pytest.mark.parametrize("iterations", [0, -1])
def test_a_network_made_with_no_steps_says_so(iterations):
    frame = torch.rand(1, 3, 64, 64)
    with pytest.raises(FleetflowError, match=f"iterations is {iterations}; it must be a whole number, at least 1"):
        models["raft_small"](iterations=iterations).eval()(frame, frame)


def test_bf16_stays_near_fp32(pair):
    torch.manual_seed(0)
    model = FastFlowNet()
    flows = [Predictor(model, device="cpu", precision=kind)(*pair) for kind in ("fp32", "bf16")]
    assert 0 < np.abs(flows[0] - flows[1]).mean() < 0.1


def test_pair_into_a_folder_in_every_format(predictor, tmp_path):
    for k in (1, 2):
        write_image(tmp_path / f"{k}.png", np.full((100, 120, 3), 51 * k, np.uint8))
    output = tmp_path / "out"
    written = job.predict_pair(
        predictor,
        tmp_path / "1.png",
        tmp_path / "2.png",
        output,
        [kind for kind in job.FORMATS if kind not in BOTH_WAYS],
    )
    assert sorted(path.name for path in output.glob("[!.]*")) == sorted(path.name for path in written)
    for kind in ("flo", "kitti", "npy", "npz", "pfm", "flo5"):
        flow, valid = read_flow(output / job.FORMATS[kind].format("1"))
        assert valid.all() and np.abs(flow - (20, 40)).max() < 0.01, kind
    assert read_image(output / "1_color.png").shape == (100, 120, 3)
    assert read_image(output / "1_side.png").shape[1] > 240
    assert read_image(output / "1_arrows.png").shape == read_image(output / "1_streamlines.png").shape == (100, 120, 3)
    for flow in (read_vectors(output / "1.exr").forward, read_stmap(output / "1_stmap.exr")):
        assert np.abs(flow - (20, 40)).max() < 0.01


class Sideways(Brightness):
    """Moves by 3 px to the right, in both directions, which agree nowhere."""

    forward = FlowModel.forward

    def estimate(self, frame1, frame2, previous, iterations):
        self.calls += 1
        return Prediction(torch.zeros_like(frame1[:, :2]) + torch.tensor([3.0, 0]).view(2, 1, 1))


def test_what_needs_the_flow_back(folder, tmp_path):
    """Written for pairs, folders and videos, in one batch of both directions; the gray pictures hold what they say."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    for k in range(3):
        write_image(tmp_path / "noise" / f"{k}.png", noise[k])
    with VideoWriter(tmp_path / "clip.mp4", 10) as writer:
        for frame in noise:
            writer.write(frame)
    predictor = Predictor(Sideways(), device="cpu", precision="fp32")
    kinds, frames = ["flow", *BOTH_WAYS], [tmp_path / "noise" / f"{k}.png" for k in range(3)]
    pair = job.predict_pair(predictor, *frames[:2], tmp_path / "pair", kinds)
    assert [path.name for path in pair] == ["0.flo", "0_backward.flo", "0_occlusion.png", "0_uncertainty.png"]
    assert predictor.model.calls == 1
    assert np.allclose(read_flow(pair[1])[0], (3, 0))
    stream = Stream(predictor, occlusion=True, uncertainty=True)
    step = [stream(frame) for frame in noise[:2]][1]
    hidden, unsure = (np.asarray(Image.open(path)) for path in pair[2:])
    assert hidden.dtype == np.uint8 and np.abs(hidden / 255 - step.occlusion).max() <= 0.5 / 255 + 1e-6
    assert unsure.dtype == np.uint16 and np.abs(unsure / 256 - step.uncertainty).max() <= 0.5 / 256 + 1e-6
    written = job.predict_folder(predictor, tmp_path / "noise", tmp_path / "folder", kinds)
    assert len(written) == 8 and (tmp_path / "folder" / "0_uncertainty.png").read_bytes() == pair[3].read_bytes()
    written, problem = job.predict_video(predictor, tmp_path / "clip.mp4", tmp_path / "video", [*kinds, "color"])
    assert len(written) == 9 and problem is None and all(path.is_file() for path in written)


def test_pair_into_a_file(predictor, folder, tmp_path):
    frames = folder / "f1.png", folder / "f3.png"
    for name, formats in (
        ("flow.flo", None), ("flow.flo", ["flo"]), ("flow.npz", None), ("flow.png", ["kitti"]), ("K.PNG", ["kitti"]),
    ):  # fmt: skip
        path = tmp_path / "deep" / name
        assert job.predict_pair(predictor, *frames, path, formats) == [path]
        assert read_flow(path)[0].shape == (20, 30, 2)
    for name, formats, width in (("flow.png", None, 30), ("C.PNG", ["color"], 30), ("s.png", ["side"], 62)):
        job.predict_pair(predictor, *frames, tmp_path / name, formats)
        assert (tmp_path / name).read_bytes()[24] == 8 and read_image(tmp_path / name).shape == (20, width, 3)


def test_pair_into_a_file_that_cannot_be(predictor, folder, tmp_path):
    frames = folder / "f1.png", folder / "f3.png"
    before = frames[1].read_bytes()
    for path, formats, words in (
        (tmp_path / "flow.xyz", None, "suffix"),
        (tmp_path / "flow.flo", ["kitti"], "kitti was asked for"),
        (tmp_path / "flow.flo", ["flo", "color"], "flo and color"),
        (tmp_path / "flow.flo", [], "no format"),
        (frames[1], None, "overwritten"),
    ):
        with pytest.raises(FleetflowError, match=words):
            job.predict_pair(predictor, *frames, path, formats)
    assert frames[1].read_bytes() == before and predictor.model.calls == 0
    write_image(tmp_path / "f1_color.png", read_image(frames[1]))
    with pytest.raises(FleetflowError, match="overwritten"):
        job.predict_pair(predictor, frames[0], tmp_path / "f1_color.png", tmp_path, ["color"])


def test_the_scale_is_that_of_the_pair_too(predictor, folder, tmp_path):
    frames = folder / "f1.png", folder / "f3.png"
    pictures = {}
    for scale in (None, 7, 700):
        job.predict_pair(predictor, *frames, tmp_path / f"{scale}.png", scale=scale)
        pictures[scale] = read_image(tmp_path / f"{scale}.png").mean()
    assert pictures[7] < pictures[None] < pictures[700], "what is fast is dark"


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf"), 1e-30, 1e300])
def test_a_scale_that_cannot_be(scale, predictor, folder, tmp_path):
    clip = video_of(tmp_path / "clip.mp4", 3)
    for work in (
        lambda: job.predict_pair(predictor, folder / "f1.png", folder / "f3.png", tmp_path / "x.png", scale=scale),
        lambda: job.predict_folder(predictor, folder, tmp_path / "out", scale=scale),
        lambda: job.predict_video(predictor, clip, tmp_path / "out", ["color"], scale=scale),
    ):
        with pytest.raises(FleetflowError, match="scale is .* expected pixels over 0"):
            work()
    assert predictor.model.calls == 0


def test_the_smallest_and_largest_scale_are_drawn_without_a_warning(recwarn):
    flow = np.float32([[[9e8, -9e8], [1e-9, 0], [0, 0]]])
    for scale in (1e-6, 1e12):
        assert flow_to_color(flow, scale).shape == (1, 3, 3)
    assert not recwarn.list


def test_folder_in_natural_order_and_continued(predictor, folder, tmp_path):
    done = []
    written = job.predict_folder(predictor, folder, tmp_path / "out", ["flo"], progress=done.append)
    assert [path.name for path in written] == ["f1.flo", "f3.flo", "f5.flo", "f7.flo", "f9.flo"]
    assert done[-1][:2] == (5, 5) and predictor.model.calls == 5
    flow, _ = read_flow(written[-1])
    assert flow[0, 0].tolist() == pytest.approx([100 * 90 / 255, 100 * 110 / 255], abs=1e-3)
    written[2].unlink()
    job.predict_folder(predictor, folder, tmp_path / "out", ["flo"])
    assert predictor.model.calls == 6, "only the missing pair is computed"
    job.predict_folder(predictor, folder, tmp_path / "out", ["flo"], overwrite=True)
    assert predictor.model.calls == 11


def test_a_folder_holds_results_of_one_network(predictor, folder, tmp_path):
    """Neither those of other weights or precisions, nor files that a former run has not left so, count as done."""
    output = tmp_path / "out"
    first = job.predict_folder(predictor, folder, output, ["flo"])
    for other in (
        Predictor(Brightness(50.0), device="cpu", precision="fp32"),
        Predictor(Brightness(50.0), device="cpu", precision="bf16"),
    ):
        before = other.model.calls
        written = job.predict_folder(other, folder, output, ["flo"])
        assert written == first and other.model.calls == before + 5
        assert read_flow(written[0])[0][0, 0, 0] == pytest.approx(50 * 10 / 255, rel=0.01)
        job.predict_folder(other, folder, output, ["flo"])
        assert other.model.calls == before + 5
    written[1].write_bytes(written[1].read_bytes()[:100])
    write_flow(written[2], np.zeros((20, 30, 2), np.float32))
    write_image(folder / "f11.png", np.full((20, 30, 3), 200, np.uint8))
    job.predict_folder(other, folder, output, ["flo"])
    assert other.model.calls == before + 5 + 3, "one is cut, one is foreign, one has a new second frame"
    assert [round(float(read_flow(path)[0][0, 0, 1])) for path in written] == [6, 10, 14, 18, 39]


def test_files_that_nobody_vouches_for_are_not_replaced(predictor, folder, tmp_path):
    output = tmp_path / "out"
    write_flow(output / "f3.flo", np.zeros((20, 30, 2), np.float32))
    for where in (output, folder):
        write_flow(where / "f3.flo", np.zeros((20, 30, 2), np.float32))
        with pytest.raises(FleetflowError, match="f3.flo was not written by fleetflow"):
            job.predict_folder(predictor, folder, where, ["flo"])
        assert predictor.model.calls == 0 and not read_flow(where / "f3.flo")[0].any()
        assert sorted(path.name for path in where.glob("*.flo")) == ["f3.flo"], "looked at before anything is computed"
    job.predict_folder(predictor, folder, output, ["flo"], overwrite=True)
    assert predictor.model.calls == 5 and read_flow(output / "f3.flo")[0].all()


def test_a_damaged_note(predictor, folder, tmp_path):
    output = tmp_path / "out"
    job.predict_folder(predictor, folder, output, ["flo"])
    note = output / NAME
    whole = note.read_bytes()
    strange = b'[3]\n7\n{"source": [], "facts": {}}\n{"source": "x"}\n{"source": "x", "request": 1, "facts": 3}\n'
    for damaged in (whole + b'\n{"f1.flo": [1', strange + whole):
        note.write_bytes(damaged)
        before = predictor.model.calls
        job.predict_folder(predictor, folder, output, ["flo"])
        assert predictor.model.calls == before
    for lost in (b"", b"\xff{"):
        note.write_bytes(lost)
        with pytest.raises(FleetflowError, match="f1.flo was not written by fleetflow"):
            job.predict_folder(predictor, folder, output, ["flo"])


def test_a_note_of_somebody_else_removes_nothing(predictor, tmp_path):
    video, output, mine = video_of(tmp_path / "clip.mp4", 3), tmp_path / "out", tmp_path / "mine.txt"
    mine.write_text("mine")
    key = hashlib.sha256(str(video.resolve()).encode()).hexdigest()[:8]
    names = [f".clip-{key}.parts/../../mine.txt", str(mine), 7]
    (output / f".clip-{key}.parts").mkdir(parents=True)
    facts = {"part 0": 3, "scale": "x", "files": [1]}
    lines = [
        {"source": str(video.resolve()), "request": {}, "facts": facts, "files": names[:2]},
        {"source": "x", "files": names},
    ]
    (output / NAME).write_text("\n".join(map(json.dumps, lines)))
    assert len(job.predict_video(predictor, video, output, ["flo"])[0]) == 2
    assert mine.read_text() == "mine"


def test_results_of_two_sources_do_not_replace_each_other(predictor, folder, tmp_path):
    output = tmp_path / "out"
    other = tmp_path / "other" / "frames"
    shutil.copytree(folder, other)
    written = job.predict_folder(predictor, folder, output, ["flo"])
    before = [path.read_bytes() for path in written]
    with pytest.raises(FleetflowError, match=f"f1.flo is a result of {folder}.*--overwrite"):
        job.predict_folder(predictor, other, output, ["flo"])
    with pytest.raises(FleetflowError, match=f"is a result of {folder}"):
        job.predict_pair(predictor, other / "f1.png", other / "f3.png", output, ["flo"])
    assert [path.read_bytes() for path in written] == before and predictor.model.calls == 5
    job.predict_folder(predictor, other, output, ["npy"])
    clips = [video_of(tmp_path / name, 3) for name in ("a/clip.mp4", "b/clip.mp4", "a/clip.mov.mp4")]
    for formats in (["color"], ["npy"]):
        job.predict_video(predictor, clips[0], output, formats, scale=40)
        with pytest.raises(FleetflowError, match=f"is a result of {clips[0]}"):
            job.predict_video(predictor, clips[1], output, formats, scale=40)
    job.predict_video(predictor, clips[1], output, ["npy"], overwrite=True)
    with pytest.raises(FleetflowError, match=f"is a result of {clips[1]}"):
        job.predict_video(predictor, clips[0], output, ["npy"])


def test_two_pairs_of_equal_names(predictor, folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    output = tmp_path / "flow"
    for _ in range(2):
        job.predict_pair(predictor, folder / "f1.png", folder / "f3.png", output, ["flo"])
    calls = predictor.model.calls
    for first, second in ((other / "f1.png", other / "f3.png"), (folder / "f1.png", folder / "f5.png")):
        with pytest.raises(FleetflowError, match=f"f1.flo is a result of {folder}/f1.png and {folder}/f3.png"):
            job.predict_pair(predictor, first, second, output, ["flo"])
    assert predictor.model.calls == calls
    job.predict_pair(predictor, other / "f1.png", other / "f3.png", output, ["flo"], overwrite=True)
    job.predict_pair(predictor, other / "f3.png", other / "f5.png", output, ["flo"])
    job.predict_pair(predictor, folder / "f1.png", folder / "f3.png", output / "f1.flo")


def test_a_folder_of_the_users_beside_the_results(predictor, tmp_path, monkeypatch):
    video, output = video_of(tmp_path / "clip.mp4", 5), tmp_path / "out"
    key = hashlib.sha256(str(video.resolve()).encode()).hexdigest()[:8]
    parts = output / f".clip-{key}.parts"
    for place in (output / "clip.parts", parts):
        place.mkdir(parents=True)
        (place / "notes.txt").write_text("mine")
    job.predict_video(predictor, video, output, ["color"], scale=40)
    assert [(place / "notes.txt").read_text() for place in (output / "clip.parts", parts)] == ["mine"] * 2
    assert [path.name for path in parts.iterdir()] == ["notes.txt"]
    (parts / "00000_color.mp4").write_text("mine")
    with pytest.raises(FleetflowError, match="00000_color.mp4 was not written by fleetflow"):
        job.predict_video(predictor, video, output, ["color"], scale=41)
    shutil.rmtree(parts)
    parts.symlink_to(output / "clip.parts")
    with pytest.raises(FleetflowError, match="is a link"):
        job.predict_video(predictor, video, output, ["color"], scale=41)
    assert [path.name for path in (output / "clip.parts").iterdir()] == ["notes.txt"]


def test_one_run_at_a_time_writes_into_a_folder(predictor, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "PATIENCE", 0)
    video = video_of(tmp_path / "clip.mp4", 4)
    with lock_folder(tmp_path / "out", "predict other"):
        for work in (
            lambda: job.predict_folder(predictor, folder, tmp_path / "out", ["flo"]),
            lambda: job.predict_video(predictor, video, tmp_path / "out", ["flo"]),
            lambda: job.predict_pair(predictor, folder / "f1.png", folder / "f3.png", tmp_path / "out", ["flo"]),
        ):
            with pytest.raises(FleetflowError, match='in use by "predict other"'):
                work()
    leftover = tmp_path / "out" / ".part-0123456789ab.flo"
    leftover.write_text("half")
    job.predict_folder(predictor, folder, tmp_path / "out", ["flo"])
    assert not leftover.exists() and not (tmp_path / "out" / LOCK).exists()


def test_scenes_by_their_names(predictor, tmp_path):
    names = ["000000_10", "000000_11", "000001_10", "000001_11", "000002_10"]
    for k, name in enumerate(names):  # scenes may have sizes of their own
        write_image(tmp_path / "kitti" / f"{name}.png", np.full((20, 30 + k // 2, 3), 10 * k, np.uint8))
    written = job.predict_folder(predictor, tmp_path / "kitti", tmp_path / "out", ["flo"])
    assert [path.stem for path in written] == ["000000_10", "000001_10"] and predictor.model.calls == 2
    assert described(scenes(list_frames(tmp_path / "kitti"))) == (
        "2 scenes: 000000_10 to 000000_11, 000001_10 to 000001_11; without a second picture: 000002_10.png"
    )
    with pytest.raises(FleetflowError, match="000000_11.png is 20x30, but .*000001_10.png is 20x31"):
        job.predict_folder(predictor, tmp_path / "kitti", tmp_path / "out", ["flo"], one_scene=True)
    for stems in (["a", "b", "c"], ["f1", "f3", "f10"], ["1_left", "2_left"], ["x1y", "x2z"], ["0.5s", "1.5t"]):
        assert scenes([Path(f"{stem}.png") for stem in stems]) == [[Path(f"{stem}.png") for stem in stems]], stems


def test_no_warm_start_from_another_scene(tmp_path):
    noise = np.random.default_rng(0)
    for name in ("a_1", "a_2", "b_1", "b_2"):
        write_image(tmp_path / "f" / f"{name}.png", noise.integers(0, 255, (48, 64, 3), np.uint8))
    predictor = Predictor(models["raft_small"](), device="cpu", precision="fp32", iterations=2)
    written = job.predict_folder(predictor, tmp_path / "f", tmp_path / "out", ["npy"], warm_start=True)
    expected = predictor(*(tmp_path / "f" / f"b_{k}.png" for k in (1, 2)))
    np.testing.assert_array_equal(np.load(written[1]), expected)


def test_sizes_are_looked_at_before_anything_is_computed(predictor, folder, tmp_path):
    write_image(folder / "f7.png", np.zeros((19, 30, 3), np.uint8))
    with pytest.raises(FleetflowError, match="f5.png is 20x30, but .*f7.png is 19x30; both must have the same size"):
        job.predict_folder(predictor, folder, tmp_path / "out", ["flo"])
    with pytest.raises(FleetflowError, match="f1.png is 20x30, but .*f7.png is 19x30"):
        job.predict_pair(predictor, folder / "f1.png", folder / "f7.png", tmp_path / "out")
    assert predictor.model.calls == 0 and not (tmp_path / "out").exists()
    turned = Image.fromarray(np.zeros((30, 20, 3), np.uint8))
    turned.getexif()[0x0112] = 6
    turned.save(folder / "f7.png", exif=turned.getexif())
    assert read_image(folder / "f7.png").shape == (20, 30, 3)
    assert len(job.predict_folder(predictor, folder, tmp_path / "out", ["flo"])) == 5


def test_one_bad_pair_does_not_make_the_others_pale():
    flows = [(k, np.full((4, 4, 2), 2.0, np.float32)) for k in range(12)]
    flows[5] = 5, np.full((4, 4, 2), 300.0, np.float32)
    scale, kept = color_scale.scouted(flows)
    assert scale == 3.0 and len(kept) == 12
    assert color_scale.scouted(flows[4:6])[0] > 300, "of two nobody knows which one is bad"
    assert color_scale.scouts(3) == [0, 1, 2] and color_scale.scouts(0) == []
    assert color_scale.scouts(1000)[::11] == [0, 999] and len(color_scale.scouts(1000)) == 12


def test_scouting_seeks_and_shows_its_progress(predictor, tmp_path):
    video, seen = video_of(tmp_path / "clip.mp4", 40), []
    reader = VideoReader(video)
    found = list(color_scale.video_scouts(reader))
    assert [k for k, *_ in found] == color_scale.scouts(39)
    every = list(reader)
    assert all((image1 == every[k]).all() and (image2 == every[k + 1]).all() for k, image1, image2 in found)
    job.predict_video(predictor, video, tmp_path / "out", ["color"], progress=seen.append)
    assert predictor.model.calls == 39, "what was looked at is not computed again"
    assert [state.what for state in seen] == [""] + ["color scale"] * 12 + [""] * 39
    assert seen[0][:2] == (0, 39), "something is seen from the first second"


def test_a_continued_folder_keeps_its_scale(predictor, folder, tmp_path):
    output = tmp_path / "out"
    job.predict_folder(predictor, folder, output, ["color"])
    before = (output / "f1_color.png").read_bytes()
    write_image(folder / "f13.png", np.full((20, 30, 3), 250, np.uint8))
    written = job.predict_folder(predictor, folder, output, ["color"])
    assert before == written[0].read_bytes() and predictor.model.calls == 5 + 1, (
        "the flows that the scale was chosen from are not computed twice"
    )
    alone = job.predict_pair(predictor, *list_frames(folder)[-2:], tmp_path / "x.png", scale=50)[0]
    assert read_image(written[-1]).tolist() == read_image(alone).tolist(), "50 px is the scale of the first five"
    job.predict_folder(predictor, folder, output, ["color"], scale=7)
    assert before != written[0].read_bytes()
    before = predictor.model.calls
    for k in range(1, 14, 2):
        write_image(folder / f"f{k}.png", np.full((20, 30, 3), 250, np.uint8))
    job.predict_folder(predictor, folder, output, ["color"])
    assert predictor.model.calls == before + 6, "another clip has a scale of its own"


def test_steps_and_warm_start(tmp_path):
    torch.manual_seed(0)
    folder, noise = tmp_path / "noise", np.random.default_rng(0)
    texture = noise.integers(0, 255, (6, 10, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    for k in range(3):
        write_image(folder / f"{k}.png", texture[:, k : k + 64])
    predictor = Predictor(models["raft_small"](), device="cpu", precision="fp32", iterations=2)
    assert predictor.label()["iterations"] == "2"
    images = [read_image(path) for path in job.list_frames(folder)]
    first = predictor.predict(*images[:2])
    found = {warm: job.predict_folder(predictor, folder, tmp_path / str(warm), ["npy"], warm_start=warm)
             for warm in (False, True)}  # fmt: skip
    for warm, previous in ((False, None), (True, first)):
        expected = predictor.predict(*images[1:3], previous).flow[0].permute(1, 2, 0)
        np.testing.assert_array_equal(np.load(found[warm][1]), expected)
        np.testing.assert_array_equal(np.load(found[warm][0]), first.flow[0].permute(1, 2, 0))
    assert not np.array_equal(*(np.load(paths[1]) for paths in found.values()))
    with pytest.raises(FleetflowError, match="keeps nothing"):
        plain = Predictor(FastFlowNet(), device="cpu", precision="fp32")
        job.predict_folder(plain, folder, tmp_path / "none", ["npy"], warm_start=True)
    with pytest.raises(FleetflowError, match="no refinement iterations"):
        Predictor(FastFlowNet(), device="cpu", iterations=3)


def test_weights_without_numbers_are_one_line(folder, tmp_path):
    predictor = Predictor(Brightness(float("nan")), device="cpu", precision="fp32")
    frames = folder / "f1.png", folder / "f3.png"
    clip = video_of(tmp_path / "clip.mp4", 3)
    for work, name in (
        (lambda: job.predict_pair(predictor, *frames, tmp_path / "out"), "f1.png"),
        (lambda: job.predict_folder(predictor, folder, tmp_path / "out"), "f1.png"),
        (lambda: job.predict_video(predictor, clip, tmp_path / "out"), "frame 0 of clip.mp4"),
    ):
        with pytest.raises(FleetflowError, match=f"the flow of {name} is not finite everywhere"):
            work()
    assert not [path for path in tmp_path.glob("out/*") if path.is_file()]


def test_folder_that_cannot_be(predictor, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FleetflowError):
        job.predict_folder(predictor, tmp_path / "empty", tmp_path / "out", ["flo"])
    with pytest.raises(FleetflowError, match="did you mean"):
        job.predict_folder(predictor, folder, tmp_path / "out", ["colr"])
    with pytest.raises(FleetflowError, match="no format"):
        job.predict_folder(predictor, folder, tmp_path / "out", [])
    with pytest.raises(FleetflowError, match="name of a file"):
        job.predict_folder(predictor, folder, tmp_path / "flow.flo")
    for kind in ("kitti", "color", "side"):
        with pytest.raises(FleetflowError, match="taken for its frames"):
            job.predict_folder(predictor, folder, folder.parent / "frames", ["flo", kind])
    assert len(job.predict_folder(predictor, folder, folder, ["flo"])) == 5, "a flow is no frame"
    write_image(folder / "f3.jpg", np.zeros((20, 30, 3), np.uint8))
    with pytest.raises(FleetflowError, match="holds f3.jpg and f3.png, whose results would have one name"):
        job.predict_folder(predictor, folder, tmp_path / "out", ["flo"])
    (folder / "f3.jpg").unlink()
    write_image(folder / "f3_backward.png", np.zeros((20, 30, 3), np.uint8))
    with pytest.raises(FleetflowError, match="f3.png and f3_backward.png, whose results"):
        job.predict_folder(predictor, folder, tmp_path / "out", ["flo", "backward"], one_scene=True)
    (folder / "f3_backward.png").unlink()
    write_image(folder / "f2.png", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(FleetflowError, match="same size"):
        job.predict_folder(predictor, folder, tmp_path / "out", ["flo"])


def test_video(predictor, tmp_path):
    video = video_of(tmp_path / "clip.mp4", 7)
    written, problem = job.predict_video(predictor, video, tmp_path / "out", ["color", "side", "npy"], scale=40)
    assert problem is None
    assert [path.name for path in written[:2]] == ["clip_color.mp4", "clip_side.mp4"]
    assert [path.name for path in written[2:]] == [f"clip_{k:06d}.npy" for k in range(6)]
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == {path.name for path in written}
    with VideoReader(written[0]) as film:
        assert len(list(film)) == 6 and film.fps == 10


def uneven_video(path, times) -> Path:
    """A clip whose frames k of brightness 20 + 5 k are shown at these seconds."""
    with VideoWriter(path, 10) as writer:
        for k, time in enumerate(times):
            writer.write(np.full((48, 64, 3), 20 + 5 * k, np.uint8), time)
    return path


def test_a_part_of_a_video(predictor, tmp_path, monkeypatch):
    """Numbers, intervals and totals are the video's; an interrupted run goes on; what lies before is not decoded."""
    monkeypatch.setattr(job, "PART_FRAMES", 2)
    times = np.cumsum([0, *np.tile([0.04, 0.1, 0.5], 13)])
    clip, totals = uneven_video(tmp_path / "clip.mp4", times), []
    options = {"scale": 40, "frames": "20:34", "every": 2}

    def stop(progress):
        totals.append((progress.done, progress.total))
        if progress.done == 3:
            raise Interrupt

    with pytest.raises(Interrupt):
        job.predict_video(predictor, clip, tmp_path / "out", ["color", "npy"], **options, progress=stop)
    written, problem = job.predict_video(predictor, clip, tmp_path / "out", ["color", "npy"], **options)
    assert predictor.model.calls == 3 + 4 and totals == [(0, 6), (1, 6), (2, 6), (3, 6)] and problem is None
    assert [path.name for path in written[1:]] == [f"clip_{k:06d}.npy" for k in range(20, 32, 2)]
    flow = read_flow(written[1])[0][0, 0]
    np.testing.assert_allclose(flow, [100 * (20 + 5 * k) / 255 for k in (20, 22)], atol=1.5)
    film = list(VideoReader(written[0]))
    np.testing.assert_allclose([frame.time for frame in film], times[20:32:2] - times[20], atol=1e-4)
    job.predict_video(predictor, clip, tmp_path / "out", ["npy"], frames="30:")
    assert len(list((tmp_path / "out").glob("*.npy"))) == 6 + 9 - 1, "30 is in both"


def test_the_total_of_an_uneven_video_is_exact(predictor, tmp_path):
    """Its header implies frames at the mean rate of the first ones, which are more."""
    path, totals = tmp_path / "clip.mkv", []
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for k, time in enumerate((0, 40, 80, 2000, 2040, 2080)):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * k, np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    job.predict_video(predictor, path, tmp_path / "out", ["color"], progress=totals.append)
    assert {row.total for row in totals if row.done and not row.what} == {5}, totals


@pytest.mark.parametrize("frames", ["39:", "50:", "3:4"])
def test_a_part_of_a_video_that_has_no_pair(frames, predictor, tmp_path):
    clip = video_of(tmp_path / "clip.mp4", 40)
    with pytest.raises(FleetflowError, match=f"fewer than two frames of frames {frames}; a flow needs two"):
        job.predict_video(predictor, clip, tmp_path / "out", ["color"], frames=frames)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("[!.]*"))


def test_a_part_of_a_folder(predictor, tmp_path):
    for k in range(8):
        write_image(tmp_path / "frames" / f"f{k}.png", np.full((20, 30, 3), 20 * k + 10, np.uint8))
    written = job.predict_folder(predictor, tmp_path / "frames", tmp_path / "out", ["flo"], frames="2:7", every=2)
    assert [path.name for path in written] == ["f2.flo", "f4.flo"]
    np.testing.assert_allclose(read_flow(written[0])[0][0, 0], [5000 / 255, 9000 / 255], atol=1e-3)
    with pytest.raises(FleetflowError, match="holds 8 pictures, of which --frames and --every leave 1; a flow needs"):
        job.predict_folder(predictor, tmp_path / "frames", tmp_path / "out", frames="7:")


@pytest.mark.parametrize("words", [["--frames", "1:2"], ["--every", "2"], ["--frames", "b"], ["--every", "0"]])
def test_a_part_that_cannot_be(words, folder, tmp_path, capsys):
    pair = words[1] in ("1:2", "2")
    inputs = [str(folder / "f1.png"), str(folder / "f3.png")] if pair else [str(folder)]
    assert main(["predict", *inputs, "-o", str(tmp_path / "out"), *words]) == 1
    assert ("two pictures are one pair" if pair else "expected") in capsys.readouterr().err


def test_a_finished_video_is_kept_as_a_folder_is(predictor, tmp_path):
    video, output = video_of(tmp_path / "clip[1].mp4", 7), tmp_path / "out"

    def again(calls, predictor=predictor, **options):
        before = predictor.model.calls
        written, problem = job.predict_video(predictor, video, output, ["color", "npy"], **options)
        assert predictor.model.calls == before + calls and problem is None
        return written

    written = again(6, scale=40)
    assert [path.name for path in written[:2]] == ["clip[1]_color.mp4", "clip[1]_000000.npy"] and len(written) == 7
    assert again(0, scale=40) == written
    again(6, scale=41)
    again(6, scale=41, overwrite=True)
    other = Predictor(Brightness(50.0), device="cpu", precision="fp32")
    again(6, other, scale=41)
    written[3].write_bytes(written[3].read_bytes()[:100])
    again(6, other, scale=41)
    written[0].unlink()
    again(6, other, scale=41)
    video_of(video, 4)
    assert len(again(3, other, scale=41)) == 4, "the files of the longer clip that was there are no results"


def test_a_folder_whose_name_looks_like_an_address(predictor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = Path("clip:%02d[1]")
    written, _ = job.predict_video(predictor, video_of(tmp_path / "a.mp4", 4), output, ["color", "npy"])
    assert len(written) == 4 and all(path.is_file() for path in written)


@pytest.mark.parametrize("name", ["00000_color.mp4", "clip_000001.npy"])
def test_what_is_damaged_in_an_unfinished_video_is_made_anew(name, predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "PART_FRAMES", 4)
    video, output = video_of(tmp_path / "clip.mp4", 12), tmp_path / "out"

    def stop(progress):
        if progress.done == 9:
            raise Interrupt

    with pytest.raises(Interrupt):
        job.predict_video(predictor, video, output, ["color", "npy"], scale=40, progress=stop)
    damaged = next(output.rglob(name))
    damaged.write_bytes(damaged.read_bytes()[:100])
    written, _ = job.predict_video(predictor, video, output, ["color", "npy"], scale=40)
    assert predictor.model.calls == 9 + 11
    with VideoReader(written[0]) as film:
        assert len(list(film)) == 11
    assert len(written) == 12 and read_flow(written[2])[1].all()


def test_a_damaged_note_of_an_unfinished_video(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "PART_FRAMES", 4)
    video, output = video_of(tmp_path / "clip.mp4", 8), tmp_path / "out"

    def stop(progress):
        if progress.done == 6:
            raise Interrupt

    with pytest.raises(Interrupt):
        job.predict_video(predictor, video, output, ["color"], scale=40, progress=stop)
    (output / NAME).write_text('{"request": {"net')
    with pytest.raises(FleetflowError, match="00000_color.mp4 was not written by fleetflow"):
        job.predict_video(predictor, video, output, ["color"], scale=40)
    job.predict_video(predictor, video, output, ["color"], scale=40, overwrite=True)
    assert predictor.model.calls == 6 + 7


class Interrupt(Exception):
    pass


def test_an_interrupted_video_goes_on_behind_its_last_whole_part(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "PART_FRAMES", 4)
    video = video_of(tmp_path / "clip.mp4", 12)

    def stop(progress):
        if progress.done == 7:
            raise Interrupt

    with pytest.raises(Interrupt):
        job.predict_video(predictor, video, tmp_path / "out", ["color", "npy"], scale=40, progress=stop)
    assert not (tmp_path / "out" / "clip_color.mp4").exists()
    assert predictor.model.calls == 7
    written, _ = job.predict_video(predictor, video, tmp_path / "out", ["color", "npy"], scale=40)
    assert predictor.model.calls == 7 + 7, "the first part of 4 is kept, 7 of 11 pairs are computed"
    whole, _ = job.predict_video(predictor, video, tmp_path / "whole", ["color", "npy"], scale=40)
    with VideoReader(written[0]) as one, VideoReader(whole[0]) as two:
        for a, b in zip(one, two, strict=True):
            assert np.abs(a.astype(int) - b).max() <= 6  # parts begin with a key frame: compression differs a little
    assert [path.name for path in written] == [path.name for path in whole] and len(written) == 12


def test_a_request_for_something_else_starts_anew(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "PART_FRAMES", 2)
    video = video_of(tmp_path / "clip.mp4", 6)

    def stop(progress):
        if progress.done == 3:
            raise Interrupt

    with pytest.raises(Interrupt):
        job.predict_video(predictor, video, tmp_path / "out", ["npy"], progress=stop)
    job.predict_video(predictor, video, tmp_path / "out", ["npz"])
    assert predictor.model.calls == 3 + 5
    assert len(list((tmp_path / "out").glob("*.npz"))) == 5
    with pytest.raises(Interrupt):
        job.predict_video(predictor, video, tmp_path / "mixed", ["npy"], progress=stop)
    other = Predictor(Brightness(50.0), device="cpu", precision="fp32")
    written, _ = job.predict_video(other, video, tmp_path / "mixed", ["npy"])
    assert other.model.calls == 5
    assert all(read_flow(path)[0][0, 0, 0] < 50 * (20 + 8 * 6) / 255 for path in written)


def test_a_cut_video_gives_what_can_be_read_and_says_so(predictor, tmp_path):
    path = tmp_path / "cut.mkv"  # Matroska can be read up to where it ends
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        noise = np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), dtype=np.uint8)
        for image in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    written, problem = job.predict_video(predictor, path, tmp_path / "out", ["npy"])
    assert problem and "\n" not in problem
    assert 5 < len(written) < 29


def test_no_film_of_one_frame_or_of_no_video(predictor, tmp_path):
    with pytest.raises(FleetflowError, match="fewer than two frames; a flow needs"):
        job.predict_video(predictor, video_of(tmp_path / "one.mp4", 1), tmp_path / "out", ["color"])
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(FleetflowError):
        job.predict_video(predictor, tmp_path / "text.mp4", tmp_path / "out", ["color"])
    write_image(tmp_path / "a.png", np.zeros((8, 9, 3), np.uint8))
    with pytest.raises(FleetflowError, match="a.png is one picture; a flow needs two"):
        job.predict_video(predictor, tmp_path / "a.png", tmp_path / "out")
    with pytest.raises(FleetflowError, match="name of a file"):
        job.predict_video(predictor, video_of(tmp_path / "two.mp4", 2), tmp_path / "flow.mp4")
    leftovers = [path for path in (tmp_path / "out").rglob("*")] if (tmp_path / "out").exists() else []
    assert not leftovers, leftovers


def test_memory_does_not_grow_with_the_length_of_a_video(predictor, tmp_path):
    peaks = []
    for frames in (20, 80):
        video = video_of(tmp_path / f"{frames}.mp4", frames, size=(128, 160))
        tracemalloc.start()
        job.predict_video(predictor, video, tmp_path / f"out{frames}", ["color"], scale=40)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 128 * 160 * 3 * 10, peaks


def test_real_frames_end_to_end(shared, tmp_path):
    """The flow of a real sequence with the package's weights, by the command, beats holding still by far."""
    frames = shared / "data" / "middlebury-flow" / "RubberWhale"
    assert (
        main(["predict", str(frames / "img1.png"), str(frames / "img2.png"), "-o", str(tmp_path), "-f", "flo", "side"])
        == 0
    )
    flow, _ = read_flow(tmp_path / "img1.flo")
    files = pairs(shared / "data")
    k = next(k for k, pair in enumerate(files.pairs) if pair.name == "RubberWhale")
    sample = files[k]
    error = np.linalg.norm(flow - sample.flow.permute(1, 2, 0).numpy(), axis=2)[sample.valid.numpy()]
    assert error.mean() < 0.7  # zero flow: 1.26 px
    assert (tmp_path / "img1_side.png").exists()


def test_frames_that_memory_cannot_hold(predictor, monkeypatch):
    """Systems that promise more than they have would end the process without a word."""
    monkeypatch.setattr(memory, "available", lambda: 2**30)
    frame = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(FleetflowError, match="out of memory at 100000x100000"):
        Predictor(predictor.model, device="cpu", precision="fp32", size=(100_000, 100_000))(frame, frame)


def test_the_longest_names_and_links_that_lead_nowhere(predictor, tmp_path):
    clip = video_of(tmp_path / f"{'n' * 240}.mp4", 2)
    films, _ = job.predict_video(predictor, clip, tmp_path / "out", ["color"])
    assert films[0].is_file()
    (tmp_path / "loop").symlink_to("loop")
    picture = tmp_path / "f1.png"
    write_image(picture, np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(FleetflowError, match="loop cannot be written"):
        job.predict_pair(predictor, picture, picture, tmp_path / "loop")
