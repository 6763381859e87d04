"""Flow fields in files: .flo, .pfm, KITTI .png, .npy, .npz, .flo5; arrays are float32 [H, W, 2] in pixels."""

import math
import os
import re
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np

from fleetflow.io.arrays import as_array, read_npy, read_npz
from fleetflow.io.atomic import existing, reading, write_atomically
from fleetflow.io.images import read_deep_image
from fleetflow.io.limits import DEFLATE, check_size
from fleetflow.types import FleetflowError


class FlowFormat(NamedTuple):
    """How flow fields are stored under one suffix. Use `read_flow` and `write_flow`, which check and clean."""

    about: str  # one line for people
    read: Callable[[Path], np.ndarray]  # path -> [H, W, 2] of any number type, not-a-number where unknown
    write: Callable[[Path, np.ndarray], None]  # path, float32 [H, W, 2], not-a-number where unknown


def read_flow(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns flow float32 [H, W, 2] pixels (u right, v down) and valid bool [H, W]; the suffix names the format.

    A vector that the file marks as unknown, or that is not finite, has valid False and flow 0. The formats are in
    FORMATS. Raises FleetflowError where the suffix is not known, or the file is missing, damaged, of another kind, or
    larger than 2^28 pixels. A file that claims a size it cannot hold is refused before memory is taken.
    """
    flow_format = _flow_format(Path(path))
    path = existing(path)
    with reading(path, f"a {path.suffix.lower()} flow file"), np.errstate(all="ignore"):
        flow = np.array(flow_format.read(path), np.float32, order="C")
    valid = np.isfinite(flow[..., 0]) & np.isfinite(flow[..., 1])  # many times as fast as .all(-1)
    flow[~valid] = 0
    return flow, valid


def write_flow(path: str | os.PathLike, flow: np.ndarray, valid: np.ndarray | None = None) -> None:
    """Returns nothing: writes flow [H, W, 2] pixels, with valid [H, W] (None: all), in the format of the suffix.

    Vectors that are not finite are stored as unknown. Exact in float32, but KITTI's .png keeps 1/64 pixel (an error of
    1/128 at most) and clips to [-512, 511.984375], as KITTI's own development kit does; and in .flo a value over 1e9 is
    unknown by definition.

    Raises:
        FleetflowError: For another shape or suffix, or where the file cannot be written.
    """
    path = Path(os.path.expanduser(path))
    flow_format = _flow_format(path)
    with np.errstate(over="ignore"):
        flow = np.array(as_array(flow, "the flow", "[H, W, 2]"), np.float32, order="C")
    if flow.ndim != 3 or flow.shape[2] != 2 or 0 in flow.shape:
        raise FleetflowError(f"the flow is {list(flow.shape)}; expected [H, W, 2]")
    known = np.isfinite(flow).all(-1)
    if valid is not None:
        if np.shape(valid) != known.shape:
            raise FleetflowError(f"valid is {list(np.shape(valid))} for a flow {list(flow.shape)}; expected [H, W]")
        known &= np.asarray(valid, bool)
    flow[~known] = np.nan
    write_atomically(path, lambda temporary: flow_format.write(temporary, flow))


def _flow_format(path: Path) -> FlowFormat:
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise FleetflowError(f'{path} has the suffix "{suffix}"; known flow formats: {", ".join(FORMATS)}')
    return FORMATS[suffix]


# Middlebury .flo: "PIEH" as a float, width, height, rows of (u, v); the numbers are those of its flowIO.h.
_FLO_TAG, _FLO_UNKNOWN, _FLO_LIMIT = 202021.25, 1e10, 1e9


def _read_flo(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        tag, width, height = struct.unpack("<fii", file.read(12))
        if tag != _FLO_TAG:
            raise FleetflowError(f"{path} does not begin with PIEH, as a .flo file does; check what it is")
        flow = _read_floats(path, file, "<f4", height, width, 2)
    flow[np.abs(flow) > _FLO_LIMIT] = np.nan
    return flow


def _write_flo(path: Path, flow: np.ndarray) -> None:
    stored = np.where(np.isnan(flow), _FLO_UNKNOWN, flow).astype("<f4")
    path.write_bytes(struct.pack("<fii", _FLO_TAG, flow.shape[1], flow.shape[0]) + stored.tobytes())


def _read_floats(path: Path, file: BinaryIO, dtype: str, height: int, width: int, channels: int) -> np.ndarray:
    """Returns [H, W, C], the rest of the file, which must be exactly as long as that."""
    needed, present = height * width * channels * 4, os.fstat(file.fileno()).st_size - file.tell()
    check_size(path, height, width, needed, present)
    if present > needed:
        raise FleetflowError(f"{path} is {present - needed} bytes longer than its {height}x{width} pixels; check it")
    return np.fromfile(file, dtype, height * width * channels).reshape(height, width, channels)


# Portable float map: "PF", width, height, a scale whose sign tells the byte order, then rows from the bottom up. As in
# FlyingThings3D the channels are u, v and 0. The size of the scale is ignored, as all readers of flow do.
_PFM_HEADER = re.compile(rb"(P[Ff])\s+(\d{1,9})\s+(\d{1,9})\s+([-+]?[0-9.]+(?:[eE][-+]?\d+)?)[ \t]*\r?\n")


def _read_pfm(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        header = _PFM_HEADER.match(file.read(128))
        if header is None or header[1] == b"Pf":
            has = "has 1 channel (a disparity or a depth?)" if header else "has no header of a .pfm file"
            raise FleetflowError(f"{path} {has}; expected a flow: PF, width, height, scale, 3 channels")
        file.seek(header.end())
        dtype = "<f4" if float(header[4]) < 0 else ">f4"
        return _read_floats(path, file, dtype, int(header[3]), int(header[2]), 3)[::-1, :, :2]


def _write_pfm(path: Path, flow: np.ndarray) -> None:
    stored = np.dstack((flow, np.zeros(flow.shape[:2], np.float32)))[::-1].astype("<f4")
    path.write_bytes(b"PF\n%d %d\n-1.0\n" % (flow.shape[1], flow.shape[0]) + stored.tobytes())


# KITTI .png: 16 bits RGB; u and v are (value - 2^15) / 64, the third channel is valid (readme of the development kit).
def _read_kitti(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        signature, depth, color = struct.unpack(">16s8xBB", file.read(26))
    if signature != b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" or (depth, color) != (16, 2):
        raise FleetflowError(f"{path} is not a PNG file of 16-bit RGB; expected KITTI's flow, not a color picture")
    stored = read_deep_image(path)
    return np.where(stored[..., 2:3] > 0, (stored[..., :2].astype(np.float32) - 2**15) / 64, np.nan)


def _write_kitti(path: Path, flow: np.ndarray) -> None:
    valid = ~np.isnan(flow[..., :1])
    steps = np.clip(np.rint(np.where(valid, flow, 0).astype(np.float64) * 64 + 2**15), 0, 2**16 - 1)
    stored = np.dstack((np.where(valid, steps, 0), valid)).astype(np.uint16)
    context = av.CodecContext.create("png", "w")
    context.height, context.width = flow.shape[:2]
    context.pix_fmt, context.time_base = "rgb48be", Fraction(1)
    context.options = {"compression_level": "1", "pred": "sub"}  # several times as fast as the default, little longer
    packets = context.encode(av.VideoFrame.from_ndarray(stored, format="rgb48be")) + context.encode(None)
    path.write_bytes(b"".join(bytes(packet) for packet in packets))


def _read_npy(path: Path) -> np.ndarray:
    return _checked(path, read_npy(path), (2,))


def _read_npz(path: Path) -> np.ndarray:
    found = read_npz(path, "flow", optional=("valid",))
    flow = _checked(path, found["flow"], (2,))
    if "valid" not in found:
        return flow
    valid = _checked(path, found["valid"], ())
    if valid.shape != flow.shape[:2]:
        raise FleetflowError(f"{path} holds valid {list(valid.shape)} for a flow {list(flow.shape)}; expected [H, W]")
    return np.where(valid[..., None] != 0, flow, np.nan)


def _checked(path: Path, array: np.ndarray, channels: tuple[int, ...]) -> np.ndarray:
    """Returns the array if it is [H, W, *channels]; else raises FleetflowError."""
    if array.ndim < 2 or array.shape[2:] != channels or not array.size:
        seen = f"{array.dtype} {list(array.shape)}"
        raise FleetflowError(f"{path} holds {seen}; expected flow float [H, W, 2], valid bool [H, W]")
    return array


def _write_npz(path: Path, flow: np.ndarray) -> None:
    valid = ~np.isnan(flow[..., 0])
    np.savez_compressed(path, flow=np.where(valid[..., None], flow, np.float32(0)), valid=valid)


# Spring .flo5: an HDF5 file with the data set "flow"; not-a-number is unknown. Spring's truth is twice as high and wide
# as its frames (spring-benchmark.org), which is the caller's business.
def _hdf5():
    try:
        import h5py
    except ImportError as error:
        raise FleetflowError('.flo5 files need h5py, which is missing; run: pip install "fleetflow[data]"') from error
    return h5py


def _read_flo5(path: Path) -> np.ndarray:
    h5py = _hdf5()
    with h5py.File(path, "r") as file:
        # other links, external storage and virtual data sets lead to other files: never followed
        dataset = file["flow"] if isinstance(file.get("flow", getlink=True), h5py.HardLink) else None
        if (
            not isinstance(dataset, h5py.Dataset)
            or (dataset.external or dataset.is_virtual)
            or (dataset.dtype.kind != "f" or dataset.ndim != 3 or dataset.shape[2] != 2)
        ):
            raise FleetflowError(f'{path} holds no plain data set "flow" of floats [H, W, 2], as Spring does')
        height, width = dataset.shape[:2]
        # HDF5 unpacks whole chunks, and chunks never written take no space: both must fit what is in the file
        values = max(math.prod(dataset.shape), math.prod(dataset.chunks or ()))
        packing = DEFLATE if dataset.id.get_create_plist().get_nfilters() else 1
        present = min(dataset.id.get_storage_size(), path.stat().st_size)
        check_size(path, height, width, values * dataset.dtype.itemsize, present, packing)
        return dataset[()]


def _write_flo5(path: Path, flow: np.ndarray) -> None:
    with _hdf5().File(path, "w", locking=False) as file:
        file.create_dataset("flow", data=flow, compression="gzip", compression_opts=5)


FORMATS: dict[str, FlowFormat] = {
    ".flo": FlowFormat("Middlebury, float32, over 1e9 where unknown", _read_flo, _write_flo),
    ".png": FlowFormat("KITTI, 16 bits, steps of 1/64 pixel within [-512, 512), with valid", _read_kitti, _write_kitti),
    ".npy": FlowFormat("numpy array [H, W, 2], not-a-number where unknown", _read_npy, np.save),
    ".npz": FlowFormat("numpy archive with flow [H, W, 2] and valid [H, W]", _read_npz, _write_npz),
    ".pfm": FlowFormat("portable float map (FlyingThings3D), not-a-number where unknown", _read_pfm, _write_pfm),
    ".flo5": FlowFormat("HDF5 (Spring), not-a-number where unknown", _read_flo5, _write_flo5),
}
