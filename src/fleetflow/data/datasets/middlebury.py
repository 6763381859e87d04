"""Middlebury optical flow (Baker et al., IJCV 2011)."""

from functools import partial
from pathlib import Path
from typing import Literal

from fleetflow.data.dataset import Files, Pair, chosen, datasets
from fleetflow.data.listing import Listing
from fleetflow.io.flow import read_flow

Split = Literal["other", "eval"]


@datasets.register
def middlebury(root: Path, *, split: Split = "other") -> Files:
    """Returns the eight pairs whose truth is public ("other"), or the evaluation set, whose truth is kept back.

        root/other-data/RubberWhale/frame10.png
        root/other-data/RubberWhale/frame11.png
        root/other-gt-flow/RubberWhale/flow10.flo   values over 1e9 are unknown
        root/eval-data/Army/frame10.png
        root/eval-data/Army/frame11.png

    Raises:
        FleetflowError: For what is missing.
    """
    chosen("split", split, Split)
    listing = Listing(root)
    found = []
    for first in listing.find("other-gt-flow/*/flow10.flo" if split == "other" else "eval-data/*/frame10.png"):
        scene = first.split("/")[1]
        frame1, frame2 = (listing.root / f"{split}-data/{scene}/frame{k}.png" for k in (10, 11))
        truth = partial(read_flow, listing.root / first) if split == "other" else None
        found.append(Pair("middlebury", scene, frame1, frame2, truth))
    return listing.files(found, f"{split}-color-twoframes.zip and other-gt-flow.zip", f"{split}-data/*/frame10.png")
