"""Gradient rules: how a point that a solver has found gets its gradient. The solver does not know of them.

Unrolled: through every step. Phantom: through a few steps from the point (Geng et al. 2021; one: Fung et al. 2021).
Implicit: through the equation z = f(z) itself, whatever led to z (Bai et al. 2019).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from fleetflow.deq.checks import able, number, whole
from fleetflow.deq.solve import Solver, Stop, iterate

Map = Callable[[Tensor], Tensor]
UNSOLVED = (
    "Implicit found no solution of y = J^T y + g for some samples: their gradient is a guess; "
    "take another solver, more steps, or a calmer f"
)


@dataclass(frozen=True)
class Unrolled:
    """Differentiates every step of the solver; memory grows with the steps. The value is f(best point)."""

    @property
    def unrolled(self) -> bool:
        return True

    def attach(self, f: Map, point: Tensor, image: Tensor) -> Tensor:
        """Returns the image, which carries the graph of the whole solve."""
        return image


@dataclass(frozen=True)
class Phantom:
    """Differentiates `steps` damped applications of f from the detached point; the value is the last of them.

    Args:
        steps: 1 or more; 1 is the one-step gradient.
        damping: in (0, 1], the published tau. Without grad mode the value is the point itself. A sample whose f is not
            finite stays where it was, and gives no gradient there.
    """

    steps: int = 1
    damping: float = 1.0

    @property
    def unrolled(self) -> bool:
        return False

    def __post_init__(self):
        whole("steps", self.steps)
        number("damping", self.damping, lambda damping: 0 < damping <= 1, "above 0 and at most 1")

    def attach(self, f: Map, point: Tensor, image: Tensor) -> Tensor:
        """Returns the point after the steps, recorded."""
        z = point.detach()
        for _ in range(self.steps if torch.is_grad_enabled() else 0):
            image = f(z)
            lost = ~image.detach().isfinite().all(1, keepdim=True)
            if bool(lost.any()):  # what is not finite must not enter the graph, where zero times infinity is no zero
                image = torch.where(lost, z, f(torch.where(lost, point.detach(), z)))
            z = torch.lerp(z, image, self.damping)
        return z


@dataclass(frozen=True)
class Implicit:
    """Differentiates the equation z = f(z): the incoming gradient g becomes the solution y of y = J^T y + g.

    Args:
        solver, tolerance, max_steps, relative: for that equation, as in `fixed_point`, but relative to ||g||. Memory
            and graph are those of one evaluation of f, however many steps were taken. The value is the solver's point.
            Warns (RuntimeWarning) if some sample's y leaves more than ||g||: then it is no better than a guess.
        order: derivatives up to this order are exact. Each order above the first costs one more evaluation forwards and
            one backwards; with order 1 a second derivative raises RuntimeError. Inside `held` it must be 1.
    """

    solver: Solver
    tolerance: float = 1e-6
    max_steps: int = 50
    relative: bool = True
    order: int = 2

    @property
    def unrolled(self) -> bool:
        return False

    def __post_init__(self):
        able("solver", self.solver, "propose", "a solver such as Anderson()")
        whole("order", self.order)
        Stop(self.tolerance, self.max_steps, self.relative)

    def attach(self, f: Map, point: Tensor, image: Tensor) -> Tensor:
        """Returns the point, as the end of `order` Newton steps from itself.

        A step from a solution that is right in its first k derivatives, by the implicit function theorem, leads to one
        that is right in k + 1. All steps but the last are recomputed when they are needed, and stored as one vector.
        """
        point, before = point.detach(), None
        if not torch.is_grad_enabled():
            return point
        if self.order > 1 and parametrize._cache:
            raise ValueError(f"Implicit(order={self.order}) inside held(): use order=1, or solve outside")
        for _ in range(self.order - 1):
            before = NewtonStep(lambda z: checkpoint(f, z, use_reentrant=False), point, self, rebuilt=f, before=before)
            point = before.end
        return NewtonStep(f, point, self, before=before).end


class NewtonStep:
    """A Newton step on f(z) - z from a solution: it changes no value, and its backward solves the transposed system.

    Args:
        rebuilt: f for a step that sleeps until a graph of its gradient is built: before that, its gradient is zero.
        before: the sleeping step that z comes from.
    """

    def __init__(self, f: Map, z: Tensor, rule: Implicit, *, rebuilt: Map | None = None, before=None):
        self.rule, self.rebuilt, self.before = rule, rebuilt, before
        self.start = z
        self.z = z
        if not z.requires_grad:
            self.z = z.detach().requires_grad_()
            # backward() leaves a gradient at z, which nobody reads, and whose graph may hold this step
            self.z.register_post_accumulate_grad_hook(lambda leaf: setattr(leaf, "grad", None))
        self.image = f(self.z)
        self.asleep = rebuilt is not None

    @property
    def end(self) -> Tensor:
        """Where the step leads; not stored, because its graph holds the step, in a circle that Python cannot see."""
        return self.start + _Correction.apply(self.image - self.z, self)

    def solve(self, g: Tensor) -> Tensor | None:
        """Returns y = J^T y + g, [N, D], itself differentiable if the backward pass is recorded."""
        recorded, rule, image = torch.is_grad_enabled(), self.rule, self.image
        if self.asleep:
            return None
        if recorded and self.before is not None:
            self.before.asleep = False
        if self.rebuilt is not None:
            with torch.enable_grad():
                image = self.rebuilt(self.z)

        def adjoint(y: Tensor) -> Tensor:
            recorded = torch.is_grad_enabled()
            pulled = torch.autograd.grad(image, self.z, y, retain_graph=True, create_graph=recorded, allow_unused=True)
            return g if pulled[0] is None else g + pulled[0]

        with torch.no_grad():
            size = torch.linalg.vector_norm(g, dim=1)
            stop = Stop(rule.tolerance, rule.max_steps, rule.relative, size)
            last = iterate(adjoint, g.detach(), rule.solver, stop).last
            y = last.point
            if bool(((last.lowest > (1 if rule.relative else size)) & size.isfinite()).any()):
                warnings.warn(UNSOLVED, RuntimeWarning, stacklevel=2)
        if not recorded:
            return y
        return _Refusal.apply(y, image) if rule.order == 1 else NewtonStep(adjoint, y, rule).end


class _Correction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual: Tensor, step: NewtonStep) -> Tensor:
        ctx.step = step
        return torch.zeros_like(residual)

    @staticmethod
    def backward(ctx, g: Tensor):
        return ctx.step.solve(g), None


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, image: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx, g: Tensor):
        raise RuntimeError("the gradient of Implicit(order=1) was differentiated again; use Implicit(order=2)")
