"""Any tree of pictures: pairs, sequences, or text lists of pairs."""

import os
from functools import partial
from pathlib import Path
from typing import Literal

from fleetflow.data.dataset import Files, Pair, chosen, datasets
from fleetflow.io import IMAGE_SUFFIXES, list_frames, read_flow
from fleetflow.types import FleetflowError

Split = Literal["all", "train", "val"]
TRUTHS = (".flo", ".pfm", ".flo5", ".npy", ".npz")


@datasets.register
def folder(root: Path, *, split: Split = "all") -> Files:
    """Returns the pairs of a tree of any depth, or those that a text list names.

        root/a/00001_img1.ppm       "all": NAMEimg1 and NAMEimg2, any kind of picture,
        root/a/00001_img2.ppm
        root/a/00001_flow.flo       with NAMEflow, any kind of flow (.png: KITTI's)
        root/b/frame_1.png          pictures with other names are a sequence, each followed by the next,
        root/b/frame_2.png
        root/b/frame_1.flo          with the flow that has the name of the first, any kind but .png
        root/train.txt              "train": a line a pair, frame1 frame2 flow, below root; the flow may be left out
        root/val.txt                "val": the same

    Pairs whose flow is not there have no known pixel. Raises FleetflowError for what is missing.
    """
    chosen("split", split, Split)
    root = Path(root)
    if not root.is_dir():
        raise FleetflowError(f"{root} is not a folder; give the folder that holds the pictures")
    found = _listed(root, root / f"{split}.txt") if split != "all" else _tree(root)
    if not found:
        raise FleetflowError(f"{root} holds no pairs of pictures ({split}); expected NAMEimg1, NAMEimg2 or sequences")
    return Files(found)


def _listed(root: Path, path: Path) -> list[Pair]:
    if not path.is_file():
        raise FleetflowError(f'{path} does not exist; write lines of "frame1 frame2 flow", or take split "all"')
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) not in (2, 3):
            raise FleetflowError(f'{path} line {number} has {len(words)} words; expected "frame1 frame2 flow"')
        paths = [root / word for word in words]
        absent = [str(file) for file in paths if not file.is_file()]
        if absent:
            raise FleetflowError(f"{path} line {number} names {absent[0]}, which does not exist; check the list")
        truth = partial(read_flow, paths[2]) if len(paths) == 3 else None
        found.append(Pair(path.stem, words[0], *paths[:2], truth))
    return found


def _tree(root: Path) -> list[Pair]:
    found = []
    for place, folders, names in os.walk(root):
        folders.sort()
        if not any(name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".") for name in names):
            continue
        frames = list_frames(place)
        firsts = [frame for frame in frames if frame.stem.endswith("img1")]
        if firsts:
            pairs = [(frame, _sibling(frame, "img2", IMAGE_SUFFIXES)) for frame in firsts]
            rows = [(*pair, _sibling(pair[0], "flow", (*TRUTHS[:3], ".png", *TRUTHS[3:]))) for pair in pairs if pair[1]]
        else:
            rows = [(*pair, _sibling(pair[0], pair[0].stem, TRUTHS)) for pair in zip(frames, frames[1:])]
        inside = Path(place).relative_to(root)
        for frame1, frame2, truth in rows:
            group = inside.parts[0] if inside.parts else root.name
            name = Path(*inside.parts[1:], frame1.stem).as_posix()
            found.append(Pair(group, name, frame1, frame2, partial(read_flow, truth) if truth else None))
    return found


def _sibling(frame: Path, ending: str, suffixes: tuple[str, ...]) -> Path | None:
    """Returns the file beside `frame` with "img1" at the end of its name replaced by `ending`, or None."""
    stem = ending if ending == frame.stem else frame.stem.removesuffix("img1") + ending
    paths = [frame.with_name(stem + suffix) for suffix in suffixes]
    return next((path for path in paths if path.is_file()), None)
