"""Videos: read and written frame by frame, so that memory does not grow with their length."""

import math
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace

from fleetflow.io.atomic import check_size, existing, held, reading, reason, temporary_name, write_atomically, writing
from fleetflow.io.images import checked_picture
from fleetflow.types import FleetflowError

# FFmpeg's names of the containers we open. Left out on purpose: play lists, which open other files or addresses,
# single pictures, and text, which FFmpeg renders as a film of a terminal.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,gif,apng,asf,ogg,ivf,h264,hevc,mjpeg,m4v,yuv4mpegpipe,mxf"


class VideoReader:
    """Iterates over the pictures uint8 [H, W, 3] RGB of a video, streamed, turned as the video says.

    fps: Fraction, the mean rate. frames: how many the header announces or implies, or None; an estimate. height and
    width: pixels, after turning. start: the index of the first picture given; those before it are decoded and dropped.
    problem: None, or, after the last picture, one line on why the video ended early or what could not be decoded;
    then `truncated` is True, and all the pictures that could be decoded have been given. Every new iteration begins at
    `start` again. Raises FleetflowError at opening where the file is missing or has no picture to decode.
    """

    def __init__(self, path: str | os.PathLike, *, start: int = 0):
        if start < 0:
            raise FleetflowError(f"start is {start}; expected the index of a frame, 0 or more")
        self.path, self.start = existing(path), start
        self.problem: str | None = None
        self._container: av.container.InputContainer | None = None
        with reading(self.path, "a video"), self._open() as container:
            stream = self._picture_stream(container)
            self.fps = Fraction(stream.average_rate or stream.guessed_rate or 25)
            self.frames = stream.frames or max(0, round((container.duration or 0) / av.time_base * self.fps)) or None
            first = next(self._decode(container), None)
            if first is None:
                raise FleetflowError(f"{self.path} holds no picture that can be decoded; check that it is complete")
            self.height, self.width = _upright(first).shape[:2]

    @property
    def truncated(self) -> bool:
        """Returns True where the last iteration met a problem."""
        return self.problem is not None

    def __iter__(self) -> Iterator[np.ndarray]:
        self.problem = None
        with reading(self.path, "a video"), self._open() as container:
            self._container = container
            for index, frame in islice(enumerate(self._decode(container)), self.start, None):
                picture = _upright(frame)
                if picture.shape != (self.height, self.width, 3):
                    self.problem = f"{self.path} changes its size at frame {index}; only the frames before it were read"
                    return
                yield picture

    def _open(self) -> av.container.InputContainer:
        options = {"protocol_whitelist": "file", "format_whitelist": _CONTAINERS}
        return av.open(f"file:{self.path}", options=options, metadata_errors="replace")

    def _picture_stream(self, container: av.container.InputContainer) -> av.VideoStream:
        # left out: the cover of an album, and what FFmpeg has no decoder for
        films = [s for s in container.streams.video if s.codec_context and not s.disposition & Disposition.attached_pic]
        if not films:
            raise FleetflowError(f"{self.path} has no video stream; give a video or a folder of pictures")
        check_size(self.path, films[0].height, films[0].width)
        return films[0]

    def _decode(self, container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
        """Yields every frame that can be decoded, then says in `problem` what could not."""
        stream = self._picture_stream(container)
        # the decoder's threads stay within a frame: side by side, frames lose the mark of damage now and then
        stream.thread_type = "SLICE"
        damage, index, frame = None, 0, None
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt:  # cut by the end of the file; decoding it would lose good frames before it
                    damage = damage or "a damaged packet"
                    continue
                try:
                    frames = packet.decode()
                except av.FFmpegError as error:
                    damage = damage or reason(error)
                    continue
                for frame in frames:
                    yield frame
                    index += 1
        except av.FFmpegError as error:
            damage = damage or reason(error)
        if frame is not None and frame.is_corrupt:
            damage = damage or "a damaged last frame"
        if self.path.stat().st_size < _declared_length(self.path):
            damage = damage or "it is shorter than it says"
        if damage is not None:
            self.problem = f"{self.path} is damaged or cut ({damage}); {index} frames could be read, get a full copy"

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_) -> None:
        if self._container is not None:
            self._container.close()


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """Returns uint8 [H, W, 3] RGB, turned by the frame's rotation (degrees to the left, multiples of 90)."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"styp", b"sidx")  # outermost, of mp4 and mov


def _declared_length(path: Path) -> int:
    """Returns how many bytes the container says the file has at least (mp4, mov, Matroska, WebM; others 0)."""
    with open(path, "rb") as file:
        head = file.read(1024)
        if head.startswith(b"\x1aE\xdf\xa3"):  # Matroska: one segment, whose length is in the 7 bytes after its name
            start = head.find(b"\x18\x53\x80\x67\x01")
            size = int.from_bytes(head[start + 5 : start + 12], "big")
            return start + 12 + size if start > 0 and size != 2**56 - 1 else 0  # all bits 1: not known
        end = 0
        while True:  # ISO 14496-12: boxes of (size, name); size 1: 64 bits follow the name; size 0: up to the end
            file.seek(end)
            size, name, long_size = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
            size = long_size if size == 1 else size
            if size < 8 or name not in _BOXES:
                return end
            end += size


class VideoWriter:
    """Writes pictures uint8 [H, W, 3] RGB, all of one size, as H.264 in an .mp4 file at `fps` frames a second.

    A context manager: the file takes its name when the block ends without an exception, and is removed otherwise. An
    odd height or width grows by one pixel, a copy of the last (H.264 halves the colors' resolution). Raises
    FleetflowError for another suffix, rate, shape or size, for no picture at all, and where the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike, fps: Fraction | float):
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise FleetflowError(f"{self.path} has not the suffix .mp4; videos are written as mp4")
        if not (math.isfinite(fps) and fps > 0):
            raise FleetflowError(f"fps is {fps}; expected a rate above 0, in frames a second")
        self.fps = max(Fraction(fps).limit_denominator(2**16), Fraction(1, 2**16))
        self._temporary = temporary_name(self.path)
        self._container = self._stream = self._shape = None  # begun by the first picture
        self._held = ExitStack()

    def write(self, image: np.ndarray) -> None:
        """Returns nothing: appends the picture uint8 [H, W, 3] RGB; the first one sets the size of the video."""
        image = checked_picture(image)
        with writing(self.path):
            if self._shape is None:
                self._begin(image.shape)
            if image.shape != self._shape:
                raise FleetflowError(f"a frame is {list(image.shape)} after {list(self._shape)}; expected one size")
            image = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            self._container.mux(self._stream.encode(frame))

    def _begin(self, shape: tuple[int, ...]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(held(self._temporary))
        self._container = av.open(f"file:{self._temporary}", "w", format="mp4")  # "a:b" is no address
        # crf 18: hardly a visible loss (FFmpeg's H.264 guide); bf 0: frames in order, so that films can be joined
        options = {"preset": "veryfast", "crf": "18", "bf": "0"}
        stream = self._stream = self._container.add_stream("libx264", rate=self.fps, options=options)
        stream.height, stream.width = (size + size % 2 for size in shape[:2])
        stream.pix_fmt, context = "yuv420p", stream.codec_context
        # 1 is BT.709 in FFmpeg's three lists of color properties; range 1 is the limited one of video
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        self._shape = shape

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            if kind is None and self._shape is None:
                raise FleetflowError(f"no frame was written to {self.path}; a video needs one at least")
            if self._container is not None:
                with writing(self.path):
                    if kind is None:
                        self._container.mux(self._stream.encode())
                    self._container.close()
                    self._held.close()
                    if kind is None:
                        os.replace(self._temporary, self.path)
        finally:
            self._held.close()
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)


def join_videos(parts: Sequence[str | os.PathLike], path: str | os.PathLike) -> None:
    """Writes one mp4 with the pictures of several, one after the other, without decoding them.

    parts: videos of one size and rate, as `VideoWriter` writes them. Raises FleetflowError if one cannot be read.
    """

    def join(temporary: Path) -> None:
        with av.open(f"file:{temporary}", "w", format="mp4") as joined:
            stream, start = None, 0
            for part in parts:
                with reading(Path(part), "a video"), av.open(f"file:{part}") as container:
                    source = container.streams.video[0]
                    stream = stream or joined.add_stream_from_template(source)
                    for packet in container.demux(source):
                        if packet.dts is not None:  # the last packet of every file is empty
                            packet.pts, packet.dts = packet.pts + start, packet.dts + start
                            packet.stream = stream
                            joined.mux(packet)
                    start += source.duration

    write_atomically(path, join)
