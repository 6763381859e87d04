"""OpenEXR: the two conventions of compositing programs pinned by their channels, STMaps, damaged files."""

import numpy as np
import pytest

from fleetflow.io.exr import read_stmap, read_vectors, write_stmap, write_vectors
from fleetflow.types import FleetflowError

OpenEXR = pytest.importorskip("OpenEXR")


def random_flow(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 9, (7, 11, 2)).astype(np.float32)


def channels(path) -> dict[str, np.ndarray]:
    with OpenEXR.File(str(path), separate_channels=True) as file:
        return {name: channel.pixels.copy() for name, channel in file.channels().items()}


def test_nuke_layers_in_pixels_with_y_upwards(tmp_path):
    forward, backward = random_flow(0), random_flow(1)
    write_vectors(tmp_path / "a.exr", forward, backward)
    stored = channels(tmp_path / "a.exr")
    assert set(stored) == {"forward.u", "forward.v", "backward.u", "backward.v"}
    assert np.array_equal(stored["forward.u"], forward[..., 0])
    assert np.array_equal(stored["forward.v"], -forward[..., 1])
    assert np.array_equal(stored["backward.u"], backward[..., 0])
    assert np.array_equal(stored["backward.v"], -backward[..., 1])


def test_blender_vector_pass(tmp_path):
    """X, Y: to the previous frame; Z, W: this frame less the next one (Cycles, primitive_motion_vector)."""
    forward, backward = random_flow(0), random_flow(1)
    write_vectors(tmp_path / "a.exr", forward, backward, convention="blender")
    stored = channels(tmp_path / "a.exr")
    assert set(stored) == {"Vector.X", "Vector.Y", "Vector.Z", "Vector.W"}
    assert np.array_equal(stored["Vector.X"], backward[..., 0])
    assert np.array_equal(stored["Vector.Y"], -backward[..., 1])
    assert np.array_equal(stored["Vector.Z"], -forward[..., 0])
    assert np.array_equal(stored["Vector.W"], forward[..., 1])


@pytest.mark.parametrize("convention", ["nuke", "blender"])
def test_vectors_round_trip(convention, tmp_path):
    forward, backward = random_flow(0), random_flow(1)
    forward[2, 3] = np.nan
    write_vectors(tmp_path / "a.exr", forward, backward, convention=convention)
    found = read_vectors(tmp_path / "a.exr")
    assert np.array_equal(found.forward, np.nan_to_num(forward)) and np.array_equal(found.backward, backward)
    assert found.forward.dtype == np.float32 and len(list(tmp_path.iterdir())) == 1


def test_one_direction(tmp_path):
    write_vectors(tmp_path / "a.exr", random_flow(0))
    assert read_vectors(tmp_path / "a.exr").backward is None
    write_vectors(tmp_path / "a.exr", backward=random_flow(0), convention="blender")
    assert not read_vectors(tmp_path / "a.exr").forward.any()
    with pytest.raises(FleetflowError, match="give one at least"):
        write_vectors(tmp_path / "a.exr")
    with pytest.raises(FleetflowError, match="of one size"):
        write_vectors(tmp_path / "a.exr", random_flow(0), random_flow(0)[1:])
    with pytest.raises(FleetflowError, match="nuke"):
        write_vectors(tmp_path / "a.exr", random_flow(0), convention="fusion")


def test_stmap(tmp_path):
    still = np.zeros((2, 4, 2), np.float32)
    write_stmap(tmp_path / "a.exr", still)
    stored = channels(tmp_path / "a.exr")
    assert np.allclose(stored["R"], [[0.125, 0.375, 0.625, 0.875]] * 2) and np.allclose(
        stored["G"], [[0.75] * 4, [0.25] * 4]
    )
    still[0, 0] = 1, 1  # one pixel to the right and down: the next pixel, the lower row
    write_stmap(tmp_path / "a.exr", still)
    stored = channels(tmp_path / "a.exr")
    assert np.isclose(stored["R"][0, 0], 0.375) and np.isclose(stored["G"][0, 0], 0.25)
    flow = random_flow(0)
    write_stmap(tmp_path / "a.exr", flow)
    assert np.abs(read_stmap(tmp_path / "a.exr") - flow).max() < 1e-5


def test_other_exr_files(tmp_path):
    path = tmp_path / "a.exr"
    write_stmap(path, random_flow(0))
    with pytest.raises(FleetflowError, match="holds the channels B, G, R; expected forward.u"):
        read_vectors(path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:100], whole[: len(whole) // 2], whole[:-20]):
        path.write_bytes(content)
        with pytest.raises(FleetflowError, match="cannot be read as an OpenEXR file"):
            read_stmap(path)
    with pytest.raises(FleetflowError, match="does not exist"):
        read_vectors(tmp_path / "absent.exr")
    place = whole.index(b"dataWindow\0box2i\0") + 21
    path.write_bytes(whole[: place + 8] + (30_000).to_bytes(4, "little") * 2 + whole[place + 16 :])
    with pytest.raises(FleetflowError):
        read_stmap(path)


def test_a_name_that_is_not_utf8(tmp_path):
    """OpenEXR takes it for no path at all."""
    odd = tmp_path / "b\udcff.exr"
    odd.write_bytes(b"v/1\x01")
    for call in (lambda: write_stmap(odd, random_flow(0)), lambda: read_vectors(odd)):
        with pytest.raises(FleetflowError, match="is no name in UTF-8, as OpenEXR needs it"):
            call()
