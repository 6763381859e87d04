"""Pictures in files: uint8 RGB [H, W, 3], 16-bit pictures, masks, the frames of a folder."""

import os
import re
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from fleetflow.io.atomic import check_size, existing, reading, write_atomically
from fleetflow.types import FleetflowError

PILLOW_FORMATS = ("PNG", "JPEG", "PPM", "BMP", "GIF", "WEBP", "TIFF", "TGA")  # none of them runs a program, as EPS does
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".tga")


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
    """Returns FFmpeg's codec for a 16-bit color picture, of which Pillow would silently keep 8 bits, or None."""
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


# Middlebury .flo: "PIEH" as a float, width, height, rows of (u, v); the numbers are those of its flowIO.h.
_FLO_TAG, _FLO_UNKNOWN, _FLO_LIMIT = 202021.25, 1e10, 1e9
