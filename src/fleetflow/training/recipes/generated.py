"""Our own recipes: generated pairs only, sized for two CPU cores unless they say otherwise."""

from collections.abc import Callable
from functools import partial

from fleetflow.data.generate import worlds
from fleetflow.models import deq_flow, fastflownet_refine, lightflow, liteflownet2
from fleetflow.models.base import FlowModel
from fleetflow.models.fastflownet import init_as_matcher
from fleetflow.training import losses, schedules
from fleetflow.training.optimizers import adamw, optimizers
from fleetflow.training.recipe import Batches, Recipe, Stage
from fleetflow.training.recipes.raft_family import equilibrium_of

SHAPES = {worlds.shapes_world: 0.9, worlds.blank_world: 0.1}
MODERATE = {  # MIXTURE, but for small frames: most of its large motions would leave them
    worlds.shapes_world: 0.45,
    worlds.large_world: 0.05,
    worlds.small_world: 0.05,
    worlds.still_world: 0.02,
    worlds.drive_world: 0.20,
    worlds.stereo_world: 0.10,
    worlds.hand_world: 0.10,
    worlds.blank_world: 0.03,
}
CALM = {world: share / 2 for world, share in worlds.MIXTURE.items()} | {  # mostly still scenes
    worlds.still_world: 0.14,
    worlds.ground_world: 0.16,
    worlds.plain_world: 0.16,
    worlds.watch_world: 0.14,
    worlds.blank_world: 0.06,
}


def _pyramid(
    name: str,
    mixture: dict[worlds.World, float],
    *sizes: Batches,
    rate: float = 0.0025,
    decay: float = 0.1,
    cooldown: float = 0.0,
    init: Callable | None = None,
) -> Stage:
    """A stage for LiteFlowNet2: Muon, and a loss on the flows of all its levels.

    It has no norms: at a rate of 0.006 and a decay of 0.01 its layers grow until it diverges (docs/lab/training-log.md).
    """
    return Stage(
        name,
        sizes,
        learning_rate=rate,
        schedule=partial(schedules.warm_flat_cool, warmup=50, cooldown=cooldown),
        loss=partial(losses.multi_scale, weights=(0.25, 0.25, 0.25)),
        weight_decay=decay,
        mixture=mixture,
        init=init,
    )


def _correcting(
    name: str,
    *sizes: Batches,
    iterations: int = 4,
    share: float = 0.1,
    spoil: float = 0.25,
    cooldown: float = 0.0,
    grow: Callable | None = None,
) -> Stage:
    """A stage for FastFlowNet with refinement, whose FastFlowNet moves by a share of the rate: it is trained already.

    At twice the rate 46 % of the flow head's units were dead after 200 steps (docs/lab/training-log.md).
    """
    return Stage(
        name,
        sizes,
        learning_rate=0.003,
        schedule=partial(schedules.warm_flat_cool, warmup=100, cooldown=cooldown),
        loss=partial(losses.multi_scale, weights=0.8, power=1.0),  # four levels, then the iterations
        optimizer=partial(optimizers, slow="fastflownet", share=share),
        weight_decay=0.01,
        iterations=iterations,
        build=partial(fastflownet_refine.FastFlowNetRefine, spoil=spoil),
        grow=grow,
        needs_weights=grow is None,
    )


def _comparing(
    name: str,
    mixture: dict[worlds.World, float],
    size: Batches,
    cooldown: float,
    init: Callable | None = None,
    teacher: str | None = None,
) -> Stage:
    """A stage for Light Flow: AdamW, of which a step takes half the time that Muon's takes and learns as much."""
    return Stage(
        name,
        (size,),
        learning_rate=2e-3,
        schedule=partial(schedules.warm_flat_cool, warmup=50, cooldown=cooldown),
        optimizer=adamw,
        weight_decay=1e-4,
        mixture=mixture,
        init=init,
        teacher=teacher,
        build=partial(lightflow.LightFlow, stored=True),
    )


def _refining(
    name: str,
    mixture: dict[worlds.World, float],
    *sizes: Batches,
    loss: Callable = losses.sequence,
    iterations: int | None = None,
    build: Callable[[], FlowModel] | None = None,
    initial_flow: str | None = None,
) -> Stage:
    """A stage for networks that refine: Muon, and a loss on several points of the way."""
    return Stage(
        name,
        sizes,
        learning_rate=0.006,
        schedule=partial(schedules.warm_flat_cool, warmup=50, cooldown=0.4),
        loss=loss,
        weight_decay=0.01,
        clip=1.0,
        ema=0.98,
        mixture=mixture,
        iterations=iterations,
        build=build,
        initial_flow=initial_flow,
    )


def _solving(
    name: str, mixture: dict[worlds.World, float], evaluations: int, *sizes: Batches, initial_flow: str | None = None
) -> Stage:
    """A stage for the small DEQ-Flow: so many evaluations, one-step gradients at three points of them."""
    equilibrium = equilibrium_of(deq_flow.PLAIN, evaluations, 3, 1)
    build = partial(deq_flow.deq_flow_tiny, equilibrium=equilibrium)
    return _refining(name, mixture, *sizes, loss=losses.correction, build=build, initial_flow=initial_flow)


GENERATED: dict[str, Recipe] = {
    "fastflownet_synthetic": Recipe(
        "fastflownet",
        (
            Stage(
                "generated",
                (Batches(6_000, 8, 192, 256), Batches(3_700, 5, 256, 512)),
                learning_rate=0.006,
                schedule=partial(schedules.warm_flat_cool, warmup=200, cooldown=0.25),
                weight_decay=0.01,
                init=init_as_matcher,
            ),
        ),
        "ours: generated pairs only, sized for an afternoon on two CPU cores",
    ),
    "fastflownet_wide": Recipe(
        "fastflownet",
        (
            Stage(
                "generated",
                (Batches(6_000, 4, 384, 640),),
                learning_rate=0.003,
                schedule=partial(schedules.warm_flat_cool, warmup=100, cooldown=0.6),
                loss=partial(losses.multi_scale, power=1.0),  # the EPE itself: large errors count in full
                weight_decay=0.01,
            ),
        ),
        "ours: large frames and motions, after fastflownet_synthetic (--start fastflownet)",
    ),
    "fastflownet_gpu": Recipe(
        "fastflownet",
        (
            Stage(
                "generated",
                (Batches(2_000, 96, 256, 320), Batches(1_000, 48, 384, 512)),
                learning_rate=0.004,
                schedule=partial(schedules.warm_flat_cool, warmup=100, cooldown=0.4),
                loss=partial(losses.multi_scale, power=1.0),
                weight_decay=0.01,
            ),
        ),
        "ours: minutes of one GPU, which makes the pairs too (--start fastflownet; benchmarks/gpu_run.py)",
    ),
    "fastflownet_refine_synthetic": Recipe(
        "fastflownet_refine",
        (
            _correcting(
                "corrects",
                Batches(10_000, 6, 192, 256),
                iterations=3,
                share=0.0,
                spoil=0.5,
                grow=fastflownet_refine.grow,
            ),
            _correcting("joins", Batches(40_000, 6, 256, 384), Batches(10_000, 6, 384, 512), cooldown=0.4),
        ),
        "ours: some days of one CPU core, from trained weights of FastFlowNet (--start fastflownet)",
    ),
    "lightflow_synthetic": Recipe(
        "lightflow",
        (
            _comparing("matches", SHAPES, Batches(1_000, 16, 128, 192), 0.0, lightflow.init_as_matcher),
            _comparing("widens", MODERATE, Batches(3_150, 8, 192, 320), 0.3),
        ),
        "ours: an hour on two CPU cores",
    ),
    "lightflow_distilled": Recipe(
        "lightflow",
        (
            _comparing("matches", SHAPES, Batches(1_000, 16, 128, 192), 0.0, lightflow.init_as_matcher, "fastflownet"),
            _comparing("widens", MODERATE, Batches(20_000, 16, 128, 192), 0.0, teacher="fastflownet"),
            _comparing("roams", worlds.MIXTURE, Batches(20_000, 8, 192, 320), 0.5, teacher="fastflownet"),
        ),
        "ours: half a million small pairs, ten hours of one CPU core",
    ),
    "liteflownet2_synthetic": Recipe(
        "liteflownet2",
        (
            _pyramid(
                "matches",
                SHAPES,
                Batches(750, 8, 128, 192),
                rate=0.006,
                decay=0.01,
                init=liteflownet2.init_as_matcher,
            ),
            _pyramid("roams", worlds.MIXTURE, Batches(620, 6, 256, 384), cooldown=0.4),
            _pyramid("sweeps", worlds.MIXTURE, Batches(1_000, 6, 256, 384), Batches(700, 4, 320, 576), cooldown=0.5),
            _pyramid("calms", CALM, Batches(600, 6, 256, 320), cooldown=0.5),
        ),
        "ours: some hours on two CPU cores",
    ),
    "raft_small_synthetic": Recipe(
        "raft_small",
        (
            _refining("matches", SHAPES, Batches(800, 8, 96, 128), iterations=6),
            _refining("widens", MODERATE, Batches(800, 6, 160, 224), iterations=8),
            _refining("roams", worlds.MIXTURE, Batches(1_500, 4, 256, 352), iterations=10),
            _refining("sweeps", worlds.MIXTURE, Batches(1_500, 4, 384, 512), iterations=10),
            _refining("follows", worlds.MIXTURE, Batches(1_000, 3, 384, 640), iterations=6, initial_flow="fastflownet"),
            _refining("calms", CALM, Batches(400, 4, 224, 288), iterations=8),
        ),
        "ours: some hours on two CPU cores",
    ),
    "deq_flow_tiny_synthetic": Recipe(
        "deq_flow_tiny",
        (
            _solving("matches", SHAPES, 12, Batches(600, 4, 96, 128)),
            _solving("settles", SHAPES, 36, Batches(1_500, 4, 96, 128)),
            _solving("widens", MODERATE, 24, Batches(1_700, 4, 160, 224)),
            _solving("roams", worlds.MIXTURE, 24, Batches(750, 4, 256, 352)),
            _solving("sweeps", worlds.MIXTURE, 24, Batches(1_500, 4, 256, 352), Batches(500, 3, 384, 512)),
            _solving("follows", worlds.MIXTURE, 24, Batches(1_000, 3, 384, 640), initial_flow="fastflownet"),
            _solving("calms", CALM, 24, Batches(400, 4, 224, 288)),
        ),
        "ours: some hours on two CPU cores",
    ),
}
