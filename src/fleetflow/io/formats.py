"""What a file is, told by its first bytes: so that a format that is not read here is not called damaged."""

import os
from pathlib import Path
from typing import Literal, NamedTuple

Role = Literal["picture", "video", "other"]


class Format(NamedTuple):
    """A format of files that is not read everywhere."""

    name: str  # with its article
    role: Role  # what reads it; "other": nothing here
    advice: str
    in_boxes: bool = False  # FFmpeg would take it for an mp4 video of one picture, or of the parts of one


_CONVERT = "convert it to PNG or JPEG"
_PAIR = "give two pictures or a folder of them"
_RAW = "raw pictures have no header; convert it, naming the size: ffmpeg -f rawvideo -s 640x480 -i FILE out.mp4"
_FRAMES = "convert it to mp4, or take its frames into a folder"

# where the bytes stand, the bytes, what they mean; the first that fits counts
_SIGNATURES: tuple[tuple[int, bytes, Format], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", Format("a PNG picture", "picture", _PAIR)),
    (0, b"\xff\xd8\xff", Format("a JPEG picture", "picture", _PAIR)),
    (0, b"BM", Format("a BMP picture", "picture", _PAIR)),
    (0, b"II*\0", Format("a TIFF picture", "picture", _PAIR)),
    (0, b"MM\0*", Format("a TIFF picture", "picture", _PAIR)),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", Format("a JPEG 2000 picture", "picture", _PAIR)),
    (0, b"\xff\x4f\xff\x51", Format("a JPEG 2000 picture", "picture", _PAIR)),
    (4, b"ftypavis", Format("an animated AVIF", "picture", _FRAMES, True)),
    (4, b"ftypavif", Format("an AVIF picture", "picture", _PAIR, True)),
    (4, b"ftyphei", Format("a HEIC picture", "other", _CONVERT, True)),
    (4, b"ftyphev", Format("a HEIC picture", "other", _CONVERT, True)),
    (4, b"ftypmif1", Format("a HEIF picture", "other", _CONVERT, True)),
    (4, b"ftypmsf1", Format("a HEIF picture", "other", _CONVERT, True)),
    (4, b"ftypcrx", Format("a raw picture of a camera", "other", _CONVERT)),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", Format("a JPEG XL picture", "other", _CONVERT)),
    (0, b"\xff\x0a", Format("a JPEG XL picture", "other", _CONVERT)),
    (0, b"\x76\x2f\x31\x01", Format("an OpenEXR picture", "other", "fleetflow.io.exr reads its motion vectors")),
    (0, b"8BPS", Format("a Photoshop file", "other", _CONVERT)),
    (0, b"SDPX", Format("a DPX picture", "other", _CONVERT)),
    (0, b"XPDS", Format("a DPX picture", "other", _CONVERT)),
    (0, b"FUJIFILMCCD-RAW", Format("a raw picture of a camera", "other", _CONVERT)),
    (0, b"\0\0\1\0", Format("an icon", "other", _CONVERT)),
    (0, b"%PDF", Format("a PDF file", "other", _CONVERT)),
    (0, b"%!PS", Format("a PostScript file", "other", _CONVERT)),
    (0, b"<svg", Format("an SVG drawing", "other", _CONVERT)),
    (0, b"\x1aE\xdf\xa3", Format("a Matroska or WebM video", "video", "give pictures")),
    (4, b"ftyp", Format("an mp4 or mov video", "video", "give pictures")),
    (0, b".RMF", Format("a RealMedia video", "other", "convert it to mp4")),
    (0, b"#EXTM3U", Format("a play list", "other", "give the video itself")),
    (0, b"ffconcat", Format("a play list", "other", "give the video itself")),
    (0, b"PK\3\4", Format("a zip archive", "other", "unpack it first")),
    (0, b"\x1f\x8b", Format("a gzip archive", "other", "unpack it first")),
)  # fmt: skip
_BY_SUFFIX = {
    **dict.fromkeys((".yuv", ".nv12", ".rgb", ".bgr", ".raw", ".uyvy", ".v210"), Format("raw video", "other", _RAW)),
    ".svg": Format("an SVG drawing", "other", _CONVERT),
}  # fmt: skip


def recognized(path: str | os.PathLike) -> Format | None:
    """Returns the format of a file, told by its first bytes, else by its suffix; None for others."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError:
        return None
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        animated = head[12:16] == b"VP8X" and len(head) > 20 and head[20] & 2
        return (
            Format("an animated WebP", "picture", _FRAMES) if animated else Format("a WebP picture", "picture", _PAIR)
        )
    for place, signature, found in _SIGNATURES:
        if head[place:].startswith(signature):
            return found
    return _BY_SUFFIX.get(Path(path).suffix.lower())


def not_this(path: str | os.PathLike, kind: str) -> str:
    """Returns why a sound file is not what it was read as, with what to do, or "" if it may be damaged.

    Args:
        path: the file that could not be read.
        kind: what it was read as: "a picture" or "a video"; others are left alone.
    """
    found = recognized(path) if kind in ("a picture", "a mask", "a video") else None
    role = "video" if kind == "a video" else "picture"
    if found is None or found.role == role:
        return ""
    return f"it is {found.name}; {found.advice}"
