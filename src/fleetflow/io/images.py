"""Pictures in files: uint8 RGB [H, W, 3], 16-bit pictures, masks, the frames of a folder."""

import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from fleetflow.io.arrays import as_array
from fleetflow.io.atomic import existing, reading, write_atomically
from fleetflow.io.limits import UNBOUNDED, check_size
from fleetflow.io.png import SIGNATURE, sound_png
from fleetflow.types import FleetflowError

# None of them runs a program, as EPS does. The last two may be missing from a build of Pillow.
PILLOW_FORMATS = ("PNG", "JPEG", "PPM", "BMP", "GIF", "WEBP", "TIFF", "TGA", "JPEG2000", "AVIF")
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".tga"),
    *(".jp2", ".avif"),
)
# Bytes of RGB that one byte of a file stands for at most: codes of 1 bit for a block in JPEG, of 12 bits for 4095 pixels
# in GIF, runs of 128 (TGA) and 255 pixels (BMP), single bits in PPM. A plain picture in the others is as good as empty.
_PACKING = {"JPEG": 2048, "GIF": 8190, "PPM": 24, "BMP": 384, "TGA": 192}
FILE_LIMIT = 2**31  # bytes
_ORIENTATION = 0x0112  # the EXIF tag


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Reads a picture, turned as its EXIF orientation says; other metadata is ignored, even if broken.

    Reads PNG, JPEG, WebP, BMP, TIFF, PNM, TGA, GIF, JPEG 2000 and AVIF: gray (repeated three times), palette, alpha
    (dropped), 16 bits (divided by 257 and rounded), floating-point TIFF in [0, 1]. Of an animation the first picture.

    Args:
        path: the file; `~` is the home folder.

    Returns:
        uint8 [H, W, 3] RGB in [0, 255].

    Raises:
        FleetflowError: the file is missing, damaged, no picture, over Pillow's limit of pixels (about 2^27), claims a
            size that it cannot hold, or its values are out of range.
    """
    path = existing(path)
    with _opened(path, "a picture") as (image, data):
        codec = _deep_codec(image, data.getbuffer())
        if codec is not None:
            picture = Image.fromarray(_to_8_bits(path, _decode(data.getvalue(), codec)))
        elif image.mode.startswith(("I", "F")):
            picture = Image.fromarray(_to_8_bits(path, np.asarray(image)))
        else:
            picture = image.convert("RGB")
        picture.info.clear()  # metadata may be broken
        if codec is not None or image.format != "TIFF":  # which Pillow turns by itself
            picture.getexif()[_ORIENTATION] = _orientation(path)
        return np.array(ImageOps.exif_transpose(picture).convert("RGB"))


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[tuple[Image.Image, BytesIO]]:
    """Opens a picture whose size has been checked, and the bytes it is read from; errors become one line.

    A file that ends early, or whose checksums are wrong, raises here or when the pixels are loaded.
    """
    with reading(path, kind):
        with open(path, "rb") as file:
            is_png = file.read(8) == SIGNATURE
        if path.stat().st_size > FILE_LIMIT:
            raise FleetflowError(f"{path} is longer than any picture is; expected at most 2 GiB")
        data = BytesIO(sound_png(path) if is_png else path.read_bytes())
        with open_picture(path, data) as image:
            present, packing = (data.getbuffer().nbytes, 24) if is_png else (path.stat().st_size, _packing(image))
            check_size(path, image.height, image.width, image.height * image.width * 3, present, packing)
            _check_end(image.format, data.getbuffer())
            yield image, data


def open_picture(path: Path, data: BytesIO | None = None) -> Image.Image:
    """Returns a picture of which only the header has been read, from the file or its bytes.

    Raises:
        FleetflowError: it has more pixels than Pillow takes.
        ValueError: it is no picture.
    """
    try:
        return Image.open(data or path, formats=PILLOW_FORMATS)
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise FleetflowError(f"{path} has more than {most:,} pixels, which are too many; make it smaller") from None
    except UnidentifiedImageError:
        what = "its first bytes are those of no picture" if path.stat().st_size else "it is empty"
        raise ValueError(what) from None


def _packing(image: Image.Image) -> int:
    plain = isinstance(image, TiffImageFile) and image.tag_v2.get(259, 1) == 1  # the tag "Compression"
    return 24 if plain else _PACKING.get(image.format or "", UNBOUNDED)


_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of JPEG: what is no data, no restart, and no padding


def _check_end(name: str | None, data: memoryview) -> None:
    """Raises ValueError if a picture ends early and its decoder would fill in the rest."""
    if name == "JPEG" and not _jpeg_ends(data):
        raise ValueError("the file ends early")
    if name == "WEBP" and not _webp_ends(data):
        raise ValueError("the file ends early")


def _jpeg_ends(data: memoryview) -> bool:
    """Returns True if a JPEG file holds the mark of its end (FF D9) behind the first pixels."""
    place = 2
    while True:
        found = _MARKER.search(data, place)
        if found is None:
            return False
        kind, place = data[found.start() + 1], found.end()
        if kind == 0xD9:
            return True
        if kind not in (0x01, 0xD8):  # the others are followed by their length
            if place + 2 > len(data):
                return False
            place += struct.unpack(">H", data[place : place + 2])[0]


def _webp_ends(data: memoryview) -> bool:
    """Returns True if a WebP file holds all its chunks, and those with pixels do not end in zeros, as none does."""
    place = 12
    while place + 8 <= len(data):
        name, length = struct.unpack("<4sI", data[place : place + 8])
        place += 8 + length
        if name in (b"VP8 ", b"VP8L", b"ANMF") and length > 64 and not any(data[place - 16 : place]):
            return False
        place += length % 2
    return place <= len(data) + 1


def _orientation(path: Path) -> int:
    """Returns the EXIF orientation of a picture, 1 to 8; 1 if there is none or the metadata is broken."""
    with suppress(Exception), Image.open(path, formats=PILLOW_FORMATS) as image:
        return int(image.getexif().get(_ORIENTATION, 1))
    return 1


def _deep_codec(image: Image.Image, data: memoryview) -> str | None:
    """Returns FFmpeg's codec for a 16-bit color picture, of which Pillow would silently keep 8 bits, or None."""
    if isinstance(image, TiffImageFile) and image.tag_v2.get(258, ())[1:2] == (16,):  # the tag "BitsPerSample"
        return "tiff"
    if image.format == "PNG" and not image.mode.startswith("I"):
        return "png" if data[24] == 16 else None  # the bit depth
    return None


def _decode(data: bytes, codec: str) -> np.ndarray:
    """Returns the picture uint16 [H, W, C] in a PNG or TIFF file of 16 bits a channel, every bit kept."""
    context = av.CodecContext.create(codec, "r")
    assert isinstance(context, av.VideoCodecContext)  # as both codecs are
    context.options = {"err_detect": "crccheck+explode"} if codec == "png" else {}  # "explode" refuses every TIFF file
    frame = next(iter(context.decode(av.Packet(data))), None)
    if frame is None or len(frame.planes) != 1 or {component.bits for component in frame.format.components} != {16}:
        raise ValueError("no picture of 16 bits a channel in it")
    channels, order = len(frame.format.components), ">" if frame.format.is_big_endian else "<"
    rows = np.frombuffer(memoryview(frame.planes[0]), np.uint8).reshape(frame.height, frame.planes[0].line_size)
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
    with _opened(existing(path), "a mask") as (image, _):
        gray = image.mode in ("1", "L") or image.mode.startswith("I")
        pixels = np.asarray(image if gray else image.convert("RGB"))
    return pixels > 0 if gray else np.asarray(pixels.any(-1))


def read_deep_image(path: str | os.PathLike) -> np.ndarray:
    """Returns uint16 [H, W, C] of a PNG file of 16 bits a channel, every bit kept; raises FleetflowError for others."""
    path = existing(path)
    with reading(path, "a PNG file of 16 bits a channel"):
        return _decode(sound_png(path), "png")


def write_image(path: str | os.PathLike, image: np.ndarray) -> None:
    """Returns nothing: writes the picture uint8 [H, W, 3] RGB, in the format of the suffix (see IMAGE_SUFFIXES).

    Raises:
        FleetflowError: For another shape, dtype or suffix, or where the file cannot be written.
    """
    path = Path(os.path.expanduser(path))
    check_suffix(path)
    picture = Image.fromarray(checked_picture(image))
    write_atomically(path, lambda temporary: picture.save(temporary, quality=95))


def check_suffix(path: str | os.PathLike) -> None:
    """Raises FleetflowError for a path that `write_image` is going to refuse, so that nobody works for nothing."""
    if Path(path).suffix.lower() not in IMAGE_SUFFIXES:
        raise FleetflowError(f"{path} has no suffix of a picture; known: {', '.join(IMAGE_SUFFIXES)}")


def write_gray(path: str | os.PathLike, values: np.ndarray) -> None:
    """Returns nothing: writes values uint8 or uint16 [H, W] as a gray picture of 8 or 16 bits, a .png.

    Raises:
        FleetflowError: For another shape, dtype or suffix, or where the file cannot be written.
    """
    path = Path(os.path.expanduser(path))
    if path.suffix.lower() != ".png" or values.dtype not in (np.uint8, np.uint16) or values.ndim != 2:
        raise FleetflowError(f"{path} is to hold {values.dtype} {list(values.shape)}; expected uint8 or uint16, a .png")
    picture = Image.fromarray(values)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def checked_picture(image: np.ndarray) -> np.ndarray:
    image = as_array(image, "the picture", "uint8 [H, W, 3] RGB")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise FleetflowError(f"the picture is {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3] RGB")
    return np.ascontiguousarray(image)


def list_frames(folder: str | os.PathLike) -> list[Path]:
    """Returns the pictures of `folder` (see IMAGE_SUFFIXES; hidden files left out), frame2 before frame10.

    Raises:
        FleetflowError: Where the folder is missing or holds no picture.
    """
    folder = Path(os.path.expanduser(folder))
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
