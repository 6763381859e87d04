"""Damaged, lying, and merely unfamiliar files: each is an error, a stated problem, or read as what it is."""

import io as streams
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from fleetflow.inference.pairing import check_sizes
from fleetflow.io import limits
from fleetflow.io.flow import read_flow, write_flow
from fleetflow.io.images import list_frames, read_deep_image, read_image, read_mask, write_image
from fleetflow.io.video import VideoReader, VideoWriter
from fleetflow.types import FleetflowError

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def saved(format: str, picture: np.ndarray = PICTURE, **options) -> bytes:
    stream = streams.BytesIO()
    Image.fromarray(picture).save(stream, format, **options)
    return stream.getvalue()


def png(rows: np.ndarray, size: tuple[int, int], *extra: bytes, depth: int = 8) -> bytes:
    """Returns an RGB PNG file whose header claims another size (height, width)."""
    header = struct.pack(">IIBBBBB", size[1], size[0], depth, 2, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def refused(path: Path, content: bytes, words: str = "", read=read_image) -> None:
    path.write_bytes(content)
    with pytest.raises(FleetflowError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and words in message and "\n" not in message, message


# ---- damage ----


@pytest.mark.parametrize("rows", [0, 1, 39])
def test_png_with_fewer_rows_than_declared(rows, tmp_path):
    refused(tmp_path / "a.png", png(PICTURE[:rows], (40, 60)), "claims 40x60 pixels")
    deep = np.zeros((rows, 180), ">u2")
    refused(tmp_path / "a.png", png(deep, (40, 60), depth=16), "claims 40x60 pixels")
    for read in (read_mask, read_deep_image, read_flow):
        refused(tmp_path / "a.png", png(deep, (40, 60), depth=16), "claims 40x60 pixels", read)


def test_png_rows_to_spare_are_no_damage(tmp_path):
    (tmp_path / "a.png").write_bytes(png(PICTURE, (30, 60)))
    assert np.array_equal(read_image(tmp_path / "a.png"), PICTURE[:30])


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA"])
def test_every_bit_of_a_png_is_covered_by_its_checksums(mode, tmp_path):
    image = Image.fromarray(PICTURE).convert(mode)
    stream = streams.BytesIO()
    image.save(stream, "PNG", optimize=True)
    whole, path = stream.getvalue(), tmp_path / "a.png"
    path.write_bytes(whole)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(read_image(path), expected)
    for place in np.random.default_rng(0).integers(0, len(whole), 60):
        content = bytearray(whole)
        content[place] ^= 1 << int(place) % 8
        path.write_bytes(content)
        try:
            assert np.array_equal(read_image(path), expected)  # a letter of the name of a part that may be missing
        except FleetflowError:
            continue


def test_interlaced_png(tmp_path):
    """Adam7, built by hand: each of the seven passes has its own rows."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    for height, width in ((40, 60), (1, 1), (3, 5), (2, 9)):
        rows = [PICTURE[y:height:dy, x:width:dx] for x, y, dx, dy in passes]
        raw = b"".join(b"\0" + row.tobytes() for part in rows if part.size for row in part)
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1))
        content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
        (tmp_path / "a.png").write_bytes(content)
        assert np.array_equal(read_image(tmp_path / "a.png"), PICTURE[:height, :width])
        short = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(raw[:-1])) + chunk(b"IEND", b"")
        refused(tmp_path / "a.png", short, "ends before the last")


LOSSY = [("WEBP", {"quality": 80}), ("WEBP", {"lossless": True}), ("JPEG", {}), ("JPEG", {"progressive": True})]


@pytest.mark.parametrize("format, options", [("PNG", {}), *LOSSY, ("TIFF", {"compression": "tiff_adobe_deflate"})])
@pytest.mark.parametrize("tail", ["cut", "zeros"])
def test_a_lost_tail_is_an_error(format, options, tail, tmp_path):
    whole, path = saved(format, **options), tmp_path / "a.bin"
    path.write_bytes(whole)
    expected = read_image(path)
    for share in (0.3, 0.5, 0.7, 0.9, 0.97):
        length = int(len(whole) * share)
        path.write_bytes(whole[:length] + bytes((len(whole) - length) * (tail == "zeros")))
        try:
            assert np.array_equal(read_image(path), expected)  # only what follows the pixels was lost
        except FleetflowError as error:
            assert str(path) in str(error)
            continue


def test_jpeg_may_be_followed_by_anything(tmp_path):
    """Telephones append a second picture or a film."""
    (tmp_path / "a.jpg").write_bytes(saved("JPEG") + bytes(5000))
    assert read_image(tmp_path / "a.jpg").shape == PICTURE.shape


# ---- broken metadata of intact pictures ----


def broken_chunk(name: bytes, data: bytes) -> bytes:
    return chunk(name, data)[:-4] + b"\0\1\2\3"


@pytest.mark.parametrize(
    "extra",
    [
        broken_chunk(b"tEXt", b"Title\0hello"), broken_chunk(b"iCCP", b"x"), broken_chunk(b"eXIf", b"MM\0*"),
        chunk(b"iCCP", b"icc\0\0" + b"not packed"), chunk(b"zTXt", b"k\0\0" + b"not packed"), chunk(b"eXIf", b"no EXIF"),
        chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**24))), chunk(b"iTXt", b"\xff\xfe"), chunk(b"gAMA", b"1"),
        chunk(b"pHYs", b""), chunk(b"cHRM", b"\0"), chunk(b"acTL", b""), chunk(b"sRGB", b""), chunk(b"eXIf", b""),
        chunk(b"tIME", b""), chunk(b"bKGD", b""), chunk(b"sBIT", b""), chunk(b"fcTL", b"\0" * 4),
    ],
)  # fmt: skip
def test_broken_metadata_of_an_intact_png_is_ignored(extra, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(PICTURE, (40, 60), extra))
    assert np.array_equal(read_image(path), PICTURE)
    assert read_mask(path).shape == (40, 60)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(40)]
)
def test_broken_exif_of_an_intact_picture_is_ignored(format, exif, tmp_path):
    content = saved(format, exif=exif, icc_profile=b"no profile", **({"lossless": True} if format == "WEBP" else {}))
    (tmp_path / "a.bin").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = read_image(tmp_path / "a.bin").astype(int)
    assert found.shape == PICTURE.shape and (format == "JPEG" or np.array_equal(found, PICTURE))


def test_text_of_a_png_that_unpacks_to_a_lot(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("story", "x" * 2**21, zip=True)
    stream = streams.BytesIO()
    Image.fromarray(PICTURE).save(stream, "PNG", pnginfo=info)
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    assert np.array_equal(read_image(tmp_path / "a.png"), PICTURE)


# ---- files that claim more than they hold ----


def claims(format: str, side: int) -> bytes:
    """Returns a small file whose header claims side x side pixels."""
    two, four = struct.pack("<HH", side, side), struct.pack("<II", side, side)
    if format == "PNG":
        return png(PICTURE, (side, side))
    if format == "deep PNG":
        return png(PICTURE, (side, side), depth=16)
    if format == "BMP":
        whole = saved("BMP")
        return whole[:18] + four + whole[26:]
    if format == "PPM":
        return b"P6 %d %d 255\n" % (side, side) + PICTURE.tobytes()
    if format == "TGA":
        whole = saved("TGA")
        return whole[:12] + two + whole[16:]
    if format == "GIF":
        whole = bytearray(saved("GIF"))
        whole[6:10] = two
        place = whole.index(b",\0\0\0\0") + 5
        whole[place : place + 4] = two
        return bytes(whole)
    if format == "JPEG":
        whole = bytearray(saved("JPEG"))
        place = whole.index(b"\xff\xc0") + 5
        whole[place : place + 4] = struct.pack(">HH", side, side)
        return bytes(whole)
    whole = bytearray(saved("TIFF"))
    for tag in (256, 257, 278):  # width, height, rows in a strip
        for kind in (3, 4):
            place = whole.find(struct.pack("<HHI", tag, kind, 1))
            if place >= 0:
                whole[place + 2 : place + 12] = struct.pack("<HII", 4, 1, side)
    return bytes(whole)


@pytest.mark.parametrize("side", [12_000, 60_000])
@pytest.mark.parametrize("format", ["PNG", "deep PNG", "BMP", "PPM", "TGA", "GIF", "JPEG", "TIFF"])
def test_a_size_that_the_file_cannot_hold_is_refused_by_the_header(format, side, tmp_path, monkeypatch):
    content = claims(format, side)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("memory was taken for the pixels"))
    for read in (read_image, read_mask):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, of large pictures
            refused(tmp_path / "a.bin", content, read=read)


def test_a_trap_of_zeros(tmp_path):
    """4 MB of zeros packed, as 8 GiB of numbers: DEFLATE can do it, no flow of anybody is like this."""
    for name in ("a.npz", "a.png"):
        with pytest.raises(FleetflowError, match="would unpack"):
            limits.check_size(tmp_path / name, 2**14, 2**14, 2**32, 2**22, limits.DEFLATE)
    header = (
        b"\x93NUMPY\1\0"
        + struct.pack("<H", 70)
        + b"{'descr': '<f8', 'fortran_order': False, 'shape': (16000, 16000, 2)}".ljust(69)
        + b"\n"
    )
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros, crc = bytes(2**20), zlib.crc32(header)
    pieces = [packer.compress(header)] + [packer.compress(zeros) for _ in range(64)]  # as long as one may look
    body = b"".join([*pieces, packer.flush()]) + bytes(4_000_000)
    name, length = b"flow.npy", len(header) + 16000 * 16000 * 16
    local = (
        struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 33, crc, len(body), length & 0xFFFFFFFF, len(name), 0) + name
    )
    entry = struct.pack(
        "<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 8, 0, 33, crc, len(body), length & 0xFFFFFFFF, len(name), 0, 0, 0, 0, 0, 0
    ) + name  # fmt: skip
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(entry), len(local) + len(body), 0)
    refused(tmp_path / "a.npz", local + body + entry + end, "would unpack", read_flow)


def test_plain_pictures_are_no_traps(tmp_path):
    plain = np.full((3000, 4000, 3), 7, np.uint8)
    for name, options in (
        ("a.webp", {"lossless": True}),
        ("a.png", {}),
        ("a.gif", {}),
        ("a.jpg", {"progressive": True}),
    ):
        Image.fromarray(plain).save(tmp_path / name, **options)
        assert read_image(tmp_path / name).shape == plain.shape


# ---- unsupported is not damaged ----


@pytest.mark.parametrize(
    "content, name, words",
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "a.heic", "a HEIC picture; convert it"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(200), "a.jxl", "a JPEG XL picture; convert it"),
        (b"\x76\x2f\x31\x01" + bytes(200), "a.exr", "an OpenEXR picture"),
        (b"8BPS\0\1" + bytes(200), "a.psd", "a Photoshop file"),
        (b"%PDF-1.7\n" + bytes(200), "a.pdf", "a PDF file"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0" + bytes(200), "a.mp4", "an mp4 or mov video"),
        (bytes(3000), "a.yuv", "raw video; raw pictures have no header"),
    ],
)
def test_unsupported_pictures_have_their_own_message(content, name, words, tmp_path):
    refused(tmp_path / name, content, words)
    if "mp4" not in name:
        refused(tmp_path / name, content, words, VideoReader)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with a name")
@pytest.mark.parametrize("name", ["a.png", "a.flo", "a.mp4"])
def test_a_pipe_is_refused_before_it_blocks(name, tmp_path):
    path = tmp_path / name
    os.mkfifo(path)
    read = {".png": read_image, ".flo": read_flow, ".mp4": VideoReader}[path.suffix]
    for look in (read, lambda path: check_sizes([(path, path)])):
        with pytest.raises(FleetflowError, match=f"{name} is a pipe or device; expected a file"):
            look(path)


def test_what_is_wrong_with_no_picture(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    for look in (read_image, lambda path: check_sizes([(path, path)])):
        for name, words in (("empty", "it is empty"), ("text", "its first bytes are those of no picture")):
            with pytest.raises(FleetflowError, match=rf"{name}.png cannot be read as a picture \({words}\)"):
                look(tmp_path / f"{name}.png")


def test_pictures_given_as_a_video(tmp_path):
    frames = [Image.fromarray(np.roll(PICTURE, k, 1)) for k in range(3)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=40, lossless=True)
    refused(tmp_path / "a.webp", (tmp_path / "a.webp").read_bytes(), "an animated WebP; convert it", VideoReader)
    assert np.array_equal(read_image(tmp_path / "a.webp"), PICTURE)  # its first picture
    refused(tmp_path / "a.png", saved("PNG"), "a PNG picture; give two pictures", VideoReader)
    refused(tmp_path / "a.png", saved("PNG")[:40], "a PNG picture", VideoReader)


@pytest.mark.parametrize("name, feature", [("a.jp2", "jpg_2000"), ("a.avif", "avif")])
def test_newer_formats_are_read(name, feature, tmp_path):
    if not features.check(feature):
        pytest.skip(f"this build of Pillow has no {feature}")
    smooth = np.kron(PICTURE[:5, :6], np.ones((16, 16, 1), np.uint8))
    write_image(tmp_path / name, smooth)
    assert np.abs(read_image(tmp_path / name).astype(int) - smooth).mean() < 6
    assert list_frames(tmp_path) == [tmp_path / name]
    with pytest.raises(FleetflowError, match="picture; give two pictures"):
        VideoReader(tmp_path / name)


# ---- doors ----


def test_home_folder_and_read_only_arrays(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    picture, flow = PICTURE.copy(), np.zeros((4, 5, 2), np.float32)
    picture.flags.writeable = flow.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_image("~/a.png", picture)
        write_flow("~/a.flo", flow)
        with VideoWriter("~/a.mp4", 25) as writer:
            writer.write(picture)
        assert np.array_equal(read_image("~/a.png"), picture)
        assert read_flow("~/a.flo")[1].all() and list_frames("~") == [tmp_path / "a.png"]
        assert len(list(VideoReader("~/a.mp4"))) == 1
