"""Points along clips: chains over gaps, occlusion and return, the scores of TAP-Vid by hand."""

import numpy as np
import pytest
import torch

from fleetflow import FleetflowError
from fleetflow.cli.track import track as command
from fleetflow.data.generate import dressed
from fleetflow.data.generate.clip import places, tracks
from fleetflow.data.generate.draw import Draw
from fleetflow.data.generate.filmed import watch_world
from fleetflow.data.generate.render import render
from fleetflow.data.generate.textures import SIDE, bank
from fleetflow.evaluation.tap_vid import tap_vid
from fleetflow.io.tracks import read_points
from fleetflow.io.video import VideoWriter, comment_of
from fleetflow.motion.tracks import follow, grid, track

HEIGHT, WIDTH = 24, 60


def scene(number: int) -> np.ndarray:
    """Frame `number` of a still ground before which a bar of 6 columns moves by 3 px a frame; its number in pixel 0."""
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    frame[0, 0, 0] = number
    return frame


def bar(number: int) -> np.ndarray:
    x = np.arange(WIDTH)[None].repeat(HEIGHT, 0)
    return (x >= 3 * number) & (x < 3 * number + 6)


def exact(frame1: np.ndarray, frame2: np.ndarray) -> np.ndarray:
    """The true flow of the bar and the ground."""
    a, b = int(frame1[0, 0, 0]), int(frame2[0, 0, 0])
    flow = np.zeros((HEIGHT, WIDTH, 2), np.float32)
    flow[bar(a), 0] = 3 * (b - a)
    return flow


def test_a_point_behind_a_bar_is_hidden_and_comes_back():
    frames = [scene(k) for k in range(12)]
    points = np.array([[20.0, 10.0], [2.0, 12.0], [50.0, 5.0]])  # the bar passes over it, is on the bar, stays free
    found = track(frames, points, exact)
    truth = np.repeat(points[:, None], 12, 1)
    truth[1, :, 0] += 3 * np.arange(12)
    hidden = np.array([bar(k)[10, 20] for k in range(12)])
    assert (found.visible[0] == ~hidden).all() and hidden.sum() == 2
    assert found.visible[1:].all()
    np.testing.assert_allclose(found.points[0][~hidden], truth[0][~hidden], atol=1e-4)
    np.testing.assert_allclose(found.points[1:], truth[1:], atol=1e-4)
    alone = track(frames, points, exact, gaps=(1,))
    assert not alone.visible[0, hidden.argmax() :].any(), "frame by frame it is lost behind the bar"
    assert np.isinf(found.uncertainty[0][hidden]).all() and np.isfinite(found.uncertainty[found.visible]).all()


def test_long_gaps_drift_less():
    """A network that is off by 0.2 px in each pair: eight frames at once are better than eight times one."""

    def off(frame1, frame2):
        return exact(frame1, frame2) + np.float32([0.2, 0]) * np.sign(float(frame2[0, 0, 0]) - float(frame1[0, 0, 0]))

    frames, point = [scene(k) for k in range(25)], np.array([[50.0, 20.0]])
    short, long = track(frames[:14], point, off, gaps=(1,)), track(frames[:14], point, off)
    drift = [abs(found.points[0, -1, 0] - 50) for found in (short, long)]
    assert drift[0] == pytest.approx(13 * 0.2, abs=1e-3) and drift[1] <= 3 * 0.2 + 1e-3  # 8 + 4 + 1


def test_points_may_begin_later_and_frames_are_let_go():
    frames = iter([scene(k) for k in range(6)])
    moments = [moment for _, moment in follow(frames, np.array([[0, 50, 3], [4, 13, 3]]), exact)]
    assert [moment.visible.tolist() for moment in moments] == [[True, k >= 4] for k in range(6)]
    assert moments[2].points[1].tolist() == [13, 3] and moments[5].points[1].tolist() == [16, 3]


def test_grid_lies_evenly():
    points = grid((10, 21), 5)
    assert points.tolist()[:2] == [[0, 2], [5, 2]] and len(points) == 5 * 2
    assert grid((7, 7), 100).tolist() == [[3, 3]]


def test_scores_of_tap_vid_by_hand():
    truth = np.zeros((1, 5, 2))
    seen = np.array([[True, True, True, False, False]])
    points = truth.copy()
    points[0, 1, 0] = 3  # within 4, 8, 16
    perfect = tap_vid(truth, seen, truth, seen)
    assert perfect == (1, 1, 1)
    found = tap_vid(points, np.array([[True, True, True, True, False]]), truth, seen)
    assert found.position_accuracy == pytest.approx((2 * 0.5 + 3 * 1) / 5)
    # 1, 2 px: one hit; two visible; false alarms: the one off and the hidden one. 4, 8, 16: two hits, one false alarm
    assert found.average_jaccard == pytest.approx((2 * 1 / (2 + 2) + 3 * 2 / (2 + 1)) / 5)
    assert found.occlusion_accuracy == pytest.approx(3 / 4)
    scaled = tap_vid(points, seen, truth, seen, size=(256, 1024))  # 3 px of 1024 are 0.75 of 256
    assert scaled == (1, 1, 1)
    assert tap_vid(points, seen, truth, seen, queried=np.array([1])) == (1, 1, 1), "frames up to the query do not count"
    with pytest.raises(FleetflowError, match="expected"):
        tap_vid(points, seen[:, :4], truth, seen)


def test_true_tracks_of_generated_clips_follow_their_flow():
    size, generator = (48, 64), torch.Generator().manual_seed(5)
    textures = bank(torch.rand(2, 3, SIDE, SIDE, generator=generator), 0)
    world, outlines = dressed(watch_world(Draw(1, generator), *size), textures, generator)
    where = places(world, 4, 0.2 * torch.arange(4.0))
    points = torch.from_numpy(grid(size, 2)).floor()
    paths, seen = tracks(world, where, outlines, points, size)
    assert paths.shape == (len(points), 4, 2) and seen[:, 0].all() and not seen.all()
    back = torch.linalg.inv(where[0])
    moved = world._replace(
        motion=where[1] @ back, outline=world.outline @ back, surface=world.surface @ back,
        wobble=torch.zeros_like(world.wobble),
    )  # fmt: skip
    pair = render(moved, textures, outlines, *size)
    front = torch.nn.functional.pad(pair.front1.float(), (2, 2, 2, 2), mode="replicate").unfold(1, 5, 1).unfold(2, 5, 1)
    x, y = points.long().unbind(1)
    within = (front.amax((3, 4)) == front.amin((3, 4)))[0, y, x]  # at outlines the picture is a mixture
    assert 0.4 < within.float().mean() < 1 and (paths[within, 1] - paths[within, 0]).abs().max() > 0.5
    np.testing.assert_allclose((paths[:, 1] - paths[:, 0])[within], pair.flow[0, :, y, x].T[within], atol=2e-3)
    assert (seen[:, 1] == ~pair.occluded[0, y, x])[within].float().mean() > 0.98


def test_wrong_points_and_gaps_are_named():
    frames = [scene(0), scene(1)]
    for call, words in (
        (lambda: track(frames, np.zeros((3, 4)), exact), r"points is \[3, 4\]"),
        (lambda: track(frames, np.array([[1.0, 2.0], [np.nan, 2.0]]), exact), "point 1 is nan, 2; expected finite"),
        (lambda: track(frames, [[1, 2], [3]], exact), "points is a list .*; expected numbers"),
        (lambda: track([None, None], np.zeros((1, 2)), exact), "the picture is None"),
        (lambda: track(frames, np.array([[70.0, 2.0]]), exact), "outside the picture"),
        (lambda: track(frames, np.zeros((1, 2)), exact, gaps=(2, 4)), "increase from 1"),
        (lambda: track([], np.zeros((1, 2)), exact), "no frame"),
        (lambda: track(frames, np.array([[2.0, 5, 5]]), exact), "begins in frame 2, but the clip has 2"),
        (lambda: track(frames, np.array([[-1.0, 5, 5]]), exact), "begins in frame -1; expected 0, 1"),
        (lambda: track(frames, np.array([[0.5, 5, 5]]), exact), "begins in frame 0.5; expected 0, 1"),
        (lambda: grid((5, 5), 0), "1 pixel or more"),
    ):
        with pytest.raises(FleetflowError, match=words):
            call()


def test_frames_are_what_the_network_takes():
    begins = np.array([[20.0, 8.0]])
    gray = [scene(time)[..., 0] for time in range(3)]
    found = track(gray, begins, lambda a, b: exact(np.dstack([a] * 3), np.dstack([b] * 3)))
    np.testing.assert_array_equal(found.points, track([scene(time) for time in range(3)], begins, exact).points)


def test_the_points_asked_for_are_not_replaced(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("1 2\n")
    with pytest.raises(FleetflowError, match="holds the points"):
        command(tmp_path / "clip.mp4", output=path, points=path)
    assert path.read_text() == "1 2\n"


def test_a_film_that_is_not_ours_is_not_replaced(tmp_path):
    film, video = tmp_path / "clip.mp4", tmp_path / "video.mp4"
    for path in (film, video):
        with VideoWriter(path, 10) as writer:
            for _ in range(2):
                writer.write(np.zeros((16, 16, 3), np.uint8))
    (tmp_path / "clip.csv").write_text("somebody's")
    before = film.read_bytes()
    for output in ("clip.npz", "clip.csv"):
        with pytest.raises(FleetflowError, match="is not ours"):
            command(video, output=tmp_path / output)
    assert film.read_bytes() == before and (tmp_path / "clip.csv").read_text() == "somebody's"
    for output in ("own.npz", "own.csv", "own.npz"):  # the overlay of a run before is replaced
        command(video, output=tmp_path / output)
    assert comment_of(tmp_path / "own.mp4") and not comment_of(film) and not comment_of(tmp_path / "clip.csv")


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("\ufeff1,2\n", [[1, 2]]),
        ("\ufeffx;y\r\n1;2\r\n", [[1, 2]]),
        ("# by hand\nframe x y\n\n3 1e1 2\n", [[3, 10, 2]]),
        ("nan 3\n", [[np.nan, 3]]),
    ],
)
def test_points_as_others_write_them(text, rows, tmp_path):
    path = tmp_path / "points.csv"
    path.write_bytes(text.encode())
    np.testing.assert_array_equal(read_points(path), rows)


@pytest.mark.filterwarnings("error")
def test_a_file_without_points_is_one_line(tmp_path):
    for text in ("", "x,y\n", "# nothing\n"):
        (tmp_path / "points.csv").write_text(text)
        with pytest.raises(FleetflowError, match="expected lines of x y"):
            read_points(tmp_path / "points.csv")
