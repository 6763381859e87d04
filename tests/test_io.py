"""io: every format read and written, golden bytes built by hand, bad files refused with one line, videos."""

import importlib.util
import io as streams
import pickle
import random
import struct
import tracemalloc
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from fleetflow.io.atomic import write_atomically
from fleetflow.io.flow import FORMATS, read_flow, write_flow
from fleetflow.io.images import IMAGE_SUFFIXES, list_frames, read_image, read_mask, write_image
from fleetflow.io.video import VideoReader, VideoWriter, join_videos
from fleetflow.types import FleetflowError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real pairs at {SHARED}")
needs_h5py = pytest.mark.skipif(importlib.util.find_spec("h5py") is None, reason="h5py is not installed")
SUFFIXES = [pytest.param(suffix, marks=needs_h5py if suffix == ".flo5" else ()) for suffix in FORMATS]


def refused(words: str, function, *arguments, **keywords) -> None:
    """Asserts that the call raises FleetflowError, in one line that holds `words`."""
    with pytest.raises(FleetflowError) as caught:
        function(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    assert words in message, message


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def random_flow(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 30, (height, width, 2)).astype(np.float32)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(pixels: np.ndarray, color: int, *extra: bytes, size: tuple[int, int] | None = None) -> bytes:
    """Returns a PNG file of uint8 or uint16 [H, W, C], built by hand; `size` is what the header claims."""
    height, width = size or pixels.shape[:2]
    depth = 8 * pixels.dtype.itemsize
    rows = b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


# ---- flow fields ----


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (13, 18)])
def test_round_trip(suffix, size, tmp_path):
    flow, valid = random_flow(*size), np.random.default_rng(1).random(size) > 0.2
    flow[0, 0] = 0.25
    valid[0, 0] = True
    flow[-1, -1] = (1, np.nan) if size != (1, 1) else flow[-1, -1]
    path = tmp_path / "new" / f"flow{suffix.upper()}"
    write_flow(path, flow, valid)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # no temporary file is left
    again, known = read_flow(path)
    expected = valid & np.isfinite(flow).all(-1)
    assert again.dtype == np.float32 and known.dtype == bool
    assert np.array_equal(known, expected)
    assert (again[~known] == 0).all()
    if suffix == ".png":
        assert np.abs(again - flow)[known].max() <= 1 / 128
    else:
        assert np.array_equal(again[known], flow[known])
    again[0, 0] = 7  # what is returned can be written to


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bad_flow_files(suffix, tmp_path):
    path = tmp_path / f"flow{suffix}"
    refused("does not exist", read_flow, path)
    refused("is a folder", read_flow, tmp_path.rename(tmp_path.with_suffix(suffix)))
    tmp_path.with_suffix(suffix).rename(tmp_path)
    write_flow(path, random_flow(9, 7))
    whole = path.read_bytes()
    for length in {0, 1, 5, 11, 12, 40, len(whole) // 2, len(whole) - 9, len(whole) - 1}:
        path.write_bytes(whole[:length])
        refused(str(path), read_flow, path)
    for foreign in (b"hello, world\n" * 20, noise(500).tobytes(), b"\0" * 300):
        path.write_bytes(foreign)
        refused(str(path), read_flow, path)


@pytest.mark.parametrize("suffix", [".flo", ".pfm", ".npy"])
def test_longer_than_its_header(suffix, tmp_path):
    path = tmp_path / f"flow{suffix}"
    write_flow(path, random_flow(9, 7))
    path.write_bytes(path.read_bytes() + b"\0")
    refused(str(path), read_flow, path)


def test_unknown_suffix_lists_the_known(tmp_path):
    refused(".flo, .png, .npy, .npz, .pfm, .flo5", read_flow, tmp_path / "flow.exr")
    refused(".flo, .png, .npy, .npz, .pfm, .flo5", write_flow, tmp_path / "flow", random_flow(2, 2))


def test_write_flow_checks_shapes(tmp_path):
    path = tmp_path / "flow.flo"
    write_flow(path, random_flow(3, 4))
    before = path.read_bytes()
    refused("[2, 3, 4]; expected [H, W, 2]", write_flow, path, np.zeros((2, 3, 4)))
    refused("[0, 4, 2]; expected [H, W, 2]", write_flow, path, np.zeros((0, 4, 2)))
    refused("the flow is None; expected [H, W, 2]", write_flow, path, None)
    refused("valid is [4, 3]", write_flow, path, np.zeros((3, 4, 2)), np.ones((4, 3), bool))
    assert path.read_bytes() == before


def test_write_flow_leaves_its_arguments_alone(tmp_path):
    flow, valid = random_flow(3, 4), np.zeros((3, 4), bool)
    copy = flow.copy()
    write_flow(tmp_path / "flow.flo", flow, valid)
    assert np.array_equal(flow, copy) and not valid.any()


def test_flo_golden(tmp_path):
    path = tmp_path / "flow.flo"
    flow = np.array([[[1.5, -2], [0, 0], [4, 0.5]]], np.float32)
    write_flow(path, flow, np.array([[True, False, True]]))
    assert path.read_bytes() == b"PIEH" + struct.pack("<ii6f", 3, 1, 1.5, -2, 1e10, 1e10, 4, 0.5)
    path.write_bytes(b"PIEH" + struct.pack("<ii8f", 2, 2, 1e9, -2, 1.1e9, 0, float("nan"), 1, 3, float("-inf")))
    flow, valid = read_flow(path)
    assert valid.tolist() == [[True, False], [False, False]]  # exactly 1e9 is still known
    assert flow.tolist() == [[[1e9, -2], [0, 0]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize("order, scale", [("<", b"-1.0"), (">", b"1"), (">", b"2.5e-1"), ("<", b"-0.003922")])
def test_pfm_golden_reading(order, scale, tmp_path):
    path = tmp_path / "flow.pfm"
    bottom, top = (5, 6, 0, float("nan"), 8, 0), (1, 2, 0, 3, 4, 0)
    path.write_bytes(b"PF\n2 2\n" + scale + b"\n" + struct.pack(order + "12f", *bottom, *top))
    flow, valid = read_flow(path)
    assert flow.tolist() == [[[1, 2], [3, 4]], [[5, 6], [0, 0]]]
    assert valid.tolist() == [[True, True], [True, False]]


def test_pfm_golden_writing(tmp_path):
    write_flow(tmp_path / "flow.pfm", np.array([[[1, 2]], [[3, 4]]], np.float32))
    assert (tmp_path / "flow.pfm").read_bytes() == b"PF\n1 2\n-1.0\n" + struct.pack("<6f", 3, 4, 0, 1, 2, 0)


def test_pfm_of_one_channel_is_refused(tmp_path):
    path = tmp_path / "disparity.pfm"
    path.write_bytes(b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 3, 4))
    refused("1 channel", read_flow, path)


def test_kitti_golden_reading(tmp_path):
    path = tmp_path / "flow.png"
    stored = np.array([[[32768, 32768, 1], [32769, 32704, 1], [65535, 0, 65535], [40000, 40000, 0]]], np.uint16)
    path.write_bytes(png(stored, 2))
    flow, valid = read_flow(path)
    assert valid.tolist() == [[True, True, True, False]]
    assert flow.tolist() == [[[0, 0], [1 / 64, -1], [511.984375, -512], [0, 0]]]


def test_kitti_clips_and_rounds(tmp_path):
    path = tmp_path / "flow.png"
    write_flow(path, np.array([[[600, -600], [1e30, -512], [0.0077, -0.0079], [3, 4]]]), np.array([[1, 1, 1, 0]]))
    flow, valid = read_flow(path)
    assert valid.tolist() == [[True, True, True, False]]
    assert flow.tolist() == [[[511.984375, -512], [511.984375, -512], [0, -1 / 64], [0, 0]]]


def test_kitti_as_opencv_sees_it(tmp_path):
    cv2 = pytest.importorskip("cv2")
    flow, valid = random_flow(37, 53), np.random.default_rng(1).random((37, 53)) > 0.3
    write_flow(tmp_path / "flow.png", flow, valid)
    stored = cv2.imread(str(tmp_path / "flow.png"), cv2.IMREAD_UNCHANGED)  # [H, W, (valid, v, u)]
    assert stored.dtype == np.uint16 and np.array_equal(stored[..., 0], valid)
    expected = np.where(valid[..., None], np.rint(flow * 64 + 32768), 0)
    assert np.array_equal(stored[..., :0:-1], expected)
    every_bit = np.random.default_rng(2).integers(0, 65536, (37, 53, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "flow.png"), every_bit)
    again, known = read_flow(tmp_path / "flow.png")
    assert np.array_equal(known, every_bit[..., 0] > 0)
    assert np.array_equal(again[known], (every_bit[..., :0:-1][known].astype(np.float32) - 32768) / 64)


def test_color_picture_is_no_flow(tmp_path):
    write_image(tmp_path / "picture.png", noise(5, 6, 3))
    refused("not a color picture", read_flow, tmp_path / "picture.png")


@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<f2", "<i4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_other_makers(dtype, order, tmp_path):
    values = np.arange(24).reshape(3, 4, 2)
    np.save(tmp_path / "flow.npy", np.array(values, dtype, order=order))
    flow, valid = read_flow(tmp_path / "flow.npy")
    assert flow.dtype == np.float32 and np.array_equal(flow, values) and valid.all()


def test_values_too_large_for_float32_are_unknown(tmp_path):
    np.save(tmp_path / "flow.npy", np.array([[[1e300, 0.0], [1.0, 2.0]]]))
    flow, valid = read_flow(tmp_path / "flow.npy")
    assert valid.tolist() == [[False, True]] and flow.tolist() == [[[0, 0], [1, 2]]]


@pytest.mark.parametrize("shape", [(2, 5, 4), (5, 4), (5, 4, 3), (1, 5, 4, 2), (0, 4, 2), ()])
def test_npy_of_another_shape(shape, tmp_path):
    np.save(tmp_path / "flow.npy", np.zeros(shape))
    refused("expected", read_flow, tmp_path / "flow.npy")


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('code in a data file was executed')",)


def test_code_in_arrays_is_never_executed(tmp_path):
    bombs = np.array([[[Bomb(), Bomb()]]], object)
    with open(tmp_path / "flow.npy", "wb") as file:
        np.lib.format.write_array(file, bombs, allow_pickle=True)
    refused("object", read_flow, tmp_path / "flow.npy")
    with zipfile.ZipFile(tmp_path / "flow.npz", "w") as archive:
        archive.write(tmp_path / "flow.npy", "flow.npy")
    refused("object", read_flow, tmp_path / "flow.npz")
    (tmp_path / "flow.npy").write_bytes(pickle.dumps(Bomb()))
    refused("cannot be read", read_flow, tmp_path / "flow.npy")


def test_npz_of_other_makers(tmp_path):
    path, flow = tmp_path / "flow.npz", random_flow(3, 4)
    np.savez(path, flow=flow)
    assert np.array_equal(read_flow(path)[0], flow) and read_flow(path)[1].all()
    np.savez(path, flow=flow, valid=np.eye(3, 4, dtype=np.uint8))
    assert np.array_equal(read_flow(path)[1], np.eye(3, 4, dtype=bool))
    np.savez(path, flow=flow, valid=np.ones((1, 1), bool))
    refused("valid [1, 1]", read_flow, path)
    np.savez(path, flow=flow, valid=np.ones(2, bool))
    refused("expected", read_flow, path)
    np.savez(path, arr_0=flow)
    refused("expected the keys flow and valid", read_flow, path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("flow.npy", npy_bytes(flow))
    refused("packed", read_flow, path)


def test_flo5_of_other_makers(tmp_path):
    h5py = pytest.importorskip("h5py")
    path, flow = tmp_path / "flow.flo5", random_flow(6, 4).astype(np.float64)
    flow[2, 3, 1] = np.nan
    with h5py.File(path, "w") as file:
        file["flow"] = flow
    again, valid = read_flow(path)
    assert again.dtype == np.float32 and not valid[2, 3] and valid.sum() == 23
    assert np.array_equal(again[valid], flow[valid].astype(np.float32))
    for name, values in {"flow": np.zeros((4, 4)), "flow/deeper": np.zeros((4, 4, 2)), "other": flow}.items():
        with h5py.File(path, "w") as file:
            file[name] = values
        refused("holds no plain data set", read_flow, path)


def test_flo5_never_follows_links_to_other_files(tmp_path):
    h5py = pytest.importorskip("h5py")
    write_flow(tmp_path / "other.flo5", random_flow(4, 4))
    with h5py.File(tmp_path / "link.flo5", "w") as file:
        file["flow"] = h5py.ExternalLink("other.flo5", "flow")
    refused("holds no plain data set", read_flow, tmp_path / "link.flo5")
    (tmp_path / "raw").write_bytes(b"\0" * 128)
    with h5py.File(tmp_path / "raw.flo5", "w") as file:
        file.create_dataset("flow", (4, 4, 2), "f4", external=[(str(tmp_path / "raw"), 0, 128)])
    refused("holds no plain data set", read_flow, tmp_path / "raw.flo5")
    layout = h5py.VirtualLayout((4, 4, 2), "f4")
    layout[:] = h5py.VirtualSource(tmp_path / "other.flo5", "flow", (4, 4, 2))
    with h5py.File(tmp_path / "virtual.flo5", "w") as file:
        file.create_virtual_dataset("flow", layout)
    refused("holds no plain data set", read_flow, tmp_path / "virtual.flo5")


def npy_bytes(array: np.ndarray, claimed: tuple[int, ...] | None = None) -> bytes:
    """Returns a .npy file whose header claims another shape."""
    stream = streams.BytesIO()
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": claimed or array.shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + array.tobytes()


@pytest.mark.parametrize("side", [8_000, 100_000])  # 8,000 is within the limit of pixels: the length gives the lie away
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_lying_headers_take_no_memory(suffix, side, tmp_path):
    path, values = tmp_path / f"flow{suffix}", random_flow(4, 4)
    if suffix == ".flo":
        path.write_bytes(b"PIEH" + struct.pack("<ii", side, side))
    elif suffix == ".pfm":
        path.write_bytes(b"PF\n%d %d\n-1.0\n" % (side, side) + values.tobytes())
    elif suffix == ".png":
        path.write_bytes(png(np.zeros((4, 4, 3), np.uint16), 2, size=(side, side)))
    elif suffix == ".npy":
        path.write_bytes(npy_bytes(values, (side, side, 2)))
    elif suffix == ".npz":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("flow.npy", npy_bytes(values, (side, side, 2)))
        whole = path.read_bytes()  # the directory at the end lies too: 8 bytes of compressed and whole size
        place = whole.index(b"PK\1\2") + 20
        path.write_bytes(whole[:place] + struct.pack("<II", 2**31, 2**31) + whole[place + 8 :])
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            chunks = (side, side, 2) if side == 8_000 else (1000, 1000, 2)
            file.create_dataset("flow", (side, side, 2), "f4", chunks=chunks, compression="gzip")
    tracemalloc.start()
    try:
        refused(f"claims {side}x{side} pixels", read_flow, path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_lying_npz_member_is_too_short(tmp_path):
    path = tmp_path / "flow.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("flow.npy", npy_bytes(random_flow(4, 4), (5, 4, 2)))
    refused("too short", read_flow, path)


def test_most_compressible_flow_passes_the_checks(tmp_path):
    for suffix in (".png", ".npz", ".flo5"):
        if suffix == ".flo5":
            pytest.importorskip("h5py")
        write_flow(tmp_path / f"flow{suffix}", np.zeros((700, 900, 2)))
        flow, valid = read_flow(tmp_path / f"flow{suffix}")
        assert flow.shape == (700, 900, 2) and not flow.any() and valid.all()


@needs_shared
def test_real_kitti_files_against_the_other_reader():
    pytest.importorskip("cv2")
    spec = importlib.util.spec_from_file_location("gtio", SHARED / "gtio.py")
    gtio = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gtio)
    files = sorted(SHARED.glob("*/*/flow.png"))
    assert len(files) > 10
    for path in files[:12]:
        flow, valid = read_flow(path)
        expected, known = gtio.read_kitti_flow(str(path))
        assert np.array_equal(flow, expected) and np.array_equal(valid, known), path


@needs_shared
def test_real_kitti_file_written_again(tmp_path):
    flow, valid = read_flow(SHARED / "kitti2015" / "stereo_000046" / "flow.png")
    assert 0 < valid.mean() < 1
    for suffix in FORMATS:
        if suffix == ".flo5":
            pytest.importorskip("h5py")
        write_flow(tmp_path / f"flow{suffix}", flow, valid)
        again, known = read_flow(tmp_path / f"flow{suffix}")
        assert np.array_equal(again, flow) and np.array_equal(known, valid), suffix


# ---- writing ----


def test_write_atomically_gives_a_file_the_usual_rights(tmp_path):
    """Whatever `write` did: safetensors makes files that nobody else may read."""

    def write(temporary: Path) -> None:
        temporary.unlink()
        temporary.write_text("secret")
        temporary.chmod(0o600)

    write_atomically(tmp_path / "new.txt", write)
    (tmp_path / "plain.txt").touch()
    assert (tmp_path / "new.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


def test_write_atomically_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        assert temporary.parent == tmp_path and temporary.suffix == ".txt"
        temporary.write_text("half")
        raise KeyError("stop")

    with pytest.raises(KeyError):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_unwritable_places_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.flo").mkdir()
    refused("cannot be written", write_flow, tmp_path / "file" / "flow.flo", random_flow(2, 2))
    refused("cannot be written", write_flow, tmp_path / "folder.flo", random_flow(2, 2))
    refused("cannot be written", write_image, tmp_path / "file" / "a.png", noise(2, 2, 3))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder.flo"]


# ---- pictures ----


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm", ".tga"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (12, 17)])
def test_picture_round_trip(suffix, size, tmp_path):
    picture = noise(*size, 3)
    write_image(tmp_path / f"a{suffix}", picture)
    again = read_image(tmp_path / f"a{suffix}")
    assert again.dtype == np.uint8 and np.array_equal(again, picture)
    assert len(list(tmp_path.iterdir())) == 1
    again[0, 0] = 0


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_picture_keeps_its_colors(suffix, tmp_path):
    picture = np.broadcast_to(np.array([200, 100, 30], np.uint8), (16, 16, 3))
    write_image(tmp_path / f"a{suffix}", picture)
    assert np.abs(read_image(tmp_path / f"a{suffix}").astype(int) - picture).max() < 6


def test_write_image_checks(tmp_path):
    refused("known: .png", write_image, tmp_path / "a.mp3", noise(4, 4, 3))
    for bad in (noise(4, 4), noise(4, 4, 4), np.zeros((4, 4, 3)), noise(0, 4, 3)):
        refused("expected uint8 [H, W, 3]", write_image, tmp_path / "a.png", bad)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_modes(mode, tmp_path):
    colors = noise(6, 8, 4)
    gray = np.repeat(colors[..., :1], 3, axis=2)
    if mode == "I;16":
        image, expected = Image.fromarray(colors[..., 0].astype(np.uint16) * 257), gray
    elif mode in ("1", "P"):
        image = Image.fromarray(colors[..., :3]).convert(mode)
        expected = np.asarray(image.convert("RGB"))
    else:
        channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode]
        image = Image.fromarray(colors[..., 0] if mode == "L" else colors[..., :channels])
        expected = gray if channels < 3 else colors[..., :3]
    assert image.mode == mode
    image.save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("color, channels", [(0, 1), (4, 2), (2, 3), (6, 4)])
def test_deep_png_is_rounded_not_truncated(color, channels, tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (19, 23, channels), dtype=np.uint16)
    values[0, :3, 0] = 65535, 129, 128
    (tmp_path / "a.png").write_bytes(png(values, color))
    expected = np.rint(values / 257)[..., : 3 if channels > 2 else 1]
    again = read_image(tmp_path / "a.png")
    assert again.shape == (19, 23, 3) and again.dtype == np.uint8
    assert np.array_equal(again, np.broadcast_to(expected, again.shape))
    assert not np.array_equal(expected, values[..., : expected.shape[2]] >> 8)  # what truncating would give


def test_deep_tiff(tmp_path):
    cv2 = pytest.importorskip("cv2")
    values = np.random.default_rng(0).integers(0, 65536, (19, 23, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "a.tif"), values)
    assert np.array_equal(read_image(tmp_path / "a.tif"), np.rint(values[..., ::-1] / 257))
    cv2.imwrite(str(tmp_path / "a.tif"), values[..., 0])
    assert np.array_equal(read_image(tmp_path / "a.tif")[..., 2], np.rint(values[..., 0] / 257))


def test_float_tiff(tmp_path):
    path = tmp_path / "a.tif"
    values = np.array([[0, 1, 0.5, 0.499 / 255, 0.501 / 255]], np.float32)
    Image.fromarray(values).save(path)
    assert read_image(path)[..., 1].tolist() == [[0, 255, 128, 0, 1]]
    for wrong in (1.5, -0.1, np.nan):
        values[0, 2] = wrong
        Image.fromarray(values).save(path)
        refused("expected 0 to 1", read_image, path)
    Image.fromarray(np.array([[0, 65536]], np.int32)).save(path)
    refused("expected 0 to 65535", read_image, path)


TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["png", "deep png", "deep gray png", "tif", "jpg"])
def test_exif_orientation(orientation, kind, tmp_path):
    picture, path = noise(8, 16, 3), tmp_path / f"a.{kind.split()[-1]}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind.startswith("deep"):
        color, channels = (0, 1) if "gray" in kind else (2, 3)
        picture = np.broadcast_to(picture[..., :channels], picture.shape)
        stored = picture[..., :channels].astype(np.uint16) * 257
        path.write_bytes(png(stored, color, (b"eXIf", exif.tobytes()[6:])))
    else:
        if kind == "jpg":  # blocks of one color, so that the loss of JPEG is small
            picture = np.kron(noise(1, 2, 3), np.ones((8, 8, 1), np.uint8))
        Image.fromarray(picture).save(path, exif=exif, quality=100, subsampling=0)
    again = read_image(path)
    expected = TURNED[orientation](picture)
    assert again.shape == expected.shape
    assert np.abs(again.astype(int) - expected).max() <= (6 if kind == "jpg" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".deep.png"])
def test_truncated_and_foreign_pictures(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    if suffix == ".deep.png":
        path.write_bytes(png(noise(24, 32, 3).astype(np.uint16) * 257, 2))
    else:
        write_image(path, noise(24, 32, 3))
    whole = path.read_bytes()
    for length in (0, 3, 30, len(whole) // 2, int(len(whole) * 0.9)):
        path.write_bytes(whole[:length])
        refused(str(path), read_image, path)
    path.write_text("this is not a picture\n" * 30)
    refused(str(path), read_image, path)
    refused("does not exist", read_image, tmp_path / "absent.png")
    refused("is a folder", read_image, tmp_path)


def test_only_pictures_that_run_no_program_are_opened(tmp_path, monkeypatch):
    """Pillow would open PostScript under any name, and give it to Ghostscript to be drawn."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    for name in ("a.eps", "a.png"):
        (tmp_path / name).write_bytes(eps)
        with Image.open(tmp_path / name) as image:
            assert image.format == "EPS"
        monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("ran Ghostscript"))
        for read in (read_image, read_mask):
            with pytest.raises(FleetflowError, match="cannot be read as"):
                read(tmp_path / name)


def test_picture_bomb_is_refused_by_its_header(tmp_path):
    (tmp_path / "a.png").write_bytes(png(noise(4, 4, 3), 2, size=(60_000, 60_000)))
    refused("pixels", read_image, tmp_path / "a.png")


def test_list_frames_in_natural_order(tmp_path):
    names = ["frame1.png", "frame2.JPG", "frame10.png", "frame010b.webp", "shot2_9.ppm", "shot2_10.ppm", "shot11_1.ppm"]
    for name in random.Random(0).sample(names, len(names)) + [".part-1.png", "notes.txt", "flow.flo"]:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_frames(tmp_path)] == names
    assert set(IMAGE_SUFFIXES) >= {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".ppm", ".webp", ".bmp"}


def test_list_frames_of_nothing(tmp_path):
    refused("holds no picture", list_frames, tmp_path)
    refused("is not a folder", list_frames, tmp_path / "absent")


@needs_shared
def test_real_pictures():
    frames = list_frames(SHARED / "videos" / "car_frames")
    assert [path.stem for path in frames] == [f"{index:03d}" for index in range(len(frames))] and len(frames) >= 10
    assert np.array_equal(read_image(frames[3]), np.asarray(Image.open(frames[3]).convert("RGB")))


# ---- videos ----


def film(height: int, width: int, count: int) -> list[np.ndarray]:
    """Returns smooth pictures, which survive the compression, each of its own brightness; red left, blue right."""
    y, x = np.mgrid[0:height, 0:width]
    ramp = 100 * x / width
    return [
        np.dstack((200 - ramp, 40 + 8.0 * index + 0 * x, 60 + ramp + 20 * y / height)).astype(np.uint8)
        for index in range(count)
    ]


def write_film(path: Path, pictures: list[np.ndarray], fps=25) -> None:
    with VideoWriter(path, fps) as writer:
        for picture in pictures:
            writer.write(picture)


def encode(path: Path, pictures: list[np.ndarray], **options: str) -> None:
    """Writes a video with PyAV alone, in the container of the suffix; nothing of fleetflow in it."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "10"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("fps", [25, 0.5, Fraction(30000, 1001), 59.94])
def test_video_round_trip(fps, tmp_path):
    pictures, path = film(33, 47, 9), tmp_path / "new" / "a.mp4"
    write_film(path, pictures, fps)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.mp4"]
    with VideoReader(path) as reader:
        assert reader.fps == Fraction(fps).limit_denominator(2**16)
        assert (reader.height, reader.width, reader.frames) == (34, 48, 9)  # odd sizes grow by one
        again = list(reader)
    assert len(again) == 9 and not reader.truncated and reader.problem is None
    for before, after in zip(pictures, again, strict=True):
        assert after.dtype == np.uint8 and after.shape == (34, 48, 3)
        padded = np.pad(before, ((0, 1), (0, 1), (0, 0)), mode="edge")
        assert np.abs(after.astype(int) - padded).mean() < 2 and np.abs(after.astype(int) - padded).max() < 16


def test_video_of_one_pixel(tmp_path):
    write_film(tmp_path / "a.mp4", [np.full((1, 1, 3), 200, np.uint8)] * 2)
    again = list(VideoReader(tmp_path / "a.mp4"))
    assert [picture.shape for picture in again] == [(2, 2, 3)] * 2 and abs(int(again[0][0, 0, 0]) - 200) < 4


def test_video_can_be_read_from_any_frame_and_again(tmp_path):
    write_film(tmp_path / "a.mp4", film(16, 32, 12))
    everything = list(VideoReader(tmp_path / "a.mp4"))
    for start in (0, 1, 5, 11, 12, 50):
        reader = VideoReader(tmp_path / "a.mp4", start=start)
        for _ in range(2):
            rest = list(reader)
            assert len(rest) == max(0, 12 - start) and np.array_equal(rest, everything[start:])
    refused("start is -1", VideoReader, tmp_path / "a.mp4", start=-1)


def test_video_reader_may_be_left_in_the_middle(tmp_path):
    write_film(tmp_path / "a.mp4", film(16, 32, 12))
    with VideoReader(tmp_path / "a.mp4") as reader:
        pictures = iter(reader)
        next(pictures)
    pictures.close()
    with pytest.raises(KeyError), VideoReader(tmp_path / "a.mp4") as reader:
        for _ in reader:
            raise KeyError("an error of the caller passes through")
    assert reader.problem is None


def test_video_frames_are_estimated_where_the_header_is_silent(tmp_path):
    encode(tmp_path / "a.mkv", film(16, 32, 20))
    reader = VideoReader(tmp_path / "a.mkv")
    assert len(list(reader)) == 20 and abs(reader.frames - 20) <= 1 and not reader.truncated


# the first six numbers of the matrix in the box "tkhd" (ISO 14496-12, 8.3.2), and the same turn in numpy
MATRICES = {
    0: (65536, 0, 0, 0, 65536, 0),
    -1: (0, 65536, 0, -65536, 0, 0),  # clockwise: what a telephone held upright writes
    2: (-65536, 0, 0, 0, -65536, 0),
    1: (0, -65536, 0, 65536, 0, 0),
}


@pytest.mark.parametrize("turns", MATRICES)
def test_video_rotation(turns, tmp_path):
    picture = film(32, 48, 1)[0]
    write_film(tmp_path / "a.mp4", [picture] * 3)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    place = content.index(b"tkhd") + 44
    content[place : place + 24] = struct.pack(">6i", *MATRICES[turns])
    (tmp_path / "a.mp4").write_bytes(content)
    reader = VideoReader(tmp_path / "a.mp4")
    again, expected = list(reader), np.rot90(picture, turns)
    assert again[0].shape == expected.shape == (reader.height, reader.width, 3) and again[0].flags.c_contiguous
    assert np.abs(again[0].astype(int) - expected).mean() < 2


@pytest.mark.parametrize("fraction", [0.35, 0.6, 0.95])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi"])
def test_video_that_ends_early_gives_its_whole_frames(suffix, fraction, tmp_path):
    path = tmp_path / f"a{suffix}"
    encode(path, list(noise(20, 32, 48, 3)), **({"movflags": "+faststart"} if suffix == ".mp4" else {}))
    everything = list(VideoReader(path))
    assert len(everything) == 20
    whole = path.read_bytes()
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    length = int(len(whole) * fraction)
    path.write_bytes(whole[:length])
    reader = VideoReader(path)
    rest = list(reader)
    assert 2 <= len(rest) < 20
    if suffix == ".mp4":  # every frame that is there as a whole
        assert len(rest) == sum(end <= length for end in ends)
    sound = len(rest) - (suffix in (".ts", ".avi"))  # there the decoder itself patches the last frame
    assert np.array_equal(rest[:sound], everything[:sound])
    assert reader.truncated and str(path) in reader.problem and "\n" not in reader.problem
    assert f"{len(rest)} frames could be read" in reader.problem


def test_video_cut_between_two_frames_is_noticed(tmp_path):
    path = tmp_path / "a.mp4"
    encode(path, list(noise(20, 32, 48, 3)), movflags="+faststart")
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: places[10]])
    reader = VideoReader(path)
    assert 8 <= len(list(reader)) <= 10 and "shorter than it says" in reader.problem


def test_damaged_packet_does_not_end_the_video(tmp_path):
    path = tmp_path / "a.mp4"
    encode(path, list(noise(20, 32, 48, 3)))
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][10]
    whole = bytearray(path.read_bytes())
    whole[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(whole)
    reader = VideoReader(path)
    assert 10 <= len(list(reader)) <= 20 and reader.truncated


def test_mp4_without_its_index_is_refused(tmp_path):
    write_film(tmp_path / "a.mp4", film(32, 48, 9))
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole[: whole.index(b"moov")])
    refused("cannot be read as a video", VideoReader, tmp_path / "a.mp4")


def test_not_a_video(tmp_path, capfd):
    write_film(tmp_path / "good.mp4", film(16, 16, 3))
    write_image(tmp_path / "picture.mp4.png", noise(8, 8, 3))
    (tmp_path / "picture.mp4.png").rename(tmp_path / "picture.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.txt").write_text("hello world\n" * 100)
    (tmp_path / "random.avi").write_bytes(noise(5000).tobytes())
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\ngood.mp4\n#EXT-X-ENDLIST\n"  # leads to another file
    (tmp_path / "list.mp4").write_text(playlist)
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    for name in ("picture.mp4", "empty.mp4", "text.txt", "random.avi", "list.mp4", "concat.mp4"):
        refused("cannot be read as a video", VideoReader, tmp_path / name)
    refused("does not exist", VideoReader, tmp_path / "absent.mp4")
    refused("is a folder", VideoReader, tmp_path)
    assert capfd.readouterr() == ("", "")


def test_sound_alone_is_not_a_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame) + stream.encode())
    refused("has no video stream", VideoReader, tmp_path / "a.mp4")


def test_video_writer_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(KeyError), VideoWriter(path, 25) as writer:
        for _ in range(60):  # more than the encoder keeps to itself
            writer.write(noise(16, 16, 3))
        assert not path.exists() and len(list(tmp_path.iterdir())) == 1
        raise KeyError("stop")
    assert not list(tmp_path.iterdir())

    def nothing():
        with VideoWriter(path, 25):
            pass

    def two_sizes():
        with VideoWriter(path, 25) as writer:
            writer.write(noise(16, 16, 3))
            writer.write(noise(16, 18, 3))

    refused("no frame was written", nothing)
    refused("expected one size", two_sizes)
    assert not list(tmp_path.iterdir())


def test_video_writer_checks(tmp_path):
    refused(".mp4", VideoWriter, tmp_path / "a.avi", 25)
    for fps in (0, -1, float("nan"), float("inf")):
        refused("expected a rate above 0", VideoWriter, tmp_path / "a.mp4", fps)
    refused("expected uint8", VideoWriter(tmp_path / "a.mp4", 25).write, np.zeros((4, 4, 3)))
    (tmp_path / "file").write_text("")
    refused("cannot be written", VideoWriter(tmp_path / "file" / "a.mp4", 25).write, noise(4, 4, 3))


def test_join_videos(tmp_path):
    pictures = film(32, 48, 9)
    for number, part in enumerate((pictures[:4], pictures[4:5], pictures[5:])):
        write_film(tmp_path / f"{number}.mp4", part, Fraction(30000, 1001))
    parts = sorted(tmp_path.glob("*.mp4"))
    join_videos(parts, tmp_path / "joined.mp4")
    reader = VideoReader(tmp_path / "joined.mp4")
    again = list(reader)
    assert reader.fps == Fraction(30000, 1001) and reader.frames == len(again) == 9 and not reader.truncated
    assert np.array_equal(again, [picture for part in parts for picture in VideoReader(part)])
    parts[1].write_bytes(b"")
    refused("cannot be read as a video", join_videos, parts, tmp_path / "again.mp4")
    assert not (tmp_path / "again.mp4").exists() and len(list(tmp_path.iterdir())) == 4


@needs_shared
def test_real_video():
    reader = VideoReader(SHARED / "videos" / "realshort.mp4")
    assert (reader.height, reader.width, reader.frames, reader.fps) == (240, 320, 36, Fraction(45000, 1499))
    assert len(list(reader)) == 36 and not reader.truncated


def test_uneven_times_are_kept(tmp_path):
    pictures, times = film(32, 48, 6), (0, 0.04, 0.08, 2, 2.04, 2.08)
    with VideoWriter(tmp_path / "a.mp4", 25) as writer:
        for picture, time in zip(pictures, times):
            writer.write(picture, time, 0.5)
    frames = list(VideoReader(tmp_path / "a.mp4"))
    assert [frame.time for frame in frames] == pytest.approx(times, abs=1e-5)
    assert [frame.index for frame in frames] == [0, 1, 2, 3, 4, 5]
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.duration / 1e6 == pytest.approx(2.58, abs=1e-3)
    refused("follows one at", write_times, tmp_path / "b.mp4", pictures, (0, 1, 0.5))


def write_times(path: Path, pictures: list[np.ndarray], times: tuple[float, ...], time_base=Fraction(1, 1000)) -> None:
    with VideoWriter(path, 25, time_base=time_base) as writer:
        for picture, time in zip(pictures, times):
            writer.write(picture, time)


def test_joined_parts_keep_their_times(tmp_path):
    pictures, parts = film(32, 48, 6), (tmp_path / "0.mp4", tmp_path / "1.mp4")
    write_times(parts[0], pictures[:3], (5, 5.04, 7))
    write_times(parts[1], pictures[3:], (9, 9.7, 10))
    join_videos(parts, tmp_path / "joined.mp4")
    times = [frame.time for frame in VideoReader(tmp_path / "joined.mp4")]
    assert times == pytest.approx([5, 5.04, 7, 9, 9.7, 10], abs=1e-9)


def test_mirrored_video(tmp_path):
    picture, path = film(32, 48, 1)[0], tmp_path / "a.mp4"
    write_film(path, [picture] * 3)
    content = path.read_bytes()
    place = content.index(b"tkhd") + 44
    for a, b, c, d in ((-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)):
        matrix = struct.pack(">6i", a << 16, b << 16, 0, c << 16, d << 16, 0)
        path.write_bytes(content[:place] + matrix + content[place + 24 :])
        turned = picture if a else picture.swapaxes(0, 1)
        expected = turned[:: d or b, :: a or c]
        assert np.abs(list(VideoReader(path))[0].astype(int) - expected).mean() < 2
