"""Videos: read and written frame by frame, so that memory does not grow with their length."""

import heapq
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from copy import copy
from fractions import Fraction
from itertools import chain, dropwhile
from numbers import Integral, Rational, Real
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace

from fleetflow.io.atomic import existing, held, reading, reason, temporary_name, write_atomically, writing
from fleetflow.io.audio import Sound
from fleetflow.io.containers import RAW_STREAMS, clock_origin, is_cut, open_container
from fleetflow.io.display import displayed
from fleetflow.io.formats import recognized
from fleetflow.io.frame import Frame, as_frame
from fleetflow.io.images import checked_picture
from fleetflow.io.limits import UNBOUNDED, check_size
from fleetflow.io.live import LiveReader
from fleetflow.types import FleetflowError

_ENTROPY_CODED = ("h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "mpeg4", "mjpeg", "wmv2", "theora")
_ZEROS = 16  # bytes at the end of a packet
_INDEXED = ("mov", "matroska", "flv")  # FFmpeg seeks in these to the very key frame asked for
_LONGEST = 4e9  # seconds: 126 years, so that the time of day (seconds since 1970) is one
_WORTH_SEEKING = 16  # frames; fewer are decoded faster than the file is looked through


def frame_slice(frames: str | None = None, every: int = 1) -> slice:
    """Returns the slice of a video or folder that the options `--frames` and `--every` mean.

    Args:
        frames: "A:B", from frame A (0 is the first) up to B, which is left out; either may be missing. None: all.
        every: 2 takes every second frame of those, and so on.

    Raises:
        FleetflowError: if the text is no range, the range is empty, or `every` is under 1.
    """
    if not isinstance(frames, str | None):
        raise FleetflowError(f'frames is {frames!r}; expected text, such as "100:200"')
    if not isinstance(every, Integral):
        raise FleetflowError(f"every is {every!r}; expected a whole number, 1 or more")
    start, colon, stop = (frames or ":").strip().partition(":")
    if not colon or not (start or "0").isdecimal() or not (stop or "0").isdecimal():
        raise FleetflowError(f'frames is "{frames}"; expected A:B, such as 100:200, :50 or 100:')
    first, last = int(start or 0), int(stop) if stop else None
    if last is not None and last <= first:
        raise FleetflowError(f'frames is "{frames}", which holds no frame; B must be larger than A')
    if every < 1:
        raise FleetflowError(f"every is {every}; expected 1 or more")
    return slice(first, last, every)


class VideoReader:
    """Iterates over the pictures of a video file, each a `Frame`: uint8 [H, W, 3] RGB with its time.

    Pictures are streamed, so that memory does not grow with the length, and look as in a player: turned or mirrored,
    HDR mapped to an ordinary screen. Every new iteration begins at `start` again. A `start` far into the video is
    sought, not decoded up to, where the file tells its frames apart without decoding them.

    Times are those in the file; the clocks of mp4, mov and Matroska begin at 0, those of other containers anywhere,
    which is taken for 0.

    Attributes:
        fps: Fraction, pictures per second as the header says: the mean rate of the whole video in mp4 and mov, elsewhere
            the one that was meant, or the clock's (1000 in AVI of a variable rate), see `mean_rate`.
        time_base: Fraction, seconds; all times are multiples of it, as exactly as a float holds them.
        frames: how many pictures the header announces or implies, without `start`, `stop` and `every`, or None; an
            estimate.
        height: pixels, after turning.
        width: pixels, after turning.
        problem: None, or, after the last picture, one line on why the video ended early or what could not be decoded;
            all the pictures that could be decoded have been given.

    Args:
        path: a video; `~` is the home folder.
        start: the index of the first picture to give.
        stop: the index before which to end; None: at the end of the video.
        every: 2 gives every second picture, and so on.

    Raises:
        FleetflowError: if the file is missing or has no picture that can be decoded.
    """

    def __init__(self, path: str | os.PathLike, *, start: int = 0, stop: int | None = None, every: int = 1):
        if not isinstance(start, Integral) or start < 0:
            raise FleetflowError(f"start is {start!r}; expected the index of a frame, 0 or more")
        whole = isinstance(every, Integral) and isinstance(stop, Integral | None)
        if not whole or every < 1 or (stop is not None and stop < start):
            raise FleetflowError(
                f"stop is {stop}, every {every}; expected stop from start ({start}) on, every 1 or more"
            )
        self.path, self.start, self.stop, self.every = existing(path), start, stop, every
        self.problem: str | None = None
        self._container: InputContainer | None = None
        self._index: _PacketIndex | None = None
        with reading(self.path, "a video"):
            self._begin()

    def _begin(self) -> None:
        """Reads what the header says, and the first picture."""
        found = recognized(self.path)
        if found is not None and found.in_boxes:
            raise ValueError(found.name)
        with self._open() as container:
            stream = self._picture_stream(container)
            self.fps = Fraction(stream.average_rate or stream.guessed_rate or 25)
            self.time_base = Fraction(stream.time_base or 1 / self.fps)
            self.frames = stream.frames or max(0, round((container.duration or 0) / av.time_base * self.fps)) or None
            self._origin = clock_origin(container)
            self._told_apart = container.format.name.startswith(_INDEXED)
            first = next(self._decode(container), None)
            if first is None:
                raise FleetflowError(f"{self.path} holds no picture that can be decoded; check that it is complete")
            if container.format.name == "avi" and first.pts is not None:  # has decoding times only, which are later
                self._origin = float(first.pts * (first.time_base or self.time_base))
            self.height, self.width = displayed(first).shape[:2]

    @property
    def truncated(self) -> bool:
        """True where the last iteration met a problem."""
        return self.problem is not None

    @property
    def seekable(self) -> bool:
        """True where any picture can be read without decoding all before it; mp4, mov, Matroska, WebM and FLV are looked
        through once."""
        return self._told_apart and self._indexed().sound

    @property
    def mean_rate(self) -> float:
        """Pictures per second of the whole video, by the times of its packets; the file is looked through once."""
        times, said = self._indexed().times, self.frames or 0
        fields = len(times) > 1.5 * said > 0  # each packet half a picture; else what the header says is less exact
        count = said if fields else len(times)
        if count < 2 or times[0] == times[-1]:
            return float(self.fps)
        return (count - 1) / float(int(times[-1] - times[0]) * self.time_base)

    def _count(self) -> int | None:
        """How many pictures there are: as the header says, by the packets once the file has been looked through."""
        packets = self._index
        if packets is None or not len(packets.times):
            return self.frames
        if packets.sound or self.frames is None:
            return len(packets.times)
        return min(len(packets.times), self.frames)  # a packet may be half a picture: one of two fields

    def _indexed(self) -> "_PacketIndex":
        if self._index is None:
            with reading(self.path, "a video"), self._open() as container:
                self._index = _PacketIndex(container, self._picture_stream(container))
        return self._index

    def part(self, start: int, stop: int | None = None, every: int = 1) -> "VideoReader":
        """Returns a reader of the same file for other pictures, without opening it anew: cheap, for looking here and
        there. Arguments as of the class."""
        other = copy(self)
        other.start, other.stop, other.every, other.problem, other._container = start, stop, every, None, None
        return other

    @property
    def wanted(self) -> int | None:
        """How many pictures there are from `start` to `stop`, one of `every`.

        None or an estimate, as `frames` is; better once the file has been looked through, see `counted`.
        """
        frames = self._count()
        if frames is None:
            return None
        return len(range(self.start, frames if self.stop is None else min(frames, self.stop), self.every))

    def counted(self) -> int | None:
        """Returns `wanted` by the packets of the file, which is looked through once: exact if it can be sought, at most
        what its header says if not, None if neither tells."""
        self._indexed()
        return self.wanted

    def among(self, first: int, count: int | None = None) -> "VideoReader":
        """Returns a reader of `count` of the pictures that this one gives, or of all, from number `first` of them on."""
        start = self.start + first * self.every
        stop = self.stop
        if count is not None:
            end = start + (count - 1) * self.every + 1
            stop = end if stop is None else min(end, stop)
        return self.part(start, stop, self.every)

    def __iter__(self) -> Iterator[Frame]:
        self.problem = None
        with reading(self.path, "a video"), self._open() as container:
            self._container, time, step = container, -math.inf, 1 / float(self.fps)
            for index, frame in self._from_start(container):
                stamp = frame.pts if frame.pts is not None else frame.dts
                base = frame.time_base or self.time_base
                given = math.nan if stamp is None else float(stamp * base) - self._origin
                time = given if given > time else max(time + step, 0.0)  # no time is given, or one that goes back
                if self.stop is not None and index >= self.stop:
                    return
                if index < self.start or (index - self.start) % self.every:
                    continue
                picture = displayed(frame)
                if picture.shape != (self.height, self.width, 3):
                    self.problem = f"{self.path} changes its size at frame {index}; only the frames before it were read"
                    return
                yield as_frame(picture, time, index)

    def _open(self) -> InputContainer:
        return open_container(self.path)

    def _picture_stream(self, container: InputContainer) -> av.VideoStream:
        # left out: the cover of an album, and what FFmpeg has no decoder for
        films = [s for s in container.streams.video if s.codec_context and not s.disposition & Disposition.attached_pic]
        if not films:
            raise FleetflowError(f"{self.path} has no video stream; give a video or a folder of pictures")
        height, width = films[0].height, films[0].width
        check_size(self.path, height, width, height * width * 3, self.path.stat().st_size, UNBOUNDED)
        return films[0]

    def _from_start(self, container: InputContainer) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yields (index, frame): from the first, or from `start` if the file can be sought that exactly."""
        if self.start < _WORTH_SEEKING or not self.seekable:
            return enumerate(self._decode(container))
        packets = self._indexed()
        place = packets.place(self.start)
        stream = self._picture_stream(container)
        container.seek(place.seek, stream=stream)
        frames = self._decode(container, place.index)
        first = next(frames, None)
        if first is None or first.pts is None or first.pts > place.pts:  # not where it should be
            container.seek(packets.first, stream=stream)
            frames, place = self._decode(container), _Place(0, packets.first, packets.first)
            first = next(frames, None)
        behind = dropwhile(
            lambda frame: frame.pts is not None and frame.pts < place.pts, chain([first] if first else [], frames)
        )
        return enumerate(behind, place.index)

    def _decode(self, container: InputContainer, index: int = 0) -> Iterator[av.VideoFrame]:
        """Yields every frame that can be decoded, then says in `problem` what could not. index: of the first one."""
        stream = self._picture_stream(container)
        # the decoder's threads stay within a frame: side by side, frames lose the mark of damage now and then
        stream.thread_type = "SLICE"
        if container.format.name in RAW_STREAMS:  # nothing else tells that the last picture is cut
            stream.thread_type, stream.codec_context.options = "NONE", {"err_detect": "explode"}
        damage, frame = None, None
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt:  # cut by the end of the file; decoding it would lose good frames before it
                    damage = damage or "a damaged packet"
                    continue
                if _is_zeroed(packet):
                    damage = damage or "a packet that was never written"
                try:
                    frames = packet.decode()
                except FFmpegError as error:
                    damage = damage or reason(error)
                    continue
                for frame in frames:
                    yield frame
                    index += 1
        except FFmpegError as error:
            damage = damage or reason(error)
        if frame is not None and frame.is_corrupt:
            damage = damage or "a damaged last frame"
        if is_cut(self.path):
            damage = damage or "it is shorter than it says"
        if damage is not None:
            self.problem = f"{self.path} is damaged or cut ({damage}); {index} frames could be read, get a full copy"

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_) -> None:
        if self._container is not None:
            self._container.close()


def _is_zeroed(packet: av.Packet) -> bool:
    """Returns True if a packet ends in zeros, which what these codecs write never does: they were not written."""
    coded = packet.size > 2 * _ZEROS and packet.stream.codec_context.name in _ENTROPY_CODED
    return coded and not any(memoryview(packet)[-_ZEROS:])


class _Place(NamedTuple):
    """How to get to a picture: seek to the time `seek`, decode, drop what is before the time `pts`."""

    index: int  # of the picture at pts
    pts: int  # in the stream's time base
    seek: int  # the time of the last key frame up to there


class _PacketIndex:
    """The times of all packets of a stream, read without decoding them."""

    def __init__(self, container: InputContainer, stream: av.VideoStream):
        stamps, keys, sound = [], [], container.format.name.startswith(_INDEXED)
        try:
            for packet in container.demux(stream):
                if packet.size == 0:  # the mark of the end, or of a picture that is shown longer
                    continue
                # else packets and pictures are not one to one
                sound = sound and not (packet.pts is None or packet.is_discard or packet.is_corrupt)
                time = packet.dts if packet.pts is None else packet.pts
                if time is None:
                    continue
                stamps.append(time)
                if packet.is_keyframe:
                    keys.append(time)
        except FFmpegError:  # said by `problem`, when what comes before is decoded
            sound = False
        self.times = np.sort(np.array(stamps, np.int64))
        self.keys = keys
        self.first = min(stamps, default=0)
        self.sound = sound and len(keys) > 0 and len(set(stamps)) == len(stamps) and min(keys) == self.first

    def place(self, index: int) -> _Place:
        """Returns the way to the picture `index`, or to the last if there are fewer; only if `sound`."""
        index = min(index, len(self.times) - 1)
        pts = int(self.times[index])
        return _Place(index, pts, max(key for key in self.keys if key <= pts))


def read_video(
    source: str | os.PathLike | int, *, frames: str | None = None, every: int = 1
) -> VideoReader | LiveReader:
    """Returns an iterator over the pictures of a video, each uint8 [H, W, 3] RGB with its `time` in seconds.

        for picture in fleetflow.read_video("clip.mp4", frames="100:200"):
            print(picture.shape, picture.time)

    Args:
        source: a video file, a camera (its index, or "/dev/video0"), or the address of a stream ("rtsp://...").
        frames: "A:B", from picture A (0 is the first) up to B, which is left out. None: all.
        every: 2 gives every second picture of those, and so on.

    Raises:
        FleetflowError: if the source is missing or has no picture that can be decoded, or `frames` is no range.
    """
    wanted = frame_slice(frames, every)
    camera = re.fullmatch(r"/dev/video(\d+)", str(source))
    source = int(camera[1]) if camera else source
    if isinstance(source, int) or "://" in str(source):
        if frames is not None or every != 1:
            raise FleetflowError(f"{source} is live and cannot be cut; leave frames and every out")
        return LiveReader(source if isinstance(source, int) else os.fspath(source))
    return VideoReader(source, start=wanted.start, stop=wanted.stop, every=wanted.step)


class VideoWriter:
    """Writes pictures uint8 [H, W, 3] RGB, all of one size, as H.264 into an .mp4 file.

    A context manager: the file takes its name when the block ends without an exception, and is removed otherwise. An
    odd height or width grows by one pixel, a copy of the last (H.264 halves the colors' resolution).

        reader = VideoReader("clip.mkv")
        with VideoWriter("out.mp4", reader.fps, time_base=reader.time_base) as writer:
            for frame in reader:
                writer.write(frame, frame.time)

    Args:
        path: the file, which ends in .mp4.
        fps: pictures per second; with times of their own only a hint for players.
        time_base: seconds that all times are multiples of; None: 1 / fps, or 1/90000 if the first picture has a time.
        comment: is kept in the file, see `comment_of`.

    Raises:
        FleetflowError: for another suffix, rate, shape or size, for no picture at all, for times that do not grow, and
            if the file cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike, fps: Fraction | float, *, time_base: Fraction | None = None, comment: str = ""
    ):
        self.path = Path(os.path.expanduser(path))
        if self.path.suffix.lower() != ".mp4":
            raise FleetflowError(f"{self.path} has not the suffix .mp4; videos are written as mp4")
        if not (isinstance(fps, Real) and 0 < fps < math.inf):
            raise FleetflowError(f"fps is {fps!r}; expected a rate above 0, in frames a second")
        if not isinstance(time_base, Rational | None):
            raise FleetflowError(f"time_base is {time_base!r}; expected a Fraction of a second, or None")
        if time_base is not None and not 0 < time_base.numerator <= time_base.denominator < 2**31:
            raise FleetflowError(f"time_base is {time_base}; expected a fraction of a second over 2^31 or less")
        rate = Fraction(fps if isinstance(fps, Rational) else float(fps))
        self.fps = max(rate.limit_denominator(2**16), Fraction(1, 2**16))
        self.time_base, self.comment = time_base, comment
        self._temporary = temporary_name(self.path)
        self._film: _Film | None = None  # begun by the first picture
        self._held = ExitStack()
        self._end = 0  # where the last picture ends, in time bases
        self._last: tuple[int, int] | None = None  # time and duration of the last picture, in time bases
        self._packets: list[av.Packet] = []  # what is to be written after the duration of the last one is known

    def write(self, image: np.ndarray, time: float | None = None, duration: float | None = None) -> None:
        """Appends a picture; the first one sets the size of the video.

        Args:
            image: uint8 [H, W, 3] RGB.
            time: seconds at which it is shown; None: when the last one ends.
            duration: seconds, used of the last picture only; None: 1 / fps.
        """
        image = checked_picture(image)
        for name, value in (("time", time), ("duration", duration)):
            if value is not None and not (isinstance(value, Real) and abs(value) < _LONGEST):
                raise FleetflowError(f"{name} is {value!r}; expected seconds, or None")
        with writing(self.path):
            if self._film is None:
                self._film = self._begin(image.shape, time)
            film = self._film
            if image.shape != film.shape:
                raise FleetflowError(f"a frame is {list(image.shape)} after {list(film.shape)}; expected one size")
            image = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            frame.pts, frame.time_base = self._next_pts(time, duration, film.time_base), film.time_base
            self._mux(film, film.stream.encode(frame))

    def _next_pts(self, time: float | None, duration: float | None, time_base: Fraction) -> int:
        """Returns the time of the next picture in time bases, and keeps where it ends."""
        pts = self._end if time is None else round(time / time_base)
        if self._last is not None and pts <= self._last[0]:
            if time is None or pts < self._last[0] - 1:
                raise FleetflowError(f"a frame at {time} s follows one at {float(self._last[0] * time_base)} s")
            pts = self._last[0] + 1  # two times that the time base cannot tell apart
        length = max(1, round((1 / self.fps if duration is None else duration) / time_base))
        self._last, self._end = (pts, length), pts + length
        return pts

    def _begin(self, shape: tuple[int, ...], time: float | None) -> "_Film":
        time_base = self.time_base or (1 / self.fps if time is None else Fraction(1, 90_000))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(held(self._temporary))
        container = _new_mp4(self._temporary, time_base)
        if self.comment:
            container.metadata["comment"] = self.comment
        # crf 18: hardly a visible loss (FFmpeg's H.264 guide); bf 0: frames in order, so that films can be joined
        options = {"preset": "veryfast", "crf": "18", "bf": "0"}
        stream = container.add_stream("libx264", rate=self.fps, options=options)
        stream.height, stream.width = (size + size % 2 for size in shape[:2])
        stream.pix_fmt, context = "yuv420p", stream.codec_context
        stream.time_base = context.time_base = time_base
        # 1 is BT.709 in FFmpeg's three lists of color properties; range 1 is the limited one of video
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        return _Film(container, stream, shape, time_base)

    def _mux(self, film: "_Film", packets: list[av.Packet], *, last: bool = False) -> None:
        """Writes all packets but the last, whose duration is not known before the end."""
        self._packets += packets
        if last and self._packets and self._last is not None:
            self._packets[-1].duration = self._last[1]
        ready = self._packets if last else self._packets[:-1]
        self._packets = self._packets[len(ready) :]
        film.container.mux(ready)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            if kind is None and self._film is None:
                raise FleetflowError(f"no frame was written to {self.path}; a video needs one at least")
            if self._film is not None:
                with writing(self.path):
                    if kind is None:
                        self._mux(self._film, self._film.stream.encode(), last=True)
                    self._film.container.close()
                    self._held.close()
                    if kind is None:
                        os.replace(self._temporary, self.path)
        finally:
            self._held.close()
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)


def comment_of(path: str | os.PathLike) -> str:
    """Returns the comment in a video file; empty where there is none, and for what is no video."""
    with suppress(FFmpegError, OSError, ValueError), open_container(Path(path)) as container:
        return container.metadata.get("comment", "")
    return ""


class _Film(NamedTuple):
    """An mp4 that is being written."""

    container: OutputContainer
    stream: av.VideoStream
    shape: tuple[int, ...]  # of its pictures
    time_base: Fraction  # of their times


def _new_mp4(path: Path, time_base: Fraction) -> OutputContainer:
    # the time at which a film begins is kept in movie_timescale, which is 1/1000 s unless said; "a:b" is no address
    return av.open(f"file:{path}", "w", format="mp4", options={"movie_timescale": str(time_base.denominator)})


def join_videos(
    parts: Sequence[str | os.PathLike],
    path: str | os.PathLike,
    *,
    audio: str | os.PathLike | None = None,
    audio_start: float = 0.0,
) -> None:
    """Writes one mp4 with the pictures of several, one after the other, without decoding them.

    A part that begins at or after the end of the one before it keeps its times; another one follows it at once.

    Args:
        parts: videos of one size and time base, as `VideoWriter` writes them.
        path: the file to write.
        audio: a video whose sound is added, as far as the pictures go; one without sound, or whose sound is broken,
            adds nothing. Sound that mp4 can hold is copied as it is, other sound becomes AAC.
        audio_start: seconds on the clock of that video (see `VideoReader`) at the time 0 of the parts.

    Raises:
        FleetflowError: if a file cannot be read or written.
    """
    with ExitStack() as stack:
        sources = []
        for part in parts:
            stack.enter_context(reading(Path(part), "a video"))
            sources.append(stack.enter_context(av.open(f"file:{part}")))
        sound = None
        if audio is not None:
            audio = existing(audio)
            stack.enter_context(reading(audio, "a video"))
            sound = Sound(stack.enter_context(open_container(audio)), audio_start)
        write_atomically(path, lambda temporary: _join(temporary, sources, sound))


def _join(temporary: Path, sources: list[InputContainer], sound: Sound | None) -> None:
    template = sources[0].streams.video[0]
    time_base = template.time_base
    assert time_base is not None  # `VideoWriter` has set it
    with _new_mp4(temporary, time_base) as joined:
        stream = joined.add_stream_from_template(template)
        stream.time_base = time_base
        packets = _in_a_row(sources, stream)
        if sound is not None and sound.stream is not None:
            # by their times, so that the muxer need not keep the packets of one stream until the other follows
            end = sum(float((source.streams.video[0].duration or 0) * time_base) for source in sources)
            heard = sound.packets(joined, max(end, _end(sources[-1])))
            packets = heapq.merge(packets, heard, key=lambda packet: (packet.dts or 0) * packet.time_base)
        for packet in packets:
            joined.mux_one(packet)


def _end(container: InputContainer) -> float:
    """Returns when the last picture of a video ends, in seconds on its clock."""
    return ((container.start_time or 0) + (container.duration or 0)) / av.time_base


def _in_a_row(sources: list[InputContainer], stream: av.VideoStream) -> Iterator[av.Packet]:
    """Yields the packets of all videos, for `stream`, with times that grow."""
    end = 0
    for container in sources:
        shift = None
        for packet in container.demux(video=0):
            if packet.dts is None or packet.pts is None:  # the last packet of every file is empty
                continue
            shift = max(0, end - packet.dts) if shift is None else shift
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            end = packet.dts + (packet.duration or 0)
            packet.stream = stream
            yield packet
