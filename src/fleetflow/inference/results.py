"""What a prediction becomes as files: the formats of `predict`, their names, and what each of them needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fleetflow.io.exr import check_exr, write_stmap, write_vectors
from fleetflow.io.flow import write_flow
from fleetflow.io.images import write_gray, write_image
from fleetflow.registry import unknown
from fleetflow.types import FleetflowError
from fleetflow.visualise import arrows, checked_scale, flow_to_color, side_by_side, streamlines, with_legend

# How each format of --format is named; {} is the name of the first frame without its suffix. "flow" is "flo", too.
FORMATS = {
    "flo": "{}.flo",
    "kitti": "{}_kitti.png",
    "npy": "{}.npy",
    "npz": "{}.npz",
    "pfm": "{}.pfm",
    "flo5": "{}.flo5",
    "color": "{}_color.png",
    "side": "{}_side.png",
    "arrows": "{}_arrows.png",
    "streamlines": "{}_streamlines.png",
    "exr": "{}.exr",
    "stmap": "{}_stmap.exr",
    "backward": "{}_backward.flo",
    "occlusion": "{}_occlusion.png",
    "uncertainty": "{}_uncertainty.png",
}
DEFAULT = ("flo", "color")
PICTURES = ("color", "side", "arrows", "streamlines")  # of a video these become one mp4 each
BOTH_WAYS = ("backward", "occlusion", "uncertainty")  # for which the flow back is needed
STEPS = 256  # a pixel, in the picture of uncertainty, as in KITTI's disparities


class Result(NamedTuple):
    """What is known of a pair: its first frame, uint8 [H, W, 3], and the arrays of `Step`."""

    image: np.ndarray
    flow: np.ndarray
    backward: np.ndarray | None = None
    occlusion: np.ndarray | None = None
    uncertainty: np.ndarray | None = None


def asked_of(formats: Sequence[str]) -> dict[str, Any]:
    """Returns what a `Stream` must be asked for, so that these formats can be written."""
    return {name: name in formats for name in BOTH_WAYS}


def known_formats(formats: Sequence[str] | None, scale: float | None) -> list[str]:
    """Returns the formats, each once; None takes DEFAULT.

    Raises:
        FleetflowError: for an unknown format, none at all, or an impossible scale.
    """
    if scale is not None:
        checked_scale(scale)
    formats = None if formats is None else ["flo" if kind == "flow" else kind for kind in formats]
    for kind in formats or ():
        if kind not in FORMATS:
            raise unknown("format", kind, sorted(FORMATS))
        if FORMATS[kind].endswith(".exr"):
            check_exr()
    if formats is not None and not formats:
        raise FleetflowError(f"no format was asked for; give one or more of {', '.join(FORMATS)}")
    return list(dict.fromkeys(formats or DEFAULT))


def kind_of(path: Path, formats: Sequence[str] | None) -> str:
    """Returns the one format in which this file is written; raises FleetflowError unless formats and suffix agree."""
    fitting = [kind for kind, name in FORMATS.items() if name.endswith(path.suffix.lower())]
    if not fitting:
        suffixes = ", ".join(dict.fromkeys(Path(name).suffix for name in FORMATS.values()))
        raise FleetflowError(f'{path} has the suffix "{path.suffix}"; expected {suffixes}, or a folder that exists')
    asked = formats or ["color" if "color" in fitting else fitting[0]]
    if len(asked) > 1 or asked[0] not in fitting:
        raise FleetflowError(
            f"{path} is one {path.suffix} file, but {' and '.join(asked)} was asked for; give a folder as output"
        )
    return asked[0]


def write(path: Path, kind: str, found: Result, scale: float | None) -> None:
    """Writes one format of a result.

    Args:
        path: the file.
        kind: a key of FORMATS. "occlusion" is a gray picture, white where a pixel is hidden for sure; "uncertainty" one
            of 16 bits, with the pixels that nine of ten flows are off by less than, times 256. "exr" has the layer
            "forward" of Nuke, "stmap" is for its node of that name.
        found: with what the format needs, see `asked_of`.
        scale: pixels at full color, for the kinds in PICTURES.
    """
    if kind in PICTURES:
        write_image(path, picture(kind, found, scale))
    elif kind == "occlusion":
        assert found.occlusion is not None
        write_gray(path, np.round(255 * found.occlusion).astype(np.uint8))
    elif kind == "uncertainty":
        assert found.uncertainty is not None
        write_gray(path, np.clip(np.round(STEPS * found.uncertainty), 0, 65535).astype(np.uint16))
    elif kind == "exr":
        write_vectors(path, found.flow)
    elif kind == "stmap":
        write_stmap(path, found.flow)
    else:
        flow = found.backward if kind == "backward" else found.flow
        assert flow is not None
        write_flow(path, flow)


def picture(kind: str, found: Result, scale: float | None) -> np.ndarray:
    """Returns the picture of one of the kinds in PICTURES, uint8 [H, W', 3]; `scale`: pixels at full color."""
    assert scale is not None  # chosen before the first picture is drawn
    if kind == "arrows":
        return arrows(found.image, found.flow)
    if kind == "streamlines":
        return streamlines(found.image, found.flow, scale=scale)
    drawn = with_legend(flow_to_color(found.flow, scale), scale)
    return side_by_side(found.image, drawn) if kind == "side" else drawn


def write_result(path: Path, kind: str, image: np.ndarray, flow: np.ndarray, scale: float | None) -> None:
    """Writes one flow [H, W, 2] as a file of a kind that needs nothing else; arguments as of `write`."""
    write(path, kind, Result(image, flow), scale)
