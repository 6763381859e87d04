"""The sound of a video, passed on to another one."""

from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction

import av
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError

from fleetflow.io.containers import clock_origin

_COPIED = ("aac", "mp3", "ac3", "eac3", "alac", "opus", "flac")  # what players expect in an mp4; others become AAC


class Sound:
    """The first audio stream of a container, from a time on.

    stream: None if there is none that can be used.

    Args:
        start: seconds on the clock of the video that become the time 0.
    """

    def __init__(self, container: InputContainer, start: float):
        self._container, self._shift = container, -start - clock_origin(container)
        streams = [stream for stream in container.streams.audio if stream.codec_context and stream.rate]
        self.stream = streams[0] if streams else None

    def packets(self, output: OutputContainer, end: float) -> Iterator[av.Packet]:
        """Adds a stream to `output` and returns its packets from the time 0 to `end` seconds, in their order."""
        stream = self.stream
        assert stream is not None  # there is nothing to ask for otherwise
        if stream.codec_context.name in _COPIED:
            return self._copied(stream, output.add_stream_from_template(stream), end)
        target = output.add_stream("aac", rate=stream.rate, layout=stream.layout.name)
        return self._encoded(stream, target, end)

    def _copied(self, stream: av.AudioStream, target: av.AudioStream, end: float) -> Iterator[av.Packet]:
        with suppress(FFmpegError):  # sound that is broken from here on
            for packet in self._container.demux(stream):
                if packet.dts is None or packet.pts is None:
                    continue
                time = float(packet.pts * packet.time_base) + self._shift
                if time >= end:
                    return
                if time + float((packet.duration or 0) * packet.time_base) <= 0:
                    continue
                shift = round(self._shift / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, target
                yield packet

    def _encoded(self, stream: av.AudioStream, target: av.AudioStream, end: float) -> Iterator[av.Packet]:
        context = target.codec_context
        resampler = av.AudioResampler(format="fltp", layout=context.layout, rate=context.rate, frame_size=1024)
        with suppress(FFmpegError):
            for frame in self._container.decode(stream):
                time = (frame.time or 0.0) + self._shift
                if time >= end:
                    break
                if time + frame.samples / frame.sample_rate <= 0:
                    continue
                frame.pts = round(time / (frame.time_base or Fraction(1, frame.sample_rate)))
                for piece in resampler.resample(frame):
                    yield from target.encode(piece)
        for piece in resampler.resample(None):
            yield from target.encode(piece)
        yield from target.encode(None)
