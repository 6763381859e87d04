"""The first thing a person runs: the flow of the bundled pair with the bundled weights, beside its truth."""

import time
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fleetflow.io import read_flow, read_image, write_image
from fleetflow.models.weights import load
from fleetflow.predict import Predictor
from fleetflow.visualise import error_map, flow_to_color, robust_scale, side_by_side, with_legend


class Demo(NamedTuple):
    """What the demo found: time of one prediction, mean errors in pixels of the network and of a zero flow, picture."""

    height: int
    width: int
    milliseconds: float
    epe: float
    still: float
    picture: Path


def demo(output: Path) -> Demo:
    """Predicts the pair in the package on the CPU, measures it against its truth and writes OUTPUT/demo.png."""
    folder = Path(str(resources.files("fleetflow") / "example"))
    image1, image2 = (read_image(folder / f"frame{k}.png") for k in (1, 2))
    truth, valid = read_flow(folder / "flow.png")
    predictor = Predictor(load("fastflownet"), device="cpu")
    predictor(image1, image2)  # the first call chooses kernels
    start = time.perf_counter()
    flow = predictor(image1, image2)
    taken = 1000 * (time.perf_counter() - start)
    error = np.linalg.norm(flow - truth, axis=2)[valid]
    scale = max(robust_scale(truth), robust_scale(flow))
    picture = side_by_side(
        image1,
        with_legend(flow_to_color(truth, scale), scale),
        with_legend(flow_to_color(flow, scale), scale),
        error_map(flow, truth, valid=valid),
        titles=("frame 1", "true flow", "predicted flow", "error"),
    )
    path = output / "demo.png"
    write_image(path, picture)
    still = float(np.linalg.norm(truth, axis=2)[valid].mean())
    return Demo(*image1.shape[:2], taken, float(error.mean()), still, path)
