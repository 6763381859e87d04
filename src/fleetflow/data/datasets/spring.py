"""Spring (Mehl et al., CVPR 2023): frames of 1080x1920 with truth at twice that height and width."""

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from fleetflow.data.dataset import Files, Pair, chosen, datasets
from fleetflow.data.listing import Listing, digits
from fleetflow.io.flow import read_flow

Split = Literal["train", "test"]
Side = Literal["left", "right"]
Direction = Literal["forward", "backward", "both"]
WAYS = {"forward": ("FW", 1), "backward": ("BW", -1)}
TURN = {"forward": "backward", "backward": "forward"}


@datasets.register
def spring(root: Path, *, split: Split = "train", side: Side = "left", direction: Direction = "forward") -> Files:
    """Returns Spring, 37 scenes with truth, or the test scenes, whose truth is kept back.

        root/train/0001/frame_left/frame_left_0001.png
        root/train/0001/frame_left/frame_left_0002.png
        root/train/0001/flow_FW_left/flow_FW_left_0001.flo5     from 0001 to 0002
        root/train/0001/flow_BW_left/flow_BW_left_0002.flo5     from 0002 to 0001
        root/train/0001/frame_right/...                         the same
        root/test/0003/frame_left/frame_left_0001.png
        root/test/0003/frame_left/frame_left_0002.png

    The truth holds four vectors a pixel of the frames, in pixels of the frames. A sample has the upper left one of the
    four, as training codes do; scores take all four, as the benchmark does (`Files.judged`). Needs h5py:
    pip install "fleetflow[data]".

    Raises:
        FleetflowError: For what is missing.
    """
    for name, value, options in (("split", split, Split), ("side", side, Side), ("direction", direction, Direction)):
        chosen(name, value, options)
    listing = Listing(root)
    listing.require("the archives of Spring", split)
    found = []
    for way in WAYS if direction == "both" else (direction,):
        letters, step = WAYS[way]
        kind = f"flow_{letters}_{side}" if split == "train" else f"frame_{side}"
        for here in listing.find(f"{split}/*/{kind}/{kind}_{digits(4)}.*"):
            scene, number = here.split("/")[1], int(here.rpartition("_")[2][:4])
            frame1, frame2 = (f"{split}/{scene}/frame_{side}/frame_{side}_{k:04d}.png" for k in (number, number + step))
            if split == "test" and frame2 not in listing:
                continue
            letters = WAYS[TURN[way]][0]
            back = f"train/{scene}/flow_{letters}_{side}/flow_{letters}_{side}_{number + step:04d}.flo5"
            found.append(
                Pair(
                    "spring", f"{scene}/{side}/{number:04d}-{number + step:04d}",
                    listing.root / frame1, listing.root / frame2,
                    partial(_every_second, listing.root / here) if split == "train" else None,
                    backward=partial(_every_second, listing.root / back) if back in listing else None,
                    truths=partial(_all_four, listing.root / here) if split == "train" else None,
                )
            )  # fmt: skip
    return listing.files(found, f"the archives frame_{side} and flow of Spring", f"pairs of {split}, {direction}")


def _every_second(path: Path) -> tuple[np.ndarray, np.ndarray]:
    flow, valid = read_flow(path)
    return np.ascontiguousarray(flow[::2, ::2]), np.ascontiguousarray(valid[::2, ::2])


def _all_four(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The four vectors of each pixel, [4, H, W, 2], the upper left one first, and where all of them are known."""
    flow, valid = read_flow(path)
    corners = [(slice(y, None, 2), slice(x, None, 2)) for y in (0, 1) for x in (0, 1)]
    return np.stack([flow[corner] for corner in corners]), np.all([valid[corner] for corner in corners], axis=0)
