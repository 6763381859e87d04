"""The one loop of every fixed-point solve: it evaluates, measures, keeps the best, stops. Solvers only propose.

What a sample gets does not depend on its companions in the batch: once it has converged it is frozen, whether
the others go on beside it or without it (`compact`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]

from fleetflow.deq.checks import able, flag, number, rising, whole
from fleetflow.deq.vectors import Layout, S


class NotFinite(ValueError):
    """The first evaluation of f is not finite: there is nothing to go on from."""


class Solution(NamedTuple, Generic[S]):
    """What `fixed_point` returns for N samples."""

    value: S  # like z0, with the gradient that the gradient rule gives it
    residual: Tensor  # [N] ||f(z) - z|| (divided by ||f(z)|| if relative) at the best point z of the solver
    steps: Tensor  # [N] evaluations of f after which the sample had converged, or all that it was given
    trace: Tensor  # [evaluations, N] the residual of every evaluation; constant once a sample has converged
    converged: Tensor  # [N] bool: residual <= tolerance
    kept: tuple[S, ...] = ()  # the best points after `keep` evaluations, with their gradients


class Solver(Protocol):
    """Proposes the next point from what has been seen. A memory is a tuple of tensors [N, ...] and Python numbers.

    z and fz are not to be changed in place: they may be the best point so far.
    """

    def start(self, z: Tensor) -> tuple: ...  # the empty memory for a state [N, D]

    def propose(self, z: Tensor, fz: Tensor, memory: Any) -> tuple[Tensor, tuple]: ...  # the next z and memory


class Gradient(Protocol):
    """Gives the point that a solve has found its gradient; called after the solve, in the caller's grad mode."""

    @property
    def unrolled(self) -> bool: ...  # whether the solve itself is recorded

    def attach(self, f: Callable[[Tensor], Tensor], point: Tensor, image: Tensor) -> Tensor: ...  # image = f(point)


@dataclass(frozen=True)
class Stop:
    """When a solve ends: at a residual of `tolerance`, or after `max_steps` steps.

    Args:
        relative: whether the residual is divided by `size` [N], or by ||f(z)|| where that is None.
    """

    tolerance: float
    max_steps: int
    relative: bool
    size: Tensor | None = None

    def __post_init__(self):
        number("tolerance", self.tolerance, lambda tolerance: tolerance >= 0, "of 0 or more")
        whole("max_steps", self.max_steps)
        flag("relative", self.relative)

    def measure(self, z: Tensor, fz: Tensor) -> Tensor:
        """Returns [N], the residual of each sample, without a gradient.

        Detached instead of under `no_grad`: torch.export makes a subgraph of each change of the mode, and then takes
        minutes for a solver's many evaluations.
        """
        z, fz = z.detach(), fz.detach()
        residual = torch.linalg.vector_norm(fz - z, dim=1)
        if not self.relative:
            return residual
        size = torch.linalg.vector_norm(fz, dim=1) if self.size is None else self.size  # infinite before fz itself is
        limits = torch.finfo(z.dtype)
        ratio = (residual / size.clamp_min(limits.tiny)).clamp(max=limits.max)  # large, yet finite, where f(z) is zero
        return torch.where(size.isfinite() & residual.isfinite(), ratio, torch.inf)


class Track(NamedTuple):
    """What is known of each of n samples so far."""

    point: Tensor  # [n, D] with the smallest residual
    image: Tensor  # [n, D] f(point)
    residual: Tensor  # [n] of the last evaluation before the sample was done
    lowest: Tensor  # [n]
    steps: Tensor  # [n]
    done: Tensor  # [n] bool: converged, or no longer finite

    def after(self, z: Tensor, fz: Tensor, residual: Tensor, step: int, stop: Stop) -> "Track":
        """Returns what is known after evaluation number `step`, f(z) = fz with that residual [n]."""
        residual = torch.where(self.done, self.residual, residual)
        better = residual < self.lowest
        lowest = torch.where(better, residual, self.lowest)
        steps = torch.where(self.done, self.steps, step)
        done = self.done | (lowest <= stop.tolerance) | ~residual.isfinite()
        point, image = (_chosen(better, new, old) for new, old in ((z, self.point), (fz, self.image)))
        return Track(point, image, residual, lowest, steps, done)

    def cut(self, tensor: Tensor) -> Tensor:
        """Returns the tensor [n, ...], the samples that are done without their graph."""
        return torch.where(self.done.view(-1, *[1] * (tensor.ndim - 1)), tensor.detach(), tensor)

    def scatter(self, rows: Tensor, part: "Track") -> "Track":
        """Returns this track with the samples `rows` replaced by those of `part`."""
        return Track(*(whole.index_copy(0, rows, piece) for whole, piece in zip(self, part)))


class Iteration(NamedTuple):
    """What one run of the loop leaves."""

    last: Track
    trace: Tensor  # [evaluations, N]
    kept: list[tuple[Tensor, Tensor]]  # (point, image) after `keep` evaluations


def iterate(
    f: Callable[[Tensor], Tensor],
    z: Tensor,
    solver: Solver,
    stop: Stop,
    *,
    restrict: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None,
    keep: Sequence[int] = (),
    strict: bool = False,
) -> Iteration:
    """Returns the best points that `solver` finds for the map f of vectors [N, D], starting at z.

    Args:
        restrict: sample numbers -> f for these samples only.
        strict: whether a first evaluation that is not finite raises.
    """
    every, captured = _look_every(z.device), _captured()
    count = z.new_zeros(z.shape[0])
    whole = part = Track(z, z, count, count + torch.inf, count.long(), count.bool())
    rows = torch.arange(z.shape[0], device=z.device)
    memory = _memory(solver, z)
    trace, kept = [], []
    for step in range(1, stop.max_steps + 1):
        fz = f(z)
        residual = stop.measure(z, fz)
        if (
            torch.is_grad_enabled() and not captured
        ):  # what is not finite must not enter the graph, where zero times infinity is no zero
            lost = ~(residual.isfinite() | part.done)
            if bool(lost.any()):
                fz = f(torch.where(lost[:, None], part.point, z))
        part = part.after(z, fz, residual, step, stop)
        if strict and step == 1 and not captured and not bool(part.residual.isfinite().all()):
            bad = int((~part.residual.isfinite()).sum())
            raise NotFinite(f"f(z0) is not finite for {bad} of {z.shape[0]} samples; look at f and z0")
        trace.append(whole.residual.index_copy(0, rows, part.residual))
        if step in keep:
            best = whole.scatter(rows, part)
            kept.append((best.point, best.image))
        if step == stop.max_steps:
            break
        if step % every == 0 and not captured:
            going = ~part.done
            left = int(going.sum())
            if left == 0:
                break
            if restrict and left < len(rows):
                whole = whole.scatter(rows, part)
                rows, z, fz = rows[going], z[going], fz[going]
                part = Track(*(tensor[going] for tensor in part))
                memory = _each(memory, lambda tensor, going=going: tensor[going])
                f = restrict(rows)
        if torch.is_grad_enabled():  # what a solver makes of a sample that stands still may have no finite gradient
            z, fz, memory = part.cut(z), part.cut(fz), _each(memory, part.cut)
        with torch.autocast(z.device.type, enabled=False):
            z, memory = solver.propose(z, fz, memory)
        z = _chosen(part.done, part.point, z)
    whole = whole.scatter(rows, part)
    kept += [(whole.point, whole.image)] * (len(keep) - len(kept))
    return Iteration(whole, torch.stack(trace), kept)


def fixed_point(
    f: Callable[[S], S],
    z0: S,
    solver: Solver,
    gradient: Gradient | None = None,
    *,
    tolerance: float = 1e-3,
    max_steps: int = 40,
    relative: bool = True,
    compact: bool | Callable[[Tensor], Callable[[S], S]] = False,
    keep: Sequence[int] = (),
) -> Solution[S]:
    """Returns the point z = f(z) of each sample, or the best one found.

    Args:
        f: z -> z, the same shapes; called as f(z) with z like z0: a tensor [N, ...] or a tuple of such tensors.
        gradient: Unrolled(), Phantom(...) or Implicit(...); None leaves the value without a gradient.
        tolerance, relative: a sample has converged when ||f(z) - z|| <= tolerance, times ||f(z)|| if relative; the norm
            goes over all parts of z and is taken in float32 at least, under autocast too. On a map that blows up
            ||f(z)|| grows as well, so that among points that have not converged a far one may count as best.
        max_steps: evaluations of f at most (the last one only measures). The best point counts, not the last.
        compact: converged samples stop costing evaluations. True if f takes any number of samples and treats them
            alike; if f holds more data of each sample, a function of the sample numbers [n] that returns f for those.
        keep: (8, 16) also returns the best points after 8 and 16 evaluations, with their gradients (correction losses).

    Raises:
        ValueError, TypeError: that names the argument: another shape or kind of number from f, an f that changes z in
            place, a first evaluation that is not finite, an f that does not take the samples that `compact` leaves.
    """
    able("f", f, "__call__", "a function")
    able("solver", solver, "propose", "a solver such as Anderson()")
    if gradient is not None:
        able("gradient", gradient, "attach", "None, Unrolled(), Phantom() or Implicit(solver)")
    layout, stop = Layout(z0), Stop(tolerance, max_steps, relative)
    rising("keep", keep, max_steps)
    if not isinstance(compact, bool):
        able("compact", compact, "__call__", "True, False, or a function of sample numbers")
    lifted = layout.lift(f)
    restrict = None if compact is False else partial(_restricted, layout, f, compact)
    recorded = torch.is_grad_enabled() and gradient is not None and gradient.unrolled
    with torch.set_grad_enabled(recorded):
        found = iterate(lifted, layout.pack(z0), solver, stop, restrict=restrict, keep=keep, strict=True)
    torch.clear_autocast_cache()  # older torch would serve the graph below weights cast without one above

    def finish(point: Tensor, image: Tensor) -> S:
        return layout.unpack(point.detach() if gradient is None else gradient.attach(lifted, point, image))

    last = found.last
    kept = tuple(finish(*pair) for pair in found.kept)
    value = finish(last.point, last.image)
    return Solution(value, last.lowest, last.steps, found.trace, last.lowest <= tolerance, kept)


def _restricted(
    layout: Layout[S], f: Callable[[S], S], compact: Literal[True] | Callable, rows: Tensor
) -> Callable[[Tensor], Tensor]:
    """Returns f of the samples `rows` alone, as a map of vectors; names `compact` where f does not take so few."""
    if compact is not True:
        f = compact(rows)
        able("what compact returned", f, "__call__", "a function: f for the samples of these numbers")
    lifted = layout.lift(f)

    def restricted(vector: Tensor) -> Tensor:
        try:
            return lifted(vector)
        except (RuntimeError, ValueError, IndexError) as error:
            words = str(error).partition("\n")[0]
            if isinstance(error, torch.OutOfMemoryError) or not any(word in words for word in ("size", "shape")):
                raise
            way = "give compact a function of sample numbers" if compact is True else "look at what it returns"
            raise ValueError(f"compact asked f for {len(rows)} samples, it failed: {words}; {way}") from error

    return restricted


def _chosen(mask: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Returns the rows of `one` [n, D] where `mask` [n] is true, else those of `other`; a lone row is not copied."""
    if len(mask) == 1 and mask.device.type == "cpu" and not torch.is_grad_enabled() and not _captured():
        return one if bool(mask) else other
    return torch.where(mask[:, None], one, other)


def _captured() -> bool:
    """Whether this is exported, compiled or traced: then all steps are made, and nothing is looked at on the way."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or is_tracing()


def _look_every(device: torch.device) -> int:
    """Returns the steps between two looks from the host; on a GPU a look waits for everything queued before it."""
    return 1 if device.type == "cpu" else 4


def _each(memory: tuple, change: Callable[[Tensor], Tensor]) -> tuple:
    changed = [change(item) if isinstance(item, Tensor) else item for item in memory]
    return type(memory)(*changed) if hasattr(memory, "_fields") else tuple(changed)


def _memory(solver: Solver, z: Tensor) -> tuple:
    """Returns the solver's empty memory; raises ValueError if it does not fit the samples or the machine."""
    try:
        memory = solver.start(z)
    except RuntimeError as error:
        size = f"{tuple(z.shape)} {z.dtype}".replace("torch.", "")
        raise ValueError(f"solver {solver} has a memory that does not fit for z of {size}; shorten it") from error
    for item in memory:
        if isinstance(item, Tensor) and (item.ndim == 0 or item.shape[0] != z.shape[0]):
            raise ValueError(f"solver {solver} has a memory of {tuple(item.shape)} that does not fit {len(z)} samples")
    return memory
