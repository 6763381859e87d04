"""Kubric (Greff et al., CVPR 2022): scenes as its workers write them, MOVi-A to MOVi-F among them."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from fleetflow.data.dataset import Files, Pair, chosen, datasets
from fleetflow.data.listing import Listing, digits
from fleetflow.io.atomic import existing, reading
from fleetflow.io.images import read_deep_image
from fleetflow.types import FleetflowError

Direction = Literal["forward", "backward", "both"]
WAYS = {"forward": ("forward_flow", 1), "backward": ("backward_flow", -1)}
TURN = {"forward": "backward", "backward": "forward"}


@datasets.register
def kubric(root: Path, *, direction: Direction = "forward") -> Files:
    """Returns the pairs of all rendered scenes.

        root/0/rgba_00000.png
        root/0/rgba_00001.png
        root/0/forward_flow_00000.png       from 00000 to 00001
        root/0/backward_flow_00001.png      from 00001 to 00000
        root/0/data_ranges.json             {"forward_flow": {"min": -9.5, "max": 7.2}, "backward_flow": ...}

    A flow is a PNG of 16 bits: red is the step down, green the step to the right, 0 and 65535 the min and max of the
    scene in pixels (challenges/movi of google-research/kubric).

    Raises:
        FleetflowError: For what is missing.
    """
    chosen("direction", direction, Direction)
    listing = Listing(root)
    found = []
    for way in WAYS if direction == "both" else (direction,):
        name, step = WAYS[way]
        for truth in listing.find(f"*/{name}_{digits(5)}.png"):
            folder, number = truth.split("/")[0], int(truth[-9:-4])
            frame1, frame2 = (f"{folder}/rgba_{k:05d}.png" for k in (number, number + step))
            if frame2 not in listing:  # the flow out of the clip at its end
                continue
            back = f"{folder}/{WAYS[TURN[way]][0]}_{number + step:05d}.png"
            found.append(
                Pair(
                    "kubric", f"{folder}/{number:05d}-{number + step:05d}", listing.root / frame1, listing.root / frame2,
                    partial(_truth, listing.root / truth),
                    backward=partial(_truth, listing.root / back) if back in listing else None,
                )
            )  # fmt: skip
    return listing.files(found, "the output of a Kubric worker", "*/forward_flow_00000.png between two rgba_*.png")


def _truth(path: Path) -> tuple[np.ndarray, np.ndarray]:
    ranges = existing(path.with_name("data_ranges.json"))
    with reading(ranges, "the ranges of a Kubric scene"):
        span = json.loads(ranges.read_text())[path.stem.rpartition("_")[0]]
        low, high = float(span["min"]), float(span["max"])
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise FleetflowError(f"{ranges} says flow from {low} to {high} pixels; expected two numbers, the lower first")
    stored = read_deep_image(path)[..., 1::-1].astype(np.float32)
    flow = stored * np.float32((high - low) / 65535) + np.float32(low)
    return flow, np.ones(flow.shape[:2], bool)
