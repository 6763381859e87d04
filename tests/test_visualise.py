"""Pictures of flow: the Middlebury colors byte for byte, one scale for a clip, legends, arrows, errors, rows."""

import colorsys
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fleetflow.types import FleetflowError
from fleetflow.visualise import (
    ERROR_BOUNDS,
    ERROR_COLORS,
    SMALLEST_LEGEND_PICTURE,
    UNKNOWN_COLOR,
    arrows,
    clip_scale,
    color_wheel,
    error_map,
    flow_to_color,
    full_scale,
    occlusion_picture,
    robust_scale,
    side_by_side,
    streamlines,
    trails,
    with_legend,
)

SHARED = Path(__file__).resolve().parents[2] / "shared"
SIZES = [(1, 1), (1, 7), (5, 1), (2, 3), (33, 47), (95, 200), (96, 96), (97, 131), (110, 600)]
BLACK = (0, 0, 0)


def field(u, v, size=(4, 5)):
    return np.broadcast_to(np.array([u, v], np.float32), (*size, 2)).copy()


def random_flow(size, seed=0, spread=5.0):
    return np.random.default_rng(seed).normal(0, spread, (*size, 2)).astype(np.float32)


def random_picture(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def first_color(flow, *arguments, **settings):
    return tuple(flow_to_color(flow, *arguments, **settings)[0, 0].tolist())


# The wheel and the colors of flow


@pytest.fixture(scope="module")
def golden():
    path = SHARED / "golden" / "flow_color.npz"
    if not path.exists():
        pytest.skip("the reference colors are not next to the repository (../shared/golden/flow_color.npz)")
    with np.load(path) as arrays:
        return dict(arrays)


def test_wheel_equals_the_reference(golden):
    np.testing.assert_array_equal(color_wheel(), golden["colorwheel"])


def test_colors_equal_the_reference_byte_for_byte(golden):
    flow = golden["flow"]
    np.testing.assert_array_equal(flow_to_color(flow), golden["rgb"])
    np.testing.assert_array_equal(flow_to_color(flow, full_scale(flow)), golden["rgb"])
    slow = np.hypot(flow[..., 0], flow[..., 1]) / np.float32(5) <= 1
    found = flow_to_color(flow, 5.0)
    np.testing.assert_array_equal(found[slow], golden["uv_raw"][slow])  # the reference dims what is faster than that
    assert 0 < slow.mean() < 0.9 and (found[~slow].min(-1) == 0).all()  # here it is fully saturated
    np.testing.assert_array_equal(flow_to_color(np.clip(flow, 0, 5)), golden["rgb_clip5"])
    np.testing.assert_array_equal(flow_to_color(np.zeros((4, 5, 2), np.float32)), golden["zero_rgb"])


def test_wheel_by_hand():
    wheel = color_wheel()
    assert wheel.shape == (55, 3) and wheel.dtype == np.uint8
    corners = {
        0: (255, 0, 0),
        15: (255, 255, 0),
        21: (0, 255, 0),
        25: (0, 255, 255),
        36: (0, 0, 255),
        49: (255, 0, 255),
    }
    between = {1: (255, 17, 0), 14: (255, 238, 0), 16: (213, 255, 0), 18: (128, 255, 0), 22: (0, 255, 63)}
    between |= {26: (0, 232, 255), 31: (0, 116, 255), 37: (19, 0, 255), 42: (117, 0, 255), 54: (255, 0, 43)}
    for place, color in (corners | between).items():
        assert tuple(wheel[place].tolist()) == color, place


@pytest.mark.parametrize(
    "u, v, expected",
    [
        (10, 0, (255, 0, 0)),  # right: wheel 0
        (-10, 0, (0, 209, 255)),  # left: wheel 27
        (0, 10, (255, 229, 0)),  # down: wheel 13.5, between (255, 221, 0) and (255, 238, 0), rounded down
        (0, -10, (88, 0, 255)),  # up: wheel 40.5, between (78, 0, 255) and (98, 0, 255)
        (5, 0, (255, 127, 127)),  # half the scale: half way to white
        (-5, 0, (127, 232, 255)),
        (20, 0, (255, 0, 0)),  # beyond the scale: as at the scale
        (-1000, 0, (0, 209, 255)),
        (0, 0, (255, 255, 255)),
    ],
)
def test_pixels_by_hand(u, v, expected):
    assert first_color(field(u, v), 10) == expected


@pytest.mark.parametrize(
    "u, expected",
    [(10, (255, 0, 0)), (5, (127, 0, 0)), (0, (0, 0, 0)), (-5, (0, 104, 127)), (20, (255, 0, 0))],
)
def test_dark_background_by_hand(u, expected):
    assert first_color(field(u, 0), 10, background="dark") == expected


def test_opposite_motions_have_opposite_hues_and_the_hue_turns_one_way():
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    flow = np.stack([np.cos(angles), np.sin(angles)], -1)[None].astype(np.float32)
    flow[0, 0] = (1, 0)
    hues = np.array([colorsys.rgb_to_hsv(*color)[0] for color in flow_to_color(flow, 1.01)[0] / 255]) * 360
    assert hues[0] < 5 and all(np.diff(hues) > 0)  # from red at the right, never back
    opposite = np.abs(hues[:36] - hues[36:])
    assert opposite.min() > 100 and opposite.max() < 260


def test_saturation_grows_with_speed_and_hue_stays():
    speeds = np.linspace(0.05, 1, 20, dtype=np.float32) * 8
    flow = np.stack([speeds * 0.6, speeds * 0.8], -1)[None]
    colors = np.array([colorsys.rgb_to_hsv(*color) for color in flow_to_color(flow, 8.01)[0] / 255])
    assert all(np.diff(colors[:, 1]) > 0) and colors[-1, 1] > 0.97
    assert np.ptp(colors[4:, 0]) < 0.02


def test_chunks_leave_no_seam():
    flow = random_flow((300, 301))
    whole = flow_to_color(flow, 7)
    for row in (0, 54, 55, 108, 299):
        np.testing.assert_array_equal(flow_to_color(flow[row : row + 1], 7), whole[row : row + 1])


def test_layout_and_type_of_the_flow_do_not_matter():
    flow = np.round(random_flow((20, 30))) + 0.0  # no negative zeros: integers have none
    expected = flow_to_color(flow, 9)
    planes = np.ascontiguousarray(flow.transpose(2, 0, 1))
    np.testing.assert_array_equal(flow_to_color(planes.transpose(1, 2, 0), 9), expected)
    np.testing.assert_array_equal(flow_to_color(flow.astype(np.float64), 9), expected)
    np.testing.assert_array_equal(flow_to_color(flow.astype(np.int16), 9), expected)
    flow.setflags(write=False)
    np.testing.assert_array_equal(flow_to_color(flow, 9), expected)


# Scales


def test_tiny_flow_is_not_amplified():
    noise = random_flow((40, 50), spread=0.01)
    assert full_scale(noise) == pytest.approx(1.0, abs=1e-4)
    assert flow_to_color(noise).min() > 240  # nearly white
    assert flow_to_color(noise, background="dark").max() < 15
    assert robust_scale(noise) == 1.0
    assert flow_to_color(noise, 0.01).min() == 0  # only who asks for it gets it


def test_own_scale_is_the_largest_known_motion():
    flow = field(3, 4)
    flow[0, 0] = (30, 40)
    assert full_scale(flow) == pytest.approx(50, abs=1e-4)
    valid = np.ones((4, 5), bool)
    valid[0, 0] = False
    assert full_scale(flow, valid) == pytest.approx(5, abs=1e-4)
    flow[0, 0] = (np.nan, np.inf)
    assert full_scale(flow) == pytest.approx(5, abs=1e-4)
    np.testing.assert_array_equal(flow_to_color(flow), flow_to_color(flow, 5 + 1e-5))


def test_one_scale_gives_one_motion_one_color_in_the_whole_clip():
    clip = np.stack([field(1, 2, (6, 8)), field(1, 2, (6, 8)), field(1, 2, (6, 8))])
    clip[1, 3:] *= 6  # something fast enters in the second frame
    scale = robust_scale(clip)
    same = [first_color(flow, scale) for flow in clip]
    assert same[0] == same[1] == same[2]
    assert first_color(clip[0]) != first_color(clip[1])  # what a scale for each frame would do
    assert scale == max(robust_scale(flow) for flow in clip) == 15.0


@pytest.mark.parametrize(
    "length, expected",
    [(0, 1), (0.3, 1), (1, 1), (1.01, 1.5), (1.9, 2), (2, 2), (2.5, 3), (3, 3), (4, 5), (6, 7), (7.1, 10), (10, 10)]
    + [(11, 15), (16, 20), (21, 30), (50, 50), (51, 70), (99, 100), (101, 150), (1234, 1500)],
)
def test_robust_scale_is_readable(length, expected):
    assert robust_scale(field(length, 0)) == pytest.approx(expected)
    assert robust_scale(field(-0.6 * length, 0.8 * length)) == pytest.approx(expected)


def test_one_bad_pair_does_not_make_a_clip_pale():
    assert clip_scale([5, 5, 7, 500]) == 7 and clip_scale([3, 5, 900]) == 5
    assert clip_scale([5.0] * 12 + [100, 200]) == 5 and clip_scale([2, 9]) == 9 and clip_scale([4]) == 4
    with pytest.raises(FleetflowError, match="got no scale"):
        clip_scale([])


def test_robust_scale_ignores_few_outliers_and_the_unknown():
    flow = field(2, 0, (50, 50))
    flow[0, :10] = 500
    flow[1:20, 5] = np.nan
    flow[20:40, 6] = 1e10
    assert robust_scale(flow) == 2.0
    assert robust_scale(flow, np.zeros((50, 50), bool)) == 1.0
    flow[:2] = 500
    assert robust_scale(flow) == 1000.0


# The unknown


@pytest.mark.parametrize("background", ["light", "dark"])
def test_unknown_pixels_have_their_own_color(background):
    flow, valid = random_flow((6, 7)), np.ones((6, 7), bool)
    flow[0, 0], flow[1, 1, 0], flow[2, 2, 1], flow[3, 3] = np.nan, np.inf, -np.inf, 1.7e9
    valid[4, 4] = False
    picture = flow_to_color(flow, 5, valid=valid, background=background)
    unknown = (picture == UNKNOWN_COLOR[background]).all(-1)
    assert {tuple(place) for place in np.argwhere(unknown).tolist()} == {(k, k) for k in range(5)}
    clean = np.where(unknown[..., None], 0, flow)
    np.testing.assert_array_equal(picture[~unknown], flow_to_color(clean, 5, background=background)[~unknown])


def test_nothing_known_is_drawn_without_complaint():
    flow = np.full((3, 4, 2), np.nan, np.float32)
    assert not flow_to_color(flow).any()
    assert not error_map(field(0, 0, (3, 4)), flow).any()
    assert full_scale(flow) == pytest.approx(1, abs=1e-4)


# The legend


def test_legend_is_a_wheel_in_the_corner():
    picture = np.full((240, 320, 3), 128, np.uint8)
    drawn = with_legend(picture, 10)
    rows, columns = np.nonzero((drawn != picture).any(-1))
    assert rows.min() > 160 and columns.min() > 240 and rows.max() < 239 and columns.max() < 319
    corner = drawn[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].astype(int)
    diameter, border = 40, 4
    middle = (corner.shape[1] // 2, border + diameter // 2)
    for u, v in [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (0, 0)]:
        reach = 12 / max(math.hypot(u, v), 1)
        x, y = middle[0] + round(u * reach), middle[1] + round(v * reach)
        expected = flow_to_color(field(x + 0.5 - middle[0], y + 0.5 - middle[1]), diameter / 2)[0, 0]
        assert np.abs(corner[y, x] - expected).max() <= 12, (u, v)


def test_legend_writes_the_scale():
    picture = random_picture((240, 320))
    ten, seven = with_legend(picture, 10), with_legend(picture, 7)
    rows, columns = np.nonzero((ten != seven).any(-1))
    assert len(rows) > 10 and rows.min() > 210  # only the number differs, under the wheel
    np.testing.assert_array_equal(ten, with_legend(picture, 10.0))
    assert (with_legend(picture, 10, background="dark") != ten).any()


def test_small_pictures_have_no_legend():
    for size in [(1, 1), (SMALLEST_LEGEND_PICTURE - 1, 900), (900, SMALLEST_LEGEND_PICTURE - 1)]:
        picture = random_picture(size)
        np.testing.assert_array_equal(with_legend(picture, 3), picture)
    side = SMALLEST_LEGEND_PICTURE
    changed = (with_legend(picture := random_picture((side, side)), 1500) != picture).any(-1)
    assert 0.05 < changed.mean() < 0.35


# Arrows


def one_arrow(u, v, **settings):
    """Returns where one arrow from the middle of a gray picture changes it."""
    image = np.full((101, 101, 3), 100, np.uint8)
    return (arrows(image, field(u, v, (101, 101)), every=101, **settings) != image).any(-1)


def test_arrow_goes_from_the_pixel_to_where_it_moves():
    changed = one_arrow(30, 0)
    rows, columns = np.nonzero(changed)
    assert 46 <= columns.min() <= 50 and 79 <= columns.max() <= 83
    assert rows.min() + rows.max() == 100 and np.ptp(rows) < 15
    thickness = changed.sum(0)
    assert thickness[65:81].max() > thickness[50:60].max() + 1  # the head is at the far end
    for turned, expected in [(one_arrow(-30, 0), changed[:, ::-1]), (one_arrow(0, 30), changed.T)]:
        assert (turned != expected).sum() <= 6 < changed.sum() / 15  # but for single pixels of the rim
    assert np.nonzero(one_arrow(15, 0, scale=2))[1].max() == columns.max()


def test_arrows_leave_out_the_unknown_and_mark_the_still():
    image = np.full((64, 64, 3), 100, np.uint8)
    for unknown in (np.nan, np.inf, 1e10):
        np.testing.assert_array_equal(arrows(image, field(unknown, 0, (64, 64))), image)
    changed = (arrows(image, field(0, 0, (64, 64)), every=16) != image).any(-1)
    assert 16 <= changed.sum() <= 16 * 16  # a dot for each of 4 x 4 points
    assert changed[7, 7] or changed[8, 8]


def test_arrows_are_as_many_as_asked():
    image = np.zeros((60, 90, 3), np.uint8)
    for every, count in [(30, 6), (20, 3 * 5), (10, 6 * 9)]:
        bright = arrows(image, field(0, 0, (60, 90)), every=every).max(-1) > 200
        assert bright.sum() == pytest.approx(count, abs=count * 0.7)
    assert (arrows(image, field(9e8, -9e8, (60, 90)), every=90) != image).any()  # far out of the picture


# Errors, occlusion, rows


def test_error_colors_at_the_bounds():
    assert ERROR_BOUNDS == tuple(0.1875 * 2**k for k in range(9)) and len(ERROR_COLORS) == 10
    truth = field(0, 0, (1, 20))
    flow = truth.copy()
    for place, bound in enumerate(ERROR_BOUNDS):
        flow[0, 2 * place, 0] = np.nextafter(np.float32(bound), np.float32(0))
        flow[0, 2 * place + 1, 1] = -bound
    flow[0, 18:, 0] = 1e6
    steps = [0] + [place for place in range(1, 10) for _ in range(2)] + [9]
    np.testing.assert_array_equal(error_map(flow, truth)[0], np.array(ERROR_COLORS)[steps])
    blue, red = np.array(ERROR_COLORS[:4]), np.array(ERROR_COLORS[6:])
    assert (blue[:, 2] > blue[:, 0]).all() and (red[:, 0] > red[:, 2]).all()


def test_long_motions_are_judged_by_five_per_cent():
    truth = field(200, 0)  # 5 % are 10 px
    assert tuple(error_map(truth + 0.0, truth)[0, 0].tolist()) == ERROR_COLORS[0]
    assert tuple(error_map(field(200, 9.9), truth)[0, 0].tolist()) == ERROR_COLORS[4]
    assert tuple(error_map(field(200, 10.1), truth)[0, 0].tolist()) == ERROR_COLORS[5]


def test_unknown_truth_is_black_and_unknown_flow_is_the_largest_error():
    truth, flow, valid = field(1, 1, (1, 4)), field(1, 1, (1, 4)), np.array([[True, False, True, True]])
    truth[0, 2] = flow[0, 3] = np.nan
    colors = [tuple(color) for color in error_map(flow, truth, valid=valid)[0].tolist()]
    assert colors == [ERROR_COLORS[0], BLACK, BLACK, ERROR_COLORS[9]]


def test_red_share_is_the_fl_of_the_kitti_development_kit():
    folder = SHARED / "data" / "refs" / "kitti_devkit2015"
    if not folder.exists():
        pytest.skip("the example of the KITTI development kit is not next to the repository (../shared/data/refs)")
    cv2 = pytest.importorskip("cv2", reason="16-bit pictures are read with OpenCV here")
    stored = [cv2.imread(str(folder / name), cv2.IMREAD_UNCHANGED) for name in ("flow_est.png", "flow_gt.png")]
    flow, truth = ((part[..., :0:-1].astype(np.float32) - 32768) / 64 for part in stored)
    valid = stored[1][..., 0] > 0
    picture = error_map(flow, truth, valid=valid)
    wrong = np.isin(picture.astype(int) @ (65536, 256, 1), np.array(ERROR_COLORS[5:]) @ (65536, 256, 1))
    assert 100 * wrong.sum() / valid.sum() == pytest.approx(20.688, abs=0.001)


def test_occlusion_picture_tints_only_the_occluded():
    image, occluded = random_picture((9, 12)), np.zeros((9, 12), bool)
    occluded[2:5, 3:7] = True
    picture = occlusion_picture(image, occluded).astype(int)
    assert (np.ptp(picture[~occluded], axis=-1) == 0).all()  # gray
    assert (picture[occluded][:, 0] > picture[occluded][:, 1:].max(-1) + 40).all()  # red
    assert np.corrcoef(picture[~occluded][:, 0], image[~occluded] @ (0.299, 0.587, 0.114))[0, 1] > 0.999


def test_side_by_side_keeps_pictures_and_heights():
    left, right = random_picture((80, 60)), random_picture((40, 50), seed=1)
    row = side_by_side(left, right)
    gap = row.shape[1] - 60 - 100  # the second is enlarged to the height of the first
    assert row.shape[0] == 80 and 1 <= gap <= 16 and row.dtype == np.uint8
    np.testing.assert_array_equal(row[:, :60], left)
    assert (row[:, 60 : 60 + gap] == 255).all()
    shown = np.array(Image.fromarray(row[:, 60 + gap :]).resize((50, 40), Image.Resampling.BOX)).astype(int)
    assert np.abs(shown - right).mean() < 20
    np.testing.assert_array_equal(side_by_side(left), left)


def test_titles_stand_above_their_pictures():
    pictures = [random_picture((80, 60), seed) for seed in range(3)]
    plain, titled = side_by_side(*pictures), side_by_side(*pictures, titles=("one", "", "a title much too long " * 9))
    strip = titled.shape[0] - plain.shape[0]
    assert 10 < strip < 40
    np.testing.assert_array_equal(titled[strip:], plain)
    inked = (titled[:strip] < 128).all(-1).any(0)
    gap = (plain.shape[1] - 180) // 2
    assert inked[:60].any() and not inked[60 : 120 + 2 * gap].any() and inked[120 + 2 * gap :].any()
    columns = np.flatnonzero(inked[:60])
    assert abs(columns.min() + columns.max() - 59) <= 3  # centered


# Every function


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_function_takes_every_size_and_changes_no_argument(size):
    flow, truth, image = random_flow(size), random_flow(size, 1), random_picture(size)
    mask = image[..., 0] > 99
    before = [array.copy() for array in (flow, truth, image, mask)]
    scale = robust_scale(flow, mask)
    pictures = [
        flow_to_color(flow),
        flow_to_color(flow, scale, valid=mask, background="dark"),
        with_legend(image, scale),
        arrows(image, flow),
        arrows(image, flow, every=3, scale=2.5),
        error_map(flow, truth, valid=mask),
        occlusion_picture(image, mask),
    ]
    for picture in pictures:
        assert picture.shape == (*size, 3) and picture.dtype == np.uint8
        assert not np.shares_memory(picture, image)
    assert side_by_side(*pictures[:2], titles=("a", "b")).shape[1] > 2 * size[1]
    for array, old in zip((flow, truth, image, mask), before, strict=True):
        np.testing.assert_array_equal(array, old)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: flow_to_color(np.zeros((2, 4, 5), np.float32)), r"\[2,4,5\] float32; expected .*\[H, W, 2\]"),
        (lambda: flow_to_color(np.zeros((0, 5, 2), np.float32)), r"\[0,5,2\]"),
        (lambda: flow_to_color(np.zeros((4, 5, 2), complex)), "complex128"),
        (lambda: flow_to_color([[1, 2]]), "a list; expected"),
        (lambda: robust_scale(np.zeros((5, 2), np.float32)), r"\[5,2\]"),
        (lambda: flow_to_color(field(1, 1), 0), "scale is 0; expected pixels over 0"),
        (lambda: flow_to_color(field(1, 1), float("nan")), "scale is nan"),
        (lambda: flow_to_color(field(1, 1), background="gray"), '\'gray\'; expected "light" or "dark"'),
        (lambda: flow_to_color(field(1, 1), valid=np.ones((4, 4), bool)), r"valid is \[4,4\] bool; .*\[4,5\]"),
        (lambda: flow_to_color(field(1, 1), valid=np.ones((4, 5))), r"\[4,5\] float64; .* of bool"),
        (lambda: with_legend(random_picture((99, 99)), -1), "scale is -1"),
        (lambda: with_legend(np.zeros((99, 99, 3)), 1), "float64; expected .* uint8 RGB"),
        (lambda: arrows(random_picture((4, 6)), field(1, 1)), r"flow is \[4,5,2\] .* image \[4,6,3\].*same height"),
        (lambda: arrows(random_picture((4, 5)), field(1, 1), every=0), "every is 0; expected at least 1"),
        (lambda: arrows(random_picture((4, 5)), field(1, 1), scale=0), "scale is 0"),
        (lambda: error_map(field(1, 1), field(1, 1, (5, 4))), "both must have the same height and width"),
        (lambda: error_map(field(1, 1), np.zeros((4, 5))), r"truth is \[4,5\]"),
        (lambda: occlusion_picture(random_picture((4, 5)), np.zeros((4, 5), int)), "occluded is .* of bool"),
        (lambda: side_by_side(), "no picture; expected one or more"),
        (lambda: side_by_side(np.zeros((4, 5), np.uint8)), r"\[4,5\] uint8; expected"),
        (lambda: side_by_side(random_picture((4, 5)), titles=("a", "b")), "2 titles for 1 pictures"),
    ],
)
def test_errors_say_what_was_expected(call, said):
    with pytest.raises(FleetflowError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


def test_a_tensor_is_told_how_to_become_an_array():
    torch = pytest.importorskip("torch")
    with pytest.raises(FleetflowError, match=r"Tensor \[2,4,5\] torch.float32; .*permute\(1, 2, 0\)"):
        flow_to_color(torch.zeros(2, 4, 5))


def test_streamlines_follow_the_field():
    image = np.full((90, 120, 3), 200, np.uint8)
    flow = np.zeros((90, 120, 2), np.float32)
    flow[:45, :, 0] = 4
    picture = streamlines(image, flow, every=20)
    drawn = (np.abs(picture.astype(int) - 90) > 20).any(-1)
    rows = drawn[:45].mean(1)
    assert picture.shape == image.shape and (picture[60:] == 90).all(), "nothing moves there: a dimmed picture"
    assert rows[10] > 0.5 and rows[30] > 0.5 and rows[20] == 0, "level lines through the starts"
    with pytest.raises(FleetflowError, match="at least 1 pixel"):
        streamlines(image, flow, every=0)


def test_trails_show_where_points_came_from():
    image = np.zeros((60, 100, 3), np.uint8)
    points = np.stack([np.stack([10 + 8 * np.arange(5), np.full(5, 20.0)], -1), np.full((5, 2), 45.0)])
    visible = np.array([[True] * 5, [True] * 4 + [False]])
    picture = trails(image, points, visible)
    assert picture[20, 42].max() > 200 and picture[20, 12:40].max(-1).min() > 10, "a dot, and a trail"
    assert picture[20, 14].sum() < picture[20, 38].sum(), "which fades"
    assert 0 < picture[43:48, 43:48].sum() < picture[18:23, 40:45].sum() / 2, "a ring where it is hidden"
    with pytest.raises(FleetflowError, match="T of 1 or more"):
        trails(image, points[:, :0], visible[:, :0])
