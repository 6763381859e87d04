"""The solve loop, and every solver in it: hard maps, samples by themselves, compaction, precision, bad input."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fleetflow.deq import Anderson, Broyden, NewtonKrylov, Phantom, Picard, Unrolled, fixed_point
from fleetflow.deq import solve as solve_file

SOLVERS = [Picard(), Anderson(), Broyden(), NewtonKrylov()]
QUICK = SOLVERS[1:]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)


def linear(low: float, high: float, size: int = 20, samples: int = 3, dtype=torch.float64):
    """z -> A z + b with eigenvalues from low to high, and its fixed point [samples, size]."""
    generator = torch.Generator().manual_seed(size)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.linspace(low, high, size, dtype=torch.float64)) @ basis.mT
    shift = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    fixed = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - matrix, shift.mT).mT
    matrix, shift = matrix.to(dtype), shift.to(dtype)
    return (lambda z: z @ matrix + shift), fixed.to(dtype)


def tanh_map(samples: int = 5, size: int = 16, gain: float = 0.7, dtype=torch.float64):
    """(weight, x), for f(z) = tanh(z weight + x), whose samples differ in difficulty."""
    generator = torch.Generator().manual_seed(7)
    weight = gain * torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    x = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(-2, 1, samples, dtype=torch.float64)[torch.randperm(samples, generator=generator), None]
    return weight.to(dtype), x.to(dtype)


@each_solver
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a_contraction(solver, dtype, tolerance):
    f, fixed = linear(-0.7, 0.8, dtype=dtype)
    solution = fixed_point(f, torch.zeros_like(fixed), solver, tolerance=tolerance, max_steps=150)
    assert solution.converged.all() and (solution.residual <= tolerance).all()
    assert (solution.value - fixed).abs().max() < 30 * tolerance * fixed.abs().max()
    own = torch.linalg.vector_norm(f(solution.value) - solution.value, dim=1) / f(solution.value).norm(dim=1)
    assert torch.allclose(own, solution.residual, rtol=0.05, atol=2e-7 if dtype == torch.float32 else 1e-15)
    assert solution.trace.shape == (int(solution.steps.max()), 3) and solution.trace.dtype == dtype


@pytest.mark.parametrize("solver", QUICK, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("low, high, budget", [(-1.5, 0.5, 40), (-1.5, 0.9, 60), (-0.98, 0.98, 90)])
def test_maps_that_plain_iteration_cannot_solve(solver, low, high, budget):
    """Spectral radius 1.5, and a stiff 0.98: the plain iteration diverges on the first and crawls on the other."""
    f, fixed = linear(low, high, dtype=torch.float32)
    z0 = torch.zeros_like(fixed)
    assert not fixed_point(f, z0, Picard(), tolerance=1e-5, max_steps=budget).converged.any()
    solution = fixed_point(f, z0, solver, tolerance=1e-5, max_steps=budget)
    assert solution.converged.all(), solution.residual
    assert (solution.value - fixed).abs().max() < 2e-3 * fixed.abs().max()


def test_damping_saves_the_plain_iteration():
    f, fixed = linear(-1.5, 0.5)
    damped = fixed_point(f, torch.zeros_like(fixed), Picard(0.5), tolerance=1e-8, max_steps=80)
    assert damped.converged.all() and torch.allclose(damped.value, fixed, atol=1e-6)


@each_solver
@pytest.mark.parametrize("f", [lambda z: 3 * z + 1, lambda z: z * z * z + 2 * z + 1, lambda z: (30 * z).exp() + z + 1])
def test_a_diverging_map_gives_its_finite_best(solver, f):
    """The first runs to infinity without damping, the others blow up faster than any dtype can hold."""
    z0 = torch.linspace(0.1, 1, 12).repeat_interleave(3).view(12, 3)  # some pass where only a square is infinite
    with torch.no_grad():
        solution = fixed_point(f, z0, solver, tolerance=1e-9, max_steps=200)
        first = torch.linalg.vector_norm(f(z0) - z0, dim=1) / f(z0).norm(dim=1)
    assert solution.value.isfinite().all() and solution.residual.isfinite().all()
    assert (solution.residual <= first * 1.001).all()
    if type(solver) is Picard:
        assert not solution.converged.any() and len(solution.trace) < 200, "what is lost is given up"


@each_solver
def test_no_fixed_point_at_all(solver):
    solution = fixed_point(lambda z: z + 1, torch.zeros(2, 4), solver, relative=False, max_steps=30)
    assert not solution.converged.any() and solution.value.isfinite().all()
    assert (solution.steps == 30).all() and torch.allclose(solution.residual, torch.full((2,), 2.0))


@each_solver
@pytest.mark.parametrize("shape", [(1, 1), (0, 5), (3,), (2, 3, 1, 2)])
def test_awkward_shapes(solver, shape):
    z0 = torch.zeros(shape, dtype=torch.float64)
    solution = fixed_point(lambda z: z.cos(), z0, solver, tolerance=1e-10, max_steps=80)
    assert solution.value.shape == shape and solution.converged.all() and solution.converged.shape == shape[:1]
    assert torch.allclose(solution.value, torch.full_like(z0, 0.7390851332151607))


@each_solver
def test_samples_do_not_hear_of_each_other(solver):
    weight, x = tanh_map()

    def f(x):
        return lambda z: torch.tanh(z @ weight + x)

    options = {"tolerance": 1e-8, "max_steps": 80}
    together = fixed_point(f(x), torch.zeros_like(x), solver, **options)
    assert len(set(together.steps.tolist())) > 1 and together.converged.all()
    for k in range(len(x)):
        alone = fixed_point(f(x[k : k + 1]), torch.zeros_like(x[:1]), solver, **options)
        assert alone.steps == together.steps[k]
        assert torch.allclose(alone.value[0], together.value[k], rtol=0, atol=1e-9)
        assert torch.equal(
            together.trace[int(alone.steps) :, k], together.residual[k].expand(len(together.trace) - int(alone.steps))
        )


@each_solver
@pytest.mark.parametrize("recorded", [False, True])
def test_compaction_saves_evaluations_and_changes_nothing(solver, recorded):
    weight, x = tanh_map()
    weight.requires_grad_(recorded)
    seen = []

    def f(z, x=x):
        seen.append(len(z))
        return torch.tanh(z @ weight + x)

    def run(compact):
        seen.clear()
        solution = fixed_point(
            f, torch.zeros_like(x), solver, Unrolled(), tolerance=1e-8, max_steps=80, compact=compact, keep=(2, 9, 60)
        )
        gradient = torch.autograd.grad(solution.value.sum() + solution.kept[1].sum(), weight)[0] if recorded else 0
        return solution, gradient, sum(seen)

    plain, plain_gradient, plain_cost = run(False)
    compact, gradient, cost = run(lambda rows: lambda z: f(z, x[rows]))
    assert plain_cost == len(x) * int(plain.steps.max()) and cost == int(plain.steps.sum()) < plain_cost
    for field in ("value", "residual", "steps", "trace", "converged"):
        one, other = (getattr(solution, field).double() for solution in (plain, compact))
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-10), field
    for one, other in zip(plain.kept, compact.kept):
        assert torch.allclose(one, other, rtol=0, atol=1e-9)
    if recorded:
        assert torch.allclose(plain_gradient, gradient, atol=1e-7)


def test_compaction_of_a_map_that_takes_any_number_of_samples():
    z0 = torch.tensor([[0.7390851], [5.0], [0.7]])
    sizes = []
    solution = fixed_point(lambda z: sizes.append(len(z)) or z.cos(), z0, Picard(), max_steps=40, compact=True)
    assert sizes[0] == 3 and sizes[1] == 2 and sum(sizes) == solution.steps.sum() and solution.converged.all()


def test_compaction_of_a_map_that_does_not_take_fewer_samples():
    """The error names compact, and says what to give it; other errors of f stay what they are."""
    weight, x = tanh_map()

    def f(z):
        return torch.tanh(z @ weight + x)

    options = {"tolerance": 1e-8, "max_steps": 80}
    with pytest.raises(ValueError, match="^compact asked f for .* give compact a function of sample numbers"):
        fixed_point(f, torch.zeros_like(x), Picard(), compact=True, **options)
    with pytest.raises(ValueError, match="^compact asked f for .* look at what it returns"):
        fixed_point(f, torch.zeros_like(x), Picard(), compact=lambda rows: f, **options)
    with pytest.raises(TypeError, match="^what compact returned is"):
        fixed_point(f, torch.zeros_like(x), Picard(), compact=lambda rows: x[rows], **options)

    def moody(z):
        if len(z) < len(x):
            raise RuntimeError("no such kernel")
        return f(z)

    with pytest.raises(RuntimeError, match="^no such kernel"):
        fixed_point(moody, torch.zeros_like(x), Picard(), compact=True, **options)


@each_solver
def test_a_map_to_zero(solver):
    """A relative residual divides by zero at the start: that is far, not an f that is not finite."""
    assert fixed_point(lambda z: 0 * z, torch.full((2, 3), 9.0), solver, max_steps=60).residual.isfinite().all()


def test_a_tuple_is_one_equilibrium():
    weight, x = tanh_map(dtype=torch.float32)
    whole = fixed_point(lambda z: torch.tanh(z @ weight + x), torch.zeros_like(x), Anderson(), tolerance=1e-6)

    def parts(z):
        first, second = z
        assert first.shape == (5, 2, 3) and second.dtype == torch.float64
        image = torch.tanh(torch.cat((first.flatten(1), second.float()), 1) @ weight + x)
        return image[:, :6].unflatten(1, (2, 3)), image[:, 6:]

    z0 = (torch.zeros(5, 2, 3), torch.zeros(5, 10, dtype=torch.float64))
    solution = fixed_point(parts, z0, Anderson(), tolerance=1e-6)
    assert solution.value[0].dtype == torch.float32 and solution.value[1].dtype == torch.float64
    assert torch.allclose(solution.value[0].flatten(1), whole.value[:, :6], atol=1e-5)
    assert torch.allclose(solution.value[1].float(), whole.value[:, 6:], atol=1e-5)


@each_solver
def test_who_has_arrived_stays(solver):
    """f is not asked elsewhere for a sample that has converged, and not at all for one that is alone."""
    weight, x = tanh_map()
    asked = []

    def f(z):
        asked.append(z.clone())
        return torch.tanh(z @ weight + x)

    solution = fixed_point(f, torch.zeros_like(x), solver, tolerance=1e-8, max_steps=80)
    for k, steps in enumerate(solution.steps.tolist()):
        assert all(torch.equal(z[k], solution.value[k]) for z in asked[steps - 1 :])


@each_solver
def test_kept_points_are_the_best_so_far(solver):
    weight, x = tanh_map()

    def f(z):
        return torch.tanh(z @ weight + x)

    solution = fixed_point(f, torch.zeros_like(x), solver, tolerance=1e-8, max_steps=60, keep=(1, 5, 60))
    assert torch.equal(solution.kept[0], torch.zeros_like(x)) and torch.equal(solution.kept[2], solution.value)
    five = fixed_point(f, torch.zeros_like(x), solver, tolerance=1e-8, max_steps=5)
    assert torch.equal(solution.kept[1], five.value)


@each_solver
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_are_measured_in_float32(solver, dtype):
    """Under autocast, and with a half-precision state: f computes in half, the solver's own sums do not."""
    weight, x = tanh_map(gain=0.5, dtype=torch.float32)
    seen = []

    def f(z):
        seen.append((z @ weight.to(z.dtype)).dtype)
        return torch.tanh(z @ weight.to(z.dtype) + x.to(z.dtype))

    if type(solver) is NewtonKrylov:
        solver = NewtonKrylov(precision=4e-3)
    with torch.autocast("cpu", dtype=dtype):
        cast = fixed_point(f, torch.zeros_like(x), solver, tolerance=0, max_steps=30)
    half = fixed_point(f, torch.zeros_like(x).to(dtype), solver, tolerance=0, max_steps=30)
    exact = fixed_point(f, torch.zeros_like(x), solver, tolerance=1e-6, max_steps=90).value
    assert set(seen[:60]) == {dtype}
    for solution, own in ((cast, torch.float32), (half, dtype)):
        assert solution.residual.dtype == solution.trace.dtype == torch.float32 and solution.value.dtype == own
        assert (solution.value.float() - exact).abs().max() < 0.02


class Looks(TorchDispatchMode):
    """Counts how often a number goes from the device to the host."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name() in ("aten::_local_scalar_dense", "aten::nonzero")
        return function(*args, **(kwargs or {}))


@each_solver
def test_looking_rarely_changes_no_result(solver, monkeypatch):
    """As on a GPU, where each look of the host waits for the device."""
    weight, x = tanh_map()
    runs = []
    for every in (1, 4):
        monkeypatch.setattr(solve_file, "_look_every", lambda device, every=every: every)
        with Looks() as looks:
            runs.append(
                fixed_point(
                    lambda z: torch.tanh(z @ weight + x), torch.zeros_like(x), solver, tolerance=1e-8, max_steps=90
                )
            )
    often, rarely = runs
    for field in ("value", "residual", "steps", "converged"):
        assert torch.equal(getattr(often, field), getattr(rarely, field)), field
    assert looks.count <= len(rarely.trace) / 4 + 2 and len(rarely.trace) < len(often.trace) + 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_solver
def test_on_a_gpu(solver):
    weight, x = (tensor.cuda() for tensor in tanh_map(dtype=torch.float32))

    def f(z):
        return torch.tanh(z @ weight + x)

    solution = fixed_point(f, torch.zeros_like(x), solver, tolerance=1e-5, max_steps=90, compact=False)
    assert solution.converged.all() and (f(solution.value) - solution.value).abs().max() < 1e-4


def test_broyden_starts_again_when_it_is_full():
    f, fixed = linear(-0.98, 0.98)
    few = fixed_point(f, torch.zeros_like(fixed), Broyden(history=4), tolerance=1e-6, max_steps=300)
    many = fixed_point(f, torch.zeros_like(fixed), Broyden(history=40), tolerance=1e-6, max_steps=300)
    assert few.converged.all() and (few.steps > many.steps).all() and (many.steps <= 41).all()


def test_broyden_forgets_everything_when_it_is_full():
    f, fixed = linear(-0.98, 0.98)
    solver, z, plain = Broyden(history=2), torch.zeros_like(fixed), []
    memory = solver.start(z)
    for _ in range(7):
        image = f(z)
        z, memory = solver.propose(z, image, memory)
        plain.append(bool((z - image).abs().max() < 1e-12))
    assert plain == [True, False, False] * 2 + [True]


def test_the_krylov_basis_stays_orthogonal_in_float32():
    f, fixed = linear(-0.98, 0.98, size=60, dtype=torch.float32)
    solver, z = NewtonKrylov(inner=30), torch.zeros_like(fixed)
    memory = solver.start(z)
    for _ in range(31):
        z, memory = solver.propose(z, f(z), memory)
    basis = memory.basis[:, :-1].double()
    assert (basis @ basis.mT - torch.eye(30)).abs().max() < 1e-5


def test_newton_converges_quadratically():
    """Once near, each cycle of a full Krylov space squares the residual."""
    weight, x = tanh_map(samples=2, size=6)
    f, z0 = (lambda z: torch.tanh(2 * z @ weight + x)), torch.zeros(2, 6, dtype=torch.float64)
    solution = fixed_point(f, z0, NewtonKrylov(inner=6), tolerance=1e-13, max_steps=60)
    newton = solution.trace[::7].amax(1)
    assert solution.converged.all()
    late = newton[newton < 1e-2]
    assert len(late) >= 2 and (late[1:] < 20 * late[:-1] ** 2 + 1e-9).all()


@dataclass(frozen=True)
class Aitken:
    """A solver as users may write it: a matrix product, and a division whose derivative is not finite at rest."""

    def start(self, z):
        return (z, z, False)

    def propose(self, z, fz, memory):
        residual, identity = fz - z, torch.eye(z.shape[1], dtype=z.dtype)
        step = (z - memory[0]) @ identity
        assert step.dtype == z.dtype, "a solver does not compute under autocast"
        if not memory[2]:
            return fz, (z, residual, True)
        change = ((residual - memory[1]) * step).sum(1, keepdim=True)
        factor = torch.where(change == 0, -1, step.square().sum(1, keepdim=True) / change)
        return z - factor.clamp(-3, -0.3) * residual, (z, residual, True)


def test_a_solver_of_your_own():
    """Recorded, under autocast, with samples that come to rest long before the others."""
    weight, x = tanh_map(dtype=torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = fixed_point(
            lambda z: torch.tanh(0.5 * (z @ weight) + x), x * 0, Aitken(), Unrolled(), max_steps=30, tolerance=0.02
        )
    assert solution.converged.all() and len(set(solution.steps.tolist())) > 1
    assert torch.autograd.grad(solution.value.sum(), weight)[0].isfinite().all()


@pytest.mark.parametrize("split", [False, True])
def test_a_map_that_works_in_place_is_an_error(split):
    """It would overwrite z0, and be found converged: f(z) and z are then one tensor."""
    z0 = (torch.ones(2, 3), torch.ones(2, 1)) if split else torch.ones(2, 3)

    def f(z):
        (z[0] if split else z).mul_(0.5).add_(1)
        return z

    with pytest.raises(ValueError, match="f changed its argument in place"):
        fixed_point(f, z0, Picard())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_map_may_fill_the_same_tensor_at_every_call(mode):
    with mode():
        own = torch.zeros(1, 3)
        solution = fixed_point(
            lambda z: torch.cos(z, out=own), torch.ones(1, 3), Picard(), tolerance=1e-5, max_steps=60
        )
        assert solution.steps.item() > 5 and (solution.value - solution.value.cos()).abs().max() < 1e-4


def test_in_inference_mode():
    """Where tensors do not count their changes."""
    with torch.inference_mode():
        solution = fixed_point(torch.cos, torch.ones(2, 3), Anderson(), Phantom(), tolerance=1e-6)
    assert solution.converged.all() and torch.allclose(solution.value, torch.tensor(0.739085))


class Memory(NamedTuple):
    wrong: Tensor


class Forgetful:
    """A solver whose memory has no row for each sample."""

    def start(self, z):
        return Memory(torch.zeros(7))

    def propose(self, z, fz, memory):
        return fz, memory


ZERO = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fixed_point(lambda z: z[:, :2], ZERO, Picard()), r"f returned \[2, 2\] for z of \[\(2, 3\)\]"),
        (lambda: fixed_point(lambda z: (z, z), ZERO, Picard()), r"f returned \[2, 3\], \[2, 3\]"),
        (lambda: fixed_point(lambda z: z[0], (ZERO, ZERO), Picard()), r"f returned \[2, 3\] for"),
        (lambda: fixed_point(lambda z: z[0], (ZERO,), Picard()), r"f returned a tensor of \[2, 3\] where z is a tuple"),
        (lambda: fixed_point(lambda z: (z,), ZERO, Picard()), r"f returned a tuple of \[2, 3\] where z is a tensor"),
        (lambda: fixed_point(lambda z: z + 1j, ZERO, Picard()), "f returned torch.complex64; it must be"),
        (lambda: fixed_point(lambda z: z.long(), ZERO, Picard()), "f returned torch.int64"),
        (lambda: fixed_point(torch.cos, ZERO, Picard(), relative="abs"), "relative is 'abs'"),
        (lambda: fixed_point(3, ZERO, Picard()), "f is 3"),
        (lambda: fixed_point(lambda z: None, ZERO, Picard()), "f returned NoneType"),
        (lambda: fixed_point(lambda z: z / 0, ZERO, Picard()), r"f\(z0\) is not finite for 2 of 2 samples"),
        (lambda: fixed_point(torch.cos, ZERO.long(), Picard()), "z0 holds torch.int64"),
        (lambda: fixed_point(torch.cos, [1.0], Picard()), "z0 is list"),
        (lambda: fixed_point(torch.cos, torch.tensor(1.0), Picard()), "z0 holds .*leading number of samples"),
        (lambda: fixed_point(torch.cos, (ZERO, ZERO[:1]), Picard()), "z0 holds .*same leading number"),
        (lambda: fixed_point(torch.cos, ZERO, "anderson"), "solver is 'anderson'"),
        (lambda: fixed_point(torch.cos, ZERO, Picard), "solver is <class .*; it must be a solver such as Anderson"),
        (lambda: fixed_point(torch.cos, ZERO, Picard(), "ift"), "gradient is 'ift'"),
        (lambda: fixed_point(torch.cos, ZERO, Picard(), Phantom), "gradient is <class .*; it must be None, Unrolled"),
        (lambda: fixed_point(torch.cos, ZERO, Picard(), tolerance=-1), "tolerance is -1"),
        (lambda: fixed_point(torch.cos, ZERO, Picard(), tolerance=float("nan")), "tolerance is nan"),
        (lambda: fixed_point(torch.cos, ZERO, Picard(), tolerance="1e-3"), "tolerance is '1e-3'"),
        (lambda: fixed_point(torch.cos, ZERO, Picard(), compact=None), "compact is None"),
        (lambda: fixed_point(torch.cos, ZERO, Picard(), compact=0), "compact is 0"),
        (lambda: fixed_point(torch.cos, ZERO, Picard(), max_steps=0), "max_steps is 0"),
        (lambda: fixed_point(torch.cos, ZERO, Picard(), max_steps=2.5), "max_steps is 2.5"),
        (lambda: fixed_point(torch.cos, ZERO, Picard(), keep=(8, 8)), "keep is"),
        (lambda: fixed_point(torch.cos, ZERO, Picard(), keep=(8, 41)), "keep is"),
        (lambda: fixed_point(torch.cos, ZERO, Picard(), keep=8), "keep is 8"),
        (lambda: fixed_point(torch.cos, ZERO, Picard(), keep=(2.5,)), r"keep is \(2.5,\)"),
        (lambda: fixed_point(torch.cos, ZERO, Picard(), max_step=3), "max_step"),
        (lambda: fixed_point(torch.cos, ZERO, Forgetful()), r"memory of \(7,\) that does not fit 2 samples"),
        (lambda: fixed_point(torch.cos, ZERO, Anderson(history=10**16)), "memory that does not fit for z of .2, 3."),
        (lambda: fixed_point(torch.cos, ZERO, Broyden(history=10**16)), "memory that does not fit"),
        (lambda: Anderson(history=0), "history is 0"),
        (lambda: Anderson(history=2.5), "history is 2.5"),
        (lambda: Anderson(ridge=-1), "ridge is -1"),
        (lambda: Anderson(scaled="no"), "scaled is 'no'"),
        (lambda: Broyden(history="6"), "history is '6'"),
        (lambda: NewtonKrylov(inner=2.5), "inner is 2.5"),
        (lambda: Broyden(history=0), "history is 0"),
        (lambda: NewtonKrylov(inner=0), "inner is 0"),
        (lambda: NewtonKrylov(precision=0), "precision is 0"),
        (lambda: Picard(damping=0), "damping is 0"),
        (lambda: Anderson(histroy=3), "histroy"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_evaluations_do_not_change_the_gradient_mode(monkeypatch):
    """torch.export makes a subgraph of each change, and its time grows with the square of their number."""
    changes, real = [], torch.set_grad_enabled
    monkeypatch.setattr(torch, "set_grad_enabled", lambda mode: changes.append(mode) or real(mode))
    counts = []
    for steps in (5, 20):
        changes.clear()
        fixed_point(torch.cos, torch.ones(1, 3), Anderson(), tolerance=0.0, max_steps=steps)
        counts.append(len(changes))
    assert counts[0] == counts[1]
