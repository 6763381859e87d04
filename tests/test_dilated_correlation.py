"""Dilated correlation: fast version and definition agree, forward and backward; published output; memory."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, SLOW
from torch.utils._python_dispatch import TorchDispatchMode

from fleetflow.ops import kernels
from fleetflow.ops.correlation import local_correlation
from fleetflow.ops.dilated_correlation import dilated_correlation


def inputs(height, width, *, dtype=torch.float64, channels=5, count=2, last=False):
    generator = torch.Generator().manual_seed(height * 131 + width)
    a, b = (torch.randn(count, channels, height, width, generator=generator, dtype=dtype) for _ in range(2))
    if last:
        a, b = a.to(memory_format=torch.channels_last), b.to(memory_format=torch.channels_last)
    return a.requires_grad_(), b.requires_grad_()


def both_ways(a, b, radius, stride):
    """The result and both gradients, by the definition and by the fast version."""
    results = []
    for plain in (True, False):
        with kernels.reference() if plain else torch.enable_grad():
            value = dilated_correlation(a, b, radius, stride)
        weight = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view(value.shape).to(value.dtype)
        results.append((value, *torch.autograd.grad((value * weight).sum(), (a, b))))
    return zip(*results)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("radius,stride", [(20, 2), (4, 1), (5, 2), (6, 3), (1, 2)])
@pytest.mark.parametrize("height,width", [(1, 1), (1, 9), (8, 8), (9, 17), (16, 7), (21, 40)])
def test_parity(height, width, radius, stride, last):
    for plain, fast in both_ways(*inputs(height, width, last=last), radius, stride):
        assert plain.shape == fast.shape
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_parity_in_low_precision(dtype, tolerance):
    for plain, fast in both_ways(*inputs(13, 18, dtype=dtype), 8, 2):
        assert fast.dtype == dtype
        torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("plain", [True, False])
def test_gradients_in_double_precision(plain):
    tensors = inputs(5, 6, channels=2, count=1)
    with kernels.reference() if plain else torch.enable_grad():
        assert torch.autograd.gradcheck(lambda a, b: dilated_correlation(a, b, 4, 2), tensors, fast_mode=not SLOW)


@pytest.mark.parametrize("plain", [True, False])
def test_by_hand(plain):
    one, two = torch.zeros(1, 2, 7, 9), torch.zeros(1, 2, 7, 9)
    one[0, :, 3, 2] = 3.0
    two[0, 0, 1, 6] = 5.0  # two lines up, four columns to the right; one channel of two
    two[0, 0, 2, 5] = 7.0  # odd displacements are not looked at
    with kernels.reference() if plain else torch.enable_grad():
        volume = dilated_correlation(one, two, 4, 2)
    assert volume.shape == (1, 25, 7, 9)
    assert volume[0, (-1 + 2) * 5 + (2 + 2), 3, 2] == 3 * 5 / 2
    assert volume.count_nonzero() == 1


def test_it_is_a_choice_of_the_channels_of_the_dense_correlation():
    a, b = inputs(11, 14)
    keep = tuple(y * 13 + x for y in range(0, 13, 3) for x in range(0, 13, 3))
    torch.testing.assert_close(dilated_correlation(a, b, 6, 3), local_correlation(a, b, 6, keep))


@pytest.mark.parametrize("plain", [True, False])
def test_published_output(plain):
    golden = np.load(GOLDEN / "ops_correlation.npz")
    a, b, expected = (torch.from_numpy(golden[f"flownetc_{key}"]) for key in ("f1", "f2", "out"))
    with kernels.reference() if plain else torch.enable_grad():
        volume = dilated_correlation(a, b, 20, 2)
    torch.testing.assert_close(volume, expected, rtol=0, atol=1e-6)


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_no_copy_for_every_displacement():
    """All shifted copies of these features hold 256 times as many values as the result."""
    a, b = torch.rand(2, 1, 256, 48, 64)
    with Largest() as largest:
        volume = dilated_correlation(a, b, 20, 2)
    assert volume.numel() <= largest.elements < 2 * volume.numel()
