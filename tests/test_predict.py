"""Predict: the Predictor, and the jobs on pairs, folders and videos, whole, interrupted and damaged."""

import tracemalloc

import av
import numpy as np
import pytest
import torch

from fleetflow import predict as job
from fleetflow.cli import main
from fleetflow.data.pairs import pairs
from fleetflow.io import read_flow, read_image, write_image
from fleetflow.models.base import FlowModel
from fleetflow.models.fastflownet import FastFlowNet
from fleetflow.types import FleetflowError, Prediction
from fleetflow.video import VideoReader, VideoWriter


class Brightness(FlowModel):
    """A flow one can foresee: u is the mean of frame1 times 100, v that of frame2. Counts its calls."""

    stride = 1
    fit = "pad"
    calls = 0

    def prepare(self, frame1, frame2):
        return frame1, frame2

    def estimate(self, frame1, frame2, previous, steps):
        self.calls += 1
        means = torch.stack((frame1.mean((1, 2, 3)), frame2.mean((1, 2, 3))), 1) * 100
        return Prediction(means[:, :, None, None].expand(-1, -1, *frame1.shape[-2:]))


@pytest.fixture
def predictor():
    return job.Predictor(Brightness(), device="cpu", precision="fp32")


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
    predictor = job.Predictor(FastFlowNet(), device="cpu")
    images = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
    flow = predictor(*images)
    assert flow.shape == (*shape[:2], 2) and flow.dtype == np.float32 and np.isfinite(flow).all()


def test_predictor_refuses():
    predictor = job.Predictor(Brightness(), device="cpu")
    good = np.zeros((8, 9, 3), np.uint8)
    for image1, image2, words in (
        (good, good[:, :8], "same size"),
        (good.astype(np.float32), good, "uint8"),
        (good[..., :2], good, "RGB"),
    ):
        with pytest.raises(FleetflowError, match=words):
            predictor(image1, image2)
    with pytest.raises(FleetflowError, match="device"):
        job.Predictor(Brightness(), device="cuda:99")
    with pytest.raises(FleetflowError, match="precision"):
        job.Predictor(Brightness(), device="cpu", precision="fp64")


def test_bf16_stays_near_fp32(pair):
    torch.manual_seed(0)
    model = FastFlowNet()
    flows = [job.Predictor(model, device="cpu", precision=kind)(*pair) for kind in ("fp32", "bf16")]
    assert 0 < np.abs(flows[0] - flows[1]).mean() < 0.1


def test_pair_into_a_folder_in_every_format(predictor, tmp_path):
    for k in (1, 2):
        write_image(tmp_path / f"{k}.png", np.full((100, 120, 3), 51 * k, np.uint8))
    output = tmp_path / "out"
    written = job.predict_pair(predictor, tmp_path / "1.png", tmp_path / "2.png", output, list(job.FORMATS))
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in written)
    for kind in ("flo", "kitti", "npy", "npz", "pfm", "flo5"):
        flow, valid = read_flow(output / job.FORMATS[kind].format("1"))
        assert valid.all() and np.abs(flow - (20, 40)).max() < 0.01, kind
    assert read_image(output / "1_color.png").shape == (100, 120, 3)
    assert read_image(output / "1_side.png").shape[1] > 240


def test_pair_into_a_file(predictor, folder, tmp_path):
    for name in ("flow.flo", "flow.png"):
        frames = folder / "f1.png", folder / "f3.png"
        assert job.predict_pair(predictor, *frames, tmp_path / "deep" / name, ["flo"]) == [tmp_path / "deep" / name]
    assert read_flow(tmp_path / "deep" / "flow.flo")[0].shape == (20, 30, 2)
    assert read_image(tmp_path / "deep" / "flow.png").shape == (20, 30, 3)
    with pytest.raises(FleetflowError):
        job.predict_pair(predictor, *frames, tmp_path / "flow.xyz", ["flo"])


def test_folder_in_natural_order_and_continued(predictor, folder, tmp_path):
    done = []
    written = job.predict_folder(predictor, folder, tmp_path / "out", ["flo"], progress=done.append)
    assert [path.name for path in written] == ["f1.flo", "f3.flo", "f5.flo", "f7.flo", "f9.flo"]
    assert done[-1] == (5, 5) and predictor.model.calls == 5
    flow, _ = read_flow(written[-1])
    assert flow[0, 0].tolist() == pytest.approx([100 * 90 / 255, 100 * 110 / 255], abs=1e-3)
    written[2].unlink()
    job.predict_folder(predictor, folder, tmp_path / "out", ["flo"])
    assert predictor.model.calls == 6, "only the missing pair is computed"
    job.predict_folder(predictor, folder, tmp_path / "out", ["flo"], again=True)
    assert predictor.model.calls == 11


def test_folder_that_cannot_be(predictor, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FleetflowError):
        job.predict_folder(predictor, tmp_path / "empty", tmp_path / "out", ["flo"])
    with pytest.raises(FleetflowError, match="did you mean"):
        job.predict_folder(predictor, folder, tmp_path / "out", ["colour"])
    write_image(folder / "f2.png", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(FleetflowError, match="same size"):
        job.predict_folder(predictor, folder, tmp_path / "out", ["flo"])


def test_video(predictor, tmp_path):
    video = video_of(tmp_path / "clip.mp4", 7)
    written, problem = job.predict_video(predictor, video, tmp_path / "out", ["color", "side", "npy"], scale=40)
    assert problem is None
    assert [path.name for path in written[:2]] == ["clip_color.mp4", "clip_side.mp4"]
    assert [path.name for path in written[2:]] == [f"clip_{k:06d}.npy" for k in range(6)]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in written}
    with VideoReader(written[0]) as film:
        assert len(list(film)) == 6 and film.fps == 10


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
    with pytest.raises(FleetflowError, match="one frame"):
        job.predict_video(predictor, video_of(tmp_path / "one.mp4", 1), tmp_path / "out", ["color"])
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(FleetflowError):
        job.predict_video(predictor, tmp_path / "text.mp4", tmp_path / "out", ["color"])
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
