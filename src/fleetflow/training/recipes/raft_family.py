"""Recipes of RAFT and its descendants: AdamW, one cycle, a loss on every full-resolution flow."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fleetflow.data.augment.raft import raft, raft_sparse
from fleetflow.data.datasets.hd1k import hd1k
from fleetflow.data.datasets.kitti import kitti2015
from fleetflow.deq import Broyden, Phantom
from fleetflow.models import deq_flow
from fleetflow.training import losses, schedules
from fleetflow.training.optimizers import adamw
from fleetflow.training.recipe import Batches, Recipe, Source, Stage
from fleetflow.training.recipes.sources import CHAIRS_TEST, KITTI_TEST, SINTEL_TEST, chairs, sintel_both, things


def raft_stages(
    name: str,
    source: str,
    *,
    network: str = "",
    steps: tuple[int, int, int, int] = (100_000, 100_000, 100_000, 50_000),
    batches: tuple[int, int, int, int] = (10, 6, 6, 6),
    rates: tuple[float, float, float, float] = (4e-4, 1.25e-4, 1.25e-4, 1e-4),
    loss: Callable = losses.sequence,
    fine: float = 0.85,
    decay: tuple[float, float] = (1e-4, 1e-5),
    build: tuple = (None,) * 4,
    iterations: int | None = 12,
) -> dict[str, Recipe]:
    """RAFT's four stages (arXiv 2003.12039, code): Chairs, Things, Sintel + KITTI + HD1K, KITTI.

    Args:
        build: makes the network of each stage; fewer than four leave out the last stages.
    """
    network = network or name
    build, count = (*build, *(None,) * 4)[:4], len(build)
    first = Stage(
        "chairs",
        (Batches(steps[0], batches[0], 368, 496),),
        learning_rate=rates[0],
        schedule=schedules.one_cycle,
        loss=partial(loss, gamma=0.8),
        optimizer=adamw,
        weight_decay=decay[0],
        clip=1.0,
        ema=0,
        sources=(chairs(partial(raft, scale=(-0.1, 1.0))),),
        iterations=iterations,
        build=build[0],
        validation=CHAIRS_TEST,
    )
    second = replace(
        first,
        name="things",
        batches=(Batches(steps[1], batches[1], 400, 720),),
        learning_rate=rates[1],
        sources=things(partial(raft, scale=(-0.4, 0.8)), "clean", "final"),
        freeze_norm=True,
        build=build[1],
        validation=(*SINTEL_TEST, *KITTI_TEST),
    )
    mixed = partial(raft, scale=(-0.2, 0.6))
    third = replace(
        second,
        name="sintel",
        batches=(Batches(steps[2], batches[2], 368, 768),),
        learning_rate=rates[2],
        loss=partial(loss, gamma=fine),
        weight_decay=decay[1],
        sources=(
            *sintel_both(mixed, 100),
            Source(kitti2015, "KITTI2015", 200, partial(raft_sparse, scale=(-0.3, 0.5), mirror=True)),
            Source(hd1k, "HD1K", 5, partial(raft_sparse, scale=(-0.5, 0.2), mirror=True)),
            *things(mixed, "clean"),
        ),
        build=build[2],
    )
    fourth = replace(
        third,
        name="kitti",
        batches=(Batches(steps[3], batches[3], 288, 960),),
        learning_rate=rates[3],
        sources=(Source(kitti2015, "KITTI2015", 1, partial(raft_sparse, scale=(-0.2, 0.4), mirror=False)),),
        build=build[3],
        validation=KITTI_TEST,
    )
    return {name: Recipe(network, (first, second, third, fourth)[:count], source)}


def equilibrium_of(plain: deq_flow.Equilibrium, steps: int, terms: int, phantom: int) -> deq_flow.Equilibrium:
    """A training equilibrium: `steps` evaluations, the loss on `terms` evenly spaced points of the way.

    The published Broyden evaluates once more in every search than its threshold says.
    """
    every = steps // terms + isinstance(plain.solver, Broyden)
    keep = tuple(every * k for k in range(1, terms))
    return replace(
        plain, iterations=every * terms, keep=keep, gradient=Phantom(phantom), through_flow=plain is deq_flow.PLAIN
    )


DEQ_TERMS = ((36, 6, 1), (40, 2, 3), (40, 2, 3), (40, 2, 3))


def deq_stages(
    name: str,
    network: Callable,
    plain: deq_flow.Equilibrium,
    source: str,
    *,
    things: int = 120_000,
    terms: tuple[tuple[int, int, int], ...] = DEQ_TERMS,
) -> dict[str, Recipe]:
    """DEQ-Flow (arXiv 2204.08442, code): RAFT's stages, as many as `terms` has rows (steps, terms, phantom steps)."""
    found = [equilibrium_of(plain, *row) for row in terms]
    found[0] = replace(found[0], through_flow=False)  # v2 passes --all_grad from Things on
    return raft_stages(
        name,
        source,
        network=network.__name__,
        steps=(120_000, things, 120_000, 50_000),
        batches=(12, 6, 6, 6),
        loss=losses.correction,
        fine=0.9,
        decay=(1e-4, 1e-4),
        build=tuple(partial(network, equilibrium=equilibrium) for equilibrium in found),
        iterations=None,
    )
