"""A folder of sets of pairs with truth: how test pairs of many sources are kept side by side."""

from functools import partial
from pathlib import Path

import numpy as np

from fleetflow.data.dataset import Files, Pair, datasets
from fleetflow.io import read_flow
from fleetflow.types import FleetflowError


@datasets.register
def pairs(root: Path, *, without: tuple[str, ...] = ()) -> Files:
    """Returns all pairs below `root`, grouped by set.

        root/SET/NAME/img1.png
        root/SET/NAME/img2.png
        root/SET/NAME/flow.npz      float16 "flow" [H, W, 2] and "valid", bits packed eight to a byte; or
        root/SET/NAME/flow.png      KITTI 16-bit

    without: names of pairs to leave out.
    Raises FleetflowError where there is no such pair.
    """
    found = []
    for first in sorted(Path(root).glob("*/*/img1.png")):
        folder = first.parent
        truth = [folder / name for name in ("flow.npz", "flow.png") if (folder / name).is_file()]
        if truth and folder.name not in without and (folder / "img2.png").is_file():
            found.append(Pair(folder.parent.name, folder.name, first, folder / "img2.png", partial(_truth, truth[0])))
    if not found:
        raise FleetflowError(f"{root} holds no pairs; expected SET/NAME/img1.png, img2.png and flow.png or flow.npz")
    return Files(found)


def _truth(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if path.suffix != ".npz":
        return read_flow(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            flow = file["flow"].astype(np.float32)
            valid = np.unpackbits(file["valid"])[: flow.shape[0] * flow.shape[1]].reshape(flow.shape[:2]).astype(bool)
    except (OSError, KeyError, ValueError) as error:
        raise FleetflowError(f"{path} cannot be read ({error}); expected arrays flow and valid") from None
    return np.where(valid[..., None], flow, 0), valid
