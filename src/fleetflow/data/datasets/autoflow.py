"""AutoFlow (Sun et al., CVPR 2021), the released static set."""

from functools import partial
from pathlib import Path

from fleetflow.data.dataset import Files, Pair, datasets
from fleetflow.data.listing import Listing
from fleetflow.io.flow import read_flow


@datasets.register
def autoflow(root: Path) -> Files:
    """Returns AutoFlow, 40,000 pairs in four archives when complete.

        root/static_40k_png_1_of_4/table_0_batch_0_sample_0/im0.png
        root/static_40k_png_1_of_4/table_0_batch_0_sample_0/im1.png
        root/static_40k_png_1_of_4/table_0_batch_0_sample_0/forward.flo

    The folders of pairs may have any name.

    Raises:
        FleetflowError: For what is missing.
    """
    listing = Listing(root)
    found = []
    for truth in listing.find("static_40k_png_*_of_4/*/forward.flo"):
        folder = listing.root / truth.removesuffix("/forward.flo")
        frames = (folder / "im0.png", folder / "im1.png")
        found.append(Pair("autoflow", folder.name, *frames, partial(read_flow, folder / "forward.flo")))
    return listing.files(found, "static_40k_png_1_of_4.zip to 4_of_4", "static_40k_png_*_of_4/*/forward.flo")
