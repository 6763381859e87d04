"""All-pairs correlation: both fast ways equal the definition, forward and backward; reference outputs; no volume."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, SLOW

from fleetflow.ops import kernels
from fleetflow.ops.all_pairs import all_pairs, halve, lookup
from fleetflow.ops.kernels import all_pairs as fast
from fleetflow.ops.warp import pixel_grid

SIZES = [(1, 1), (1, 9), (3, 5), (16, 7), (17, 37)]
STORED, COMPUTED = 2**31, 0  # memory limits


def inputs(height, width, *, dtype=torch.float64, channels=6, spread=3.0):
    """Two feature maps and positions: around each pixel, some of them far outside."""
    generator = torch.Generator().manual_seed(height * 131 + width)
    a, b = (torch.randn(2, channels, height, width, generator=generator, dtype=dtype) for _ in range(2))
    moved = spread * torch.randn(2, 2, height, width, generator=generator, dtype=dtype)
    moved[0, :, 0, 0] = torch.tensor([1e7, -3e3])
    moved[1, :, 0, 0] = torch.tensor([-width - 2.5, height + 1.5])
    return a.requires_grad_(), b.requires_grad_(), (pixel_grid(height, width, a) + moved).detach().requires_grad_()


def read(a, b, positions, *, radius=3, levels=4, limit=STORED):
    return lookup(all_pairs(a, b, levels, limit), positions, radius)


def value_and_gradients(a, b, positions, **how):
    value = read(a, b, positions, **how)
    weight = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view(value.shape).to(value.dtype)
    return value, *torch.autograd.grad((value * weight).sum(), (a, b, positions))


@pytest.mark.parametrize("limit,box", [(STORED, None), (COMPUTED, None), (COMPUTED, 400), (COMPUTED, 0)])
@pytest.mark.parametrize("radius", [1, 4])
@pytest.mark.parametrize("height,width", SIZES)
def test_parity(height, width, radius, limit, box, monkeypatch):
    """Box 0 gives every pixel a window of its own, 400 some of them; small chunks, so that there are several."""
    if box is not None:
        monkeypatch.setattr(fast, "LARGEST_BOX", box)
        monkeypatch.setattr(fast, "CHUNK", 5_000)
    tensors = inputs(height, width)
    with kernels.reference():
        plain = value_and_gradients(*tensors, radius=radius)
    for name, a, b in zip(
        ("value", "features1", "features2", "positions"),
        value_and_gradients(*tensors, radius=radius, limit=limit),
        plain,
    ):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_some_tiles_fit_a_box_and_some_do_not():
    """Otherwise the parity at box 400 would test one way only."""
    *_, positions = inputs(17, 37)
    origin = positions.detach()[:1].floor().long().clamp(-4, 40).flatten(2)
    a = torch.zeros(1, 6, 17, 37)
    _, _, corners, _, tile = fast._laid_out(a, a, origin, 10)
    boxes, rest = fast._boxes(corners[0], tile, 10)
    assert len(boxes) + len(tile[rest].unique()) == 2 * 3 and boxes


@pytest.mark.parametrize("limit", [STORED, COMPUTED])
def test_parity_in_single_precision(limit):
    a, b, positions = (tensor.detach() for tensor in inputs(20, 33, dtype=torch.float32, channels=64))
    with kernels.reference():
        plain = read(a, b, positions, radius=4)
    torch.testing.assert_close(read(a, b, positions, radius=4, limit=limit), plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("limit", [STORED, COMPUTED])
def test_low_precision_features_give_single_precision_correlations(limit):
    a, b, positions = (tensor.detach() for tensor in inputs(9, 16, dtype=torch.bfloat16))
    positions = positions.float()
    with torch.autocast("cpu", torch.bfloat16):
        value = read(a, b, positions, limit=limit)
    assert value.dtype == torch.float32
    kept = 2**-7 * read(a.float(), b.float(), positions).abs().max().item() if limit == STORED else 1e-5
    torch.testing.assert_close(value, read(a.float(), b.float(), positions), rtol=0, atol=kept)


def test_training_stores_single_precision():
    a, b, positions = (tensor.detach() for tensor in inputs(9, 16, dtype=torch.bfloat16))
    value = read(a.requires_grad_(), b, positions.float())
    torch.testing.assert_close(value, read(a.float(), b.float(), positions.float()), rtol=0, atol=1e-5)


def test_gradients_in_double_precision(monkeypatch):
    a, b, positions = (tensor.detach()[:1].requires_grad_() for tensor in inputs(3, 5, channels=2, spread=1.0))
    for box in (4096, 0):
        monkeypatch.setattr(fast, "LARGEST_BOX", box)
        assert torch.autograd.gradcheck(
            lambda x, y, p: read(x, y, p, radius=1, levels=2, limit=COMPUTED), (a, b, positions), fast_mode=not SLOW
        )


def test_all_lookups_of_a_pyramid_share_a_gradient():
    """Three lookups, one of them by a window that is too wide for the fast way; the same graph again gives the same."""
    a, b, positions = inputs(16, 7)

    def gradients() -> list[tuple]:
        pyramid = all_pairs(a, b, 3)
        values = [lookup(pyramid, positions + k, radius) for k, radius in enumerate((3, 2, 6))]
        total = sum((value * value).sum() for value in values)
        found = [torch.autograd.grad(total, (a, b, positions), retain_graph=True) for _ in range(2)]
        assert not pyramid.sums  # nothing is kept that the next pass would add to
        return found

    with kernels.reference():
        plain = gradients()[0]
    for fast_ones in gradients():
        for ours, theirs in zip(fast_ones, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_lookups_that_follow_one_another():
    """Windows that stay are not read again: on one pyramid each of many lookups is that of a fresh pyramid."""
    a, b, positions = inputs(17, 37)
    pyramid = all_pairs(a, b, 4, STORED)
    generator = torch.Generator().manual_seed(5)
    places = [positions]
    for share in (0.1, 1.0, 0.5, 0.0, 0.02):
        step = 3 * torch.randn(positions.shape, generator=generator, dtype=positions.dtype)
        places.append(places[-1] + step * (torch.rand(positions.shape, generator=generator) < share))
    places += [places[2] + 0.3]
    for radius, place in ((radius, place) for radius in (3, 2, 4) for place in places):
        torch.testing.assert_close(lookup(pyramid, place, radius), read(a, b, place, radius=radius), rtol=0, atol=0)
    with kernels.reference():
        torch.testing.assert_close(lookup(pyramid, place, radius), read(a, b, place, radius=radius))


@torch.no_grad()
def test_only_windows_that_moved_are_read():
    a, b, _ = inputs(16, 24, dtype=torch.float32)
    positions = pixel_grid(16, 24, a).expand(2, -1, -1, -1) + 0.25
    pyramid = all_pairs(a, b, 4, STORED)
    first = lookup(pyramid, positions, 3)
    pyramid.table.fill_(float("nan"))
    assert lookup(pyramid, positions + 0.5, 3).isfinite().all()  # the same windows, blended in other shares
    moved = positions.clone()
    moved[1, 0, 3, 5] += 1
    again = lookup(pyramid, moved, 3)
    assert again[1, :, 3, 5].isnan().any()
    again[1, :, 3, 5] = first[1, :, 3, 5]
    assert again.equal(first)


def test_the_limit_decides_what_is_stored():
    a, b = torch.rand(2, 2, 4, 16, 24)
    numbers = 2 * (16 * 24) * (16 * 24 + 8 * 12 + 4 * 6 + 2 * 3)
    stored = all_pairs(a, b, 4, 4 * numbers)
    assert sum(volume.numel() for volume in stored.volumes) == numbers
    assert all_pairs(a, b, 4, 4 * numbers - 1).volumes is None
    with kernels.reference():
        assert all_pairs(a, b, 4, 0).volumes is not None, "the definition always stores"


def test_a_picture_too_large_to_store_is_read():
    """At 400x300 the volumes would take 76 GB."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 2, 400, 300)
    a, b = torch.nn.functional.normalize(a), torch.nn.functional.normalize(b)
    pyramid = all_pairs(a, b, 1)
    assert pyramid.volumes is None
    flow = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1)
    window = lookup(pyramid, pixel_grid(400, 300, a)[None] + flow, 1)
    expected = (a[..., 3:, :-4] * b[..., 1:-2, 3:-1]).sum(1) / 2**0.5
    torch.testing.assert_close(window[:, 4, 3:, :-4], expected)


@pytest.mark.parametrize("limit", [STORED, COMPUTED])
def test_by_hand(limit):
    """The horizontal offset is the slow axis of the window; the second level sees means of 2x2 pixels."""
    a, b = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
    a[0, :, 4, 4] = 1.0
    b[0, 0, 3, 6] = 10.0  # two to the right, one up
    window = read(a, b, pixel_grid(8, 8, a)[None], radius=2, levels=2, limit=limit)[0, :, 4, 4].view(2, 5, 5)
    assert window[0, 2 + 2, 2 - 1] == 10 / 2 and window[0].count_nonzero() == 1
    assert window[1, 2 + 1, 2 - 1] == 10 / 2 / 4 and window[1].count_nonzero() == 1  # pixel (1, 3) of the half
    between = read(a, b, pixel_grid(8, 8, a)[None] + 0.25, radius=2, levels=1, limit=limit)[0, :, 4, 4].view(5, 5)
    assert between[4, 1] == pytest.approx(5 * 0.75 * 0.75) and between[3, 0] == pytest.approx(5 * 0.25 * 0.25)


@pytest.mark.parametrize("limit", [STORED, COMPUTED])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_a_position_that_is_no_number_reads_nothing(limit, value):
    a, b = torch.ones(2, 1, 3, 6, 9)
    positions = pixel_grid(6, 9, a)[None].clone()
    positions[0, 0, 2, 3] = value
    window = read(a, b, positions, limit=limit)
    assert window[..., 2, 3].abs().max() == 0 and window.isfinite().all() and window[..., 3, 3].abs().max() > 0


def test_halve_leaves_an_odd_edge_out():
    assert halve(torch.arange(15.0).view(1, 1, 3, 5)).tolist() == [[[[3.0, 5.0]]]]
    assert halve(torch.ones(1, 1, 1, 5)).shape == (1, 1, 0, 2)


@pytest.mark.parametrize("limit", [STORED, COMPUTED])
@pytest.mark.parametrize("radius", [3, 4])
def test_published_outputs(radius, limit):
    golden = np.load(GOLDEN / "ops_correlation.npz")
    a, b, positions, expected = (
        torch.from_numpy(golden[f"raft_{key}"]) for key in ("f1", "f2", "coords", f"r{radius}_out")
    )
    found = read(a, b, positions, radius=radius, limit=limit)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_one_sample_is_laid_out_as_the_next_layer_takes_it():
    """Channels-last in every stride, also in the first, which nothing reads: else each use copies it once more."""
    a, b, positions = (tensor[:1].detach() for tensor in inputs(16, 24, dtype=torch.float32))
    with torch.inference_mode():
        value = read(a, b, positions)
    assert value.to(value.dtype, memory_format=torch.channels_last).data_ptr() == value.data_ptr()
