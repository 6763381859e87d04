"""A folder of sets of pairs with truth: how test pairs of many sources are kept side by side."""

import math
from functools import partial
from pathlib import Path

import numpy as np

from fleetflow.data.dataset import Files, Pair, datasets, read_masks
from fleetflow.io.arrays import read_npz
from fleetflow.io.atomic import existing, reading
from fleetflow.io.flow import read_flow
from fleetflow.types import FleetflowError


@datasets.register
def pairs(root: Path, *, without: tuple[str, ...] = ()) -> Files:
    """Returns all pairs below `root`, grouped by set.

        root/SET/NAME/img1.png
        root/SET/NAME/img2.png
        root/SET/NAME/flow.npz      float16 "flow" [H, W, 2] and "valid", bits packed eight to a byte; or
        root/SET/NAME/flow.png      KITTI 16-bit
        root/SET/NAME/occ.png       if known: not black where img2 does not show the pixel; or
        root/SET/NAME/noc.png       black where it does not
        root/SET/NAME/invalid.png   if known: not black where the truth cannot be trusted

    Args:
        without: names of pairs to leave out.

    Raises:
        FleetflowError: Where there is no such pair.
    """
    found = []
    for first in sorted(Path(root).glob("*/*/img1.png")):
        folder = first.parent
        truth = [folder / name for name in ("flow.npz", "flow.png") if (folder / name).is_file()]
        if truth and folder.name not in without and (folder / "img2.png").is_file():
            frames, masks = (first, folder / "img2.png"), partial(_masks, folder)
            found.append(Pair(folder.parent.name, folder.name, *frames, partial(_truth, truth[0]), masks=masks))
    if not found:
        raise FleetflowError(f"{root} holds no pairs; expected SET/NAME/img1.png, img2.png and flow.png or flow.npz")
    return Files(found)


def _masks(folder: Path) -> dict[str, np.ndarray]:
    files = {"occluded": folder / "occ.png", "noc": folder / "noc.png", "invalid": folder / "invalid.png"}
    masks = read_masks({key: path for key, path in files.items() if path.is_file()})
    return {"occluded": ~masks["noc"], **masks} if "noc" in masks else masks


def _truth(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if path.suffix != ".npz":
        return read_flow(path)
    with reading(existing(path), "a flow .npz"):
        flow, bits = read_npz(path, "flow", "valid").values()
    flow, count = flow.astype(np.float32), math.prod(flow.shape[:2])
    if flow.ndim != 3 or flow.shape[2] != 2 or bits.dtype != np.uint8 or 8 * bits.size < count:
        held = f"flow {list(flow.shape)} and valid {bits.dtype} {list(bits.shape)}"
        raise FleetflowError(f"{path} holds {held}; expected flow [H, W, 2] and valid of H x W bits")
    valid = np.unpackbits(bits)[:count].reshape(flow.shape[:2]).astype(bool)
    valid &= np.isfinite(flow).all(-1)
    return np.where(valid[..., None], flow, 0), valid
