"""The Triton kernels against the definitions. `test_triton.py` runs this file in a process of its own: in Triton's
interpreter (TRITON_INTERPRET=1), and without it on a GPU, where there is one."""

import itertools
import os

import pytest
import torch
from conftest import SLOW

from fleetflow.ops.all_pairs import all_pairs, lookup
from fleetflow.ops.correlation import local_correlation
from fleetflow.ops.dilated_correlation import dilated_correlation
from fleetflow.ops.kernels import differentiable, reference
from fleetflow.ops.triton import all_pairs as fast_all_pairs
from fleetflow.ops.triton import blocks, cells
from fleetflow.ops.triton import correlation as fast_correlation
from fleetflow.ops.triton import dilated_correlation as fast_dilated
from fleetflow.ops.triton import warp as fast_warp
from fleetflow.ops.warp import pixel_grid, warp

# The interpreter takes a tenth of a second for a kernel: by default each size, type and layout is met there, not every two.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FEW = INTERPRETED and not SLOW
DEVICE = "cpu" if INTERPRETED else "cuda"
SIZES = [(1, 1), (1, 9), (6, 11)]
KEPT = [(1, None), (2, None), (4, (0, 40, 44, 80, 8, 44))]  # radius, and what is kept
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """In the interpreter the number of programs counts, not their size."""
    if INTERPRETED:
        for module, p in ((fast_correlation, 64), (fast_warp, 64), (fast_all_pairs, 32), (cells, 32)):
            monkeypatch.setattr(module, "P", p)


def tensor(*shape, dtype=torch.float32, layout="contiguous", scale=1.0):
    """Random numbers with the same seed, in memory row by row, channels-last, or with gaps."""
    values = scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    values = values.to(DEVICE, dtype)
    if layout == "last":
        values = values.to(memory_format=torch.channels_last)
    if layout == "gaps":
        values = values.new_zeros(*shape[:2], shape[2] + 3, 2 * shape[3])[:, :, 3:, ::2].copy_(values)
    return values.requires_grad_()


fast_local = differentiable(fast_correlation.local_correlation, fast_correlation.local_correlation_gradients)
fast_dilated_correlation = differentiable(fast_dilated.dilated_correlation, fast_dilated.dilated_correlation_gradients)
fast_warped = differentiable(fast_warp.warp, fast_warp.warp_gradients)


def same(definition, fast, *tensors, tolerance=None):
    """Asserts that values and gradients are those of the definition in float32 or wider."""
    exact = [t.detach().to(torch.promote_types(t.dtype, torch.float32)).requires_grad_() for t in tensors]
    with reference():
        plain = definition(*exact)
    value = fast(*tensors)
    assert value.shape == plain.shape
    weight = torch.linspace(-1, 1, plain.numel(), device=DEVICE, dtype=torch.float64).view(plain.shape)
    found = (value, *torch.autograd.grad((value * weight.to(value.dtype)).sum(), tensors))
    truth = (plain, *torch.autograd.grad((plain * weight.to(value.dtype).to(plain.dtype)).sum(), exact))
    near = tolerance or TOLERANCE[tensors[0].dtype]
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=near, atol=near)
    return value


@pytest.mark.parametrize("size,kept", [*zip(SIZES, KEPT)] if FEW else itertools.product(SIZES, KEPT))
def test_correlation(size, kept):
    (height, width), (radius, keep) = size, kept
    a, b = tensor(2, 5, height, width, layout="last"), tensor(2, 5, height, width)
    value = same(
        lambda a, b: local_correlation(a, b, radius, keep),
        lambda a, b: fast_local(a, b, radius, keep),
        *(a, b),
    )
    assert value.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("radius,stride", [(4, 2), (5, 2), (4, 3), (1, 2)])
def test_dilated_correlation(radius, stride):
    a, b = tensor(1, 35, 5, 9), tensor(1, 35, 5, 9, layout="last")
    same(
        lambda a, b: dilated_correlation(a, b, radius, stride),
        lambda a, b: fast_dilated_correlation(a, b, radius, stride),
        *(a, b),
    )


LAYOUTS = ["contiguous", "last", "gaps"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    "dtype,layout", [*zip(DTYPES, [*LAYOUTS, "last"])] if FEW else itertools.product(DTYPES, LAYOUTS)
)
def test_dtypes_and_layouts(dtype, layout):
    a, b = (tensor(2, 20, 4, 7, dtype=dtype, layout=layout) for _ in range(2))
    flow = tensor(2, 2, 4, 7, dtype=torch.promote_types(dtype, torch.float32), layout=layout, scale=3.0)
    value = same(lambda a, b: local_correlation(a, b, 1), lambda a, b: fast_local(a, b, 1), a, b)
    assert value.dtype == dtype
    assert same(warp, fast_warped, a, flow).dtype == dtype


@pytest.mark.parametrize("height,width", [*SIZES, (9, 1)])
def test_warp(height, width):
    a, flow = tensor(2, 35, height, width, layout="last"), tensor(2, 2, height, width, scale=3.0)
    same(warp, fast_warped, a, flow)


def test_half_precision_flow_is_widened():
    a, flow = tensor(1, 3, 5, 6, dtype=torch.bfloat16), tensor(1, 2, 5, 6, dtype=torch.bfloat16)
    same(warp, fast_warped, a, flow)


def test_warp_to_one_place():
    """Many gradients meet in one sum, the same at every run."""
    a = tensor(1, 4, 7, 9, dtype=torch.float64)
    flow = (3.25 - pixel_grid(7, 9, a))[None].detach().requires_grad_()
    same(warp, fast_warped, a, flow)
    first, second = (torch.autograd.grad(fast_warped(a, flow).sin().sum(), a)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_positions_that_are_no_numbers(value):
    flow = torch.zeros(1, 2, 4, 9, device=DEVICE)
    flow[0, 0, 2, 3] = value
    features = torch.ones(1, 4, 4, 9, device=DEVICE, requires_grad=True)
    warped = fast_warped(features, flow)
    assert warped[0, :, 2, 3].abs().max() == 0 and warped.sum() == 4 * 35
    assert torch.autograd.grad(warped.sum(), features)[0].sum() == 4 * 35
    for limit in (2**31, 0):
        pyramid = all_pairs(features.detach(), features.detach(), 1, limit)
        window = fast_all_pairs.lookup(pyramid, pixel_grid(4, 9, flow)[None] + flow, 1)
        assert window[..., 2, 3].abs().max() == 0 and window.isfinite().all() and window[..., 3, 3].abs().max() > 0


def test_gradients_that_are_no_numbers_are_seen():
    features, flow = torch.ones(1, 2, 3, 4, device=DEVICE, requires_grad=True), torch.zeros(1, 2, 3, 4, device=DEVICE)
    for value in (float("nan"), float("inf")):
        gradient = torch.autograd.grad(fast_warped(features, flow)[0, 0, 0, 0] * value, features)[0]
        assert not gradient.isfinite().all()
    assert blocks.fixed_point(torch.zeros((), device=DEVICE), 8).isfinite()


WINDOWS = [(1, 1, 1), (3, 5, 3), (5, 6, 1)]  # height, width, radius


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "limit,window", [(2**31, WINDOWS[2]), (0, WINDOWS[0])] if FEW else itertools.product((2**31, 0), WINDOWS)
)
def test_lookup(window, dtype, limit):
    height, width, radius = window
    a, b = tensor(2, 18, height, width, dtype=dtype), tensor(2, 18, height, width, dtype=dtype, layout="last")
    moved = tensor(2, 2, height, width, dtype=dtype, scale=3.0).detach()
    moved[0, :, 0, 0] = torch.tensor([1e7, -3e3])
    moved[1, :, 0, 0] = torch.tensor([-width - 2.5, height + 1.5])
    positions = (pixel_grid(height, width, a) + moved).detach().requires_grad_()
    same(
        lambda a, b, p: lookup(all_pairs(a, b, 3), p, radius),
        lambda a, b, p: fast_all_pairs.lookup(all_pairs(a, b, 3, limit), p, radius),
        *(a, b, positions),
        tolerance=1e-9 if dtype == torch.float64 else 2e-5,
    )


def test_gradcheck():
    a, b = (tensor(1, 3, 3, 4, dtype=torch.float64) for _ in range(2))
    flow = tensor(1, 2, 3, 4, dtype=torch.float64)
    how = {"fast_mode": True}
    assert torch.autograd.gradcheck(lambda a, b: fast_local(a, b, 1, (0, 4, 5)), (a, b), **how)
    assert torch.autograd.gradcheck(fast_warped, (a, flow), **how)
    for limit in (2**31, 0):
        read = lambda a, b, p, limit=limit: fast_all_pairs.lookup(all_pairs(a, b, 1, limit), p, 1)  # noqa: E731
        assert torch.autograd.gradcheck(read, (a, b, flow + 1.5), **how)


def test_more_than_two_billion_numbers_apart():
    """4.3 GB are asked for, two pages of them are touched."""
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided((1, 2, 3, 4), (0, 2**31, 4, 1))
    values = tensor(1, 2, 3, 4, dtype=torch.float16).detach()
    far.copy_(values)
    flow = tensor(1, 2, 3, 4).detach()
    assert torch.equal(fast_warped(far, flow), fast_warped(values, flow))
    one, two = (fast_local(x, x, 1) for x in (far, values))
    assert torch.equal(one, two)


def test_nothing_gives_nothing():
    none, flow = torch.zeros(0, 3, 4, 5, device=DEVICE), torch.zeros(0, 2, 4, 5, device=DEVICE)
    assert fast_warped(none, flow).shape == (0, 3, 4, 5)
    assert fast_local(none, none, 1).shape == (0, 9, 4, 5)


def test_the_compiler_takes_them():
    a, b = (tensor(1, 3, 4, 5) for _ in range(2))
    flow = tensor(1, 2, 4, 5)

    def network(a, b, flow):
        return fast_all_pairs.lookup(all_pairs(a, b, 2, 0), local_correlation(a, warp(b, flow), 1, (0, 4))[:, :2], 1)

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for made in (network, compiled):
        value = made(a, b, flow)
        gradients = torch.autograd.grad(value.square().sum(), (a, b, flow))
        if made is network:
            expected = value, gradients
    torch.testing.assert_close((value, gradients), expected)


def test_the_operators_are_sound():
    a, b, flow = tensor(1, 3, 4, 5), tensor(1, 3, 4, 5, layout="last"), tensor(1, 2, 4, 5)
    volume = tensor(1, 20, 2, 2)
    for operator, arguments in (
        (torch.ops.fleetflow.warp.default, (a, flow)),
        (torch.ops.fleetflow.local_correlation.default, (a, b, 1, [0, 5])),
        (fast_all_pairs._read, (volume, flow, 1, 1, False)),
        (cells.cells, (a, b, flow, 1, 0)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
