"""io under damaged files: each reader gives a proper result or a FleetflowError, and takes no more memory than fits."""

import contextlib
import tracemalloc
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fleetflow.io.flow import FORMATS, read_flow, write_flow
from fleetflow.io.images import read_image, write_image
from fleetflow.io.video import VideoReader
from fleetflow.types import FleetflowError

few = settings(
    max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
MEMORY = 4 * 2**20  # bytes; the files here have some hundred, which DEFLATE can blow up by 1032 at most

# One damage: bytes written over a place, and where the file ends. Half of the places lie in the first 64 bytes.
places = st.one_of(st.integers(0, 63), st.integers(0, 5000))
damages = st.tuples(
    st.lists(st.tuples(places, st.binary(min_size=1, max_size=4)), max_size=4),
    st.one_of(st.none(), st.integers(0, 5000)),
    st.binary(max_size=3),
)
VALID_START = {
    ".flo": b"PIEH",
    ".pfm": b"PF\n",
    ".png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    ".npy": b"\x93NUMPY\1\0",
    ".npz": b"PK\3\4",
    ".flo5": b"\x89HDF\r\n\x1a\n",
}


def damaged(whole: bytes, damage: tuple) -> bytes:
    overwritten, end, tail = damage
    content = bytearray(whole)
    for place, data in overwritten:
        place %= len(content)
        content[place : place + len(data)] = data
    return bytes(content[:end]) + tail


@contextlib.contextmanager
def bounded_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def check_flow(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with bounded_memory():
        try:
            flow, valid = read_flow(path)
        except FleetflowError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            return
    assert flow.dtype == np.float32 and valid.dtype == bool
    assert flow.shape == (*valid.shape, 2) and valid.size > 0
    assert np.isfinite(flow).all() and not flow[~valid].any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def whole_flows(folder) -> dict[str, bytes]:
    """The content of one valid file of each format."""
    random, contents = np.random.default_rng(0), {}
    for suffix in FORMATS:
        if suffix == ".flo5":
            pytest.importorskip("h5py")
        path = folder / f"whole{suffix}"
        write_flow(path, random.normal(0, 9, (5, 7, 2)), random.random((5, 7)) > 0.2)
        contents[suffix] = path.read_bytes()
    return contents


@pytest.mark.parametrize("suffix", FORMATS)
@few
@given(content=st.binary(max_size=300), begins_well=st.booleans())
def test_random_bytes_as_flow(folder, suffix, content, begins_well):
    if suffix == ".flo5":
        pytest.importorskip("h5py")
    check_flow(folder / f"random{suffix}", VALID_START[suffix] * begins_well + content)


@pytest.mark.parametrize("suffix", FORMATS)
@few
@given(damage=damages)
@example(damage=([], None, b""))
@example(damage=([(4, b"\xff\xff\xff\x7f")], None, b""))  # .flo: the width
@example(damage=([(16, b"\x7f\xff\xff\xff")], None, b""))  # .png: the width
@example(damage=([(3, b"9999"), (8, b"9999")], None, b""))  # .pfm: the size
def test_damaged_flow_file(folder, whole_flows, suffix, damage):
    check_flow(folder / f"damaged{suffix}", damaged(whole_flows[suffix], damage))


@few
@given(height=st.integers(-(2**31), 2**31 - 1), width=st.integers(-(2**31), 2**31 - 1), data=st.binary(max_size=64))
def test_any_size_in_a_flo_header(folder, height, width, data):
    header = b"PIEH" + width.to_bytes(4, "little", signed=True) + height.to_bytes(4, "little", signed=True)
    check_flow(folder / "size.flo", header + data)


@few
@given(
    shape=st.lists(st.integers(-2, 2**40), max_size=4).map(tuple),
    descr=st.sampled_from(["<f4", ">f8", "|b1", "<i8", "|O", "<U9", "<c16", "|V9999999", "<M8[s]"]),
    data=st.binary(max_size=64),
)
def test_any_header_of_npy(folder, shape, descr, data):
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    content = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + data
    check_flow(folder / "header.npy", content)


@pytest.fixture(scope="module")
def whole_pictures(folder) -> dict[str, bytes]:
    picture, contents = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8), {}
    for suffix in (".png", ".jpg", ".tif", ".webp", ".bmp", ".ppm"):
        write_image(folder / f"picture{suffix}", picture)
        contents[suffix] = (folder / f"picture{suffix}").read_bytes()
    write_flow(folder / "deep.png", np.random.default_rng(0).normal(0, 9, (5, 7, 2)))
    contents[".deep.png"] = (folder / "deep.png").read_bytes()
    Image.fromarray(picture).save(folder / "picture.gif")
    contents[".gif"] = (folder / "picture.gif").read_bytes()
    return contents


@pytest.mark.parametrize("suffix", [".png", ".deep.png", ".jpg", ".tif", ".webp", ".bmp", ".ppm", ".gif"])
@few
@given(damage=damages)
def test_damaged_picture(folder, whole_pictures, suffix, damage):
    path = folder / f"damaged{suffix}"
    path.write_bytes(damaged(whole_pictures[suffix], damage))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged EXIF data and of large pictures
        try:
            picture = read_image(path)
        except FleetflowError as error:
            assert "\n" not in str(error)
            return
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.size > 0


@few
@given(content=st.binary(max_size=300))
def test_random_bytes_as_picture_and_video(folder, content):
    path = folder / "random.bin"
    path.write_bytes(content)
    for read in (read_image, VideoReader):
        with contextlib.suppress(FleetflowError):
            read(path)


@pytest.fixture(scope="module")
def whole_videos(folder) -> dict[str, bytes]:
    contents, random = {}, np.random.default_rng(0)
    for suffix in (".mp4", ".mkv", ".avi"):
        with av.open(str(folder / f"whole{suffix}"), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
            for _ in range(5):
                picture = random.integers(0, 256, (32, 48, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        contents[suffix] = (folder / f"whole{suffix}").read_bytes()
    return contents


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
@few
@given(damage=damages)
def test_damaged_video(folder, whole_videos, suffix, damage):
    path = folder / f"damaged{suffix}"
    path.write_bytes(damaged(whole_videos[suffix], damage))
    try:
        with VideoReader(path) as reader:
            for picture in reader:
                assert picture.dtype == np.uint8 and picture.shape == (reader.height, reader.width, 3)
            assert reader.truncated == (reader.problem is not None)
    except FleetflowError as error:
        assert "\n" not in str(error)
