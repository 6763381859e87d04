"""Videos: times, seeking, HDR and 10 bits, cut files of every container; what test_io.py does not hold."""

import re
import socket
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

import fleetflow
from fleetflow.inference.ahead import ahead
from fleetflow.inference.color_scale import scouts, video_scouts
from fleetflow.io.video import VideoReader, VideoWriter, frame_slice, join_videos
from fleetflow.types import FleetflowError

QUIET = {"x265-params": "log-level=0:open-gop=1:keyint=12:min-keyint=12"}
# name of the file, encoder, pixel format, options of the encoder, options of the container
KINDS = {
    "a.mp4": ("libx264", "yuv420p", {}, {"movflags": "+faststart"}),
    "fragments.mp4": ("libx264", "yuv420p", {}, {"movflags": "frag_keyframe+empty_moov"}),
    "open_gop.mp4": ("libx265", "yuv420p", QUIET, {"movflags": "+faststart"}),
    "a.mkv": ("libx264", "yuv420p", {}, {}),
    "live.mkv": ("libx264", "yuv420p", {}, {"live": "1"}),
    "a.webm": ("libvpx-vp9", "yuv420p", {}, {}),
    "a.avi": ("mpeg4", "yuv420p", {}, {}),
    "a.ts": ("libx264", "yuv420p", {}, {}),
    "a.mpg": ("mpeg2video", "yuv420p", {}, {}),
    "a.flv": ("flv", "yuv420p", {}, {}),
    "a.y4m": ("wrapped_avframe", "yuv420p", {}, {}),
    "a.gif": ("gif", "rgb8", {}, {}),
    "a.apng": ("apng", "rgb24", {}, {}),
    "a.ivf": ("libvpx-vp9", "yuv420p", {}, {}),
    "a.wmv": ("wmv2", "yuv420p", {}, {}),
    "a.mxf": ("mpeg2video", "yuv420p", {}, {}),
    "a.ogg": ("libvpx", "yuv420p", {}, {}),
    "a.mjpeg": ("mjpeg", "yuvj420p", {}, {}),
}


def write(path: Path, kind: tuple, count: int = 30, times: list[int] | None = None) -> None:
    """Writes a video with PyAV alone: every third picture is noise, the others plain, with a bar that moves."""
    codec, pixels, options, container_options = kind
    random = np.random.default_rng(0)
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 64, pixels
        stream.codec_context.gop_size = 12
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k in range(count):
            picture = (
                random.integers(0, 255, (48, 64, 3), np.uint8) if k % 3 == 0 else np.full((48, 64, 3), k, np.uint8)
            )
            picture[:, (k * 3) % 56 :][:, :8] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = (times[k], Fraction(1, 1000)) if times else (k, Fraction(1, 25))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, tuple[Path, list[np.ndarray]]]:
    """A video of each kind and its pictures."""
    found, folder = {}, tmp_path_factory.mktemp("videos")
    for name, kind in KINDS.items():
        try:
            write(folder / name, kind)
        except (av.codec.codec.UnknownCodecError, av.FFmpegError):  # another build of FFmpeg
            continue
        reader = VideoReader(folder / name)
        pictures = list(reader)
        assert len(pictures) == 30 and reader.problem is None, reader.problem
        found[name] = folder / name, pictures
    assert len(found) > len(KINDS) // 2
    return found


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tail", ["cut", "zeros"])
def test_a_lost_tail_is_a_problem_of_every_video(videos, name, tail, tmp_path):
    if name not in videos:
        pytest.skip(f"no encoder for {name}")
    source, pictures = videos[name]
    whole, path = source.read_bytes(), tmp_path / name
    for share in np.random.default_rng(1).uniform(0.3, 0.99, 5):
        length = int(len(whole) * share)
        path.write_bytes(whole[:length] + bytes((len(whole) - length) * (tail == "zeros")))
        try:
            reader = VideoReader(path)
            rest = list(reader)
        except FleetflowError:
            continue
        intact = len(rest) == 30 and np.array_equal(rest, pictures)  # only an index or padding was lost
        assert reader.problem or intact, (length, len(rest))


RAW = {
    "a.h264": ("libx264", "yuv420p", {}, {}),
    "slices.h264": ("libx264", "yuv420p", {"slices": "4"}, {}),
    "a.m2v": ("mpeg2video", "yuv420p", {}, {}),
}


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("tail", ["cut", "zeros"])
def test_no_half_picture_from_a_stream_without_container(name, tail, tmp_path):
    """It may end between two pictures, but where it ends within one, that is said."""
    write(tmp_path / name, RAW[name])
    pictures, whole, path = list(VideoReader(tmp_path / name)), (tmp_path / name).read_bytes(), tmp_path / f"cut{name}"
    assert len(pictures) == 30
    for share in np.random.default_rng(1).uniform(0.3, 0.99, 6):
        length = int(len(whole) * share)
        path.write_bytes(whole[:length] + bytes((len(whole) - length) * (tail == "zeros")))
        reader = VideoReader(path)
        rest = list(reader)
        assert reader.problem or np.array_equal(rest, pictures[: len(rest)]), (length, len(rest))


@pytest.mark.parametrize("name", [*KINDS, "uneven.mp4", "uneven.mkv"])
def test_seeking_gives_the_same_as_decoding_everything(videos, name, tmp_path):
    if name.startswith("uneven"):
        path, times = tmp_path / name, np.random.default_rng(0).integers(5, 200, 60).cumsum().tolist()
        write(path, KINDS["a.mp4"], 60, times)
        pictures = list(VideoReader(path))
        assert np.allclose([picture.time for picture in pictures], np.array(times) / 1000, atol=1e-9)
    elif name in videos:
        path, pictures = videos[name]
    else:
        pytest.skip(f"no encoder for {name}")
    reader = VideoReader(path)
    for start, stop, every in ((16, None, 1), (17, 25, 3), (23, None, 2), (24, 25, 1), (29, None, 1), (70, None, 1)):
        part = reader.part(start, stop, every)
        found, expected = list(part), pictures[start:stop:every]
        assert [(f.index, f.time) for f in found] == [(f.index, f.time) for f in expected]
        assert np.array_equal(found, expected) and part.problem is None
    if name.endswith((".mp4", ".mkv", ".webm")) and name != "fragments.mp4":
        assert reader.part(0).seekable and part.seekable


@pytest.mark.parametrize("name", ["a.avi", "a.gif", "a.mkv"])
def test_pictures_are_counted_whatever_rate_the_header_says(name, tmp_path):
    times = np.random.default_rng(0).integers(5, 20, 60).cumsum()  # hundredths of a second
    write(tmp_path / name, KINDS[name], 60, (10 * (times - times[0])).tolist())
    reader = VideoReader(tmp_path / name)
    assert (
        (reader.frames == 60) == (name == "a.gif")
        and reader.counted() == reader.wanted == 60
        and len(list(reader)) == 60
    )
    assert reader.mean_rate == pytest.approx(5900 / (times[-1] - times[0]), rel=1e-3)
    assert reader.part(10, 100, 2).counted() == 25
    assert [k for k, *_ in video_scouts(reader)] == scouts(59), "the color scale is that of the whole clip"


def test_the_mean_rate_of_a_file_whose_header_is_short_of_some_pictures(tmp_path):
    write(tmp_path / "a.mpg", ("mpeg2video", "yuv420p", {"bf": "2"}, {}), 60)
    reader = VideoReader(tmp_path / "a.mpg")
    assert reader.frames < 60 and reader.mean_rate == pytest.approx(25)


def test_a_file_that_cannot_be_sought_is_not_looked_through(tmp_path, monkeypatch):
    write(tmp_path / "a.avi", KINDS["a.avi"], 30, list(range(0, 1200, 40)))
    monkeypatch.setattr("fleetflow.io.video._PacketIndex", None)
    reader = VideoReader(tmp_path / "a.avi", start=20, stop=22)
    assert [frame.index for frame in reader] == [20, 21] and not reader.seekable


def test_times_of_day_and_rates_of_numpy(tmp_path):
    now = 1_796_100_000.0  # seconds since 1970
    with VideoWriter(tmp_path / "a.mp4", np.float32(25)) as writer:
        for k in range(3):
            writer.write(np.zeros((64, 64, 3), np.uint8), now + k / 25)
    assert writer.fps == 25 and VideoReader(tmp_path / "a.mp4").frames
    assert [frame.time - now for frame in VideoReader(tmp_path / "a.mp4")] == pytest.approx([0, 0.04, 0.08], abs=1e-4)


def test_seeking_does_not_decode_what_lies_before(videos):
    path = videos["a.mp4"][0]
    reader = VideoReader(path, start=25)
    decoded = []
    decode = reader._decode
    reader._decode = lambda *arguments: (decoded.append(frame) or frame for frame in decode(*arguments))
    assert [frame.index for frame in reader] == [25, 26, 27, 28, 29] and len(decoded) <= 13


def test_clocks_that_begin_anywhere(videos):
    for name in ("a.ts", "a.mpg", "a.avi", "a.flv"):
        if name in videos:
            assert videos[name][1][0].time == 0 and videos[name][1][1].time == pytest.approx(0.04, abs=1e-3), name


def test_read_video(videos):
    path, pictures = videos["a.mp4"]
    found = list(fleetflow.read_video(path, frames="3:9", every=2))
    assert np.array_equal(found, pictures[3:9:2]) and [frame.index for frame in found] == [3, 5, 7]
    assert type(np.asarray(found[0])) is np.ndarray and np.isnan(np.zeros(3).view(type(found[0])).time)


def test_frame_slice():
    assert frame_slice() == slice(0, None, 1) and frame_slice("3:9", 2) == slice(3, 9, 2)
    assert frame_slice(":9") == slice(0, 9, 1) and frame_slice("5:") == slice(5, None, 1)
    for wrong in ("5", "a:b", "9:3", "4:4", "-3:4", "1:2:3"):
        with pytest.raises(FleetflowError, match="frames is"):
            frame_slice(wrong)
    with pytest.raises(FleetflowError, match="every is 0"):
        frame_slice(None, 0)


# ---- colors ----

MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}  # FFmpeg's number: weights of red and blue


def write_color(path: Path, rgb: np.ndarray, matrix: int, color_range: int, pixels: str, **properties: int) -> None:
    """Writes two plain pictures of one color, rgb in [0, 1], converted by the equations of ITU-R BT.709 and BT.2020."""
    red, blue = MATRICES[matrix]
    luma = red * rgb[0] + (1 - red - blue) * rgb[1] + blue * rgb[2]
    chroma = (rgb[2] - luma) / (2 - 2 * blue), (rgb[0] - luma) / (2 - 2 * red)
    deep = pixels.endswith("10le")
    if color_range == 1:
        values = [219 * luma + 16, *(224 * value + 128 for value in chroma)]
        values = [value * 4 if deep else value for value in values]
    else:
        most = 1023 if deep else 255
        values = [luma * most, *(value * most + (most + 1) / 2 for value in chroma)]
    frame = av.VideoFrame(64, 64, pixels)
    for plane, value in zip(frame.planes, values):
        dtype = np.uint16 if deep else np.uint8
        plane.update(np.full(plane.buffer_size // dtype().itemsize, round(value), dtype).tobytes())
    frame.colorspace, frame.color_range, frame.time_base = matrix, color_range, Fraction(1, 25)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "2"})
        stream.height = stream.width = 64
        stream.pix_fmt, context = pixels, stream.codec_context
        context.colorspace, context.color_range = matrix, color_range
        for name, value in properties.items():
            setattr(context, name, value)
        for frame.pts in range(2):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("color_range", [1, 2])
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv420p10le", "yuv444p10le"])
def test_the_matrix_and_range_that_the_video_names(matrix, color_range, pixels, tmp_path):
    color = np.array([200, 90, 30])
    write_color(tmp_path / "a.mp4", color / 255, matrix, color_range, pixels)
    found = next(iter(VideoReader(tmp_path / "a.mp4")))
    assert found.dtype == np.uint8 and np.abs(found.astype(int) - color).max() <= (2 if pixels != "yuv420p" else 3)


def pq(light: float) -> float:
    """The value of SMPTE ST 2084 for light in cd/m^2."""
    power = (light / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def test_hdr_is_mapped_to_an_ordinary_screen(tmp_path):
    properties = {"color_primaries": 9, "color_trc": 16}
    grays = []
    for light in (0, 5, 50, 203, 1000, 4000):
        write_color(tmp_path / "a.mp4", np.full(3, pq(light)), 9, 1, "yuv420p10le", **properties)
        picture = next(iter(VideoReader(tmp_path / "a.mp4"))).astype(int)
        assert np.ptp(picture[20, 20]) <= 3  # gray stays gray
        grays.append(picture[20, 20, 1])
    assert grays == sorted(grays) and grays[0] <= 1 and 180 < grays[3] < 220 and 250 <= grays[4] <= 255
    assert grays[2] > 110  # PQ taken for an ordinary curve gives 112 at 50 cd/m^2, but 148 for a white sheet
    write_color(tmp_path / "a.mp4", np.full(3, 0.75), 9, 1, "yuv420p10le", color_primaries=9, color_trc=18)
    white = next(iter(VideoReader(tmp_path / "a.mp4")))[20, 20]
    assert abs(int(white[1]) - grays[3]) <= 6  # ITU-R BT.2408: 75 % of HLG is a white sheet, too


def test_pure_red_of_hdr_keeps_its_hue(tmp_path):
    red = np.array([0.627, 0.0691, 0.0164]) * 150  # the red of BT.709 in BT.2020 (ITU-R BT.2087), 150 cd/m^2
    values = np.array([pq(light) for light in red])
    write_color(tmp_path / "a.mp4", values, 9, 1, "yuv444p10le", color_primaries=9, color_trc=16)
    found = next(iter(VideoReader(tmp_path / "a.mp4")))[20, 20]
    assert found[0] > 150 and found[1] < 40 and found[2] < 40, found


# ---- fields ----


def comb(picture: np.ndarray) -> float:
    """How far the odd lines are off the mean of the even ones beside them."""
    lines = picture.astype(float)
    return float(np.abs(lines[1:-1:2] - (lines[:-2:2] + lines[2::2]) / 2).mean())


@pytest.mark.parametrize("fields, name", [(True, "a.mp4"), (True, "a.mpg"), (False, "b.mp4")])
def test_interlaced_frames_lose_their_combs(fields, name, tmp_path):
    """A pattern that moves 2 px from field to field; frames of one moment that are called interlaced stay as they are."""
    wide = np.repeat(np.random.default_rng(2).integers(0, 255, (6, 20, 3)), 16, 0).repeat(8, 1).astype(np.uint8)
    whole = [wide[:48, 2 * k : 2 * k + 96].copy() for k in range(20)]
    options = {"flags": "+ildct+ilme", **({"x264opts": "tff=1", "crf": "12"} if name.endswith("mp4") else {"q": "2"})}
    codec = "libx264" if name.endswith("mp4") else "mpeg2video"
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 96, "yuv420p"
        for k in range(10):
            picture = whole[2 * k].copy()
            picture[1::2] = whole[2 * k + fields][1::2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode())
    with av.open(str(tmp_path / name)) as container:
        stored = [(frame.interlaced_frame, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert all(interlaced for interlaced, _ in stored)
    frames = list(VideoReader(tmp_path / name))
    assert len(frames) == 10
    if fields:
        assert max(map(comb, frames)) < min(comb(picture) for _, picture in stored) / 4
    else:
        assert np.abs(np.stack(frames).astype(int) - np.stack([picture for _, picture in stored])).mean() < 2


# ---- sound ----


def write_with_sound(path: Path, codec: str, rate: int = 48_000) -> None:
    """Writes 2 s of pictures and of sound: silence, but a loud tone from 1 s to 1.2 s."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        audio = container.add_stream(codec, rate=rate, layout="stereo")
        wave = np.zeros((2, 2 * rate), np.float32)
        wave[:, rate : rate + rate // 5] = np.sin(np.arange(rate // 5) * 0.1)
        samples = audio.codec_context.frame_size or 1024
        packed = codec.startswith("pcm")
        for start in range(0, 2 * rate, samples):
            piece = wave[:, start : start + samples]
            if packed:
                data = np.ascontiguousarray((piece.T.reshape(1, -1) * 20_000).astype(np.int16))
                frame = av.AudioFrame.from_ndarray(data, format="s16", layout="stereo")
            else:
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
        for k in range(50):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * k, np.uint8), format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode())


def loud(path: Path) -> tuple[str, float, float]:
    """Returns the codec of the sound of a video, and when the tone begins and the sound ends, in seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        frames = [
            (frame.time, np.abs(frame.to_ndarray().astype(float)).max(), frame) for frame in container.decode(stream)
        ]
    top = max(height for _, height, _ in frames)
    end = frames[-1][0] + frames[-1][2].samples / frames[-1][2].sample_rate
    return stream.codec_context.name, next(time for time, height, _ in frames if height > top / 3), end


@pytest.mark.parametrize(
    "name, codec, found", [("a.mp4", "aac", "aac"), ("a.ts", "aac", "aac"), ("a.mov", "pcm_s16le", "aac")]
)
def test_sound_is_passed_through(name, codec, found, tmp_path):
    write_with_sound(tmp_path / name, codec)
    reader = VideoReader(tmp_path / name)
    for number, (start, stop) in enumerate(((0, 20), (20, 50))):
        with VideoWriter(tmp_path / f"part{number}.mp4", reader.fps, time_base=reader.time_base) as writer:
            for frame in reader.part(start, stop):
                writer.write(frame, frame.time, 0.04)
    parts = sorted(tmp_path.glob("part*.mp4"))
    join_videos(parts, tmp_path / "all.mp4", audio=tmp_path / name)
    kind, begins, ends = loud(tmp_path / "all.mp4")
    assert kind == found and abs(begins - 1) < 0.05 and abs(ends - 2) < 0.08
    times = [frame.time for frame in VideoReader(tmp_path / "all.mp4")]
    assert np.allclose(times, [frame.time for frame in reader], atol=1e-3) and len(times) == 50
    join_videos(parts[:1], tmp_path / "short.mp4", audio=tmp_path / name, audio_start=0.6)
    kind, begins, ends = loud(tmp_path / "short.mp4")
    assert abs(begins - 0.4) < 0.05 and abs(ends - 0.8) < 0.08


def test_a_video_without_sound_adds_none(videos, tmp_path):
    path = videos["a.mp4"][0]
    join_videos([path], tmp_path / "a.mp4", audio=path)
    assert len(list(VideoReader(tmp_path / "a.mp4"))) == 30
    with pytest.raises(FleetflowError, match="does not exist"):
        join_videos([path], tmp_path / "b.mp4", audio=tmp_path / "absent.mp4")


def test_a_live_stream(videos):
    """The bytes of a file, sent over a local connection."""
    if "a.ts" not in videos:
        pytest.skip("no encoder for MPEG-TS")
    path, pictures = videos["a.ts"]
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(path.read_bytes())

        thread = threading.Thread(target=send)
        thread.start()
        with fleetflow.read_video(f"tcp://127.0.0.1:{server.getsockname()[1]}") as reader:
            found = list(reader)
        thread.join()
    assert np.array_equal(found, pictures)
    assert np.allclose([frame.time for frame in found], [frame.time for frame in pictures], atol=1e-6)
    for camera in (97, "/dev/video97"):
        with pytest.raises(FleetflowError, match="camera 97"):
            fleetflow.read_video(camera)
    with pytest.raises(FleetflowError, match="live and cannot be cut"):
        fleetflow.read_video("tcp://127.0.0.1:1", every=2)
    with pytest.raises(FleetflowError, match=r"^tcp://127.0.0.1:1 cannot be opened \(.*\); check that it is there$"):
        fleetflow.read_video("tcp://127.0.0.1:1")


def test_a_live_stream_that_falls_silent(videos, monkeypatch):
    """A sender that ends is no problem; one that says nothing for a while first has been lost."""
    if "a.ts" not in videos:
        pytest.skip("no encoder for MPEG-TS")
    monkeypatch.setattr("fleetflow.io.live._SILENCE", 0.5)
    path, pictures = videos["a.ts"]
    for silence, problem in ((0, None), (1.5, "sent no picture for")):
        with socket.create_server(("127.0.0.1", 0)) as server:

            def send(server=server, silence=silence) -> None:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(path.read_bytes())
                    time.sleep(silence)

            thread = threading.Thread(target=send)
            thread.start()
            with fleetflow.read_video(f"tcp://127.0.0.1:{server.getsockname()[1]}") as reader:
                assert len(list(reader)) == len(pictures)
            thread.join()
        assert (problem is None) == (reader.problem is None)
        assert problem is None or re.match(rf"tcp://[\d.:]+ {problem} \d s, and then ended", reader.problem)


def test_a_live_stream_without_pictures(tmp_path):
    with av.open(str(tmp_path / "a.ts"), "w") as container:
        stream = container.add_stream("mp2", rate=48_000, layout="mono")
        for start in range(0, 48_000, 1152):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48_000, start, Fraction(1, 48_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall((tmp_path / "a.ts").read_bytes())

        thread = threading.Thread(target=send)
        thread.start()
        with pytest.raises(FleetflowError, match=r"^tcp://.* sends no picture that can be decoded"):
            fleetflow.read_video(f"tcp://127.0.0.1:{server.getsockname()[1]}")
        thread.join()


def test_a_live_clock_never_goes_back(videos):
    """A sender that begins its film again, in the same connection."""
    if "a.ts" not in videos:
        pytest.skip("no encoder for MPEG-TS")
    data = videos["a.ts"][0].read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(2 * data)

        thread = threading.Thread(target=send)
        thread.start()
        with fleetflow.read_video(f"tcp://127.0.0.1:{server.getsockname()[1]}") as reader:
            times = [frame.time for frame in reader]
        thread.join()
    assert len(times) >= 55 and times[0] == 0 and np.diff(times).min() > 0.03 and times[-1] < 2.5


def test_frames_are_made_ahead_and_no_thread_is_left():
    made = []

    def frames(broken: bool):
        for k in range(9):
            made.append(k)
            yield k
        if broken:
            raise FleetflowError("the end is damaged")

    before = threading.active_count()
    assert list(ahead(frames(False))) == list(range(9))
    found = ahead(frames(True))
    with pytest.raises(FleetflowError, match="the end is damaged"):
        assert [next(found) for _ in range(9)] == list(range(9)) and next(found)
    made.clear()
    found = ahead(frames(False), 2)
    assert next(found) == 0
    until = time.monotonic() + 20
    while len(made) < 4 and time.monotonic() < until:  # the one that was taken, two that wait, one in the hand
        time.sleep(0.01)
    found.close()
    assert made == [0, 1, 2, 3] and threading.active_count() == before
