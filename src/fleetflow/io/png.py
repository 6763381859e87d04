"""PNG files, checked chunk by chunk: damage is an error, broken metadata is left out."""

import struct
import zlib
from pathlib import Path

from fleetflow.io.limits import DEFLATE, check_size
from fleetflow.types import FleetflowError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of the color types (PNG specification, 11.2.1)
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_KEPT = (b"PLTE", b"tRNS")  # besides the header and the pixels: all that decides what the pixels look like


def sound_png(path: Path) -> bytes:
    """Returns the picture of a PNG file as a PNG file without metadata, whose pixels are not packed.

    Every checksum of what is kept is checked, and that there are as many pixels as the header says. A decoder then
    has neither to unpack nor to judge anything.

    Raises:
        FleetflowError: the header claims a size that is not allowed or that the file cannot hold.
        ValueError: the file is damaged.
    """
    data = memoryview(path.read_bytes())
    chunks = _chunks(data)
    header = chunks[b"IHDR"][0] if b"IHDR" in chunks else b""
    if len(header) != 13 or b"IDAT" not in chunks:
        raise ValueError("a header or the pixels are missing")
    width, height, depth, color, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if depth not in _DEPTHS.get(color, ()) or interlaced > 1:
        raise ValueError("the header names no kind of pixels that PNG has")
    needed = _raw_length(width, height, depth * _CHANNELS[color], bool(interlaced))
    check_size(path, height, width, needed, sum(map(len, chunks[b"IDAT"])), DEFLATE)
    raw = _unpacked(chunks[b"IDAT"], needed)
    if len(raw) < needed:
        raise FleetflowError(
            f"{path} claims {height}x{width} pixels but ends before the last of them; get a complete copy"
        )
    kept = [(name, chunks[name][0]) for name in _KEPT if name in chunks]
    rows = [(b"IHDR", header), *kept, (b"IDAT", zlib.compress(raw, 0)), (b"IEND", b"")]
    return SIGNATURE + b"".join(_packed(name, content) for name, content in rows)


def _chunks(data: memoryview) -> dict[bytes, list[memoryview]]:
    """Returns the chunks by their names. Those that a picture can do without may be damaged, and are left out then."""
    if data[:8] != SIGNATURE:
        raise ValueError("not a PNG file")
    found: dict[bytes, list[memoryview]] = {}
    place = 8
    while b"IEND" not in found:
        if len(data) < place + 12:
            raise ValueError("the file ends early")
        length, name = struct.unpack(">I4s", data[place : place + 8])
        end = place + 12 + length
        if end > len(data) or not name.isalpha():
            raise ValueError("a part has no sound name or length")
        content = data[place + 8 : end - 4]
        if zlib.crc32(data[place + 4 : end - 4]).to_bytes(4, "big") == data[end - 4 : end]:
            found.setdefault(name, []).append(content)
        elif name[:1].isupper() or name in _KEPT:  # an upper-case letter marks what a picture cannot do without
            raise ValueError(f"the checksum of {name.decode()} is wrong")
        place = end
    return found


def _raw_length(width: int, height: int, bits: int, interlaced: bool) -> int:
    """Returns how many bytes the pixels take: each row one byte more, for its filter."""
    if not interlaced:
        return height * (1 + (width * bits + 7) // 8)
    total = 0
    for x, y, step_x, step_y in _PASSES:
        columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _unpacked(pieces: list[memoryview], needed: int) -> bytes:
    """Returns at most `needed` bytes of a DEFLATE stream in pieces; zlib checks its sum if it ends there."""
    stream, found, length = zlib.decompressobj(), [], 0
    for piece in pieces:
        if length < needed:
            found.append(stream.decompress(piece, needed - length))
            length += len(found[-1])
        elif not stream.eof:
            stream.decompress(stream.unconsumed_tail + bytes(piece), 1)  # the sum may stand in a piece of its own
    if length == needed and not stream.eof:
        stream.decompress(stream.unconsumed_tail, 1)
    return b"".join(found)


def _packed(name: bytes, content: bytes) -> bytes:
    body = name + bytes(content)
    return struct.pack(">I", len(content)) + body + zlib.crc32(body).to_bytes(4, "big")
