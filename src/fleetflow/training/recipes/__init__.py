"""The experiments, one row each. `fleetflow recipes` lists them, `fleetflow train` runs them.

The rows of `generated` are ours; the others repeat published schedules on the data
sets, which lie below --root in folders of the names given here. Where a figure is not published, the row says so.
"""

from functools import partial

from fleetflow.data.augment.flownet import flownet
from fleetflow.data.augment.irr import irr, irr_kitti
from fleetflow.data.augment.lightflow import lightflow as lightflow_augment
from fleetflow.models import deq_flow
from fleetflow.registry import unknown
from fleetflow.training import losses, schedules
from fleetflow.training.optimizers import adam
from fleetflow.training.recipe import Batches, Recipe, Stage
from fleetflow.training.recipes.flownet_family import flownet2_parts, liteflownet2_stages, pwc
from fleetflow.training.recipes.generated import GENERATED
from fleetflow.training.recipes.raft_family import deq_stages, raft_stages
from fleetflow.training.recipes.sources import CHAIRS_TEST, NO_CLIP, chairs

RECIPES: dict[str, Recipe] = {
    **GENERATED,
    "lightflow": Recipe(
        "lightflow",
        (
            Stage(
                "chairs",
                (Batches(403 * 174, 128, 320, 448),),
                learning_rate=1e-3,
                schedule=schedules.lightflow,
                loss=losses.lightflow,
                optimizer=partial(adam, bias_decay=0.0),
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
