"""Evaluate: a network's errors on a data set, by pair, by set, and the mean of the sets."""

import json
from pathlib import Path

import numpy as np
import torch

from fleetflow.data.dataset import Files
from fleetflow.io import write_atomically
from fleetflow.metrics import mean_over_sets, pair_errors
from fleetflow.types import FleetflowError

DIS = "dis"
FARNEBACK = "farneback"


def evaluate(predict, files: Files, *, progress=lambda done, total: None) -> dict[str, dict[str, float]]:
    """Returns per set, and for the "mean of sets", the mean over its pairs of epe, out1, out3, out5 and fl.

    predict: a function of two uint8 [H, W, 3] RGB images that returns the flow, float32 [H, W, 2] pixels.
    Protocol: errors are averaged over the known pixels of each pair, then over the pairs of a set, then over the sets.
    """
    rows = []
    for k, pair in enumerate(files.pairs):
        sample = files[k]
        images = [(frame * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for frame in sample[:2]]
        flow = torch.from_numpy(np.ascontiguousarray(predict(*images))).permute(2, 0, 1)
        rows.append((pair.group, pair_errors(flow, sample)))
        progress(k + 1, len(files))
    return mean_over_sets(rows)


def classical(name: str):
    """Returns OpenCV's DIS (medium preset) or Farneback as a function of two images, the peers on a CPU."""
    try:
        import cv2
    except ImportError:
        raise FleetflowError(f'{name} needs OpenCV; install it with pip install "fleetflow[bench]"') from None
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def predict(image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        gray = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (image1, image2)]
        if name == DIS:
            return dis.calc(*gray, None)
        return cv2.calcOpticalFlowFarneback(*gray, None, 0.5, 3, 15, 3, 5, 1.2, 0)

    return predict


def as_json(table: dict[str, dict[str, float]], path: Path) -> None:
    """Writes the table of `evaluate` as JSON."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(table, indent=1) + "\n"))
