"""Arithmetic of flows against closed forms: translations, rotations, zooms, and what leaves the picture."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import SLOW

from fleetflow import FleetflowError, motion

SIZE = (40, 56)


def affine(angle: float = 0.0, zoom: float = 1.0, shift: tuple[float, float] = (0.0, 0.0), size=SIZE) -> np.ndarray:
    """[3, 3] turn (degrees) and zoom about the middle of the picture, then a shift."""
    x, y = (size[1] - 1) / 2, (size[0] - 1) / 2
    c, s = zoom * np.cos(np.radians(angle)), zoom * np.sin(np.radians(angle))
    return np.array([[c, -s, x - c * x + s * y + shift[0]], [s, c, y - s * x - c * y + shift[1]], [0, 0, 1]])


def flow_of(matrix: np.ndarray, size=SIZE) -> np.ndarray:
    y, x = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float64)
    points = np.stack((x, y, np.ones_like(x)), -1) @ matrix.T
    return points[..., :2] / points[..., 2:] - np.stack((x, y), -1)


MAPS = {
    "translation": affine(shift=(3.25, -1.5)),
    "rotation": affine(8, shift=(1, 2)),
    "zoom in": affine(-3, 1.2, (-2, 0.5)),
    "zoom out": affine(2, 0.8),
}


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("one", MAPS)
@pytest.mark.parametrize("other", MAPS)
def test_composing_is_the_product_of_the_maps(one, other, kind):
    first, second, both = (flow_of(matrix) for matrix in (MAPS[one], MAPS[other], MAPS[other] @ MAPS[one]))
    if kind == "torch":
        first, second = (torch.from_numpy(flow).movedim(-1, 0)[None] for flow in (first, second))
    value, valid = motion.compose(first, second)
    if kind == "torch":
        value, valid = value[0].movedim(0, -1).numpy(), valid[0].numpy()
    y, x = np.mgrid[0 : SIZE[0], 0 : SIZE[1]]
    there = np.stack((x, y), -1) + flow_of(MAPS[one])
    stays = ((there >= 0) & (there <= (SIZE[1] - 1, SIZE[0] - 1))).all(-1)
    assert (valid == stays).all() and valid.mean() > 0.5
    np.testing.assert_allclose(value[valid], both[valid], atol=1e-9)


@pytest.mark.parametrize("name", MAPS)
def test_inverting_is_the_inverse_of_the_map(name):
    flow, back = flow_of(MAPS[name]), flow_of(np.linalg.inv(MAPS[name]))
    value, valid = motion.invert(flow)
    y, x = np.mgrid[0 : SIZE[0], 0 : SIZE[1]]
    origin = np.stack((x, y), -1) + back
    stays = ((origin >= 0) & (origin <= (SIZE[1] - 1, SIZE[0] - 1))).all(-1)
    outside = ((origin < -1) | (origin > (SIZE[1], SIZE[0]))).any(-1)
    assert not (valid & outside).any(), "what comes from outside is not known"
    np.testing.assert_allclose(value[valid], back[valid], atol=0.6)  # up to a pixel outside something near arrives
    assert (valid & stays).sum() > 0.97 * stays.sum()
    np.testing.assert_allclose(value[valid & stays], back[valid & stays], atol=1e-6)
    round_trip, known = motion.compose(flow, value, second_valid=valid & stays)
    np.testing.assert_allclose(round_trip[known], 0, atol=1e-6)


def test_what_a_square_hides_has_no_inverse_and_the_nearer_wins():
    flow = np.zeros((20, 30, 2))
    flow[6:14, 10:18, 0] = 4
    value, valid = motion.invert(flow, importance=50 * (flow[..., 0] > 0))
    assert not valid[6:14, 10:14].any(), "uncovered"
    expected = np.zeros((20, 30, 2))
    expected[6:14, 14:22, 0] = -4
    np.testing.assert_allclose(value[valid], expected[valid], atol=1e-6)
    assert valid.sum() >= 20 * 30 - 8 * 4 - 8 * 2  # and at most one column on either side, where samples mix


def test_splat_moves_averages_and_leaves_holes():
    image = np.arange(30.0).reshape(5, 6)
    flow = np.zeros((5, 6, 2), np.float32)
    flow[..., 0] = 2
    value, valid = motion.splat(image, flow)
    assert (value[:, 2:] == image[:, :-2]).all() and not valid[:, :2].any() and valid[:, 2:].all()
    flow[:] = 0
    flow[2, 2, 0], flow[0, 0] = 1, np.nan
    value, valid = motion.splat(image.astype(np.uint8), flow)
    assert value.dtype == np.float32 and not valid[2, 2] and not valid[0, 0] and valid.sum() == 28
    assert value[2, 3] == pytest.approx((image[2, 2] + image[2, 3]) / 2)
    importance = np.zeros((5, 6))
    importance[2, 2] = np.log(3)
    value, _ = motion.splat(image, flow, importance)
    assert value[2, 3] == pytest.approx((3 * image[2, 2] + image[2, 3]) / 4), "softmax"
    importance[2, 2], importance[3] = 2000, -2000
    value, valid = motion.splat(image, flow, importance)
    assert value[2, 3] == image[2, 2] and valid[3].all() and (value[3] == image[3]).all(), "no overflow, no underflow"


def test_resized_and_cropped_flow_is_that_of_the_resized_and_cropped_frames():
    flow = flow_of(MAPS["rotation"])
    for size in ((20, 28), (80, 112), (20, 112)):
        scale = np.diag([size[1] / SIZE[1], size[0] / SIZE[0], 1])
        edge = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        matrix = (
            np.linalg.inv(edge) @ scale @ edge @ MAPS["rotation"] @ np.linalg.inv(edge) @ np.linalg.inv(scale) @ edge
        )
        value, valid = motion.resize(flow, size)
        assert valid.all()
        np.testing.assert_allclose(value[4:-4, 4:-4], flow_of(matrix, size)[4:-4, 4:-4], atol=1e-6)
    known = np.ones(SIZE, bool)
    known[:, :20] = False
    value, valid = motion.resize(np.where(known[..., None], flow, 1e6), (20, 28), known)
    assert not valid[:, :9].any() and valid[:, 10:].all() and np.abs(value[valid]).max() < 20
    value, valid = motion.crop(flow, 5, 7, (20, 30))
    np.testing.assert_array_equal(value, flow[5:25, 7:37])
    y, x = np.mgrid[0:20, 0:30]
    there = np.stack((x, y), -1) + value
    assert (valid == ((there >= 0) & (there <= (29, 19))).all(-1)).all()


def test_sample_reads_between_pixels_and_knows_the_edge():
    flow = flow_of(MAPS["zoom in"])
    points = np.array([[0, 0], [10.25, 7.5], [55, 39], [-1, 3], [20, 39.5]])
    value, valid = motion.sample(flow, points)
    homogeneous = np.concatenate((points, np.ones((5, 1))), 1) @ MAPS["zoom in"].T
    np.testing.assert_allclose(value[:3], homogeneous[:3, :2] - points[:3], atol=1e-9)
    assert valid.tolist() == [True, True, True, False, False]
    known = np.ones(SIZE, bool)
    known[8, 10] = False
    assert motion.sample(flow, points, known).valid.tolist() == [True, False, True, False, False]


def test_all_of_it_is_differentiable():
    generator = torch.Generator().manual_seed(3)

    def smooth(*shape):  # flows that keep away from whole pixels, where bilinear weights have a kink
        return (torch.rand(*shape, generator=generator, dtype=torch.float64) * 0.3 + 0.3).requires_grad_()

    flow, other, image = smooth(1, 2, 5, 6), smooth(1, 2, 5, 6), smooth(1, 3, 5, 6)
    weight, points = smooth(1, 1, 5, 6), (smooth(1, 4, 2).detach() + torch.arange(4.0)[:, None]).requires_grad_()
    check = partial(torch.autograd.gradcheck, fast_mode=not SLOW)
    assert check(lambda *given: motion.splat(*given).value, (image, flow, weight))
    assert check(lambda *given: motion.compose(*given).value, (flow, other))
    assert check(lambda given: motion.resize(given, (3, 4)).value, (flow,))
    assert check(lambda *given: motion.sample(*given).value, (flow, points))
    middle = torch.zeros(1, 2, 5, 6, dtype=torch.float64)
    middle[:, :, 1:4, 1:4] = 1
    assert check(lambda given: motion.invert(given).value * middle, (flow,), atol=1e-4)


def test_wrong_inputs_are_named():
    flow = np.zeros((6, 8, 2))
    for call, words in (
        (lambda: motion.compose(flow, flow[:5]), "the first is .* and the second is"),
        (lambda: motion.compose(flow, flow, np.ones((6, 7), bool)), "first_valid is"),
        (lambda: motion.splat(flow, flow[:5]), "same size"),
        (lambda: motion.crop(flow, 2, 2, (5, 5)), "not within"),
        (lambda: motion.resize(flow, (0, 5)), "expected height and width"),
        (lambda: motion.sample(flow, flow), r"expected a numpy array \[P, 2\]"),
    ):
        with pytest.raises(FleetflowError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert set(motion.__all__) == set(dir(motion)) and all(callable(getattr(motion, name)) for name in motion.__all__)
    with pytest.raises(AttributeError):
        motion.nothing  # noqa: B018


def test_the_camera_is_found_beside_what_moves_by_itself():
    pytest.importorskip("cv2", reason="needs the bench extra")
    matrix = affine(3, 1.05, (4, -2))
    matrix[2, :2] = 2e-4, -1e-4
    flow = flow_of(matrix)
    flow[10:25, 20:40] += (6, 3)
    found = motion.fit_homography(flow)
    np.testing.assert_allclose(found.matrix, matrix, atol=2e-3)
    assert not found.inliers[10:25, 20:40].any() and found.inliers.sum() == 40 * 56 - 15 * 20
    value, valid = motion.residual_motion(flow, found.matrix)
    np.testing.assert_allclose(value[12:22, 22:38], np.broadcast_to((6, 3), (10, 16, 2)), atol=0.02)
    assert valid.all() and np.abs(value[found.inliers]).max() < 0.02
    camera, inside = motion.camera_flow(found.matrix, SIZE)
    np.testing.assert_allclose(camera, flow_of(matrix), atol=0.02)
    assert (inside == motion.inside(flow_of(matrix))).mean() > 0.99
    with pytest.raises(FleetflowError, match="8 or more"):
        motion.fit_homography(flow, np.zeros(SIZE, bool))


def test_epipolar_geometry_holds_for_all_depths():
    pytest.importorskip("cv2", reason="needs the bench extra")
    generator = np.random.default_rng(1)
    y, x = np.mgrid[0 : SIZE[0], 0 : SIZE[1]].astype(np.float64)
    depth = 2 + generator.uniform(0, 3, SIZE)
    focal, (cx, cy) = 60, ((SIZE[1] - 1) / 2, (SIZE[0] - 1) / 2)
    forward = np.array([0.1, 0.05, 0.2])
    points = np.stack(((x - cx) / focal * depth, (y - cy) / focal * depth, depth), -1) - forward
    flow = np.stack(
        (focal * points[..., 0] / points[..., 2] + cx - x, focal * points[..., 1] / points[..., 2] + cy - y), -1
    )
    flow[5:15, 30:40] += (-5, 7)
    found = motion.fit_fundamental(flow, threshold=0.2)
    free = np.ones(SIZE, bool)
    free[5:15, 30:40] = False
    assert found.inliers[free].mean() > 0.99 and found.inliers[~free].mean() < 0.2


def test_pan_zoom_and_roll_are_found_without_opencv():
    from fleetflow.motion.camera import fit_similarity

    matrix = affine(2, 1.03, (3, -1))
    flow = flow_of(matrix)
    flow[5:25, 10:40] += (5, 5)
    np.testing.assert_allclose(fit_similarity(flow, step=2), matrix, atol=0.02)
