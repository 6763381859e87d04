"""Containers of video: opened safely, their clocks, and whether they are as long as they say."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import av
from av.container import InputContainer

# FFmpeg's names of the containers we open. Left out on purpose: play lists, which open other files or addresses,
# single pictures, and text, which FFmpeg renders as a film of a terminal.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,gif,apng,asf,ogg,ivf,h264,hevc,mjpeg,m4v,yuv4mpegpipe,mxf"
RAW_STREAMS = ("h264", "hevc", "mpegvideo", "m4v")  # pictures without a container
_CLOCKS_FROM_ZERO = ("mov", "matroska")  # other containers begin anywhere, as a broadcast does
_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"styp", b"sidx", b"mfra", b"uuid", b"meta")
_TAIL = 64  # bytes at the end of a file that are never all 0
_SCAN = 2**20  # bytes of padding that may follow the last picture


def open_container(path: Path) -> InputContainer:
    """Opens a video file with FFmpeg, which then follows no address in it; raises what FFmpeg raises."""
    options = {"protocol_whitelist": "file", "format_whitelist": _CONTAINERS}
    return av.open(f"file:{path}", options=options, metadata_errors="replace")


def clock_origin(container: InputContainer) -> float:
    """Returns the time in seconds that counts as 0: where the first stream begins, unless the clock begins at 0."""
    own_clock = container.format.name.startswith(_CLOCKS_FROM_ZERO)
    return 0.0 if own_clock else (container.start_time or 0) / av.time_base


def is_cut(path: Path) -> bool:
    """Returns True if the file ends before its container does.

    Known of mp4, mov, Matroska, WebM, AVI, MPEG-TS, FLV, GIF, animated PNG, IVF, Y4M, Ogg, ASF, MXF and raw streams of
    JPEG; other files pass. Of raw H.264 and MPEG the decoder tells. Of raw HEVC it cannot be known: its last picture may be
    half a picture where such a file is cut, without a sign.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(1024)
        for begins, end in _WALKS:
            if begins(head):
                return end(file, head, size) > size
    return False


# Each of these returns how many bytes the file must have at least.


def _matroska(file: BinaryIO, head: bytes, size: int) -> int:
    """One segment of elements (name, length, data), the clusters among them again of elements, down to the blocks."""
    start = head.find(b"\x18\x53\x80\x67") + 4
    if start < 4:
        return 0
    length, end = _ebml_length(file, start)
    whole = size if length is None else end + length  # a live recording leaves the length open
    while end < min(whole, size):
        name = _ebml_name(file, end)
        if not name:
            return size + 1  # no element begins like this: the tail is lost
        length, begin = _ebml_length(file, end + len(name))
        # the elements of a cluster stand in the same row as the clusters: they are looked at, too
        end = begin if length is None or name == b"\x1f\x43\xb6\x75" else begin + length
    return max(whole, end)


def _ebml_name(file: BinaryIO, place: int) -> bytes:
    """Returns the name of 1 to 4 bytes that stands at a place, or nothing if there is none."""
    file.seek(place)
    name = file.read(4)
    return name[: 9 - name[0].bit_length()] if name and name[0] >= 0x10 else b""


def _ebml_length(file: BinaryIO, place: int) -> tuple[int | None, int]:
    """Returns the length that stands at a place (None: unknown) and where what it is the length of begins."""
    file.seek(place)
    first = file.read(1)
    if not first or not first[0]:
        return 0, place + 1
    count = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(count - 1), "big") & ((1 << 7 * count) - 1)
    return (None if value == (1 << 7 * count) - 1 else value), place + count


def _mp4(file: BinaryIO, head: bytes, size: int) -> int:
    """ISO 14496-12: boxes of (size, name); size 1: 64 bits follow the name; size 0: up to the end."""
    end, in_fragments = 0, False
    while end < size:
        file.seek(end)
        length, name, long_length = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        length = long_length if length == 1 else length
        if length < 8 or name not in _BOXES:  # others write after the film whatever they like
            return size + 1 if in_fragments and not length and name == b"\0\0\0\0" else end
        in_fragments |= name == b"moof"
        end += length
    return end


def _riff(file: BinaryIO, head: bytes, size: int) -> int:
    """AVI: chunks "RIFF" of (name, length), one after the other in files over 1 GB, which consist of such chunks."""
    end = inside = 0
    while end + 8 <= size:
        file.seek(end)
        name, length = struct.unpack("<4sI", file.read(8))
        if name == b"RIFF":
            inside, end = end + 8 + length, end + 12
        elif end >= inside:
            break
        elif name == b"\0\0\0\0":
            return size + 1
        else:
            end += 8 + length + length % 2
    return max(end, inside)


def _program_stream(file: BinaryIO, head: bytes, size: int) -> int:
    """MPEG-1 and -2: nothing tells the length, but padding is not zero."""
    file.seek(max(0, size - _TAIL))
    return size if any(file.read()) else size + 1


def _flv(file: BinaryIO, head: bytes, size: int) -> int:
    """A header whose length it holds, 4 bytes, then tags of 11 bytes, data, and 4 bytes; a tag begins with 8, 9, 18."""
    end = int.from_bytes(head[5:9], "big") + 4
    while end < size:
        file.seek(end)
        tag = file.read(4)
        if tag[:1] not in (b"\x08", b"\x09", b"\x12"):
            break
        end += 15 + int.from_bytes(tag[1:].ljust(3, b"\0"), "big")
    return end


def _gif(file: BinaryIO, head: bytes, size: int) -> int:
    """GIF89a: header, color table, then blocks until the trailer; what lies inside a block are pieces of one length."""
    end = 13 + _color_table(head[10:11])
    while end < size:
        file.seek(end)
        kind = file.read(1)
        if kind == b";":
            return end + 1
        if kind == b",":  # a picture: 9 bytes, its color table, one byte, then pieces
            end += 10 + _color_table(file.read(9)[8:]) + 1
        elif kind == b"!":  # an extension: its kind, then pieces
            end += 2
        else:
            return size + 1  # no block begins like this: the tail is lost
        piece = b"\1"
        while piece not in (b"\0", b""):
            file.seek(end)
            piece = file.read(1)
            end += 1 + (piece[0] if piece else 0)
    return max(end, size + 1)  # without a trailer


def _color_table(flags: bytes) -> int:
    return 3 * 2 ** ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


def _y4m(file: BinaryIO, head: bytes, size: int) -> int:
    """A line, then for each picture a line that begins with FRAME, and its samples: as many each time."""
    first = head.find(b"\n") + 1
    lines = head[first:].split(b"\n", 1)
    if not first or not lines[0].startswith(b"FRAME"):
        return 0
    samples, end = _y4m_samples(head[: first - 1]), first
    while samples and end < size:
        file.seek(end)
        line = file.readline(1024)
        if not line.startswith(b"FRAME") or not line.endswith(b"\n"):
            return size + 1
        end += len(line) + samples
    file.seek(max(0, size - _TAIL))
    return end if b"Cmono" in head or any(file.read()) else size + 1  # no color is 0


def _y4m_samples(header: bytes) -> int:
    """Returns the bytes of a picture; 0 if the kind of colors is not known."""
    fields = {field[:1]: field[1:].decode("ascii", "replace") for field in header.split(b" ")[1:]}
    width, height, colors = int(fields.get(b"W", "0")), int(fields.get(b"H", "0")), fields.get(b"C", "420")
    kind, _, depth = colors.partition("p")
    if kind.startswith("mono"):
        depth, kind = kind[4:], "mono"
    elif not depth.isdigit():  # 420jpeg, 420paldv, 420mpeg2, 444alpha
        kind, depth = ("444alpha" if colors == "444alpha" else colors[:3]), ""
    half_width, half_height = (width + 1) // 2, (height + 1) // 2
    planes = {
        "mono": 0, "420": 2 * half_width * half_height, "422": 2 * half_width * height,
        "411": 2 * ((width + 3) // 4) * height, "444": 2 * width * height, "444alpha": 3 * width * height,
    }  # fmt: skip
    if kind not in planes:
        return 0
    return (width * height + planes[kind]) * (2 if depth.isdigit() and int(depth) > 8 else 1)


def _transport_stream(file: BinaryIO, head: bytes, size: int) -> int:
    """Packets of one length, each of which begins with 0x47: a whole number of them."""
    for length, offset in ((188, 0), (192, 4), (204, 0)):
        if all(head[place] == 0x47 for place in range(offset, min(len(head), size), length)):
            whole = size // length * length
            file.seek(max(0, whole - length) + offset)
            return size + 1 if whole != size or file.read(1) != b"\x47" else size
    return 0


def _ivf(file: BinaryIO, head: bytes, size: int) -> int:
    """A header whose length it holds, then for each picture its length, its time of 8 bytes, and its data."""
    end = int.from_bytes(head[6:8], "little")
    while end < size:
        file.seek(end)
        end += 12 + int.from_bytes(file.read(4).ljust(4, b"\0"), "little")
    return end


def _ogg(file: BinaryIO, head: bytes, size: int) -> int:
    """Pages: 27 bytes, the last of which tells how many lengths follow, these, and as much data as they say."""
    end = 0
    while end < size:
        file.seek(end)
        page = file.read(27)
        if not page.startswith(b"OggS"):
            return size + 1
        lengths = file.read(page[26]) if len(page) == 27 else b""
        end += 27 + len(lengths) + sum(lengths) if len(page) == 27 and len(lengths) == page[26] else size + 1
    file.seek(max(0, size - _TAIL))
    return end if any(file.read()) else size + 1


def _asf(file: BinaryIO, head: bytes, size: int) -> int:
    """Objects of (name, length); the second holds packets of one length, the first how many and how long they are."""
    begin = struct.unpack("<Q", head[16:24].ljust(8, b"\0"))[0]
    place = head.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))  # the file properties object
    if place < 0 or len(head) < place + 96 or head[place + 88] & 1:  # written while it was sent
        return 0
    length, packets, packet = struct.unpack("<Q8xQ28xI", head[place + 40 : place + 96])
    file.seek(begin + 50 + max(0, packets - 1) * packet)
    return length if file.read(1) != b"\0" else size + 1


def _mxf(file: BinaryIO, head: bytes, size: int) -> int:
    """Keys of 16 bytes, each followed by a length (SMPTE ST 377-1) and as much data."""
    end = 0
    while end < size:
        file.seek(end)
        key = file.read(25)
        if not key.startswith(b"\x06\x0e\x2b\x34"):
            return size + 1
        first = key[16] if len(key) > 16 else 0
        count = first & 0x7F if first & 0x80 else 0
        end += 17 + count + (int.from_bytes(key[17 : 17 + count], "big") if count else first)
    return end


def _apng(file: BinaryIO, head: bytes, size: int) -> int:
    """Chunks of (length, name, data, checksum) up to IEND."""
    end, name = 8, b""
    while end < size and name != b"IEND":
        file.seek(end)
        length, name = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
        end += 12 + length
    return end if name == b"IEND" else size + 1


def _motion_jpeg(file: BinaryIO, head: bytes, size: int) -> int:
    """Pictures one after the other; each ends with the bytes FF D9, and padding may follow."""
    file.seek(max(0, size - _SCAN))
    return 0 if file.read().rstrip(b"\0\n\r").endswith(b"\xff\xd9") else size + 1


def _begins(*starts: bytes, at: int = 0) -> Callable[[bytes], bool]:
    return lambda head: head[at:].startswith(starts)


_WALKS = (
    (_begins(b"\x1aE\xdf\xa3"), _matroska),
    (_begins(*_BOXES, at=4), _mp4),
    (_begins(b"RIFF"), _riff),
    (_begins(b"FLV\x01"), _flv),
    (_begins(b"GIF8"), _gif),
    (_begins(b"YUV4MPEG2"), _y4m),
    (_begins(b"DKIF"), _ivf),
    (_begins(b"OggS"), _ogg),
    (_begins(bytes.fromhex("3026b2758e66cf11")), _asf),
    (_begins(b"\x06\x0e\x2b\x34"), _mxf),
    (_begins(b"\0\0\1\xba"), _program_stream),
    (_begins(b"\x89PNG"), _apng),
    (_begins(b"\xff\xd8\xff"), _motion_jpeg),
    (lambda head: head[:1] == b"\x47" or head[4:5] == b"\x47", _transport_stream),
)
