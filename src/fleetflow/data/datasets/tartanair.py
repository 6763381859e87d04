"""TartanAir (Wang et al., IROS 2020): flow of a moving camera through still scenes."""

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from fleetflow.data.dataset import Files, Pair, chosen, datasets
from fleetflow.data.listing import Listing
from fleetflow.io.arrays import read_npy
from fleetflow.io.atomic import existing, reading
from fleetflow.io.flow import read_flow
from fleetflow.types import FleetflowError

Difficulty = Literal["both", "Easy", "Hard"]
OUT_OF_VIEW = 100  # in the mask; 1 and 10 are two kinds of occlusion (castacks/tartanair_tools, flow_and_warping_error)


@datasets.register
def tartanair(root: Path, *, difficulty: Difficulty = "both") -> Files:
    """Returns TartanAir, 480x640, left camera.

        root/abandonedfactory/Easy/P000/image_left/000000_left.png
        root/abandonedfactory/Easy/P000/image_left/000001_left.png
        root/abandonedfactory/Easy/P000/flow/000000_000001_flow.npy
        root/abandonedfactory/Easy/P000/flow/000000_000001_mask.npy     uint8, 0 where frame 2 shows the pixel

    A folder more between root and Easy, as some archives bring it, is found as well. Where the mask says "out of
    view" the point may lie behind the camera and its flow mean nothing: such pixels are unknown. The mask "occluded"
    holds all that frame 2 does not show.

    Raises:
        FleetflowError: For what is missing.
    """
    chosen("difficulty", difficulty, Difficulty)
    listing = Listing(root)
    level = "*" if difficulty == "both" else difficulty
    found, masks = [], []
    for truth in listing.find(f"*/{level}/P*/flow/*_flow.npy", f"*/*/{level}/P*/flow/*_flow.npy"):
        track, name = truth.split("/flow/")
        here, there = name.split("_")[:2]
        frame1, frame2 = (listing.root / track / f"image_left/{k}_left.png" for k in (here, there))
        masks.append(listing.root / truth.replace("_flow.npy", "_mask.npy"))
        found.append(
            Pair("tartanair", f"{track}/{here}", frame1, frame2, partial(_truth, listing.root / truth, masks[-1]),
                 masks=partial(_masks, masks[-1]))
        )  # fmt: skip
    return listing.files(found, "the archives image_left and flow_mask", "*/Easy/P*/flow/*_flow.npy", masks)


def _truth(path: Path, mask: Path) -> tuple[np.ndarray, np.ndarray]:
    flow, valid = read_flow(path)
    hidden = _mask(mask)
    if hidden.shape != valid.shape:
        raise FleetflowError(f"{mask} is {list(hidden.shape)}, its flow {list(valid.shape)}; get both again")
    valid &= hidden != OUT_OF_VIEW
    flow[~valid] = 0
    return flow, valid


def _masks(mask: Path) -> dict[str, np.ndarray]:
    return {"occluded": _mask(mask) > 0}


def _mask(path: Path) -> np.ndarray:
    with reading(existing(path), "a mask .npy"):
        return read_npy(path)
