"""How well-behaved a map is at its fixed point: size of its Jacobian, spectral radius, a picture of the residuals."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from fleetflow.deq.checks import whole
from fleetflow.deq.solve import Solution
from fleetflow.deq.vectors import Layout, State


def jacobian_penalty(
    f: Callable[[State], State], z: State, *, probes: int = 1, generator: Generator | None = None
) -> Tensor:
    """Returns [N], an unbiased estimate of ||J||^2 / D: the mean square row of f's Jacobian at z, [D, D].

    Hutchinson's estimator with random signs (Bai et al. 2021, "Stabilizing equilibrium models"). Differentiable in the
    parameters of f: add a small multiple of its mean to the loss, and f stays contractive. z: [N, ...] or a tuple.
    """
    whole("probes", probes)
    image, point = _recorded(f, z)
    total = torch.zeros_like(point[:, 0])
    for _ in range(probes):
        signs = torch.randint(0, 2, point.shape, generator=generator, device=point.device).to(point.dtype) * 2 - 1
        pulled = _pull(image, point, signs, create_graph=torch.is_grad_enabled())
        total = total + pulled.square().sum(1)
    return total / (probes * point.shape[1])


def spectral_radius(
    f: Callable[[State], State], z: State, *, steps: int = 75, generator: Generator | None = None
) -> Tensor:
    """Returns [N], the largest absolute eigenvalue of f's Jacobian at z, by `steps` steps of the power method.

    It is the mean growth over the second half of the steps, so a complex pair of eigenvalues gives its modulus. Below
    1 the plain iteration converges near z. The Jacobian is that of autograd: what f detaches does not count.
    """
    whole("steps", steps, 2)
    image, point = _recorded(f, z)
    image_of = torch.randn(point.shape, generator=generator, device=point.device, dtype=point.dtype)
    growth, late = torch.zeros_like(point[:, 0]), steps - steps // 2
    tiny = torch.finfo(point.dtype).tiny
    for step in range(steps):
        length = torch.linalg.vector_norm(image_of, dim=1, keepdim=True).clamp_min(tiny)
        if step > steps // 2:
            growth = growth + length[:, 0].log()
        image_of = _pull(image, point, image_of / length, create_graph=False)
    growth = growth + torch.linalg.vector_norm(image_of, dim=1).clamp_min(tiny).log()
    return (growth / late).exp().detach()


def plot_convergence(solutions: Mapping[str, Solution | Tensor], *, axes: Any = None) -> Any:
    """Returns matplotlib axes with the residual over the evaluations: the median sample, and the range of all.

    Args:
        solutions: a label -> a `Solution`, or its trace [evaluations, N].
        axes: where to draw; None makes new ones.

    Raises:
        ImportError: If matplotlib is not installed, TypeError that names what is wrong.
    """
    try:
        import matplotlib.pyplot as pyplot
    except ImportError as error:
        raise ImportError("plot_convergence needs matplotlib; pip install matplotlib") from error
    if not isinstance(solutions, Mapping) or not solutions:
        raise TypeError(f"solutions is {type(solutions).__name__}; it must map labels to solutions, one or more")
    traces = {label: item.trace if isinstance(item, Solution) else item for label, item in solutions.items()}
    for label, trace in traces.items():
        if not isinstance(trace, Tensor) or trace.ndim != 2 or trace.numel() == 0:
            was = list(trace.shape) if isinstance(trace, Tensor) else type(trace).__name__
            raise TypeError(f"solutions[{label!r}] is {was}; it must be a Solution, or its trace [evaluations, N]")
    axes = pyplot.subplots(figsize=(6, 4), layout="constrained")[1] if axes is None else axes
    for label, trace in traces.items():
        trace = trace.detach().double().cpu()
        evaluations = range(1, len(trace) + 1)
        (line,) = axes.semilogy(evaluations, trace.median(1).values.tolist(), label=label)
        low, high = trace.amin(1).tolist(), trace.amax(1).tolist()
        axes.fill_between(evaluations, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="evaluations of f", ylabel="residual")
    axes.legend()
    return axes


def _recorded(f: Callable[[State], State], z: State) -> tuple[Tensor, Tensor]:
    """Returns f(z) and the detached z, both [N, D], the first with its graph."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("f has no derivative in torch.inference_mode(); use torch.no_grad() around it instead")
    layout = Layout(z)
    with torch.enable_grad():
        point = layout.pack(z).detach().requires_grad_()
        return layout.lift(f)(point), point


def _pull(image: Tensor, point: Tensor, vector: Tensor, create_graph: bool) -> Tensor:
    if not image.requires_grad:
        return torch.zeros_like(point)
    pulled = torch.autograd.grad(
        image, point, vector, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return pulled[0]
