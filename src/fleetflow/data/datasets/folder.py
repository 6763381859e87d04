"""Any tree of pictures: pairs, sequences, or text lists of pairs."""

import os
import re
import shlex
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

from fleetflow.data.dataset import Files, Pair, chosen, datasets
from fleetflow.io.atomic import reading
from fleetflow.io.flow import read_flow
from fleetflow.io.images import IMAGE_SUFFIXES, list_frames
from fleetflow.types import FleetflowError

Split = Literal["all", "train", "val"]
TRUTHS = (".flo", ".pfm", ".flo5", ".npy", ".npz")


@datasets.register
def folder(root: Path, *, split: Split = "all") -> Files:
    """Returns the pairs of a tree of any depth, or those that a text list names.

        root/a/00001_img1.ppm       "all": NAMEimg1 and NAMEimg2, any kind of picture,
        root/a/00001_img2.ppm
        root/a/00001_flow.flo       with NAMEflow, any kind of flow (.png: KITTI's)
        root/b/frame_1.png          other names that differ in their last number alone are a sequence, each followed by
        root/b/frame_2.png          the next number; where a number is left out, another sequence begins
        root/b/frame_1.flo          with the flow that has the name of the first, any kind but .png
        root/train.txt              "train": a line a pair, frame1 frame2 flow, below root; the flow may be left out
        root/val.txt                "val": the same

    So KITTI's 000000_10.png goes with 000000_11.png, and never 000000_11.png with 000001_10.png. Names without a number
    are one sequence, as they are sorted. In a list, names with blanks stand in quotes, as for a shell, or tabs part the
    names; what lies elsewhere may be linked to from below root. Pairs whose flow is not there have no known pixel.

    Raises:
        FleetflowError: For what is missing, NAMEimg2 beside NAMEimg1 too.
    """
    chosen("split", split, Split)
    root = Path(root)
    if not root.is_dir():
        raise FleetflowError(f"{root} is not a folder; give the folder that holds the pictures")
    found = _listed(root, root / f"{split}.txt") if split != "all" else _tree(root)
    if not found:
        raise FleetflowError(
            f"{root} holds no pairs of pictures ({split}); expected NAMEimg1, NAMEimg2 or NAME1, NAME2"
        )
    return Files(found)


def _listed(root: Path, path: Path) -> list[Pair]:
    if not path.is_file():
        raise FleetflowError(f'{path} does not exist; write lines of "frame1 frame2 flow", or take split "all"')
    with reading(path, "a list of pairs in UTF-8"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    found, roots = [], [Path(os.path.abspath(root)), Path(os.path.realpath(root))]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        readings = [words for words in _readings(line) if len(words) in (2, 3)]
        if not readings:
            count = len(line.split())
            raise FleetflowError(
                f'{path} line {number} has {count} words; expected "frame1 frame2 flow", names with blanks in quotes'
            )
        absent = [[word for word in words if not os.path.isfile(root / word)] for words in readings]
        if all(absent):
            first = root / absent[-1][0]
            raise FleetflowError(f"{path} line {number} names {first}, which does not exist; check the list")
        words = readings[absent.index([])]
        inside = [_below(root / word, roots) for word in words]
        if outside := [word for word, name in zip(words, inside) if not name]:
            raise FleetflowError(
                f"{path} line {number} names {outside[0]}, which is not below {root}; move or link it there"
            )
        paths = [root / word for word in words]
        truth = partial(read_flow, paths[2]) if len(paths) == 3 else None
        found.append(Pair(path.stem, inside[0], paths[0], paths[1], truth))
    return found


def _below(path: Path, roots: list[Path]) -> str:
    """Returns the path from one of the roots on, as it is written: links may lead elsewhere; "" of one outside of all."""
    place = Path(os.path.abspath(path))
    return next((place.relative_to(root).as_posix() for root in roots if place.is_relative_to(root)), "")


def _readings(line: str) -> list[list[str]]:
    """Returns the words of a line as blanks part them, as tabs do, and with quotes as a shell reads them.

    The first reading whose files exist is meant, so that a name may hold an apostrophe, or a blank.
    """
    readings = [line.split()]
    if "\t" in line:
        readings.append([word.strip() for word in line.split("\t") if word.strip()])
    if '"' in line or "'" in line:
        with suppress(ValueError):  # a quote alone
            readings.append(shlex.split(line))
    return readings


def _tree(root: Path) -> list[Pair]:
    found = []
    for place, folders, names in os.walk(root):
        folders.sort()
        if not any(name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".") for name in names):
            continue
        frames = list_frames(place)
        firsts = [frame for frame in frames if frame.stem.endswith("img1")]
        if firsts:
            pairs = [(frame, _second(frame)) for frame in firsts]
            rows = [(*pair, _sibling(pair[0], "flow", (*TRUTHS[:3], ".png", *TRUTHS[3:]))) for pair in pairs]
        else:
            rows = [(*pair, _sibling(pair[0], pair[0].stem, TRUTHS)) for pair in _consecutive(frames)]
        inside = Path(place).relative_to(root)
        for frame1, frame2, truth in rows:
            group = inside.parts[0] if inside.parts else root.name
            name = Path(*inside.parts[1:], frame1.stem).as_posix()
            found.append(Pair(group, name, frame1, frame2, partial(read_flow, truth) if truth else None))
    return found


def _consecutive(frames: list[Path]) -> list[tuple[Path, Path]]:
    """Returns the frames whose names differ in the last number alone, by one; of names without numbers, neighbors."""
    runs: dict[tuple[str, ...], list[tuple[int, Path]]] = {}
    for frame in frames:
        name = re.fullmatch(r"(.*?)([0-9]+)([^0-9]*)", frame.stem.lower())
        run = runs.setdefault((name[1], name[3], frame.suffix.lower()) if name else (), [])
        run.append((int(name[2]) if name else len(run), frame))
    steps = (step for run in runs.values() for step in pairwise(run))
    return [(frame, following) for (here, frame), (there, following) in steps if there == here + 1]


def _second(frame: Path) -> Path:
    """Returns NAMEimg2 beside NAMEimg1; raises FleetflowError where it is missing."""
    found = _sibling(frame, "img2", (frame.suffix, *IMAGE_SUFFIXES))
    if found is None:
        lost = frame.with_name(f"{frame.stem.removesuffix('img1')}img2{frame.suffix}")
        raise FleetflowError(f"{lost} does not exist, which follows {frame.name}; get it, or take {frame.name} away")
    return found


def _sibling(frame: Path, ending: str, suffixes: tuple[str, ...]) -> Path | None:
    """Returns the file beside `frame` with "img1" at the end of its name replaced by `ending`, or None."""
    stem = ending if ending == frame.stem else frame.stem.removesuffix("img1") + ending
    paths = [frame.with_name(stem + suffix) for suffix in suffixes]
    return next((path for path in paths if path.is_file()), None)
