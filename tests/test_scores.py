"""How clips move: figures of clips whose motion is known, with a network that knows it, too; tables; the sheet."""

import csv
import json
import math
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from conftest import SLOW
from PIL import Image, ImageFilter

from fleetflow import FleetflowError
from fleetflow.cli import main as cli
from fleetflow.io.frame import as_frame
from fleetflow.io.table import write_table
from fleetflow.io.video import VideoReader, VideoWriter
from fleetflow.motion.alignment import aligned
from fleetflow.motion.camera import affine_flows, similarity
from fleetflow.motion.evidence import contrasts, fit_cameras, moved_beside
from fleetflow.motion.scores import caption, row_of, score
from fleetflow.ops.warp import warp
from fleetflow.visualise import contact_sheet

HEIGHT, WIDTH, FPS = 144, 256, 12.0


def wide(seed: int = 1) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (60, 120, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((960, 480), Image.Resampling.BICUBIC))


def filmed(at: list[tuple[int, int]], thing: list[tuple[int, int]] | None = None, seed: int = 1) -> list[np.ndarray]:
    """Frames whose view begins at `at` (x, y) of a wide picture, and a square of 40 pixels that lies at `thing`."""
    frames, surface = [], wide(seed)
    for number, (x, y) in enumerate(at):
        frame = surface[y : y + HEIGHT, x : x + WIDTH].copy()
        if thing is not None:
            left, top = thing[number]
            frame[top : top + 40, left : left + 40] = wide(7)[:40, :40]
        frames.append(frame)
    return frames


def knowing(frames: list[np.ndarray], at: list[tuple[int, int]], thing: list[tuple[int, int]] | None = None):
    """A network that knows the motion between any two of the frames."""
    numbers = {frame.tobytes(): number for number, frame in enumerate(frames)}

    def predict(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        a, b = numbers[first.tobytes()], numbers[second.tobytes()]
        flow = np.zeros((HEIGHT, WIDTH, 2), np.float32)
        flow[:] = np.subtract(at[a], at[b])
        if thing is not None:
            left, top = thing[a]
            flow[top : top + 40, left : left + 40] = np.subtract(thing[b], thing[a])
        return flow

    return predict


def scored(at, thing=None):
    frames = filmed(at, thing)
    return score(frames, knowing(frames, at, thing), fps=FPS)


def test_a_pan_is_the_camera_and_a_square_an_object():
    still = scored([(300, 150)] * 10)
    assert still.kind == "static" and still.motion == still.camera == still.objects == still.shake == still.cuts == 0
    assert still.seconds == pytest.approx(10 / FPS, abs=1e-3) and still.pairs == 9 and math.isnan(still.sharpness)
    pan = scored([(300 + 3 * k, 150) for k in range(10)])
    assert (
        pan.kind == "camera" and pan.camera == pytest.approx(36, rel=0.02) and pan.pan_x == pytest.approx(-36, rel=0.02)
    )
    assert pan.objects < 1 and pan.moving_share > 0.95 and pan.shake < 0.1
    square = scored([(300, 150)] * 10, [(20 + 4 * k, 50) for k in range(10)])
    share = 40 * 40 / (HEIGHT * WIDTH)
    assert square.kind == "static" and square.camera == 0 and square.objects == pytest.approx(48 * share, rel=0.25)
    assert square.moving_share == pytest.approx(share, rel=0.25)
    both = scored([(300 + 3 * k, 150) for k in range(10)], [(20 + 8 * k, 50) for k in range(10)])
    assert both.camera == pytest.approx(36, rel=0.05) and both.objects > 1


def test_shake_is_told_from_a_pan():
    jumps = np.random.default_rng(3).integers(-3, 4, (24, 2))
    shaken = scored([(300 + 3 * k + int(x), 150 + int(y)) for k, (x, y) in enumerate(jumps)])
    even = scored([(300 + 5 * k, 150) for k in range(24)])
    expected = math.sqrt(jumps.astype(float).var(0).sum())
    assert even.shake < 0.1 and shaken.shake == pytest.approx(expected, rel=0.3)


def test_cuts_and_periods():
    swing = [(300 + round(20 * math.sin(2 * math.pi * k / 12)), 150) for k in range(48)]
    found = scored(swing)
    assert found.period == pytest.approx(1.0) and found.periodic > 0.9 and found.cuts == 0
    assert math.isnan(scored([(300 + 3 * k, 150) for k in range(30)]).period)
    frames = [*filmed([(300, 150)] * 6), *filmed([(300, 150)] * 6, seed=5)]
    assert score(frames, lambda a, b: np.zeros((HEIGHT, WIDTH, 2)), fps=FPS).cuts == 1
    with pytest.raises(FleetflowError, match="one frame"):
        score(frames[:1], lambda a, b: np.zeros((HEIGHT, WIDTH, 2)))
    for wrong, words in ((None, "the clip is a NoneType"), ([[[1], [2, 3]]], "the picture is a list")):
        with pytest.raises(FleetflowError, match=words):
            score(wrong, lambda a, b: np.zeros((HEIGHT, WIDTH, 2)))


def write_uneven(path, frames: list[np.ndarray], times: list[float]) -> None:
    """Video without loss, in Matroska that says 60 pictures a second, in AVI 1000, whenever they are shown."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=60)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "bgr0"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for image, time in zip(frames, times):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), stream.time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


@pytest.mark.parametrize("name", ["a.mkv", *(["a.avi"] if SLOW else [])])
def test_a_variable_rate_does_not_change_speeds_and_periods(tmp_path, name):
    """Two seconds of 10 pictures a second, then two of 30; pictures that are shown 60 and 110 ms in turn."""
    faster = [k / 10 for k in range(20)] + [2 + k / 30 for k in range(60)]
    in_turn = [0.17 * (k // 2) + 0.06 * (k % 2) for k in range(48)]
    for times, place, expected in (
        (faster, lambda t: 300 + round(30 * t), {"pan_x": -30, "seconds": 4.02, "looked": 4.02}),
        (in_turn, lambda t: 300 + round(10 * math.sin(2 * math.pi * t)), {"period": 1.0, "seconds": 4.06}),
    ):
        at = [(place(time), 150) for time in times]
        write_uneven(tmp_path / name, filmed(at), times)
        found = score(tmp_path / name, knowing(filmed(at), at))
        assert {column: getattr(found, column) for column in expected} == pytest.approx(expected, rel=0.02)
        if name == "a.mkv" or SLOW:  # frames in a list know their times, too
            listed = list(VideoReader(tmp_path / name))
            assert score(listed, knowing(filmed(at), at)).camera == pytest.approx(found.camera)
        assert "pan_x" not in expected or found.shake < 0.2


def test_clips_one_after_the_other_and_two_frames_at_nearly_one_time():
    at = [(100 + 4 * k, 150) for k in range(40)]
    one_by_one = [as_frame(image, k % 20 / 12, k) for k, image in enumerate(filmed(at))]
    found = score(one_by_one, knowing(filmed(at), at))
    assert found.pan_x == pytest.approx(-48) and found.seconds == pytest.approx(40 / 12, rel=0.01)
    close = [k / 12 if k % 6 else max(0, (k - 1) / 12 + 0.002) for k in range(40)]
    at_once = [as_frame(image, time, k) for k, (image, time) in enumerate(zip(filmed(at), close))]
    assert score(at_once, knowing(filmed(at), at)).shake < 4, "pixels between two frames"
    with pytest.raises(FleetflowError, match="fps is inf"):
        score(filmed(at), knowing(filmed(at), at), fps=math.inf)


def test_a_long_clip_is_looked_at_up_to_its_end(tmp_path):
    """Sixteen seconds of 10 pictures each, in a file that says 60."""
    frames = filmed([(100 + k % 300, 150) for k in range(160)])
    write_uneven(tmp_path / "long.mkv", [frame[::2, ::2] for frame in frames], [k / 10 for k in range(160)])
    row, _ = row_of(tmp_path / "long.mkv", lambda a, b: np.zeros((*a.shape[:2], 2)))
    assert row["problem"] is None and row["pairs"] == 64 and row["seconds"] == pytest.approx(16, rel=0.01), row


def test_what_is_blurred_is_less_sharp():
    at = [(3 * k, 0) for k in range(4)]
    fine = Image.fromarray(np.random.default_rng(6).integers(0, 256, (72, 140, 3)).astype(np.uint8)).resize((280, 144))
    frames = [np.asarray(fine)[:, x : x + WIDTH].copy() for x, _ in at]
    sharp = score(frames, knowing(frames, at), fps=FPS).sharpness
    blurred = [np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(3))) for frame in frames]
    assert score(blurred, knowing(blurred, at), fps=FPS).sharpness < 0.7 * sharp


def test_motion_that_the_pictures_do_not_show_does_not_count():
    """Noise on a plain surface, and a network that sees motion in it."""
    noise = np.random.default_rng(4)
    frames = [np.clip(noise.normal(90, 8, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8) for _ in range(6)]
    found = score(frames, lambda a, b: np.full((HEIGHT, WIDTH, 2), 3.0), fps=FPS)
    assert found.kind == "static" and found.camera < 1


def test_a_long_video_is_sought(tmp_path):
    at = [(100 + k % 300, 150) for k in range(16 * 12)]
    with VideoWriter(tmp_path / "long.mp4", 12) as writer:
        for frame in filmed(at):
            writer.write(frame[::2, ::2])
    row, picture = row_of(tmp_path / "long.mp4", lambda a, b: np.zeros((*a.shape[:2], 2)))
    assert row["problem"] is None and row["seconds"] == pytest.approx(16) and row["pairs"] == 64
    assert row["looked"] == pytest.approx(4 * 17 / 12, abs=0.01) and picture.shape == (144, 256, 3)
    assert caption(row).startswith("long.mp4\ncamera 12")  # which pictures say to a network that sees nothing


def test_slow_and_short_clips_are_looked_at_once(tmp_path):
    """Of a clip of one frame a second the four runs would overlap; of two frames at 25 a second both are looked at."""
    frames = filmed([(100 + k, 150) for k in range(20)])
    for name, fps, count, pairs in (("slow", 1, 20, 19), ("few", 0.5, 8, 7), ("two", 25, 2, 1)):
        path = tmp_path / f"{name}.mp4"
        with VideoWriter(path, fps) as writer:
            for frame in frames[:count]:
                writer.write(frame)
        row, _ = row_of(path, lambda a, b: np.zeros((*a.shape[:2], 2)))
        assert row["problem"] is None and row["pairs"] == pairs and row["cuts"] == 0, (name, row)
    assert score(frames[:2], lambda a, b: np.zeros((*a.shape[:2], 2))).pairs == 1


def test_a_damaged_clip_says_so(tmp_path):
    """Matroska, of which a half can be read; an .mp4 has its table at the end."""
    with av.open(str(tmp_path / "whole.mkv"), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in filmed([(100 + 3 * k, 150) for k in range(60)]):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    whole = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    row, picture = row_of(tmp_path / "cut.mkv", lambda a, b: np.zeros((*a.shape[:2], 2)))
    assert "damaged or cut" in row["problem"] and row["camera"] is None and picture is None


def test_a_table_does_not_replace_a_clip(tmp_path, capsys):
    """FFmpeg knows a clip by its bytes, whatever its name."""
    with VideoWriter(tmp_path / "clip.mp4", 12) as writer:
        for frame in filmed([(100, 100)] * 3):
            writer.write(frame)
    (tmp_path / "clip.mp4").rename(tmp_path / "clip.csv")
    before = (tmp_path / "clip.csv").read_bytes()
    assert cli.main(["motion", str(tmp_path / "clip.csv"), "-o", str(tmp_path / "clip.csv"), "-m", "dis"]) == 1
    assert "is read by this command" in capsys.readouterr().err and (tmp_path / "clip.csv").read_bytes() == before


def test_names_that_are_not_utf8_are_written(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_table(tmp_path / "t.parquet", [{"clip": "bad\udcff.mkv", "camera": 1.0}])
    assert parquet.read_table(tmp_path / "t.parquet").to_pylist() == [{"clip": "bad\\xff.mkv", "camera": 1.0}]


def test_tables(tmp_path):
    rows = [{"clip": "a", "camera": 1.23456789, "period": math.nan, "cuts": 2}]
    write_table(tmp_path / "t.csv", rows)
    assert list(csv.DictReader(open(tmp_path / "t.csv"))) == [
        {"clip": "a", "camera": "1.23457", "period": "", "cuts": "2"}
    ]
    write_table(tmp_path / "t.json", rows)
    assert json.loads((tmp_path / "t.json").read_text()) == [
        {"clip": "a", "camera": 1.23457, "period": None, "cuts": 2}
    ]
    with pytest.raises(FleetflowError, match="expected .csv, .json, .parquet"):
        write_table(tmp_path / "t.txt", rows)
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the batch extra")
    write_table(tmp_path / "t.parquet", rows)
    assert parquet.read_table(tmp_path / "t.parquet").to_pylist()[0]["cuts"] == 2


def test_the_command(tmp_path, capsys):
    with VideoWriter(tmp_path / "clips" / "a.mp4", 12) as writer:
        for frame in filmed([(300 + 3 * k, 150) for k in range(4)]):
            writer.write(frame)
    (tmp_path / "clips" / "b.mp4").write_text("no video")
    words = [
        str(tmp_path / "clips"),
        "-o",
        str(tmp_path / "m.csv"),
        "--sheet",
        str(tmp_path / "m.png"),
        "--threads",
        "1",
    ]
    assert cli.main(["motion", *words]) == 1
    assert "1 of 2 clips could not be scored" in capsys.readouterr().err
    good, bad = csv.DictReader(open(tmp_path / "m.csv"))
    assert good["kind"] == "camera" and float(good["pan_x"]) == pytest.approx(-36, rel=0.2) and not good["problem"]
    assert "b.mp4" in bad["problem"] and not bad["camera"]
    assert Image.open(tmp_path / "m.png").size[0] > 500
    assert cli.main(["motion", str(tmp_path), "-o", str(tmp_path / "m.txt")]) == 1


def test_clips_side_by_side_give_the_same_table(tmp_path):
    for number in range(3):
        with VideoWriter(tmp_path / "clips" / f"{number}.mp4", 12) as writer:
            for frame in filmed([(300 + (number + 1) * k, 150) for k in range(5)]):
                writer.write(frame)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            words = [str(tmp_path / "clips"), "-o", str(tmp_path / f"{count}.csv"), "--threads", str(count)]
            assert cli.main(["motion", *words]) == 0
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "1.csv").read_text() == (tmp_path / "2.csv").read_text()
    rows = list(csv.DictReader(open(tmp_path / "2.csv")))
    pans = [float(row["pan_x"]) for row in rows]
    assert [row["clip"][-5] for row in rows] == ["0", "1", "2"] and pans[0] > pans[1] > pans[2]


def test_a_sheet_has_rows_of_six():
    sheet = contact_sheet([np.zeros((9, 16, 3), np.uint8)] * 7 + [None], ["name\nfigures"] * 8, width=96)
    assert sheet.shape[1] == 6 * 104 + 8 and (sheet[8:60, 8:100] == 0).all() and (sheet[-8:] == 255).all()


def shifted(picture: Image.Image, x: float) -> np.ndarray:
    """uint8 [HEIGHT, WIDTH, 3]: a window of a larger picture, x pixels further to the right."""
    window = picture.transform(
        (WIDTH, HEIGHT), Image.Transform.AFFINE, (1, 0, 20 + x, 0, 1, 10), Image.Resampling.BICUBIC
    )
    return np.asarray(window)


def test_a_slow_camera_in_noise_shows_over_several_pairs():
    generator, pace, count = np.random.default_rng(8), 0.1, 12
    coarse = Image.fromarray(generator.integers(100, 130, (20, 32, 3)).astype(np.uint8))
    scene = coarse.resize((WIDTH + 40, HEIGHT + 20), Image.Resampling.BICUBIC)
    noise = generator.normal(0, 8, (count, HEIGHT, WIDTH, 3))
    frames = [np.clip(shifted(scene, pace * k) + noise[k], 0, 255).astype(np.uint8) for k in range(count)]
    planes = contrasts(frames)
    flows = torch.tensor((-pace, 0.0)).view(1, 2, 1, 1).expand(count - 1, 2, HEIGHT, WIDTH)
    assert all(np.array_equal(fit, np.eye(3)) for fit in fit_cameras(flows[:1], planes[:2]))
    assert [fit[0, 2] for fit in fit_cameras(flows, planes)] == pytest.approx([-pace] * (count - 1), abs=0.001)


def test_a_flow_out_of_the_picture_is_no_object():
    planes = contrasts(filmed([(300, 150)] * 6))
    flows = torch.zeros(5, 2, HEIGHT, WIDTH)
    flows[:, 0, :, -76:] = 40
    assert float(moved_beside(flows, [np.eye(3)] * 5, planes).norm(dim=1).mean()) < 0.1  # pixels; the flow has 12


@pytest.mark.parametrize("large_in_front", [True, False])
def test_what_covers_another_motion_is_not_the_camera(large_in_front):
    """The left three quarters of the picture move by 3 pixels, the rest by -1: the camera is what is covered."""
    left, right = wide(1), wide(2)
    frames, edges = [], []
    for k in range(10):
        # where the left part ends: it is moved along, or is covered from the right
        edge = 180 + 3 * k if large_in_front else 200 - k
        frame = right[:HEIGHT, 300 + k : 300 + k + WIDTH].copy()
        frame[:, :edge] = left[:HEIGHT, 300 - 3 * k : 300 - 3 * k + edge]
        frames.append(frame)
        edges.append(edge)
    flows = torch.zeros(9, 2, HEIGHT, WIDTH)
    for k, edge in enumerate(edges[:9]):
        flows[k, 0, :, :edge], flows[k, 0, :, edge:] = 3, -1
    cameras = fit_cameras(flows, contrasts(frames))
    expected = -1 if large_in_front else 3
    assert np.allclose([camera[0, 2] for camera in cameras], expected, atol=0.1)


def test_what_lies_behind_is_still_where_the_pictures_do_not_show_that_it_moves():
    """A plate before a plain wall, on which the network continues a part of the plate's motion."""
    frames, flows = [], torch.zeros(9, 2, HEIGHT, WIDTH)
    noise = np.random.default_rng(0)
    for k in range(10):
        frame = np.full((HEIGHT, WIDTH, 3), 128.0) + noise.normal(0, 2, (HEIGHT, WIDTH, 1))
        edge = 140 + 4 * k
        frame[:, :edge] = wide(1)[:HEIGHT, 300 - 4 * k : 300 - 4 * k + edge]
        frames.append(frame.clip(0, 255).astype(np.uint8))
        if k < 9:
            flows[k, 0, :, :edge], flows[k, 0, :, edge:] = 4, 1.5
    assert all(np.array_equal(camera, np.eye(3)) for camera in fit_cameras(flows, contrasts(frames)))


def off(motions, true, size=(144, 256)) -> list[float]:
    """Mean pixels between motions and the true ones."""
    apart = affine_flows(motions, size) - affine_flows(true, size)
    return apart.norm(dim=1).mean((1, 2)).tolist()


def test_a_camera_is_told_better_by_the_pictures_than_by_the_flow():
    """A pan, zoom and roll that is off by a pixel and more is found again, though a square moves by itself; so is its."""
    size = (144, 256)
    true = [similarity((0.01, 0.02, 2.5, -1.5), size), similarity((-0.02, 0.0, -1.0, 3.0), size)]
    first = contrasts([wide(2)[:144, :256], wide(3)[:144, :256]])
    last = warp(first, affine_flows([np.linalg.inv(each) for each in true], size))
    last[..., 30:114, 60:150] = first[..., 30:114, 60:150]
    given = [each @ similarity((0, 0.005, 0.9, -1.2), size) for each in true]
    assert min(off(given, true)) > 1
    assert max(off(aligned(given, first, last), true)) < 0.05
    square = torch.zeros(2, 1, *size, dtype=torch.bool)
    square[..., 34:110, 64:146] = True
    near = [similarity((0, 0.01, 1.2, -0.8), size)] * 2
    assert max(off(aligned(near, first, last, square), [np.eye(3)] * 2)) < 0.2
    square[..., 60:, :] = False  # fewer pixels than four numbers should be fitted to
    assert aligned(near, first, last, square) == near


def test_an_odd_size_zooms_about_its_middle():
    size = (145, 257)
    true = [similarity((0.2, 0, 0.5, 0.5), size)]
    first = contrasts([wide(2)[:145, :257]])
    last = warp(first, affine_flows([np.linalg.inv(each) for each in true], size))
    assert off(aligned([true[0] @ similarity((0, 0, 0.7, 0.7), size)], first, last), true, size)[0] < 0.03


def test_noise_moves_no_camera():
    """Pictures that are not clearly more alike under another motion leave the one that is given."""
    generator = np.random.default_rng(0)
    pictures = [generator.integers(100, 110, (144, 256, 3)).astype(np.uint8) for _ in range(3)]
    planes, given = contrasts(pictures), [similarity((0, 0, 0.3, 0.1), (144, 256)), np.eye(3)]
    for before, after in zip(given, aligned(given, planes[:-1], planes[1:])):
        assert np.array_equal(before, after)
    flat = torch.zeros(2, 1, 144, 256)
    assert all(np.array_equal(*both) for both in zip(given, aligned(given, flat, flat)))
