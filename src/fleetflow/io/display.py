"""From a decoded video frame to the picture a player shows: color matrix, HDR, turned and mirrored."""

from functools import lru_cache

import av
import numpy as np
from av.sidedata.sidedata import SideData
from av.video.reformatter import Colorspace

_UNSPECIFIED = 2  # FFmpeg's number in each of its three lists of color properties
_BT2020 = 9  # the primaries
_PQ, _HLG = 16, 18  # the transfer functions of HDR: SMPTE ST 2084 and ARIB STD-B67
_BT2020_TO_BT709 = np.array(  # linear light; ITU-R BT.2087, table 4 inverted
    ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)), np.float32
)
_WHITE = 203  # cd/m^2: what a white sheet of paper has in HDR (ITU-R BT.2408)
_PEAK = 1000  # cd/m^2: the brightest highlights that stay apart


def displayed(frame: av.VideoFrame) -> np.ndarray:
    """Returns the picture of a frame as a player shows it.

    The matrix and the range are those the video names. HDR (PQ, HLG) is mapped to the range of an ordinary screen. Of
    interlaced frames the lines of the second field, which is of another moment, lose their combs.

    Args:
        frame: any frame that FFmpeg decoded.

    Returns:
        uint8 [H, W, 3] RGB, turned and mirrored as the video's display matrix says.
    """
    picture = _rgb(frame)
    if frame.interlaced_frame and len(picture) > 1:
        picture = _without_combs(picture)
    return np.ascontiguousarray(_upright(picture, _display_matrix(frame)))


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    """Returns uint8 [H, W, 3] RGB as stored; more than 8 bits are rounded, not cut off."""
    transfer, primaries = getattr(frame, "color_trc", _UNSPECIFIED), getattr(frame, "color_primaries", _UNSPECIFIED)
    matrix = Colorspace.BT2020 if frame.colorspace == _UNSPECIFIED and primaries == _BT2020 else None
    if frame.format.components[0].bits <= 8 and transfer not in (_PQ, _HLG):
        return frame.to_ndarray(format="rgb24", src_colorspace=matrix)
    deep = frame.to_ndarray(format="rgb48le", src_colorspace=matrix)
    if transfer in (_PQ, _HLG):
        return _tone_mapped(deep, transfer)
    return ((deep.astype(np.uint32) + 128) // 257).astype(np.uint8)


@lru_cache(maxsize=2)
def _light(transfer: int) -> np.ndarray:
    """Returns float32 [65536]: the light of each 16-bit value, in multiples of _WHITE."""
    value = np.linspace(0, 1, 65536)
    if transfer == _PQ:  # ITU-R BT.2100, table 4
        root = value ** (1 / 78.84375)
        light = 10000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
    else:  # ITU-R BT.2100, table 5; 1.2 is the exponent of a screen of 1000 cd/m^2, taken channel by channel
        scene = np.where(value <= 0.5, value**2 / 3, (np.exp((value - 0.55991073) / 0.17883277) + 0.28466892) / 12)
        light = 1000 * scene**1.2
    return (light / _WHITE).astype(np.float32)


@lru_cache(maxsize=1)
def _gamma() -> np.ndarray:
    """Returns uint8 [4097]: the value of light in [0, 1] on a screen of ITU-R BT.1886, whose exponent is 2.4."""
    return np.rint(255 * np.linspace(0, 1, 4097) ** (1 / 2.4)).astype(np.uint8)


def _tone_mapped(deep: np.ndarray, transfer: int) -> np.ndarray:
    """Returns uint8 [H, W, 3] of HDR uint16 [H, W, 3]: highlights compressed (Reinhard 2002, equation 4), hue kept."""
    light = np.maximum(_light(transfer)[deep] @ _BT2020_TO_BT709.T, 0)
    brightest = light.max(-1, keepdims=True)
    light *= (1 + brightest / np.float32(_PEAK / _WHITE) ** 2) / (1 + brightest)
    return _gamma()[(np.minimum(light, 1) * 4096 + 0.5).astype(np.uint16)]


def _without_combs(picture: np.ndarray) -> np.ndarray:
    """Returns the picture [H, W, 3] whose odd lines stay within the values of both their neighbors, the even lines.

    The median of three lines: what moved between the fields stands out as a comb and goes; what stands still, and frames
    that are of one moment though they say otherwise, keep all but details of a single line.
    """
    above, lines = picture[:-1:2], picture[1::2]
    below = np.concatenate((picture[2::2], above[-1:]))[: len(lines)]
    picture = picture.copy()
    picture[1::2] = np.clip(lines, np.minimum(above, below), np.maximum(above, below))
    return picture


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Returns (a, b, c, d), each -1, 0 or 1: the pixel (x, y) is shown at (a x + c y, b x + d y), up to a shift."""
    for data in frame.side_data:
        if isinstance(data, SideData) and data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(data), np.int32)[:5])
            largest = max(abs(a), abs(b), abs(c), abs(d))
            if largest:
                return round(a / largest), round(b / largest), round(c / largest), round(d / largest)
    return 1, 0, 0, 1


def _upright(picture: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Returns the picture after the nearest of the eight turns and mirrors of a rectangle."""
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):  # x and y change places
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
