"""Files: pictures, flow fields, the frames of a folder. Arrays here are numpy [H, W, C], pictures uint8 RGB.

Every reader checks what a header claims against the length of the file before it takes memory. Every writer writes a
temporary file in the same folder and renames it, so no half-written file carries the wanted name.
"""

import math
import os
import re
import struct
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np
from PIL import Image, ImageOps

from fleetflow.types import FleetflowError

PILLOW_FORMATS = ("PNG", "JPEG", "PPM", "BMP", "GIF", "WEBP", "TIFF", "TGA")  # none of them runs a program, as EPS does
PIXEL_LIMIT = 2**28  # pixels in one picture or flow field; a flow field of this size takes 2 GiB
DEFLATE_LIMIT = 1032  # DEFLATE packs at most 1032 bytes into one (zlib.net/zlib_tech.html)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".tga")


# ---- errors, sizes, temporary files ----


def existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not os.path.isfile(path):
        raise FleetflowError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; expected a file")
    return path


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turns what a library raises at a damaged or foreign file into one line about `path`."""
    try:
        yield
    except FleetflowError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, RuntimeError, ...
        raise FleetflowError(f"{path} cannot be read as {kind} ({reason(error)}); get a complete copy") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        message = f"{path} cannot be written ({reason(error)}); check the folder and the space left"
        raise FleetflowError(message) from error


def reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def check_size(path: Path, height: int, width: int, needed: int = 0, present: int = 0) -> None:
    """Raises FleetflowError unless height x width pixels are allowed and `present` bytes can hold the `needed` ones."""
    if height < 1 or width < 1 or height * width > PIXEL_LIMIT:
        raise FleetflowError(f"{path} claims {height}x{width} pixels; expected at least 1x1 and at most 2^28 pixels")
    if needed > present:
        raise FleetflowError(f"{path} claims {height}x{width} pixels but is too short for them; get a complete copy")


def temporary_name(path: Path) -> Path:
    """Returns the name of a file that does not exist yet, hidden, in the folder and with the suffix of `path`."""
    return path.with_name(f".part-{uuid.uuid4().hex[:12]}{path.suffix.lower()}")


def write_atomically(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Returns nothing: `write(temporary)` writes a file, which then takes the name `path` in one step.

    The folder is created. Where `write` raises, `path` stays as it was and the temporary file is removed.
    Raises FleetflowError where the file cannot be written; other errors of `write` pass through.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            os.chmod(temporary, mode)  # safetensors makes files that nobody else may read
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


# ---- pictures ----


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Returns the picture uint8 [H, W, 3] RGB in [0, 255], turned as its EXIF orientation says.

    Reads PNG, JPEG, WebP, BMP, TIFF, PNM, TGA and GIF: gray (repeated three times), palette, alpha (dropped), 16 bits
    (divided by 257 and rounded), floating-point TIFF in [0, 1]. Of an animation the first picture. Raises
    FleetflowError where the file is missing, damaged, no picture, over Pillow's limit of pixels (about 2^27), or out
    of range.
    """
    path = existing(path)
    with reading(path, "a picture"):
        with Image.open(path, formats=PILLOW_FORMATS) as image:
            check_size(path, image.height, image.width)
            return np.array(_upright_rgb(path, image))


def _upright_rgb(path: Path, image: Image.Image) -> Image.Image:
    """Returns the picture in Pillow's mode RGB, with its EXIF orientation undone."""
    codec = _deep_codec(path, image)
    if codec is not None:
        deep = Image.fromarray(_to_8_bits(path, _decode(path.read_bytes(), codec)))
        deep.getexif()[0x0112] = image.getexif().get(0x0112, 1)  # the tag "Orientation"
        image = deep
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bits(path, np.asarray(image)))
    return image.convert("RGB")


def _deep_codec(path: Path, image: Image.Image) -> str | None:
    """Returns FFmpeg's codec for a 16-bit colour picture, of which Pillow would silently keep 8 bits, or None."""
    if image.format == "TIFF" and image.tag_v2.get(258, ())[1:2] == (16,):  # the tag "BitsPerSample"
        return "tiff"
    if image.format == "PNG" and not image.mode.startswith("I"):
        with open(path, "rb") as file:
            return "png" if file.read(25)[24] == 16 else None  # the bit depth
    return None


def _decode(data: bytes, codec: str) -> np.ndarray:
    """Returns the picture uint16 [H, W, C] in a PNG or TIFF file of 16 bits a channel, every bit kept."""
    context = av.CodecContext.create(codec, "r")
    context.options = {"err_detect": "crccheck+explode"} if codec == "png" else {}  # "explode" refuses every TIFF file
    frame = next(iter(context.decode(av.Packet(data))), None)
    if frame is None or len(frame.planes) != 1 or {component.bits for component in frame.format.components} != {16}:
        raise ValueError("no picture of 16 bits a channel in it")
    channels, order = len(frame.format.components), ">" if frame.format.is_big_endian else "<"
    rows = np.frombuffer(frame.planes[0], np.uint8).reshape(frame.height, frame.planes[0].line_size)
    pixels = rows[:, : frame.width * channels * 2].copy().view(order + "u2")
    return pixels.reshape(frame.height, frame.width, channels).astype(np.uint16)


def _to_8_bits(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Returns uint8 of the same shape: floats in [0, 1] times 255, whole numbers in [0, 65535] over 257, rounded."""
    low, high, highest = pixels.min(), pixels.max(), 1 if pixels.dtype.kind == "f" else 65535
    if not (low >= 0 and high <= highest):  # also where a value is not a number
        raise FleetflowError(f"{path} holds values from {low} to {high}; expected 0 to {highest}, scale them first")
    if pixels.dtype.kind == "f":
        return np.rint(pixels * 255).astype(np.uint8)
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """Returns bool [H, W], True where the picture is not black. Raises FleetflowError as `read_image` does."""
    path = existing(path)
    with reading(path, "a mask"):
        with Image.open(path, formats=PILLOW_FORMATS) as image:
            check_size(path, image.height, image.width)
            gray = image.mode in ("1", "L") or image.mode.startswith("I")
            pixels = np.asarray(image if gray else image.convert("RGB"))
    return pixels > 0 if gray else pixels.any(-1)


def read_deep_image(path: str | os.PathLike) -> np.ndarray:
    """Returns uint16 [H, W, C] of a PNG file of 16 bits a channel, every bit kept; raises FleetflowError for others."""
    path = existing(path)
    with reading(path, "a PNG file of 16 bits a channel"):
        with Image.open(path, formats=PILLOW_FORMATS) as image:
            check_size(path, image.height, image.width)
        return _decode(path.read_bytes(), "png")


def write_image(path: str | os.PathLike, image: np.ndarray) -> None:
    """Returns nothing: writes the picture uint8 [H, W, 3] RGB, in the format of the suffix (see IMAGE_SUFFIXES).

    Raises FleetflowError for another shape, dtype or suffix, or where the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise FleetflowError(f"{path} has no suffix of a picture; known: {', '.join(IMAGE_SUFFIXES)}")
    picture = Image.fromarray(checked_picture(image))
    write_atomically(path, lambda temporary: picture.save(temporary, quality=95))


def checked_picture(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise FleetflowError(f"the picture is {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3] RGB")
    return np.ascontiguousarray(image)


def list_frames(folder: str | os.PathLike) -> list[Path]:
    """Returns the pictures of `folder` (see IMAGE_SUFFIXES; hidden files left out), frame2 before frame10.

    Raises FleetflowError where the folder is missing or holds no picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FleetflowError(f"{folder} is not a folder; give the name of a folder of pictures")
    with reading(folder, "a folder"):
        pictures = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    frames = [path for path in pictures if not path.name.startswith(".")]
    if not frames:
        raise FleetflowError(f"{folder} holds no picture; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return sorted(frames, key=_natural)


def _natural(path: Path) -> tuple:
    pieces = re.split(r"([0-9]+)", path.name.lower())
    return [int(piece) if place % 2 else piece for place, piece in enumerate(pieces)], path.name


# ---- flow fields ----


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
    unknown by definition. Raises FleetflowError for another shape or suffix, or where the file cannot be written.
    """
    path = Path(path)
    flow_format = _flow_format(path)
    with np.errstate(over="ignore"):
        flow = np.array(flow, np.float32, order="C")
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
        signature, width, height, depth, colour = struct.unpack(">16sIIBB", file.read(26))
    if signature != b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" or (depth, colour) != (16, 2):
        raise FleetflowError(f"{path} is not a PNG file of 16-bit RGB; expected KITTI's flow, not a colour picture")
    check_size(path, height, width, height * width * 6, path.stat().st_size * DEFLATE_LIMIT)
    stored = _decode(path.read_bytes(), "png")
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


def _read_npy_array(path: Path, file: BinaryIO, present: int, channels: tuple[int, ...]) -> np.ndarray:
    """Returns the array [H, W, *channels] of numbers in a .npy stream of `present` bytes; never objects."""
    if np.lib.format.read_magic(file) != (1, 0):  # later versions hold only structures and headers over 64 KiB
        raise FleetflowError(f"{path} is not a plain .npy file; write it with numpy.save")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if len(shape) < 2 or shape[2:] != channels or dtype.kind not in "biuf":
        raise FleetflowError(f"{path} holds {dtype} {list(shape)}; expected flow float [H, W, 2], valid bool [H, W]")
    needed = math.prod(shape) * dtype.itemsize
    check_size(path, *shape[:2], needed, present - file.tell())
    data = file.read(needed)
    if file.read(1):  # at the end of a .npz member this also checks its checksum
        raise FleetflowError(f"{path} goes on after its array {list(shape)}; check the file")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")


def _read_npy(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        return _read_npy_array(path, file, path.stat().st_size, (2,))


def _read_npz(path: Path) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        flow = _read_npz_member(path, archive, "flow.npy", (2,))
        if "valid.npy" not in archive.namelist():
            return flow
        valid = _read_npz_member(path, archive, "valid.npy", ())
    if valid.shape != flow.shape[:2]:
        raise FleetflowError(f"{path} holds valid {list(valid.shape)} for a flow {list(flow.shape)}; expected [H, W]")
    return np.where(valid[..., None] != 0, flow, np.nan)


def _read_npz_member(path: Path, archive: zipfile.ZipFile, name: str, channels: tuple[int, ...]) -> np.ndarray:
    if name not in archive.namelist():
        raise FleetflowError(f"{path} holds {archive.namelist()[:9]} but no {name}; expected the keys flow and valid")
    member = archive.getinfo(name)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FleetflowError(f"{path} is packed in a way numpy does not write; write it with numpy.savez_compressed")
    # the lengths in the directory of the archive may lie as well as the header of the array: trust neither too far
    present = min(member.file_size, min(member.compress_size, path.stat().st_size) * DEFLATE_LIMIT)
    with archive.open(member) as file:
        return _read_npy_array(path, file, present, channels)


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
        plain = isinstance(dataset, h5py.Dataset) and not dataset.external and not dataset.is_virtual
        if not plain or dataset.dtype.kind != "f" or not dataset.shape or dataset.shape[2:] != (2,):
            raise FleetflowError(f'{path} holds no plain data set "flow" of floats [H, W, 2], as Spring does')
        # HDF5 unpacks whole chunks, and chunks never written take no space: both must fit what is in the file
        values = max(math.prod(dataset.shape), math.prod(dataset.chunks or ()))
        packing = DEFLATE_LIMIT if dataset.id.get_create_plist().get_nfilters() else 1
        present = min(dataset.id.get_storage_size(), path.stat().st_size) * packing
        check_size(path, *dataset.shape[:2], values * dataset.dtype.itemsize, present)
        return dataset[()]


def _write_flo5(path: Path, flow: np.ndarray) -> None:
    with _hdf5().File(path, "w") as file:
        file.create_dataset("flow", data=flow, compression="gzip", compression_opts=5)


FORMATS: dict[str, FlowFormat] = {
    ".flo": FlowFormat("Middlebury, float32, over 1e9 where unknown", _read_flo, _write_flo),
    ".png": FlowFormat("KITTI, 16 bits, steps of 1/64 pixel within [-512, 512), with valid", _read_kitti, _write_kitti),
    ".npy": FlowFormat("numpy array [H, W, 2], not-a-number where unknown", _read_npy, np.save),
    ".npz": FlowFormat("numpy archive with flow [H, W, 2] and valid [H, W]", _read_npz, _write_npz),
    ".pfm": FlowFormat("portable float map (FlyingThings3D), not-a-number where unknown", _read_pfm, _write_pfm),
    ".flo5": FlowFormat("HDF5 (Spring), not-a-number where unknown", _read_flo5, _write_flo5),
}
