"""Video reuse: evaluations that an equilibrium network saves on the next frame, and that a better solver saves.

Both compare how many evaluations of f reach the same residual ||f(z) - z|| / ||f(z)||. An evaluation is nearly all the
cost of a step: the features are computed once for a pair.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from fleetflow.data.dataset import to_frame
from fleetflow.data.generate import default_textures, dressed
from fleetflow.data.generate.render import render
from fleetflow.data.generate.worlds import MIXTURE, blank_world, draw_scene, still_world
from fleetflow.deq import Anderson, Broyden, Picard, Solver, fixed_point, held
from fleetflow.io.images import list_frames, read_image
from fleetflow.io.video import VideoReader
from fleetflow.layers.small_frames import SMALLEST
from fleetflow.models.deq_flow import DEQFlow, State
from fleetflow.types import FleetflowError

Map = Callable[[State], State]
Clips = Mapping[str, Sequence[Tensor]]  # name -> consecutive frames [3, H, W], RGB in [0, 1], all of one size
Bounds = tuple[float, float]  # what a number is at least and at most; equal where it is known
RESIDUALS = (1e-1, 1e-2, 1e-3)
FRAMES = 6  # of a clip that is read
MOST = 100  # evaluations; of a search that needs more only that is known
PICARD = 36  # evaluations, the published number in training
SOLVERS: dict[str, Solver] = {
    "Anderson, published": Anderson(ridge=1e-4, scaled=False, restart=torch.inf),
    "Anderson": Anderson(),
    "Anderson, history 10": Anderson(history=10),
    "Anderson, damping 2": Anderson(damping=2.0),
    "Broyden": Broyden(history=60),
}


class Reuse(NamedTuple):
    """Evaluations for the pairs of a clip but its first: medians, and the median of their ratio.

    Each is what it is at least and at most: the two differ where searches did not arrive within MOST evaluations.
    """

    clip: str
    pairs: int
    residual: float  # to be reached
    cold: Bounds  # evaluations from zero
    warm: Bounds  # from the last pair's fixed point
    ratio: Bounds  # warm / cold


class Race(NamedTuple):
    """Evaluations in which a solver reaches the residual of PICARD plain iterations, over the pairs of all clips."""

    solver: str
    pairs: int
    evaluations: float  # median
    ratio: float  # evaluations / PICARD


def reuse_cells(row: Reuse) -> list[str]:
    """Returns the cells of the row in a table."""
    counts = [f"{least:g}" if least == most else f"over {least:g}" for least, most in (row.cold, row.warm)]
    least, most = row.ratio
    if least == most:
        ratio = f"{least:.2f}"
    elif math.isfinite(most):
        ratio = f"at most {most:.2f}"
    else:
        ratio = f"at least {least:.2f}" if least > 0 else "-"
    return [row.clip, str(row.pairs), f"{row.residual:.0e}", *counts, ratio]


def race_cells(row: Race) -> list[str]:
    """Returns the cells of the row in a table."""
    reached = math.isfinite(row.evaluations)
    counts = [f"{row.evaluations:g}", f"{row.ratio:.2f}"] if reached else [f"not within {PICARD}", "-"]
    return [row.solver, str(row.pairs), *counts]


@torch.no_grad()
def video_reuse(model: DEQFlow, clips: Clips, residuals: Sequence[float] = RESIDUALS) -> list[Reuse]:
    """Returns a row for each clip and residual, and rows named "all"; the solver is the network's own.

    Args:
        clips: of 3 frames or more. Each pair starts from the fixed point that the pair before it has found in the same
            way.

    Raises:
        FleetflowError: For a shorter clip, one of frames of several sizes, and a network without an equilibrium.
    """
    _check_sizes(clips)
    rows, every = [], []
    for name, frames in clips.items():
        if len(frames) < 3:
            raise FleetflowError(f"clip {name} has {len(frames)} frames; reuse needs 3 or more")
        found, counts = None, []
        with held(checked(model).update_block):
            for f, start in equations(model, frames):
                cold, after = searched(model, f, start, min(residuals))
                if found is not None:
                    warm, after = searched(model, f, found, min(residuals))
                    counts.append([(evaluations(cold, level), evaluations(warm, level)) for level in residuals])
                found = after
        rows += _medians(name, counts, residuals)
        every += counts
    return rows + _medians("all", every, residuals)


@torch.no_grad()
def solver_race(model: DEQFlow, clips: Clips, solvers: Mapping[str, Solver] = SOLVERS) -> list[Race]:
    """Returns a row for each solver, over all pairs of the clips, each from a cold start; raises as `video_reuse`."""
    _check_sizes(clips)
    needed: dict[str, list[float]] = {name: [] for name in solvers}
    for frames in clips.values():
        with held(checked(model).update_block):
            for f, start in equations(model, frames):
                plain = min(_trace(f, start, Picard()))
                for name, solver in solvers.items():
                    needed[name].append(evaluations(_trace(f, start, solver), plain))
    medians = {name: median(counts) for name, counts in needed.items()}
    return [Race(name, len(needed[name]), count, count / PICARD) for name, count in medians.items()]


def checked(model: torch.nn.Module) -> DEQFlow:
    """Returns the model in evaluation mode; raises FleetflowError for a network without an equilibrium."""
    if not isinstance(model, DEQFlow):
        raise FleetflowError(f"{type(model).__name__} has no fixed point to reuse; take a network such as deq_flow_b")
    return model.eval()


def equations(model: DEQFlow, frames: Sequence[Tensor]) -> Iterator[tuple[Map, State]]:
    """Yields the map and the cold start of each pair of consecutive frames, cropped to multiples of the stride."""
    height, width = (size // model.stride * model.stride for size in frames[0].shape[-2:])
    if min(height, width) < SMALLEST:
        raise FleetflowError(
            f"frames are {height}x{width}; video reuse is measured on {SMALLEST} pixels a side or more"
        )
    for pair in zip(frames, frames[1:]):
        yield model.equation(*model.prepare(*(frame[None, :, :height, :width] for frame in pair)))


def searched(model: DEQFlow, f: Map, start: State, residual: float) -> tuple[list[float], State]:
    """Returns the residual after each evaluation by the network's own solver, and the best point."""
    solution = fixed_point(f, start, model.equilibrium.solver, tolerance=residual, max_steps=MOST)
    return solution.trace[:, 0].tolist(), solution.value


def evaluations(trace: Sequence[float], residual: float) -> float:
    """Returns the number of evaluations after which the residual was reached, infinity if it never was."""
    return next((float(k) for k, value in enumerate(trace, 1) if value <= residual), float("inf"))


@torch.no_grad()
def generated_clips(count: int, frames: int, height: int, width: int, *, seed: int = 0) -> dict[str, list[Tensor]]:
    """Returns `count` generated clips: the motion of a generated pair, in as many equal parts as there are frames."""
    moving = {world: share for world, share in MIXTURE.items() if world not in (still_world, blank_world)}
    generator = torch.Generator().manual_seed(seed)
    scene = draw_scene(count, height, width, generator, moving)
    textures = default_textures()
    scene, outlines = dressed(scene, textures, generator)
    clips: dict[str, list[Tensor]] = {f"generated {k}": [] for k in range(count)}
    whole = scene.motion / scene.motion[..., 2:, 2:]
    still = torch.eye(3)
    for step in range(1, frames + 1):
        moved = scene._replace(motion=torch.lerp(still, whole, step / frames))
        rendered = render(moved, textures, outlines, height, width, full=False)
        for clip, frame in zip(clips.values(), rendered.frame2):
            clip.append(frame)
    return clips


def read_clips(paths: tuple[Path, ...]) -> dict[str, list[Tensor]]:
    """Returns the first frames of videos and of folders of pictures, by name, as `video_reuse` takes them.

    Raises:
        FleetflowError: a clip cannot be read, or it is damaged within these frames.
    """
    found = {}
    for path in paths:
        reader = None if path.is_dir() else VideoReader(path)
        pictures = map(read_image, list_frames(path)) if reader is None else reader
        name = str(path) if path.name in found else path.name
        found[name] = [to_frame(picture) for picture in islice(pictures, FRAMES)]
        if reader is not None and reader.problem:
            raise FleetflowError(reader.problem)
    return found


def _trace(f: Map, start: State, solver: Solver) -> list[float]:
    return fixed_point(f, start, solver, tolerance=0.0, max_steps=PICARD).trace[:, 0].tolist()


def _check_sizes(clips: Clips) -> None:
    """Raises FleetflowError for a clip whose frames are not all of one size."""
    for name, frames in clips.items():
        sizes = dict.fromkeys(f"{frame.shape[-2]}x{frame.shape[-1]}" for frame in frames)
        if len(sizes) > 1:
            raise FleetflowError(f"clip {name} has frames of {', '.join(sizes)}; all must have one size: resize them")


def _medians(name: str, counts: Sequence[Sequence[tuple[float, float]]], residuals: Sequence[float]) -> list[Reuse]:
    rows = []
    for k, residual in enumerate(residuals):
        cold, warm = ([_bounds(pair[k][side]) for pair in counts] for side in (0, 1))
        ratios = [(after[0] / before[1], after[1] / before[0]) for before, after in zip(cold, warm)]
        rows.append(Reuse(name, len(counts), residual, _median(cold), _median(warm), _median(ratios)))
    return rows


def _bounds(count: float) -> Bounds:
    return (count, count) if math.isfinite(count) else (float(MOST), math.inf)


def _median(values: Sequence[Bounds]) -> Bounds:
    least, most = zip(*values)
    return median(least), median(most)
