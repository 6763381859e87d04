"""io under damaged files: each reader gives a proper result or a FleetflowError of one line, and takes little memory.

Six seconds in all, divided among the readers, from a fixed seed; `make test-all` takes a minute, and `make fuzz` runs
longer, from another seed each time: FLEETFLOW_FUZZ_SECONDS and FLEETFLOW_FUZZ_SEED. A failure names the file that shows
it.
"""

import io as streams
import itertools
import os
import resource
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import SLOW
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from fleetflow.data.datasets.folder import folder as folder_of_pairs
from fleetflow.io.flow import FORMATS, read_flow, write_flow
from fleetflow.io.images import read_deep_image, read_image, read_mask, write_image
from fleetflow.io.video import VideoReader
from fleetflow.types import FleetflowError

SECONDS = float(os.environ.get("FLEETFLOW_FUZZ_SECONDS", "50" if SLOW else "6"))
SEED = int(os.environ.get("FLEETFLOW_FUZZ_SEED", "0"))
MEMORY = 4 * 2**20  # bytes for a flow; the files here have some hundred, which DEFLATE can blow up by 1032 at most
RESIDENT = 2**30  # bytes that this process may grow by, decoders included
VALID_START = {
    ".flo": b"PIEH",
    ".pfm": b"PF\n",
    ".png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    ".npy": b"\x93NUMPY\1\0",
    ".npz": b"PK\3\4",
    ".flo5": b"\x89HDF\r\n\x1a\n",
}

few = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


# ---- damage ----


def damaged(whole: bytes, random: np.random.Generator) -> bytes:
    """Returns the content after one to four of: bytes changed (often in the first 64), cut, zeroed, moved, added."""
    content = bytearray(whole)
    for _ in range(random.integers(1, 5)):
        place = int(
            random.integers(0, min(64, len(content)) if random.random() < 0.5 else len(content)) if content else 0
        )
        kind = random.integers(0, 8)
        if kind <= 2:
            data = random.bytes(int(random.integers(1, 5)))
            content[place : place + len(data)] = data
        elif kind == 3 and content:
            content[place] ^= 1 << int(random.integers(0, 8))
        elif kind == 4:
            data = (b"\xff\xff\xff\x7f", b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\x80")[
                random.integers(0, 5)
            ]
            content[place : place + 4] = data
        elif kind == 5:
            del content[int(random.integers(0, len(content) + 1)) :]
        elif kind == 6:
            start = int(random.integers(0, len(content) + 1))
            content[start:] = bytes(len(content) - start)
        else:
            content[place:place] = content[: int(random.integers(0, 64))]
    return bytes(content)


def run(check: Callable[[Path], None], path: Path, whole: bytes, share: float) -> None:
    """Checks the whole file, random bytes behind its first ones, and damaged ones until the time is up."""
    until, name = time.monotonic() + SECONDS * share, path.name
    for number in itertools.count():
        random = np.random.default_rng([SEED, number, *name.encode()])
        content = whole if number == 0 else damaged(whole, random)
        if number % 16 == 15:
            content = whole[: int(random.integers(0, 20))] + random.bytes(int(random.integers(0, 300)))
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of damaged EXIF data and of large pictures
                check(path)
        except FleetflowError as error:
            assert number > 0 and "\n" not in str(error) and str(path) in str(error), str(error)
        except BaseException:
            kept = path.with_name(f"failed-{SEED}-{number}-{name}")
            kept.write_bytes(content)
            print("see", kept)
            raise
        if number >= 20 and time.monotonic() > until:
            return


@pytest.fixture(scope="module", autouse=True)
def little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024  # kilobytes on Linux
    assert grown < RESIDENT, f"{grown / 2**20:.0f} MiB"


# ---- flow fields ----


def check_flow(path: Path) -> None:
    tracemalloc.start()
    try:
        flow, valid = read_flow(path)
        assert flow.dtype == np.float32 and valid.dtype == bool
        assert flow.shape == (*valid.shape, 2) and valid.size > 0
        assert np.isfinite(flow).all() and not flow[~valid].any()
    finally:
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert used < MEMORY


@pytest.mark.parametrize("suffix", FORMATS)
def test_flow(tmp_path, suffix):
    if suffix == ".flo5":
        pytest.importorskip("h5py")
    random, path = np.random.default_rng(0), tmp_path / f"flow{suffix}"
    write_flow(path, random.normal(0, 9, (5, 7, 2)), random.random((5, 7)) > 0.2)
    run(check_flow, path, path.read_bytes(), 0.02)


@few
@given(height=st.integers(-(2**31), 2**31 - 1), width=st.integers(-(2**31), 2**31 - 1), data=st.binary(max_size=64))
def test_any_size_in_a_flo_header(tmp_path_factory, height, width, data):
    path = tmp_path_factory.getbasetemp() / "size.flo"
    header = b"PIEH" + width.to_bytes(4, "little", signed=True) + height.to_bytes(4, "little", signed=True)
    path.write_bytes(header + data)
    try:
        check_flow(path)
    except FleetflowError as error:
        assert str(path) in str(error)


@few
@given(
    shape=st.lists(st.integers(-2, 2**40), max_size=4).map(tuple),
    descr=st.sampled_from(["<f4", ">f8", "|b1", "<i8", "|O", "<U9", "<c16", "|V9999999", "<M8[s]"]),
    data=st.binary(max_size=64),
)
def test_any_header_of_npy(tmp_path_factory, shape, descr, data):
    path = tmp_path_factory.getbasetemp() / "header.npy"
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + data)
    try:
        check_flow(path)
    except FleetflowError as error:
        assert str(path) in str(error)


# ---- pictures ----

PICTURES = {
    "a.png": {},
    "palette.png": {"mode": "P"},
    "deep.png": {},
    "a.jpg": {},
    "progressive.jpg": {"progressive": True},
    "a.tif": {},
    "packed.tif": {"compression": "tiff_adobe_deflate"},
    "a.webp": {},
    "lossless.webp": {"lossless": True},
    "a.bmp": {},
    "a.ppm": {},
    "a.tga": {"compression": "tga_rle"},
    "a.gif": {},
    "a.jp2": {"feature": "jpg_2000"},
    "a.avif": {"feature": "avif"},
}


def whole_picture(path: Path, feature: str = "", mode: str = "RGB", **options) -> bytes:
    if feature and not features.check(feature):
        pytest.skip(f"this build of Pillow has no {feature}")
    if path.name == "deep.png":
        write_flow(path, np.random.default_rng(0).normal(0, 9, (5, 7, 2)))
        return path.read_bytes()
    picture = np.random.default_rng(0).integers(0, 256, (18, 22, 3), dtype=np.uint8)
    stream = streams.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    metadata = {"exif": exif} if path.suffix in (".png", ".jpg", ".webp", ".tif") else {}
    image = Image.fromarray(picture).convert(mode)
    image.save(stream, Image.registered_extensions()[path.suffix], **metadata, **options)
    return stream.getvalue()


def check_picture(path: Path) -> None:
    picture = read_image(path)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.size > 0
    mask = read_mask(path)
    assert mask.dtype == bool and mask.size == picture.size // 3
    if path.name == "deep.png":
        assert read_deep_image(path).dtype == np.uint16


@pytest.mark.parametrize("name", PICTURES)
def test_picture(tmp_path, name):
    path = tmp_path / name
    run(check_picture, path, whole_picture(path, **PICTURES[name]), 0.02)


# ---- videos ----

VIDEOS = {
    "a.mp4": ("mpeg4", "yuv420p"),
    "b.mp4": ("libx264", "yuv420p"),
    "a.mkv": ("libx264", "yuv420p"),
    "a.avi": ("mpeg4", "yuv420p"),
    "a.ts": ("mpeg2video", "yuv420p"),
    "a.flv": ("flv", "yuv420p"),
    "a.webm": ("libvpx-vp9", "yuv420p"),
    "a.gif": ("gif", "rgb8"),
    "a.apng": ("apng", "rgb24"),
    "a.y4m": ("wrapped_avframe", "yuv420p"),
    "a.ogg": ("libvpx", "yuv420p"),
    "a.wmv": ("wmv2", "yuv420p"),
}


def whole_video(path: Path, codec: str, pixels: str) -> bytes:
    random = np.random.default_rng(0)
    try:
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.height, stream.width, stream.pix_fmt = 32, 48, pixels
            for k in range(5):
                picture = random.integers(0, 256, (32, 48, 3), dtype=np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
                frame.pts = k
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except (av.codec.codec.UnknownCodecError, av.FFmpegError) as error:
        pytest.skip(f"this build of FFmpeg writes no {path.suffix} ({error})")
    return path.read_bytes()


def check_video(path: Path) -> None:
    with VideoReader(path) as reader:
        count = 0
        for picture in itertools.islice(reader, 200):
            assert picture.dtype == np.uint8 and picture.shape == (reader.height, reader.width, 3)
            count += 1
        assert reader.problem is None or (str(path) in reader.problem and "\n" not in reader.problem)
        assert all(picture.index >= 17 for picture in itertools.islice(reader.part(17), 5))


@pytest.mark.parametrize("name", VIDEOS)
def test_video(tmp_path, name):
    path = tmp_path / name
    run(check_video, path, whole_video(path, *VIDEOS[name]), 0.03)


# ---- others ----


def test_vectors(tmp_path):
    pytest.importorskip("OpenEXR")
    from fleetflow.io.exr import read_vectors, write_vectors

    def check(path: Path) -> None:
        assert read_vectors(path).forward.ndim == 3

    path = tmp_path / "a.exr"
    write_vectors(path, np.random.default_rng(0).normal(0, 9, (5, 7, 2)), None)
    run(check, path, path.read_bytes(), 0.03)


def test_list_of_pairs(tmp_path):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name, np.zeros((8, 8, 3), np.uint8))
    write_flow(tmp_path / "a.flo", np.zeros((8, 8, 2)))

    def check(path: Path) -> None:
        try:
            assert len(folder_of_pairs(tmp_path, split="train")) >= 1
        except FleetflowError as error:
            raise FleetflowError(f"{path}: {error}") from error  # it names the frame that is missing

    run(check, tmp_path / "train.txt", b"a.png b.png a.flo\nb.png a.png\n", 0.03)
