"""Gradient rules: against unrolling, twice, in constant memory, under autocast, in two processes, of kept iterates."""

import gc
import multiprocessing
import os
import warnings

import pytest
import torch
import torch.distributed as distributed
from conftest import SLOW
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fleetflow.deq import (
    Anderson,
    Broyden,
    Implicit,
    NewtonKrylov,
    Phantom,
    Picard,
    Unrolled,
    fixed_point,
    held,
    weight_norm,
)

SOLVERS = [Picard(), Anderson(), Broyden(), NewtonKrylov()]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
TIGHT = {"tolerance": 1e-13, "max_steps": 200}


def problem(size: int = 12, samples: int = 4):
    """(weight, x) in float64, for f(z) = tanh(z weight^T + x) with a Jacobian of norm about 1."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(size, size, generator=generator, dtype=torch.float64) * 0.9 / size**0.5
    return weight.requires_grad_(), torch.randn(
        samples, size, generator=generator, dtype=torch.float64
    ).requires_grad_()


def solve(weight, x, solver, gradient, **options):
    return fixed_point(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x), solver, gradient, **options)


def gradients(weight, x, solver, gradient, **options):
    loss = solve(weight, x, solver, gradient, **options).value.square().sum()
    return torch.autograd.grad(loss, (weight, x))


def largest(one, other) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other))


@pytest.fixture(scope="module")
def unrolled():
    """The gradient of 400 plain steps."""
    return gradients(*problem(), Picard(), Unrolled(), tolerance=0, max_steps=400)


@each_solver
@pytest.mark.parametrize("order", [1, 2])
def test_implicit_equals_unrolled(solver, order, unrolled):
    found = gradients(*problem(), solver, Implicit(solver, tolerance=1e-13, max_steps=200, order=order), **TIGHT)
    assert largest(found, unrolled) < 1e-9


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), NewtonKrylov(inner=3)])
def test_any_solver_can_be_unrolled(solver, unrolled):
    found = gradients(*problem(), solver, Unrolled(), **TIGHT)
    assert largest(found, unrolled) < 1e-5


def test_unrolled_picard_is_the_composition():
    weight, x = problem()
    z = torch.zeros_like(x)
    for _ in range(5):
        z = torch.tanh(z @ weight.T + x)
    expected = torch.autograd.grad(z.square().sum(), (weight, x))
    assert torch.equal(solve(weight, x, Picard(), Unrolled(), tolerance=0, max_steps=5).value, z)
    assert largest(gradients(weight, x, Picard(), Unrolled(), tolerance=0, max_steps=5), expected) < 1e-12


def test_phantom_goes_from_one_step_to_the_whole(unrolled):
    errors = [largest(gradients(*problem(), Anderson(), Phantom(k), **TIGHT), unrolled) for k in (1, 3, 10, 60)]
    assert errors[0] > 0.1 and all(later < 0.7 * earlier for earlier, later in zip(errors, errors[1:]))
    assert errors[-1] < 1e-8


def test_one_step_gradient_is_that_of_f_alone():
    weight, x = problem()
    point = solve(weight, x, Anderson(), None, **TIGHT).value
    assert not point.requires_grad
    image = torch.tanh(point @ weight.T + x)
    expected = torch.autograd.grad(image.square().sum(), (weight, x))
    assert largest(gradients(weight, x, Anderson(), Phantom(), **TIGHT), expected) < 1e-12


def test_damped_phantom_is_the_published_formula():
    weight, x = problem()
    z = solve(weight, x, Anderson(), None, max_steps=5).value
    for _ in range(3):
        z = 0.5 * z + 0.5 * torch.tanh(z @ weight.T + x)
    expected = torch.autograd.grad(z.square().sum(), (weight, x))
    assert largest(gradients(weight, x, Anderson(), Phantom(3, 0.5), max_steps=5), expected) < 1e-12


def test_second_derivatives():
    weight, x = (tensor.detach()[..., :4].clone().requires_grad_() for tensor in problem(4, 2))
    rule = Implicit(Anderson(), tolerance=1e-13, max_steps=200)

    def value(weight, x):
        return solve(weight, x, Anderson(), rule, **TIGHT).value

    how = {"fast_mode": not SLOW}
    assert torch.autograd.gradcheck(value, (weight, x), **how)
    assert torch.autograd.gradgradcheck(value, (weight, x), **how)


@pytest.mark.parametrize("order", [2, 3])
def test_derivatives_up_to_the_order_equal_those_of_unrolling(order):
    weight, x = problem(5, 2)
    probe = torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5)

    def derivatives(solver, gradient, **options):
        scalar = solve(weight, x, solver, gradient, **options).value.pow(3).sum()
        for _ in range(order):
            (found,) = torch.autograd.grad(scalar, weight, create_graph=True)
            yield found.detach()
            scalar = (found * probe).sum()

    rule = Implicit(Broyden(), tolerance=1e-13, max_steps=200, order=order)
    found = tuple(derivatives(Broyden(), rule, **TIGHT))
    expected = tuple(derivatives(Picard(), Unrolled(), tolerance=0, max_steps=300))
    assert len(found) == order and largest(found, expected) < 1e-9


def test_a_second_derivative_of_order_one_is_refused():
    """Also where the incoming gradient is a constant, whose derivative nobody asks for."""
    weight, x = problem()
    value = solve(weight, x, Anderson(), Implicit(Anderson(), order=1)).value
    (gradient,) = torch.autograd.grad(value.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"use Implicit\(order=2\)"):
        torch.autograd.grad(gradient.square().sum(), weight)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_price_of_an_order(order):
    """One evaluation for the graph, and one more for each further order in either direction."""
    weight, x = problem()
    evaluations = []

    def f(z):
        evaluations.append(z.requires_grad)
        return torch.tanh(z @ weight.T + x)

    solution = fixed_point(f, torch.zeros_like(x), Anderson(), Implicit(Anderson(), order=order))
    assert len(evaluations) == len(solution.trace) + order
    solution.value.sum().backward()
    assert len(evaluations) == len(solution.trace) + 2 * order - 1


def test_the_value_is_the_point_that_was_measured():
    weight, x = problem()
    for rule in (None, Implicit(Anderson())):
        solution = solve(weight, x, Anderson(), rule, tolerance=1e-3, max_steps=50)
        with torch.no_grad():
            image = torch.tanh(solution.value @ weight.T + x)
            residual = (image - solution.value).norm(dim=1) / image.norm(dim=1)
        assert torch.allclose(residual, solution.residual, rtol=1e-9)


@pytest.mark.parametrize("rule", [Unrolled(), Phantom(), Implicit(Picard()), Implicit(Picard(), order=1)])
def test_a_map_that_ignores_its_input(rule):
    x = torch.ones(2, 3, requires_grad=True)
    value = fixed_point(lambda z: 2 * x, torch.zeros(2, 3), Anderson(), rule).value
    assert torch.equal(value, torch.full((2, 3), 2.0))
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], torch.full((2, 3), 2.0))


@pytest.mark.parametrize("rule", [Unrolled(), Phantom(2), Implicit(Anderson())])
def test_no_graph_without_grad_mode(rule):
    weight, x = problem()
    with torch.no_grad():
        assert not solve(weight, x, Anderson(), rule).value.requires_grad


def test_a_tuple_with_a_detached_part():
    """As in DEQ-Flow: the coordinates are detached inside f, so the Jacobian is not the whole one."""
    weight, x = problem(6)
    weight = (0.5 * weight).detach().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    mixing = 0.3 * torch.randn(6, 2, generator=generator, dtype=torch.float64)

    def f(z):
        hidden, place = z
        place = place.detach()
        hidden = torch.tanh(hidden @ weight.T + x + torch.sin(place) @ mixing.T)
        return hidden, 0.5 * place + hidden @ mixing

    z0 = (torch.zeros_like(x), torch.zeros(4, 2, dtype=torch.float64))
    solution = fixed_point(f, z0, Anderson(), Implicit(Anderson(), **TIGHT), **TIGHT)
    assert solution.converged.all(), "Anderson must leave the place where the residual of the last sample is smallest"
    found, many = solution.value, fixed_point(f, z0, Anderson(), Phantom(200), **TIGHT).value
    assert all(part.requires_grad for part in found)
    one, other = (torch.autograd.grad(z[0].sum() + z[1].square().sum(), (weight, x)) for z in (found, many))
    assert largest(one, other) < 1e-9


def test_the_gradient_of_an_incoming_nan_does_not_raise():
    """A gradient scaler meets infinite gradients and skips the step; the backward pass must let them through."""
    weight, x = problem()
    value = solve(weight, x, Anderson(), Implicit(Anderson())).value
    (gradient,) = torch.autograd.grad(value.sum() * torch.inf, weight)
    assert not gradient.isfinite().any()


@pytest.mark.parametrize("rule", [Unrolled(), Phantom(), Implicit(Picard(), tolerance=1e-12, max_steps=300)])
def test_kept_iterates_carry_their_own_gradients(rule):
    weight, x = problem()
    solution = solve(weight, x, Picard(), rule, tolerance=0, max_steps=120, keep=(8, 16))
    parts = [torch.autograd.grad(z.sum(), (weight, x), retain_graph=True) for z in (*solution.kept, solution.value)]
    total = torch.autograd.grad(sum(z.sum() for z in (*solution.kept, solution.value)), (weight, x))
    assert largest(total, [sum(items) for items in zip(*parts)]) < 1e-9
    assert largest(parts[0], parts[2]) > largest(parts[1], parts[2]) > 0
    for steps, kept, own in zip((8, 16), solution.kept, parts):
        alone = solve(weight, x, Picard(), rule, tolerance=0, max_steps=steps)
        assert torch.equal(kept, alone.value)
        assert largest(own, torch.autograd.grad(alone.value.sum(), (weight, x))) < 1e-9


@pytest.mark.parametrize("solver", [Picard(), Anderson(history=1)])
def test_a_backward_solve_that_diverges_gives_no_wild_gradient(solver):
    """An eigenvalue of 1.6: each step makes the iterate larger, and the residual small beside it."""
    matrix, b = torch.diag(torch.tensor([0.5, 1.6])), torch.ones(1, 2, requires_grad=True)
    value = fixed_point(lambda z: z @ matrix + b, torch.zeros(1, 2), Broyden(), Implicit(solver), tolerance=1e-5).value
    with pytest.warns(RuntimeWarning, match="no solution of y = J.T y . g for some samples"):
        (gradient,) = torch.autograd.grad(value.sum(), b)
    assert gradient.isfinite().all() and gradient.abs().max() <= 2, "of the size of what came in"


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("solver", [Anderson(), Broyden(), NewtonKrylov()])
def test_an_expansive_map_has_its_exact_gradient_at_every_scale_of_the_loss(solver, size):
    matrix, b = torch.diag(torch.tensor([0.5, 1.6])), torch.ones(1, 2, requires_grad=True)
    value = fixed_point(lambda z: z @ matrix + b, torch.zeros(1, 2), Broyden(), Implicit(solver), tolerance=1e-5).value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (gradient,) = torch.autograd.grad(size * value.sum(), b)
    assert torch.allclose(gradient / size, 1 / (1 - matrix.diagonal()), rtol=1e-4)


@pytest.mark.parametrize("solver", [Picard(), Anderson()])
@pytest.mark.parametrize("rule", [Phantom(2), Phantom(5, 0.5), Unrolled()])
def test_a_sample_that_diverges_spoils_no_other(solver, rule):
    """The second one overflows: in the steps after its best point, and in the solve."""

    def of_first(*start):
        weight, z0 = torch.tensor(0.3, requires_grad=True), torch.tensor(start)[:, None]
        solution = fixed_point(lambda z: (weight * z).exp() * (1 + z * z) / 4, z0, solver, rule, tolerance=1e-5)
        assert solution.value.isfinite().all() and solution.converged.tolist() == [True, start[1] < 1]
        own, other = (torch.autograd.grad(z.sum(), weight, retain_graph=True)[0] for z in solution.value.split(1))
        assert other.isfinite()
        return solution.value[0].item(), own.item()

    alone = pytest.approx(of_first(0.1, 0.1), rel=1e-6)
    assert of_first(0.1, 3.0) == alone and of_first(0.1, 20.0) == alone


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("order, create_graph", [(1, False), (2, False), (2, True), (3, True)])
def test_a_training_step_leaves_nothing_behind(order, create_graph):
    layer, x, images = torch.nn.Linear(8, 8), torch.randn(3, 8), []

    def f(z):
        image = torch.tanh(layer(z) + x)
        images.append(StorageWeakRef(image.untyped_storage()))
        return image

    for _ in range(5):
        value = fixed_point(f, torch.zeros(3, 8), Anderson(), Implicit(Anderson(), order=order)).value
        if order == 3:
            (gradient,) = torch.autograd.grad(value.sum(), layer.weight, create_graph=True)
            value = value.sum() + gradient.square().sum()
            del gradient
        value.sum().backward(create_graph=create_graph)
        del value
        layer.zero_grad()
    gc.collect()
    assert len(images) > 20 and all(image.expired() for image in images)


def test_held_weights_ask_for_order_one():
    layer, x = weight_norm(torch.nn.Sequential(torch.nn.Linear(6, 6))), torch.randn(2, 6)

    def value(rule):
        return fixed_point(lambda z: 0.5 * torch.tanh(layer(z) + x), torch.zeros(2, 6), Picard(), rule).value

    with held(layer):
        value(Implicit(Picard(), order=1)).sum().backward()
        with pytest.raises(ValueError, match=r"^Implicit\(order=2\) inside held\(\): use order=1"):
            value(Implicit(Picard()))
        with torch.no_grad():
            value(Implicit(Picard()))
    value(Implicit(Picard())).sum().backward()


class Footprint(TorchDispatchMode):
    """The most bytes that were alive at once in tensors made under this mode."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: item for key, item in self.alive.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def training_memory(steps: int, solver, rule) -> int:
    layer = torch.nn.Conv2d(8, 8, 3, padding=1)
    x = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    with Footprint() as footprint:
        value = fixed_point(
            lambda z: torch.tanh(layer(z) + x), torch.zeros_like(x), solver, rule, tolerance=0, max_steps=steps
        ).value
        value.square().mean().backward()
    return footprint.peak


@pytest.mark.parametrize("solver", [Picard(), Anderson(history=4)])
def test_memory_does_not_grow_with_the_steps(solver):
    for rule in (Phantom(), Implicit(solver, max_steps=8), Implicit(solver, max_steps=8, order=1)):
        assert training_memory(20, solver, rule) <= 1.05 * training_memory(5, solver, rule), rule
    backward = [training_memory(5, solver, Implicit(solver, tolerance=0, max_steps=steps)) for steps in (5, 20)]
    assert backward[1] <= 1.05 * backward[0]
    assert training_memory(20, solver, Unrolled()) > 2.5 * training_memory(5, solver, Unrolled()), "the measure works"


@pytest.mark.parametrize("rule", [Phantom(), Implicit(Anderson(), tolerance=1e-4), Implicit(Anderson(), order=1)])
def test_autocast_does_not_lose_the_weights(rule):
    """Autocast caches weights that it cast during the solve, without a graph; the gradient must not meet them."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(16, 16), torch.randn(3, 16)

    def gradient():
        layer.weight.grad = None
        solution = fixed_point(
            lambda z: torch.tanh(layer(z) + x), torch.zeros_like(x), Anderson(), rule, tolerance=1e-4
        )
        assert solution.residual.dtype == solution.value.dtype == torch.float32
        return solution.value.square().sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = gradient()
    loss.backward()
    cast = layer.weight.grad
    gradient().backward()
    assert cast is not None and (cast - layer.weight.grad).norm() < 0.03 * layer.weight.grad.norm()


class Net(torch.nn.Module):
    """An equilibrium between two linear layers."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.inside, self.outside = rule, torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)

    def forward(self, x):
        found = fixed_point(
            lambda z: torch.tanh(self.inside(z) + x), torch.zeros_like(x), Anderson(), self.rule, **TIGHT
        )
        return self.outside(found.value)


def gradients_of_a_process(rank: int, meeting: str) -> None:
    """Asserts that the gradient of DistributedDataParallel is the mean of both halves of a batch."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for rule in (Phantom(2), Implicit(Anderson(), **TIGHT), Implicit(Anderson(), **TIGHT, order=1)):
        torch.manual_seed(0)
        net, x, found = Net(rule).double(), torch.randn(6, 8, dtype=torch.float64), []
        for model, part in ((net, 0), (net, 1), (torch.nn.parallel.DistributedDataParallel(net), rank)):
            net.zero_grad()
            model(x[part::2]).square().mean().backward()
            found.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()]))
        assert (found[2] - (found[0] + found[1]) / 2).abs().max() < 1e-9, rule
        assert (found[0] - found[1]).abs().max() > 1e-3
    distributed.barrier()


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_average_their_gradients(tmp_path):
    def act(rank: int) -> None:
        gradients_of_a_process(rank, str(tmp_path / "meeting"))
        os._exit(0)  # without ceremony: gloo sometimes aborts when its threads are torn down

    fork = multiprocessing.get_context("fork")
    team = [fork.Process(target=act, args=(rank,)) for rank in range(2)]
    for process in team:
        process.start()
    for process in team:
        process.join(120)
    assert [process.exitcode for process in team] == [0, 0]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Phantom(0), "steps is 0"),
        (lambda: Phantom(1.5), "steps is 1.5"),
        (lambda: Phantom(1, 1.5), "damping is 1.5"),
        (lambda: Implicit("broyden"), "solver is 'broyden'"),
        (lambda: Implicit(Anderson), "solver is <class .*; it must be a solver such as Anderson"),
        (lambda: Implicit(Anderson(), order=0), "order is 0"),
        (lambda: Implicit(Anderson(), order=1.5), "order is 1.5"),
        (lambda: Implicit(Anderson(), relative="abs"), "relative is 'abs'"),
        (lambda: Implicit(Anderson(), tolerance=-1), "tolerance is -1"),
        (lambda: Implicit(Anderson(), max_steps=0), "max_steps is 0"),
        (lambda: Implicit(Anderson(), max_itr=5), "max_itr"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
