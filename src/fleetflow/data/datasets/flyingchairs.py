"""FlyingChairs (Dosovitskiy et al., ICCV 2015), FlyingChairs2 (Ilg et al., ECCV 2018), ChairsSDHom (CVPR 2017)."""

from functools import partial
from pathlib import Path
from typing import Literal

from fleetflow.data.dataset import Files, Pair, chosen, datasets, read_masks
from fleetflow.data.listing import Listing
from fleetflow.io.atomic import reading
from fleetflow.io.flow import read_flow
from fleetflow.types import FleetflowError

ChairsSplit = Literal["train", "val", "all"]
Chairs2Split = Literal["train", "val"]
HomogeneousSplit = Literal["train", "test"]
Direction = Literal["forward", "backward", "both"]


@datasets.register
def flyingchairs(root: Path, *, split: ChairsSplit = "train") -> Files:
    """Returns FlyingChairs: 22,872 pairs of 384x512, of which the published split validates on 640.

        root/data/00001_img1.ppm
        root/data/00001_img2.ppm
        root/data/00001_flow.flo
        root/FlyingChairs_train_val.txt     line k is 1 if pair k trains and 2 if it validates; not read for "all"

    Raises:
        FleetflowError: For what is missing.
    """
    chosen("split", split, ChairsSplit)
    listing = Listing(root)
    found = []
    side = _sides(listing.root / "FlyingChairs_train_val.txt") if split != "all" else []
    for truth in listing.find("data/*_flow.flo"):
        number = truth.removeprefix("data/").removesuffix("_flow.flo")
        if split != "all":
            if not number.isdigit() or not 1 <= int(number) <= len(side):
                raise FleetflowError(f"{root}/FlyingChairs_train_val.txt has {len(side)} lines, none for pair {number}")
            if side[int(number) - 1] != ("1" if split == "train" else "2"):
                continue
        frame1, frame2 = (listing.root / f"data/{number}_img{k}.ppm" for k in (1, 2))
        found.append(Pair("flyingchairs", number, frame1, frame2, partial(read_flow, listing.root / truth)))
    return listing.files(found, "FlyingChairs.zip", "data/*_flow.flo of this split")


def _sides(path: Path) -> list[str]:
    if not path.is_file():
        raise FleetflowError(f'{path} does not exist; get the published split, or take split "all"')
    with reading(path, "the published split"):
        return path.read_text().split()


@datasets.register
def flyingchairs2(root: Path, *, split: Chairs2Split = "train", direction: Direction = "forward") -> Files:
    """Returns FlyingChairs2, with backward flow and occlusion: 22,232 pairs to train on and 640 to validate.

        root/train/0000000-img_0.png
        root/train/0000000-img_1.png
        root/train/0000000-flow_01.flo      from img_0 to img_1
        root/train/0000000-flow_10.flo      from img_1 to img_0
        root/train/0000000-occ_01.png       not black where img_1 does not show the pixel of img_0
        root/train/0000000-occ_10.png
        root/val/...                        the same

    Args:
        direction: "backward" takes img_1 as frame1; "both" gives each pair twice.

    Raises:
        FleetflowError: For what is missing.
    """
    chosen("split", split, Chairs2Split)
    chosen("direction", direction, Direction)
    listing = Listing(root)
    found = []
    for first in listing.find(f"{split}/*-img_0.png"):
        stem = first.removesuffix("img_0.png")
        for here, there in _ways(direction, "0", "1"):
            frame1, frame2 = (listing.root / f"{stem}img_{k}.png" for k in (here, there))
            truth, back = (listing.root / f"{stem}flow_{way}.flo" for way in (here + there, there + here))
            occluded = f"{stem}occ_{here}{there}.png"
            found.append(
                Pair(
                    "flyingchairs2", f"{Path(stem).name}{here}{there}", frame1, frame2, partial(read_flow, truth),
                    backward=partial(read_flow, back),
                    masks=partial(read_masks, {"occluded": listing.root / occluded}) if occluded in listing else None,
                )
            )  # fmt: skip
    return listing.files(found, "FlyingChairs2.zip", f"{split}/*-img_0.png")


def _ways(direction: str, first: str, second: str) -> list[tuple[str, str]]:
    ways = {"forward": [(first, second)], "backward": [(second, first)]}
    return ways.get(direction) or [*ways["forward"], *ways["backward"]]


@datasets.register
def chairs_sdhom(root: Path, *, split: HomogeneousSplit = "train") -> Files:
    """Returns ChairsSDHom, small displacements and homogeneous surfaces.

        root/data/train/t0/00000.png
        root/data/train/t1/00000.png
        root/data/train/flow/00000.pfm
        root/data/test/...                  the same

    Raises:
        FleetflowError: For what is missing.
    """
    chosen("split", split, HomogeneousSplit)
    listing = Listing(root)
    found = []
    for truth in listing.find(f"data/{split}/flow/*.pfm"):
        number = Path(truth).stem
        frame1, frame2 = (listing.root / f"data/{split}/t{k}/{number}.png" for k in (0, 1))
        found.append(Pair("chairs_sdhom", number, frame1, frame2, partial(read_flow, listing.root / truth)))
    return listing.files(found, "ChairsSDHom.tar.gz", f"data/{split}/flow/*.pfm")
