"""HD1K (Kondermann et al., CVPR Workshops 2016)."""

from functools import partial
from pathlib import Path

from fleetflow.data.dataset import Files, Pair, datasets
from fleetflow.data.listing import Listing, digits
from fleetflow.io.flow import read_flow

ARCHIVE = "hd1k_input.zip and hd1k_flow_gt.zip"


@datasets.register
def hd1k(root: Path) -> Files:
    """Returns the training set of HD1K, 1080x2560: 1047 pairs in 36 sequences, truth in KITTI's format, sparse.

        root/hd1k_input/image_2/000000_0000.png             sequence_frame
        root/hd1k_input/image_2/000000_0001.png
        root/hd1k_flow_gt/flow_occ/000000_0000.png
        root/hd1k_flow_gt/flow_occ/000000_0001.png          of the last frame of a sequence: not used

    Raises:
        FleetflowError: For what is missing.
    """
    listing = Listing(root)
    listing.require(ARCHIVE, "hd1k_input/image_2", "hd1k_flow_gt/flow_occ")
    found, truths = [], []
    for first in listing.find(f"hd1k_input/image_2/{digits(6)}_{digits(4)}.png"):
        sequence, frame = Path(first).stem.split("_")
        second = f"hd1k_input/image_2/{sequence}_{int(frame) + 1:04d}.png"
        if second in listing:
            truths.append(listing.root / f"hd1k_flow_gt/flow_occ/{sequence}_{frame}.png")
            frames = (listing.root / first, listing.root / second)
            found.append(Pair("hd1k", f"{sequence}_{frame}", *frames, partial(read_flow, truths[-1])))
    return listing.files(found, ARCHIVE, "two frames of one sequence in hd1k_input/image_2", truths)
