"""Motion vectors and STMaps in OpenEXR files, as compositing programs want them. Needs the extra "exr".

Both conventions count in pixels with y upwards, while flow here has v downwards:

nuke      the layers "forward" (to the next frame) and "backward" (to the previous one), channels u and v
blender   one layer "Vector": X, Y to the previous frame; Z, W from the next frame to this one, which is the forward
          flow with its sign turned (as Blender's own vector pass)
"""

import os
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from fleetflow.io.atomic import existing, reading, write_atomically
from fleetflow.io.limits import UNBOUNDED, check_size
from fleetflow.io.names import check_utf8
from fleetflow.types import FleetflowError

Convention = Literal["nuke", "blender"]
# Channels of x and y, and what a flow (u, v) is multiplied by, for forward and backward
_CHANNELS = {
    "nuke": ((("forward.u", "forward.v"), (1, -1)), (("backward.u", "backward.v"), (1, -1))),
    "blender": ((("Vector.Z", "Vector.W"), (-1, 1)), (("Vector.X", "Vector.Y"), (1, -1))),
}


class Vectors(NamedTuple):
    """The motion vectors of one frame."""

    forward: np.ndarray | None  # float32 [H, W, 2] pixels to the next frame, u to the right, v downwards
    backward: np.ndarray | None  # the same to the previous frame


def write_vectors(
    path: str | os.PathLike,
    forward: np.ndarray | None = None,
    backward: np.ndarray | None = None,
    *,
    convention: Convention = "nuke",
) -> None:
    """Writes the motion vectors of a frame as an OpenEXR file of 32-bit floats.

    Vectors that are not finite are written as 0: compositing programs spread what is not a number. A direction that
    is not given is left out ("nuke"), or written as 0 ("blender", whose nodes need all four channels).

    Args:
        path: the file, which ends in .exr.
        forward: [H, W, 2] pixels to the next frame, u to the right, v downwards.
        backward: [H, W, 2] pixels to the previous frame.
        convention: "nuke" or "blender", see the top of this file.

    Raises:
        FleetflowError: neither flow is given, a shape or the convention is wrong, or the file cannot be written.
    """
    if convention not in _CHANNELS:
        raise FleetflowError(f'convention is {convention!r}; expected "nuke" or "blender"')
    given = [flow for flow in (forward, backward) if flow is not None]
    if not given:
        raise FleetflowError("neither a forward nor a backward flow was given; give one at least")
    size = np.shape(given[0])[:2]
    channels = {}
    for flow, (names, signs) in zip((forward, backward), _CHANNELS[convention]):
        if flow is None and convention == "nuke":
            continue
        flow = np.zeros((*size, 2)) if flow is None else flow
        if np.ndim(flow) != 3 or np.shape(flow) != (*size, 2) or 0 in size:
            raise FleetflowError(f"the flow is {list(np.shape(flow))}; expected [H, W, 2], of one size for both")
        channels |= {name: np.asarray(flow)[..., k] * signs[k] for k, name in enumerate(names)}
    _write(Path(os.path.expanduser(path)), channels)


def read_vectors(path: str | os.PathLike) -> Vectors:
    """Reads the motion vectors of an OpenEXR file of either convention.

    Raises:
        FleetflowError: the file is missing, damaged, or holds neither the layers of Nuke nor that of Blender.
    """
    path = existing(path)
    channels = _read(path)
    for directions in _CHANNELS.values():
        flows = [
            np.stack([channels[name] * np.float32(sign) for name, sign in zip(names, signs)], -1)
            if all(name in channels for name in names)
            else None
            for names, signs in directions
        ]
        if any(flow is not None for flow in flows):
            return Vectors(*flows)
    seen = ", ".join(list(channels)[:12])
    raise FleetflowError(f"{path} holds the channels {seen}; expected forward.u and forward.v, or Vector.X to Vector.W")


def write_stmap(path: str | os.PathLike, flow: np.ndarray) -> None:
    """Writes a flow as an STMap: where each pixel comes from, as Nuke's node of that name wants it.

    The node, given the next frame, shows it as this frame. Red is x / W, green y / H, from 0 at the left and lower
    edges of the picture to 1 at the others; the middle of the first pixel is 0.5 / W.

    Args:
        path: the file, which ends in .exr.
        flow: [H, W, 2] pixels from this frame to the next.

    Raises:
        FleetflowError: the shape is wrong, or the file cannot be written.
    """
    flow = np.asarray(flow, np.float64)
    if flow.ndim != 3 or flow.shape[2] != 2 or 0 in flow.shape:
        raise FleetflowError(f"the flow is {list(flow.shape)}; expected [H, W, 2]")
    height, width = flow.shape[:2]
    flow = np.where(np.isfinite(flow).all(-1, keepdims=True), flow, 0)
    y, x = np.mgrid[0:height, 0:width]
    red, green = (x + 0.5 + flow[..., 0]) / width, 1 - (y + 0.5 + flow[..., 1]) / height
    _write(Path(os.path.expanduser(path)), {"R": red, "G": green, "B": np.zeros_like(red)})


def read_stmap(path: str | os.PathLike) -> np.ndarray:
    """Returns the flow float32 [H, W, 2] pixels that an STMap stands for; raises FleetflowError as `read_vectors`."""
    path = existing(path)
    channels = _read(path)
    if not {"R", "G"} <= set(channels):
        raise FleetflowError(f"{path} holds the channels {', '.join(list(channels)[:12])}; expected R and G")
    height, width = channels["R"].shape
    y, x = np.mgrid[0:height, 0:width]
    u, v = channels["R"] * np.float64(width) - x - 0.5, (1 - channels["G"].astype(np.float64)) * height - y - 0.5
    return np.stack((u, v), -1).astype(np.float32)


def check_exr() -> None:
    """Raises FleetflowError where OpenEXR is not installed."""
    _library()


def _library():
    try:
        import OpenEXR
    except ImportError as error:
        raise FleetflowError('.exr files need OpenEXR, which is missing; run: pip install "fleetflow[exr]"') from error
    return OpenEXR


def _write(path: Path, channels: dict[str, np.ndarray]) -> None:
    library = _library()
    check_utf8(path, "OpenEXR")
    if path.suffix.lower() != ".exr":
        raise FleetflowError(f'{path} has the suffix "{path.suffix}"; expected .exr')
    planes = {
        name: np.ascontiguousarray(np.where(np.isfinite(plane), plane, 0) + 0.0, np.float32)  # no negative zeros
        for name, plane in channels.items()
    }
    header = {"compression": library.ZIP_COMPRESSION, "type": library.scanlineimage}

    def write(temporary: Path) -> None:
        with library.File(header, planes) as file:
            file.write(str(temporary))

    write_atomically(path, write)


def _read(path: Path) -> dict[str, np.ndarray]:
    """Returns the channels of the first part of a file, each float32 [H, W]; the size is checked first."""
    library = _library()
    check_utf8(path, "OpenEXR")
    with reading(path, "an OpenEXR file"):
        with library.File(str(path), header_only=True) as file:
            header = file.header()
            first, last = header["dataWindow"]
            width, height = (int(last[axis]) - int(first[axis]) + 1 for axis in (0, 1))
            needed = max(height, 0) * max(width, 0) * 4 * len(header["channels"])
        check_size(path, height, width, needed, path.stat().st_size, UNBOUNDED)
        with library.File(str(path), separate_channels=True) as file:
            found = {name: np.array(channel.pixels, np.float32) for name, channel in file.channels().items()}
    if any(plane.shape != (height, width) for plane in found.values()):
        raise FleetflowError(f"{path} has channels of several sizes; expected one of {height}x{width} pixels")
    return found
