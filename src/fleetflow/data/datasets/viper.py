"""VIPER (Richter et al., ICCV 2017, "Playing for Benchmarks")."""

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from fleetflow.data.dataset import Files, Pair, chosen, datasets
from fleetflow.data.listing import Listing, digits
from fleetflow.io.arrays import read_npz
from fleetflow.io.atomic import existing, reading
from fleetflow.types import FleetflowError

Split = Literal["train", "val", "test"]
LIMIT = 512  # pixels; the float16 files mark unknown vectors by larger values


@datasets.register
def viper(root: Path, *, split: Split = "train") -> Files:
    """Returns VIPER, 1080x1920; the truth of "test" is kept back.

        root/train/img/001/001_00001.jpg    sequence_frame; or .png
        root/train/img/001/001_00002.jpg
        root/train/flow/001/001_00001.npz   float16 "u" and "v" [H, W], from 00001 to 00002
        root/val/...                        the same
        root/test/img/...

    Vectors that are not finite, or longer than 512 pixels along an axis, are unknown. Frames whose next frame is not
    there give no pair.

    Raises:
        FleetflowError: For what is missing.
    """
    chosen("split", split, Split)
    listing = Listing(root)
    listing.require(f"the VIPER archives of {split}", f"{split}/img", *([f"{split}/flow"] if split != "test" else []))
    found = []
    for first in listing.find(*(f"{split}/img/*/{digits(3)}_{digits(5)}{kind}" for kind in (".jpg", ".png"))):
        place = Path(first)
        sequence, frame = place.stem.split("_")
        second = place.with_name(f"{sequence}_{int(frame) + 1:05d}{place.suffix}")
        truth = f"{split}/flow/{sequence}/{place.stem}.npz"
        if second.as_posix() in listing and (split == "test" or truth in listing):
            reader = partial(_truth, listing.root / truth) if split != "test" else None
            found.append(Pair("viper", place.stem, listing.root / first, listing.root / second, reader))
    return listing.files(found, f"the VIPER archives of {split}", "two frames in a row with the flow of the first")


def _truth(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with reading(existing(path), "a VIPER flow"):
        u, v = read_npz(path, "u", "v").values()
    if u.ndim != 2 or u.shape != v.shape:
        raise FleetflowError(f"{path} holds u {list(u.shape)} and v {list(v.shape)}; expected two arrays [H, W]")
    flow = np.stack((u, v), -1).astype(np.float32)
    valid = np.asarray((np.abs(flow) <= LIMIT).all(-1))
    flow[~valid] = 0
    return flow, valid
