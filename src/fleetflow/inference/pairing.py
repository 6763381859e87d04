"""Which pictures of a folder follow one another."""

import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from fleetflow.io.atomic import existing, reading
from fleetflow.io.images import open_picture
from fleetflow.types import FleetflowError


def scenes(frames: Sequence[Path]) -> list[list[Path]]:
    """Returns the pictures of a folder, in their order, by scenes: names that differ in their last number only.

    `000000_10.png 000000_11.png 000001_10.png 000001_11.png` (KITTI) are two scenes of two pictures. Where that leaves
    no two pictures together, all are one scene.
    """
    found: dict[tuple[str, str], list[Path]] = {}
    for frame in frames:
        name = re.fullmatch(r"(.*?)(\d+)(\D*)", frame.stem, flags=re.DOTALL)
        key = (name[1], name[3]) if name else (frame.stem, "")
        found.setdefault(key, []).append(frame)
    if max(map(len, found.values()), default=0) < 2:
        return [list(frames)]
    return list(found.values())


def described(clips: Sequence[Sequence[Path]]) -> str:
    """Returns one line on what is paired, such as "2 scenes: 000000_10 to 000000_11, 000001_10 to 000001_11"."""
    several = [clip for clip in clips if len(clip) > 1]
    alone = [clip[0].name for clip in clips if len(clip) == 1]
    shown = [f"{clip[0].stem} to {clip[-1].stem}" for clip in several]
    shown = shown if len(shown) <= 4 else [*shown[:2], "...", shown[-1]]
    line = f"{len(several)} scene{'s' if len(several) > 1 else ''}: {', '.join(shown)}"
    if alone:
        line += f"; without a second picture: {', '.join(alone if len(alone) <= 4 else [*alone[:3], '...'])}"
    return line


def check_sizes(clips: Sequence[Sequence[Path]]) -> None:
    """Raises FleetflowError unless the pictures of each scene have one size; only their headers are read."""
    for clip in clips:
        sizes = [picture_size(frame) for frame in clip]
        for (before, old), (frame, new) in pairwise(zip(clip, sizes)):
            if old != new:
                raise FleetflowError(
                    f"{before} is {old[0]}x{old[1]}, but {frame} is {new[0]}x{new[1]}; both must have the same size: "
                    "crop or resize one"
                )


def picture_size(path: Path) -> tuple[int, int]:
    """Returns height and width of a picture as `read_image` turns it, from its header."""
    with reading(existing(path), "a picture"), open_picture(path) as image:
        width, height = image.size
        with suppress(Exception):  # broken metadata says nothing
            if image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # turned by 90 degrees
                return width, height
        return height, width
