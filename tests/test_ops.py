"""Operators: the fast version equals the definition, forward and backward; gradients are right; reference outputs."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, SLOW

from fleetflow.ops import kernels
from fleetflow.ops.correlation import local_correlation
from fleetflow.ops.dilated_correlation import dilated_correlation
from fleetflow.ops.resize import resize
from fleetflow.ops.subtract_mean import subtract_mean
from fleetflow.ops.warp import pixel_grid, warp

SIZES = [(1, 1), (1, 9), (8, 8), (9, 17), (16, 7), (33, 40)]
RADII = [(4, (0, 40, 44, 80)), (4, None), (1, None), (3, (48, 0, 7)), (10, None)]


def inputs(height, width, *, dtype=torch.float64, channels=5, count=2, last=False):
    generator = torch.Generator().manual_seed(height * 131 + width)
    a, b = (torch.randn(count, channels, height, width, generator=generator, dtype=dtype) for _ in range(2))
    if last:
        a, b = a.to(memory_format=torch.channels_last), b.to(memory_format=torch.channels_last)
    flow = 3 * torch.randn(count, 2, height, width, generator=generator, dtype=dtype)
    return a.requires_grad_(), b.requires_grad_(), flow.requires_grad_()


def both_ways(operator, *tensors):
    """The result and the gradients of all tensors, by the definition and by the fast version."""
    results = []
    for plain in (True, False):
        with kernels.reference() if plain else torch.enable_grad():
            value = operator()
        weight = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view(value.shape).to(value.dtype)
        results.append((value, *torch.autograd.grad((value * weight).sum(), tensors)))
    return zip(*results)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("radius,keep", RADII)
@pytest.mark.parametrize("height,width", SIZES)
def test_correlation_parity(height, width, radius, keep, last):
    a, b, _ = inputs(height, width, last=last)
    for plain, fast in both_ways(lambda: local_correlation(a, b, radius, keep), a, b):
        assert plain.shape == fast.shape
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("height,width", SIZES)
def test_warp_parity(height, width, last):
    a, _, flow = inputs(height, width, last=last)
    for plain, fast in both_ways(lambda: warp(a, flow), a, flow):
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_parity_in_low_precision(dtype, tolerance):
    a, b, flow = inputs(13, 21, dtype=dtype)
    for plain, fast in both_ways(lambda: local_correlation(a, b, 4), a, b):
        assert fast.dtype == dtype
        torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance)
    with torch.no_grad(), kernels.reference():
        plain = warp(a, flow.float())
    assert warp(a, flow.float()).dtype == dtype
    torch.testing.assert_close(warp(a, flow.float()), plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-12), (torch.bfloat16, 0)])
@pytest.mark.parametrize("size", [(1, 1), (32, 68), (37, 68), (375, 1242), (9, 17), (8, 40), (11, 5), (4, 4)])
def test_a_flow_is_resized_as_torch_does_it(size, dtype, tolerance):
    flow = inputs(8, 17, dtype=dtype)[2].detach().to(memory_format=torch.channels_last)
    with kernels.reference():
        plain = resize(flow, size)
    fast = resize(flow, size)
    assert fast.dtype == dtype and fast.shape == (2, 2, *size)
    torch.testing.assert_close(fast, plain, rtol=0, atol=tolerance)


def test_a_flow_that_grows_is_resized_the_fast_way(monkeypatch):
    """Else the test above compares torch with itself."""
    flow = inputs(8, 17, dtype=torch.float32)[2]
    monkeypatch.setattr("fleetflow.ops.resize._higher", lambda planes, height: planes.new_zeros(1))
    assert resize(flow.detach(), (16, 17)).shape == (1,)
    for given, size in ((flow, (16, 17)), (flow.detach(), (15, 40)), (flow.detach().bfloat16(), (16, 17))):
        assert resize(given, size).shape == (2, 2, *size)


def test_gradients_in_double_precision():
    a, b, flow = inputs(5, 7, channels=3, count=1)
    how = {"fast_mode": not SLOW}
    for context in (kernels.reference, torch.enable_grad):
        with context():
            assert torch.autograd.gradcheck(lambda x, y: local_correlation(x, y, 2, (0, 12, 24, 3)), (a, b), **how)
            assert torch.autograd.gradcheck(warp, (a, flow), **how)


def test_reference_is_forced_nested_and_left():
    assert not kernels.is_reference()
    with kernels.reference():
        with kernels.reference():
            assert kernels.is_reference()
        assert kernels.is_reference()
    assert not kernels.is_reference()


def test_correlation_by_hand():
    one, two = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    one[0, :, 1, 1] = 3.0
    two[0, 0, 0, 3] = 5.0  # one line up, two columns to the right; one channel of two
    volume = local_correlation(one, two, 2)
    assert volume[0, (-1 + 2) * 5 + (2 + 2), 1, 1] == 3 * 5 / 2
    assert volume.count_nonzero() == 1


def test_warp_brings_the_second_frame_back():
    frame1 = torch.rand(1, 3, 12, 20, dtype=torch.float64)
    frame2 = frame1.roll((1, 2), (2, 3))  # moved 2 to the right and 1 down
    flow = torch.tensor([2.0, 1.0], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 12, 20)
    torch.testing.assert_close(warp(frame2, flow)[..., :11, :18], frame1[..., :11, :18])
    assert warp(frame2, flow)[..., -1, :].abs().max() == 0, "outside the picture is 0"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_warp_survives_a_flow_that_is_no_number(value):
    flow = torch.zeros(1, 2, 6, 9)
    flow[0, 0, 2, 3] = value
    assert warp(torch.ones(1, 4, 6, 9), flow)[0, :, 2, 3].abs().max() == 0


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 1, 1)])
def test_less_is_a_difference_in_the_layout_of_the_frame(last, shape):
    frame = torch.rand(2, 3, 5, 7).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    mean = torch.rand(shape)
    result = subtract_mean(frame, mean)
    assert torch.equal(result, frame - mean.reshape(-1, 3, 1, 1))
    assert result.stride() == frame.stride()


def test_pixel_grid():
    grid = pixel_grid(2, 3, torch.zeros(()))
    assert grid.tolist() == [[[0, 1, 2], [0, 1, 2]], [[0, 0, 0], [1, 1, 1]]]


def test_published_outputs():
    golden = np.load(GOLDEN / "ops_correlation.npz")
    tensor = {key: torch.from_numpy(golden[key]) for key in golden.files if golden[key].dtype == np.float32}
    volume = local_correlation(tensor["md4_f1"], tensor["md4_f2"], 4)
    torch.testing.assert_close(volume, tensor["md4_out"], rtol=0, atol=1e-6)
    kept = local_correlation(tensor["md4_f1"], tensor["md4_f2"], 4, tuple(golden["cddc_index"].tolist()))
    torch.testing.assert_close(kept, tensor["cddc_out"], rtol=0, atol=1e-6)
    warped = warp(tensor["resample2d_img"], tensor["ffn_warp_flow"])
    torch.testing.assert_close(warped, tensor["ffn_warp_out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_registered_operators_are_sound(last):
    """Schema, shapes, strides, gradients and what the compiler makes of them agree with what runs.

    Gradients and the compiler see channels-last maps alone, unless slow: they take seconds.
    """
    how = {} if last or SLOW else {"test_utils": ("test_schema", "test_faketensor")}
    a, b, flow = inputs(9, 13, dtype=torch.float32, last=last)
    library = torch.ops.fleetflow
    assert dilated_correlation.__name__ == "dilated_correlation", "its import registers it"
    for operator, arguments in (
        (library.warp, (a, flow)),
        (library.local_correlation, (a, b, 2, [0, 5])),
        (library.local_correlation, (a, b, 1, None)),
        (library.dilated_correlation, (a, b, 4, 2)),
    ):
        torch.library.opcheck(operator.default, arguments, **how)


def test_other_devices_run_the_definition():
    a, b, _ = inputs(6, 7)
    plain, gradients = kernels.by_definition(local_correlation.__wrapped__, 2)
    value = plain(a, b, 2, None)
    weight = torch.randn_like(value)
    expected = torch.autograd.grad((local_correlation(a, b, 2) * weight).sum(), (a, b))
    torch.testing.assert_close(gradients(weight, a, b, 2, None), list(expected), rtol=0, atol=1e-12)
