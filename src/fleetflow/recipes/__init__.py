"""The experiments, one row each. `fleetflow recipes` lists them, `fleetflow train` runs them.

Rows called NETWORK_synthetic train on generated pairs and are ours; the others repeat published schedules on the data
sets, which lie below --root in folders of the names given here. Where a figure is not published, the row says so.
"""

from functools import partial

from fleetflow import losses, schedules
from fleetflow.data.augment.flownet import flownet
from fleetflow.data.augment.irr import irr, irr_kitti
from fleetflow.data.augment.lightflow import lightflow as lightflow_augment
from fleetflow.data.generate import worlds
from fleetflow.models import deq_flow
from fleetflow.models.fastflownet import start_as_matcher
from fleetflow.optimise import adam, adamw
from fleetflow.plan import Batches, Recipe, Stage
from fleetflow.recipes.flownet_family import flownet2_parts, liteflownet2_stages, pwc
from fleetflow.recipes.raft_family import deq_stages, equilibrium_of, raft_stages
from fleetflow.recipes.sources import CHAIRS_TEST, NO_CLIP, chairs
from fleetflow.registry import unknown

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


def _equilibrium_stage(name: str, batches: Batches, evaluations: int, mixture: dict[worlds.World, float]) -> Stage:
    return Stage(
        name,
        (batches,),
        learning_rate=0.006,
        schedule=partial(schedules.warm_flat_cool, warmup=50, cooldown=0.4),
        loss=losses.correction,
        weight_decay=0.01,
        clip=1.0,
        ema=0.98,
        mixture=mixture,
        build=partial(deq_flow.deq_flow_tiny, equilibrium=equilibrium_of(deq_flow.PLAIN, evaluations, 3, 1)),
    )


RECIPES: dict[str, Recipe] = {
    "fastflownet_synthetic": Recipe(
        "fastflownet",
        (
            Stage(
                "generated",
                (Batches(6_000, 8, 192, 256), Batches(3_700, 5, 256, 512)),
                learning_rate=0.006,
                schedule=partial(schedules.warm_flat_cool, warmup=200, cooldown=0.25),
                weight_decay=0.01,
                begin=start_as_matcher,
            ),
        ),
        "ours: generated pairs only, sized for an afternoon on two CPU cores",
    ),
    "fastflownet_wide": Recipe(
        "fastflownet",
        (
            Stage(
                "generated",
                (Batches(1_000, 4, 320, 640), Batches(6_000, 3, 384, 768)),
                learning_rate=0.004,
                schedule=partial(schedules.warm_flat_cool, warmup=100, cooldown=0.6),
                loss=partial(losses.multi_scale, power=1.0),  # the EPE itself: large errors count in full
                weight_decay=0.01,
            ),
        ),
        "ours: large frames and motions, after fastflownet_synthetic (--start fastflownet)",
    ),
    "lightflow_synthetic": Recipe(
        "lightflow",
        (
            Stage(
                "generated",
                (Batches(8_000, 8, 192, 256),),
                learning_rate=1e-3,
                schedule=partial(schedules.warm_flat_cool, warmup=200, cooldown=0.3),
                optimiser=adamw,
                weight_decay=1e-4,
            ),
        ),
        "ours",
    ),
    "liteflownet2_synthetic": Recipe(
        "liteflownet2",
        (
            Stage(
                "generated",
                (Batches(10_000, 8, 256, 384),),
                learning_rate=4e-4,
                schedule=partial(schedules.warm_flat_cool, warmup=500, cooldown=0.3),
                loss=partial(losses.multi_scale, weights=(0.25, 0.25, 0.25)),
                optimiser=adamw,
                weight_decay=1e-4,
            ),
        ),
        "ours, for a GPU",
    ),
    "raft_small_synthetic": Recipe(
        "raft_small",
        (
            Stage(
                "generated",
                (Batches(100_000, 12, 320, 512),),
                learning_rate=4e-4,
                schedule=schedules.one_cycle,
                loss=losses.sequence,
                optimiser=adamw,
                weight_decay=1e-4,
                clip=1.0,
                refinements=12,
            ),
        ),
        "ours, for a GPU",
    ),
    "deq_flow_tiny_synthetic": Recipe(
        "deq_flow_tiny",
        (
            _equilibrium_stage("matches", Batches(600, 4, 96, 128), 12, SHAPES),
            _equilibrium_stage("settles", Batches(1_500, 4, 96, 128), 36, SHAPES),
            _equilibrium_stage("widens", Batches(1_700, 4, 160, 224), 24, MODERATE),
            _equilibrium_stage("roams", Batches(750, 4, 256, 352), 24, worlds.MIXTURE),
        ),
        "ours: some hours on two CPU cores",
    ),
    "lightflow": Recipe(
        "lightflow",
        (
            Stage(
                "chairs",
                (Batches(403 * 174, 128, 320, 448),),
                learning_rate=1e-3,
                schedule=schedules.lightflow,
                loss=losses.lightflow,
                optimiser=partial(adam, bias_decay=0.0),
                weight_decay=4e-5,
                clip=NO_CLIP,
                ema=0,
                sources=(chairs(lightflow_augment),),
                validation=CHAIRS_TEST,
            ),
        ),
        "McDo/LightFlowPytorch: 403 epochs of 174 batches, 64 pairs on each of two GPUs",
    ),
    **pwc("fastflownet", irr, irr_kitti, "ICRA 2021, which names PWC-Net's and IRR-PWC's training"),
    **pwc("pwcnet", flownet, irr_kitti, "arXiv 1709.02371"),
    **liteflownet2_stages(),
    **flownet2_parts(),
    **raft_stages("raft", "arXiv 2003.12039, train_standard.sh"),
    **raft_stages("raft_small", "arXiv 2003.12039; the schedule of raft"),
    **raft_stages(
        "gma",
        "arXiv 2104.02409, train.sh; the batch of the last two stages is that of Things",
        steps=(120_000, 120_000, 120_000, 50_000),
        batches=(8, 6, 6, 6),
        rates=(2.5e-4, 1.25e-4, 1.25e-4, 1.25e-4),
    ),
    **deq_stages("deq_flow_b", deq_flow.deq_flow_b, deq_flow.ANDERSON, "arXiv 2204.08442, v1"),
    **deq_stages(
        "deq_flow_h",
        deq_flow.deq_flow_h,
        deq_flow.BROYDEN,
        "arXiv 2204.08442, v1, train_H_full.sh",
        terms=((36, 6, 1), (36, 6, 3), (36, 6, 3), (36, 6, 1)),
    ),
    **deq_stages(
        "deq_flow_h2", deq_flow.deq_flow_h2, deq_flow.PLAIN, "locuslab/deq-flow v2, 1x, whose scripts end with Things"
    ),
    **deq_stages(
        "deq_flow_h2_3x",
        deq_flow.deq_flow_h2,
        deq_flow.PLAIN,
        "locuslab/deq-flow v2, 3x, whose scripts end with Things",
        things=360_000,
    ),
    **deq_stages(
        "deq_flow_b_one",
        deq_flow.deq_flow_b,
        deq_flow.ANDERSON,
        "v1, train_B_demo.sh: one-step gradient and one term on Things",
        things=100_000,
        terms=((36, 6, 1), (40, 1, 1)),
    ),
    **deq_stages(
        "deq_flow_h_one",
        deq_flow.deq_flow_h,
        deq_flow.BROYDEN,
        "v1, train_H_demo.sh: one-step gradient and one term on Things",
        terms=((36, 6, 1), (36, 1, 1)),
    ),
    **deq_stages(
        "deq_flow_h2_one",
        deq_flow.deq_flow_h2,
        deq_flow.PLAIN,
        "v2, train_H_1_step_grad.sh: one-step gradient and one term",
        terms=((36, 1, 1), (40, 1, 1)),
    ),
}


def recipe(name: str) -> Recipe:
    """Returns the recipe called `name`; raises FleetflowError for an unknown name."""
    if name not in RECIPES:
        raise unknown("recipe", name, sorted(RECIPES))
    return RECIPES[name]
