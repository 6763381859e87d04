"""KITTI 2012 (Geiger et al., CVPR 2012) and KITTI 2015 (Menze and Geiger, CVPR 2015)."""

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from fleetflow.data.dataset import Files, Pair, chosen, datasets
from fleetflow.data.listing import Listing
from fleetflow.io.flow import read_flow
from fleetflow.io.images import read_mask

Split = Literal["training", "testing"]
Frames = Literal["colored_0", "image_0"]
ARCHIVES = {"kitti2012": "data_stereo_flow.zip", "kitti2015": "data_scene_flow.zip"}


@datasets.register
def kitti2012(root: Path, *, split: Split = "training", frames: Frames = "colored_0") -> Files:
    """Returns KITTI 2012: 194 pairs with sparse truth, or 195 whose truth is kept back.

        root/training/colored_0/000000_10.png
        root/training/colored_0/000000_11.png
        root/training/image_0/...               the same in gray
        root/training/flow_occ/000000_10.png    all known pixels
        root/training/flow_noc/000000_10.png    those that stay in the picture
        root/testing/colored_0/000000_10.png
        root/testing/colored_0/000000_11.png

    The masks are "noc" and "occluded" (known, and not in flow_noc).

    Raises:
        FleetflowError: For what is missing.
    """
    chosen("split", split, Split)
    chosen("frames", frames, Frames)
    return _kitti("kitti2012", Listing(root), split, frames)


@datasets.register
def kitti2015(root: Path, *, split: Split = "training") -> Files:
    """Returns KITTI 2015: 200 pairs with sparse truth, or 200 whose truth is kept back.

        root/training/image_2/000000_10.png
        root/training/image_2/000000_11.png
        root/training/flow_occ/000000_10.png    all known pixels
        root/training/flow_noc/000000_10.png    those that stay in the picture
        root/training/obj_map/000000_10.png     number of the moving car, 0 on background
        root/testing/image_2/000000_10.png
        root/testing/image_2/000000_11.png

    The masks are "noc", "occluded" (known, and not in flow_noc) and "foreground", for Fl-fg and Fl-bg.

    Raises:
        FleetflowError: For what is missing.
    """
    chosen("split", split, Split)
    return _kitti("kitti2015", Listing(root), split, "image_2")


def _kitti(name: str, listing: Listing, split: str, frames: str) -> Files:
    truth = split == "training"
    listing.require(ARCHIVES[name], f"{split}/{frames}", *([f"{split}/flow_occ"] if truth else []))
    found = []
    for first in listing.find(f"{split}/flow_occ/*_10.png" if truth else f"{split}/{frames}/*_10.png"):
        file = Path(first).name
        noc, objects = f"{split}/flow_noc/{file}", f"{split}/obj_map/{file}"
        frame1, frame2 = (listing.root / f"{split}/{frames}/{file[:-7]}_{k}.png" for k in (10, 11))
        masks = partial(
            _masks,
            listing.root / first,
            listing.root / noc if noc in listing else None,
            listing.root / objects if objects in listing else None,
        )
        found.append(
            Pair(name, file[:-7], frame1, frame2, partial(read_flow, listing.root / first) if truth else None,
                 masks=masks if truth else None)
        )  # fmt: skip
    return listing.files(found, ARCHIVES[name], f"{split}/{frames}/000000_10.png")


def _masks(occ: Path, noc: Path | None, objects: Path | None) -> dict[str, np.ndarray]:
    found = {}
    if noc:
        known, found["noc"] = read_flow(occ)[1], read_flow(noc)[1]
        if known.shape == found["noc"].shape:  # else the masks say nothing of each other
            found["occluded"] = known & ~found["noc"]
    if objects:
        found["foreground"] = read_mask(objects)
    return found
