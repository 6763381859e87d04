"""FlyingThings3D (Mayer et al., CVPR 2016): the full set, and the subset used for DispNet and FlowNet 2.0."""

from functools import partial
from pathlib import Path
from typing import Literal

from fleetflow.data.dataset import Files, Pair, chosen, datasets, read_masks
from fleetflow.data.listing import Listing, digits
from fleetflow.io.flow import read_flow

Split = Literal["train", "test"]
SubsetSplit = Literal["train", "val"]
Render = Literal["clean", "final"]
Side = Literal["left", "right"]
Direction = Literal["both", "forward", "backward"]
TURN = {"forward": "backward", "backward": "forward"}
FOLDER = {"forward": "into_future", "backward": "into_past"}


@datasets.register
def flyingthings3d(
    root: Path, *, split: Split = "train", render: Render = "clean", side: Side = "left", direction: Direction = "both"
) -> Files:
    """Returns the full FlyingThings3D, 540x960, in scenes of ten frames; not-a-number in the truth is unknown.

        root/frames_cleanpass/TRAIN/A/0000/left/0006.png
        root/frames_cleanpass/TRAIN/A/0000/left/0007.png
        root/frames_finalpass/TRAIN/...                    the same
        root/optical_flow/TRAIN/A/0000/into_future/left/OpticalFlowIntoFuture_0006_L.pfm    from 0006 to 0007
        root/optical_flow/TRAIN/A/0000/into_future/left/OpticalFlowIntoFuture_0007_L.pfm
        root/optical_flow/TRAIN/A/0000/into_past/left/OpticalFlowIntoPast_0006_L.pfm
        root/optical_flow/TRAIN/A/0000/into_past/left/OpticalFlowIntoPast_0007_L.pfm        from 0007 to 0006

    Each of the frames 0006 to 0015 has a flow both ways, but there is no frame 0005 or 0016 for those at the ends: a
    scene gives nine pairs a direction. direction: "backward" goes from a frame to the one before.

    Raises:
        FleetflowError: For what is missing, a frame between others too.
    """
    for name, value, options in (
        ("split", split, Split), ("render", render, Render), ("side", side, Side), ("direction", direction, Direction)
    ):  # fmt: skip
        chosen(name, value, options)
    listing = Listing(root)
    images = f"frames_{render}pass/{split.upper()}"
    listing.require("the archives of FlyingThings3D: frames and optical_flow", images, f"optical_flow/{split.upper()}")

    def truth(scene: str, way: str, number: int) -> Path:
        name = {"forward": "IntoFuture", "backward": "IntoPast"}[way]
        folder = listing.root / "optical_flow" / split.upper() / scene / FOLDER[way] / side
        return folder / f"OpticalFlow{name}_{number:04d}_{side[0].upper()}.pfm"

    found, truths = [], []
    for folder in listing.find(f"{images}/*/*/{side}"):
        scene = folder.removeprefix(f"{images}/").removesuffix(f"/{side}")
        numbers = [
            int(name[:-4]) for name in listing.names(folder) if name[:-4].isdigit() and name.endswith(".png")
        ] or [0]
        for number in range(min(numbers), max(numbers)):  # every one, so that a frame that is not there is missed
            for way in FOLDER if direction == "both" else (direction,):
                here, there = (number, number + 1) if way == "forward" else (number + 1, number)
                frame1, frame2 = (listing.root / folder / f"{k:04d}.png" for k in (here, there))
                truths.append(truth(scene, way, here))
                back = partial(read_flow, truth(scene, TURN[way], there))
                found.append(
                    Pair(f"flyingthings3d/{render}", f"{scene}/{side}/{here:04d}-{there:04d}", frame1, frame2,
                         partial(read_flow, truths[-1]), backward=back)
                )  # fmt: skip
    return listing.files(found, "frames of FlyingThings3D", f"{images}/A/0000/{side}/0006.png", truths)


@datasets.register
def flyingthings3d_subset(
    root: Path,
    *,
    split: SubsetSplit = "train",
    render: Render = "clean",
    side: Side = "left",
    direction: Direction = "both",
) -> Files:
    """Returns the subset of FlyingThings3D without its hardest scenes, with occlusion; numbers run through all scenes.

        root/train/image_clean/left/0000000.png
        root/train/image_clean/left/0000001.png
        root/train/image_final/left/...                         the same
        root/train/flow/left/into_future/0000000.flo            from 0000000 to 0000001
        root/train/flow/left/into_past/0000001.flo              from 0000001 to 0000000
        root/train/flow_occlusions/left/into_future/0000000.png not black where occluded
        root/train/flow_occlusions/left/into_past/0000001.png
        root/val/...                                            the same

    The last frame of a scene has no flow into the future and the first none into the past.

    Args:
        direction: "backward" goes from a frame to the one before.

    Raises:
        FleetflowError: For what is missing.
    """
    for name, value, options in (
        ("split", split, SubsetSplit), ("render", render, Render), ("side", side, Side),
        ("direction", direction, Direction),
    ):  # fmt: skip
        chosen(name, value, options)
    listing = Listing(root)
    listing.require("the subset archives image and flow", f"{split}/image_{render}/{side}", f"{split}/flow/{side}")
    found = []
    for way in FOLDER if direction == "both" else (direction,):
        for truth in listing.find(f"{split}/flow/{side}/{FOLDER[way]}/{digits(7)}.flo"):
            here = int(Path(truth).stem)
            there = here + 1 if way == "forward" else here - 1
            frame1, frame2 = (listing.root / f"{split}/image_{render}/{side}/{k:07d}.png" for k in (here, there))
            back = f"{split}/flow/{side}/{FOLDER[TURN[way]]}/{there:07d}.flo"
            occluded = f"{split}/flow_occlusions/{side}/{FOLDER[way]}/{here:07d}.png"
            found.append(
                Pair(
                    f"flyingthings3d_subset/{render}", f"{side}/{here:07d}-{there:07d}", frame1, frame2,
                    partial(read_flow, listing.root / truth),
                    backward=partial(read_flow, listing.root / back) if back in listing else None,
                    masks=partial(read_masks, {"occluded": listing.root / occluded}) if occluded in listing else None,
                )
            )  # fmt: skip
    return listing.files(found, "the subset archive image", f"{split}/flow/{side}/into_future/*.flo")
