"""The camera's part of a flow: a homography or an epipolar geometry that most of it agrees with, and what is left."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fleetflow.io.arrays import as_array
from fleetflow.motion.arrays import Masked, Picture, as_tensor, like, mask_of
from fleetflow.ops.warp import inside, pixel_grid
from fleetflow.types import FleetflowError, size_of

MOST = 4000  # pixels that a fit looks at, evenly taken: more change the result by less than a hundredth of a pixel
FEWEST = 8
CERTAIN = 0.999  # probability with which OpenCV's search finds the best model


class CameraFit(NamedTuple):
    """What most of a flow agrees with."""

    matrix: np.ndarray  # float64 [3, 3]
    inliers: np.ndarray  # bool [H, W]: known pixels that agree within the threshold


def fit_homography(flow: Picture, valid: Picture | None = None, threshold: float = 1.0) -> CameraFit:
    """Returns the homography frame1 -> frame2 that most of the flow agrees with, by OpenCV's MAGSAC++.

    It is the camera's motion where the camera only turns and zooms, or the scene is flat or far away.

    Args:
        flow: [H, W, 2] numpy array or tensor [1, 2, H, W], pixels from frame1 to frame2.
        valid: bool [H, W] or [1, H, W], pixels to look at; None: all.
        threshold: pixels in frame2 by which an inlier may be off.

    Raises:
        FleetflowError: OpenCV is missing, fewer than 8 pixels are known, or nothing fits.
    """
    library, start, end = _matches(flow, valid)
    matrix, _ = library.findHomography(start, end, library.USAC_MAGSAC, threshold, maxIters=5000, confidence=CERTAIN)
    if matrix is None:
        raise FleetflowError("no homography fits the flow; mask what moves by itself, or give a larger threshold")
    missed = np.linalg.norm(residual_motion(_one(flow), matrix).value, axis=-1)
    known = mask_of(valid, as_tensor(flow, "flow", 2))[0].cpu().numpy()
    return CameraFit(matrix, known & (missed <= threshold))


def fit_fundamental(flow: Picture, valid: Picture | None = None, threshold: float = 1.0) -> CameraFit:
    """Returns the fundamental matrix F with x2' F x1 = 0 for x2 = x1 + flow(x1) that most of the flow agrees with.

    It holds for all that stands still, whatever its depth, where the camera moves. By OpenCV's MAGSAC++.

    Args:
        flow: [H, W, 2] numpy array or tensor [1, 2, H, W], pixels from frame1 to frame2.
        valid: bool [H, W] or [1, H, W], pixels to look at; None: all.
        threshold: pixels by which an inlier may be off its epipolar lines (Sampson distance).

    Raises:
        FleetflowError: OpenCV is missing, fewer than 8 pixels are known, or nothing fits.
    """
    library, start, end = _matches(flow, valid)
    matrix, _ = library.findFundamentalMat(start, end, library.USAC_MAGSAC, threshold, CERTAIN, 5000)
    if matrix is None or matrix.shape != (3, 3):
        raise FleetflowError("no epipolar geometry fits the flow; does the camera move at all? try fit_homography")
    known = mask_of(valid, as_tensor(flow, "flow", 2))[0].cpu().numpy()
    return CameraFit(matrix, known & (_sampson(_one(flow), matrix) <= threshold))


def camera_flow(matrix: np.ndarray, size: tuple[int, int]) -> Masked:
    """Returns the flow float64 [H, W, 2] of a homography frame1 -> frame2 [3, 3]; valid where it stays in frame2."""
    flow = _of_matrix(torch.as_tensor(np.asarray(matrix, np.float64)), size)
    picture = np.empty((1, 1, 1))
    return Masked(like(flow[None], picture), like(inside(flow[None]), picture))


def residual_motion(flow: Picture, matrix: np.ndarray) -> Masked:
    """Returns what the flow has beside the camera's motion: flow(x) - (H x - x), pixels on the grid of frame1.

    Args:
        flow: [H, W, 2] numpy array or tensor [N, 2, H, W], pixels from frame1 to frame2. Differentiable for tensors.
        matrix: [3, 3] homography frame1 -> frame2, as `fit_homography` gives it.

    Returns:
        The residual flow, valid where the flow is a number.
    """
    vectors = as_tensor(flow, "flow", 2)
    camera = _of_matrix(torch.as_tensor(np.asarray(matrix, np.float64)), size_of(vectors))
    return Masked(like(vectors - camera.to(vectors), flow), like(mask_of(None, vectors), flow))


def affine_flows(matrices: Sequence[np.ndarray], size: tuple[int, ...]) -> torch.Tensor:
    """Returns the flows [N, 2, h, w] of N affine motions [3, 3] of pictures of a size (h, w)."""
    each = torch.from_numpy(np.stack(matrices)).float()
    grid = pixel_grid(size[0], size[1], each)
    return torch.einsum("nij,jhw->nihw", each[:, :2, :2], grid) + each[:, :2, 2, None, None] - grid


def _median(values: np.ndarray, weights: np.ndarray) -> float:
    """The weighted median of values [P]."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, reached[-1] / 2)])


def _of_matrix(matrix: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if matrix.shape != (3, 3):
        raise FleetflowError(f"the matrix is {list(matrix.shape)}; expected a homography [3, 3]")
    grid = pixel_grid(*size, matrix)
    points = torch.einsum("ij,jhw->ihw", matrix, torch.cat((grid, torch.ones_like(grid[:1]))))
    return points[:2] / points[2:] - grid


def _sampson(flow: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The Sampson distance [H, W] in pixels (Hartley and Zisserman, Multiple View Geometry, equation 11.9)."""
    y, x = np.mgrid[0 : flow.shape[0], 0 : flow.shape[1]].astype(np.float64)
    ones = np.ones_like(x)
    start, end = np.stack((x, y, ones), -1), np.stack((x + flow[..., 0], y + flow[..., 1], ones), -1)
    line2, line1 = start @ matrix.T, end @ matrix
    gradient = (line2[..., :2] ** 2).sum(-1) + (line1[..., :2] ** 2).sum(-1)
    return np.abs((end * line2).sum(-1)) / np.sqrt(np.maximum(gradient, 1e-12))


def _one(flow: Picture) -> np.ndarray:
    """The flow as one numpy array float64 [H, W, 2]."""
    vectors = as_tensor(flow, "flow", 2)
    if len(vectors) != 1:
        raise FleetflowError(f"{len(vectors)} flows were given; a camera is fitted to one: give flow[k : k + 1]")
    return vectors[0].detach().cpu().double().numpy().transpose(1, 2, 0)


def _matches(flow: Picture, valid: Picture | None):
    """OpenCV, and points of frame1 and frame2 [P, 2] that belong together, at most MOST."""
    try:
        import cv2
    except ImportError:
        raise FleetflowError('a camera fit needs OpenCV; install it with pip install "fleetflow[bench]"') from None
    vectors = _one(flow)
    rows, columns = mask_of(valid, as_tensor(flow, "flow", 2))[0].cpu().numpy().nonzero()
    if len(rows) < FEWEST:
        raise FleetflowError(f"{len(rows)} pixels of the flow are known; a camera fit needs {FEWEST} or more")
    taken = np.linspace(0, len(rows) - 1, min(len(rows), MOST)).astype(int)
    start = np.stack((columns[taken], rows[taken]), 1).astype(np.float64)
    return cv2, start, start + vectors[rows[taken], columns[taken]]


def fit_similarity(flow: np.ndarray, weights: np.ndarray | None = None, step: int = 4, rounds: int = 10) -> np.ndarray:
    """Returns the pan, zoom and roll that most of a flow agrees with, as a homography float64 [3, 3]; needs no OpenCV.

    Weighted least squares with the weights of Geman and McClure: begun at the median motion, each round with the scale of
    the median residual.

    Args:
        flow: [H, W, 2] pixels from frame1 to frame2.
        weights: [H, W] how much each pixel counts; None: all alike.
        step: only every `step`-th pixel is looked at.
        rounds: of the weights.
    """
    flow = as_array(flow, "the flow", "[H, W, 2] pixels")
    if flow.ndim != 3 or flow.shape[2] != 2 or 0 in flow.shape:
        raise FleetflowError(f"the flow is {list(flow.shape)}; expected [H, W, 2] pixels")
    height, width = flow.shape[:2]
    y, x = np.mgrid[step // 2 : height : step, step // 2 : width : step]
    vectors = flow[y, x].reshape(-1, 2).astype(np.float64)
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    x, y = (np.stack((x.ravel(), y.ravel()), 1) - middle).T
    ones, zeros = np.ones_like(x), np.zeros_like(x)
    # u = grow x - turn y + pan_x, v = turn x + grow y + pan_y, about the middle of the picture
    design = np.concatenate((np.stack((x, -y, ones, zeros), 1), np.stack((y, x, zeros, ones), 1)))
    wanted = vectors.T.ravel()
    prior = np.ones(len(x)) if weights is None else weights[step // 2 :: step, step // 2 :: step].ravel()
    found = np.array([0, 0, *(_median(part, prior) for part in vectors.T)])
    for _ in range(rounds):
        missed = np.square((design @ found - wanted).reshape(2, -1)).sum(0)
        scale = max(_median(missed, prior), 0.01)  # square pixels
        weight = np.tile(prior / np.square(1 + missed / scale), 2)[:, None]
        found = np.linalg.solve(design.T @ (weight * design) + 1e-9 * np.eye(4), design.T @ (weight[:, 0] * wanted))
    return similarity(found.tolist(), (height, width))


def similarity(parts: Sequence[float], size: Sequence[int]) -> np.ndarray:
    """Returns the motion [3, 3] of a picture of a size (h, w) whose parts are grow, turn, right and down.

    The flow is u = grow x - turn y + right, v = turn x + grow y + down, with x and y from the middle of the picture.
    """
    grow, turn, right, down = parts
    middle = np.array([(size[1] - 1) / 2, (size[0] - 1) / 2])
    matrix = np.array([[1 + grow, -turn, 0], [turn, 1 + grow, 0], [0, 0, 1]], np.float64)
    matrix[:2, 2] = middle + (right, down) - matrix[:2, :2] @ middle
    return matrix
