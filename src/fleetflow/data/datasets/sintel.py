"""MPI Sintel (Butler et al., ECCV 2012)."""

from functools import partial
from pathlib import Path
from typing import Literal

from fleetflow.data.dataset import Files, Pair, chosen, datasets, read_masks
from fleetflow.data.listing import Listing, digits
from fleetflow.io.flow import read_flow

Split = Literal["all", "train", "val", "test"]
Render = Literal["final", "clean"]
Validation = Literal["scenes", "pairs"]

# Two published ways to hold back part of the training set, as scene -> number of the first frame held back.
# "scenes": six whole scenes (README of microsoft/MaskFlownet; ptlflow validates on the same).
# "pairs": 133 of the 1041 pairs, the later half of three scenes and two whole ones (datasets/sintel.py of visinf/irr
# lists the places 199-217, 340-364, 536-560, 659-697, 967-991 in the sorted training set, which are these frames).
HELD_BACK = {
    "scenes": {"ambush_2": 1, "ambush_6": 1, "bamboo_2": 1, "cave_4": 1, "market_6": 1, "temple_2": 1},
    "pairs": {"ambush_6": 1, "bamboo_2": 25, "cave_4": 25, "market_6": 1, "temple_2": 25},
}


@datasets.register
def sintel(root: Path, *, split: Split = "all", render: Render = "final", validation: Validation = "scenes") -> Files:
    """Returns Sintel, 436x1024: 1041 pairs with truth in 23 scenes ("all"), or the test set, whose truth is kept back.

        root/training/clean/alley_1/frame_0001.png
        root/training/clean/alley_1/frame_0002.png
        root/training/final/alley_1/frame_0001.png
        root/training/final/alley_1/frame_0002.png
        root/training/flow/alley_1/frame_0001.flo
        root/training/occlusions/alley_1/frame_0001.png     white where frame 2 does not show the pixel
        root/training/invalid/alley_1/frame_0001.png        white where the truth cannot be trusted
        root/test/clean/ambush_1/frame_0001.png
        root/test/clean/ambush_1/frame_0002.png
        root/test/final/...                                 the same

    Args:
        validation: which published part of the training set "val" is, and "train" is not. The masks "occluded" and
            "invalid" are read where the folders are there; published scores count invalid pixels.

    Raises:
        FleetflowError: For what is missing.
    """
    for name, value, options in (
        ("split", split, Split), ("render", render, Render), ("validation", validation, Validation)
    ):  # fmt: skip
        chosen(name, value, options)
    listing = Listing(root)
    part = "test" if split == "test" else "training"
    archive = "MPI-Sintel-complete.zip"
    listing.require(archive, f"{part}/{render}", *(["training/flow"] if part == "training" else []))
    if part == "test":
        firsts = [frame for frame in listing.find(f"test/{render}/*/frame_{digits(4)}.png") if _next(frame) in listing]
    else:
        firsts = listing.find(f"training/flow/*/frame_{digits(4)}.flo")
    found = []
    for first in firsts:
        scene, name = first.split("/")[-2], Path(first).stem
        held = int(name[-4:]) >= HELD_BACK[validation].get(scene, 10_000)
        if split in ("train", "val") and held != (split == "val"):
            continue
        frame1 = f"{part}/{render}/{scene}/{name}.png"
        maps = {
            key: listing.root / f"{part}/{folder}/{scene}/{name}.png"
            for key, folder in (("occluded", "occlusions"), ("invalid", "invalid"))
            if f"{part}/{folder}/{scene}/{name}.png" in listing
        }
        found.append(
            Pair(
                f"sintel/{render}", f"{scene}/{name}", listing.root / frame1, listing.root / _next(frame1),
                partial(read_flow, listing.root / first) if part == "training" else None,
                masks=partial(read_masks, maps) if maps else None,
            )
        )  # fmt: skip
    return listing.files(found, archive, f"{part}/{render}/SCENE/frame_0001.png of this split")


def _next(frame: str) -> str:
    """Returns the path of the frame after this one: frame_0001.png -> frame_0002.png."""
    return f"{frame[:-8]}{int(frame[-8:-4]) + 1:04d}.png"
