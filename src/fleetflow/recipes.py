"""The experiments, one row each. `fleetflow recipes` lists them, `fleetflow train` runs them.

Rows called NETWORK_synthetic train on generated pairs and are ours; the others repeat published schedules on the data
sets, which lie below --root in folders of the names given here. Where a figure is not published, the row says so.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fleetflow import losses, schedules
from fleetflow.data.augment.flownet import flownet
from fleetflow.data.augment.irr import irr, irr_kitti
from fleetflow.data.augment.lightflow import lightflow as lightflow_augment
from fleetflow.data.augment.liteflownet2 import liteflownet2, liteflownet2_kitti, liteflownet2_sintel
from fleetflow.data.augment.raft import raft, raft_sparse
from fleetflow.data.flyingchairs import chairs_sdhom, flyingchairs
from fleetflow.data.flyingthings import flyingthings3d, flyingthings3d_subset
from fleetflow.data.hd1k import hd1k
from fleetflow.data.kitti import kitti2012, kitti2015
from fleetflow.data.sintel import sintel
from fleetflow.deq import Phantom
from fleetflow.models import deq_flow
from fleetflow.models.fastflownet import start_as_matcher
from fleetflow.models.flownet import start_stack
from fleetflow.models.liteflownet2 import grow
from fleetflow.optimise import adam, adamw
from fleetflow.plan import Augment, Batches, Recipe, Source, Stage
from fleetflow.registry import unknown

# ---- data sets, in the folders below --root ----

NO_CLIP = math.inf


def chairs(augment: Augment, split: str = "train") -> Source:
    return Source(partial(flyingchairs, split=split), "FlyingChairs_release", augment=augment)


def things(augment: Augment, *renders: str) -> tuple[Source, ...]:
    return tuple(Source(partial(flyingthings3d, render=name), "FlyingThings3D", augment=augment) for name in renders)


def subset(augment: Augment) -> tuple[Source, ...]:
    return (Source(flyingthings3d_subset, "FlyingThings3D_subset", augment=augment),)


def sintel_both(augment: Augment, repeat: int = 1) -> tuple[Source, ...]:
    return tuple(Source(partial(sintel, render=name), "Sintel", repeat, augment) for name in ("clean", "final"))


def kitti_both(augment: Augment) -> tuple[Source, ...]:
    return (
        Source(kitti2012, "KITTI2012", augment=augment),
        Source(kitti2015, "KITTI2015", augment=augment),
    )


CHAIRS_TEST = (Source(partial(flyingchairs, split="val"), "FlyingChairs_release"),)
SINTEL_TEST = (Source(partial(sintel, render="final"), "Sintel"),)
KITTI_TEST = (Source(kitti2015, "KITTI2015"),)

# ---- FlowNet and its descendants: Adam, flow / 20, a loss on every level ----

FLOWNET2 = partial(losses.pyramid, weights=losses.FLOWNET2)
FLOWNET_SD = partial(losses.pyramid, weights=losses.FLOWNET2, unit=1 / 20)
FUSED = partial(losses.pyramid, weights=(0.0, 0.0, 1.0), mean=True)  # the fused flow alone
PWC_FINE = partial(losses.pyramid, weights=losses.FLOWNET2, measure=losses.robust, compare=losses.at_known)
LITE = partial(losses.pyramid, weights=losses.LITEFLOWNET2[:4])


def _pwc(network: str, first: Augment, sparse: Augment, source: str) -> dict[str, Recipe]:
    """PWC-Net's schedule (arXiv 1709.02371, section 4): Chairs, Things, then each fine-tuning from --start."""
    base = Stage(
        "chairs",
        (Batches(1_200_000, 8, 384, 448),),
        learning_rate=1e-4,
        schedule=schedules.s_long,
        loss=FLOWNET2,
        optimiser=adam,
        weight_decay=4e-4,
        clip=NO_CLIP,
        ema=0,
        sources=(chairs(first),),
        validation=CHAIRS_TEST,
    )
    fine = replace(base, learning_rate=1e-5, schedule=schedules.s_fine, validation=SINTEL_TEST)
    second = replace(
        fine, name="things", batches=(Batches(500_000, 4, 384, 768),), sources=things(first, "clean", "final")
    )
    tuned = replace(fine, learning_rate=3e-5, schedule=schedules.pwcnet_sintel, loss=PWC_FINE)
    on_sintel = replace(tuned, name="sintel", batches=(Batches(300_000, 4, 384, 768),), sources=sintel_both(first))
    on_kitti = replace(
        tuned, name="kitti", batches=(Batches(300_000, 4, 320, 896),), sources=kitti_both(sparse), validation=KITTI_TEST
    )
    mixed = replace(
        on_sintel,
        name="mixed",
        sources=(*sintel_both(first, 10), *kitti_both(sparse), Source(hd1k, "HD1K", augment=sparse)),
    )
    return {
        network: Recipe(network, (base, second), source),
        f"{network}_sintel": Recipe(network, (on_sintel,), f"{source}; after {network}"),
        f"{network}_kitti": Recipe(network, (on_kitti,), f"{source}; after {network}"),
        f"{network}_mixed": Recipe(network, (mixed,), f"{source}; the mixture is ours; after {network}"),
    }


def _liteflownet2() -> dict[str, Recipe]:
    """mmflow's configurations: five stages on Chairs, then Things, then Sintel with KITTI, or KITTI alone."""
    base = Stage(
        "m6s6",
        (Batches(300_000, 8, 320, 448),),
        learning_rate=1e-4,
        schedule=schedules.liteflownet2_pre,
        loss=partial(losses.pyramid, weights=losses.LITEFLOWNET2[:1]),
        optimiser=adam,
        weight_decay=4e-4,
        clip=NO_CLIP,
        ema=0,
        sources=(chairs(liteflownet2),),
        network="liteflownet2_m6s6",
        validation=CHAIRS_TEST,
    )
    levels = (("m6s6r6", 1), ("m5s5r5", 2), ("m4s4r4", 3), ("m3s3r3", 4))
    later = [
        replace(
            base,
            name=name,
            network="liteflownet2" if name == "m3s3r3" else f"liteflownet2_{name}",
            loss=partial(losses.pyramid, weights=losses.LITEFLOWNET2[:count]),
            grow=grow,
        )
        for name, count in levels
    ]
    last = replace(later[-1], grow=None, learning_rate=5e-5)
    on_things = replace(
        last,
        name="things",
        batches=(Batches(500_000, 4, 384, 768),),
        schedule=schedules.s_fine,
        sources=subset(liteflownet2),
        validation=SINTEL_TEST,
    )
    tuned = replace(
        last,
        loss=partial(
            losses.pyramid,
            weights=losses.LITEFLOWNET2,
            measure=losses.charbonnier,
            compare=losses.enlarged,
        ),
    )
    on_sintel = replace(
        tuned,
        name="sintel",
        batches=(Batches(600_000, 4, 320, 768),),
        schedule=schedules.liteflownet2_sintel,
        sources=(*sintel_both(liteflownet2_sintel), *kitti_both(liteflownet2_sintel)),
        validation=SINTEL_TEST,
    )
    on_kitti = replace(
        tuned,
        name="kitti",
        batches=(Batches(500_000, 4, 320, 896),),
        schedule=schedules.liteflownet2_kitti,
        sources=kitti_both(liteflownet2_kitti),
        validation=KITTI_TEST,
    )
    source = "arXiv 1903.07414, as mmflow trains it"
    return {
        "liteflownet2": Recipe("liteflownet2", (base, *later, on_things), source),
        "liteflownet2_sintel": Recipe("liteflownet2", (on_sintel,), f"{source}; after liteflownet2"),
        "liteflownet2_kitti": Recipe("liteflownet2", (on_kitti,), f"{source}; after liteflownet2"),
    }


def _flownet2() -> dict[str, Recipe]:
    """FlowNet 2.0 (arXiv 1612.01925): SD on ChairsSDHom; C, CS, CSS, each on Chairs, then Things; then the fusion."""
    base = Stage(
        "c",
        (Batches(1_200_000, 8, 320, 448),),
        learning_rate=1e-4,
        schedule=schedules.s_long,
        loss=FLOWNET2,
        optimiser=adam,
        weight_decay=4e-4,
        clip=NO_CLIP,
        ema=0,
        sources=(chairs(flownet),),
        network="flownet_c",
        validation=CHAIRS_TEST,
    )

    def on_things(stage: Stage) -> Stage:
        size = (Batches(500_000, 4, 384, 768),)
        return replace(
            stage, name=f"{stage.name}-things", batches=size, learning_rate=1e-5, schedule=schedules.s_fine,
            sources=things(flownet, "clean"),
        )  # fmt: skip

    stack = [replace(base, name=name, network=f"flownet_{name}", grow=start_stack) for name in ("cs", "css")]
    sd = replace(
        base,
        name="sd",
        network="flownet_sd",
        sources=(Source(chairs_sdhom, "ChairsSDHom", augment=flownet),),
        loss=FLOWNET_SD,
        validation=(),
    )
    tune = replace(
        base,
        name="sintel",
        network="flownet2",
        batches=(Batches(40_000, 4, 384, 1024),),
        learning_rate=1e-5,
        schedule=schedules.constant,
        loss=FUSED,
        sources=(Source(partial(sintel, render="clean"), "Sintel"),),
        validation=SINTEL_TEST,
        validate_every=2_000,
    )
    fusion = on_things(replace(base, name="fusion", network="flownet2", loss=FUSED, grow=start_stack))
    source = "arXiv 1612.01925"
    return {
        "flownet2_sd": Recipe("flownet_sd", (sd,), source),
        "flownet2_css": Recipe(
            "flownet_css", tuple(step for stage in (base, *stack) for step in (stage, on_things(stage))), source
        ),
        "flownet2": Recipe("flownet2", (fusion,), f"{source}; --start flownet_css:A --start flownet_sd:B"),
        "flownet2_sintel": Recipe("flownet2", (tune,), "fine-tuning; 436 rows are cut to 384, a multiple of 64"),
    }


# ---- RAFT and its descendants: AdamW, one cycle, a loss on every full-resolution flow ----


def _raft(
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
    refinements: int | None = 12,
) -> dict[str, Recipe]:
    """RAFT's four stages (arXiv 2003.12039, code): Chairs, Things, Sintel + KITTI + HD1K, KITTI."""
    network = network or name
    first = Stage(
        "chairs",
        (Batches(steps[0], batches[0], 368, 496),),
        learning_rate=rates[0],
        schedule=schedules.one_cycle,
        loss=partial(loss, gamma=0.8),
        optimiser=adamw,
        weight_decay=decay[0],
        clip=1.0,
        ema=0,
        sources=(chairs(raft),),
        refinements=refinements,
        build=build[0],
        validation=CHAIRS_TEST,
    )
    second = replace(
        first,
        name="things",
        batches=(Batches(steps[1], batches[1], 400, 720),),
        learning_rate=rates[1],
        sources=things(raft, "clean", "final"),
        freeze_norm=True,
        build=build[1],
        validation=(*SINTEL_TEST, *KITTI_TEST),
    )
    third = replace(
        second,
        name="sintel",
        batches=(Batches(steps[2], batches[2], 368, 768),),
        learning_rate=rates[2],
        loss=partial(loss, gamma=fine),
        weight_decay=decay[1],
        sources=(
            *sintel_both(raft, 100),
            Source(kitti2015, "KITTI2015", 200, raft_sparse),
            Source(hd1k, "HD1K", 5, raft_sparse),
            *things(raft, "clean"),
        ),
        build=build[2],
    )
    fourth = replace(
        third,
        name="kitti",
        batches=(Batches(steps[3], batches[3], 288, 960),),
        learning_rate=rates[3],
        sources=(Source(kitti2015, "KITTI2015", 1, raft_sparse),),
        build=build[3],
        validation=KITTI_TEST,
    )
    return {name: Recipe(network, (first, second, third, fourth), source)}


def _equilibrium(plain: deq_flow.Equilibrium, steps: int, terms: int, phantom: int) -> deq_flow.Equilibrium:
    """A training equilibrium: `steps` evaluations, the loss on `terms` evenly spaced points of the way."""
    keep = tuple(steps // terms * k for k in range(1, terms))
    return replace(plain, steps=steps, keep=keep, gradient=Phantom(phantom), through_flow=plain is deq_flow.PLAIN)


def _deq(
    name: str,
    network: Callable,
    plain: deq_flow.Equilibrium,
    source: str,
    *,
    things: int = 120_000,
    one: bool = False,
) -> dict[str, Recipe]:
    """DEQ-Flow (arXiv 2204.08442, code): Chairs with six terms, then two; `one`: the one-step gradient throughout."""
    begin = partial(network, equilibrium=_equilibrium(plain, 36, 6, 1))
    rest = partial(network, equilibrium=_equilibrium(plain, 40, 2, 1 if one else 3))
    return _raft(
        name,
        source,
        network=network.__name__,
        steps=(120_000, things, 120_000, 50_000),
        batches=(12, 6, 6, 6),
        loss=losses.correction,
        fine=0.9,
        decay=(1e-4, 1e-4),
        build=(begin, rest, rest, rest),
        refinements=None,
    )


# ---- the rows ----

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
                (Batches(5_500, 4, 320, 640),),
                learning_rate=0.004,
                schedule=partial(schedules.warm_flat_cool, warmup=100, cooldown=0.35),
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
            Stage(
                "generated",
                (Batches(600, 4, 192, 256),),
                learning_rate=6e-4,
                schedule=partial(schedules.warm_flat_cool, warmup=50, cooldown=0.3),
                loss=losses.correction,
                optimiser=adamw,
                weight_decay=1e-4,
                clip=1.0,
                ema=0.99,
                build=partial(deq_flow.deq_flow_tiny, equilibrium=_equilibrium(deq_flow.PLAIN, 12, 3, 1)),
            ),
        ),
        "ours: some hundred steps on a CPU",
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
    **_pwc("fastflownet", irr, irr_kitti, "ICRA 2021, which names PWC-Net's and IRR-PWC's training"),
    **_pwc("pwcnet", flownet, irr_kitti, "arXiv 1709.02371"),
    **_liteflownet2(),
    **_flownet2(),
    **_raft("raft", "arXiv 2003.12039, train_standard.sh"),
    **_raft("raft_small", "arXiv 2003.12039; the schedule of raft"),
    **_raft(
        "gma",
        "arXiv 2104.02409, train.sh; the batch of the last two stages is that of Things",
        steps=(120_000, 120_000, 120_000, 50_000),
        batches=(8, 6, 6, 6),
        rates=(2.5e-4, 1.25e-4, 1.25e-4, 1.25e-4),
    ),
    **_deq("deq_flow_b", deq_flow.deq_flow_b, deq_flow.ANDERSON, "arXiv 2204.08442, v1"),
    **_deq("deq_flow_h", deq_flow.deq_flow_h, deq_flow.BROYDEN, "arXiv 2204.08442, v1"),
    **_deq("deq_flow_h2", deq_flow.deq_flow_h2, deq_flow.PLAIN, "locuslab/deq-flow v2, 1x"),
    **_deq("deq_flow_h2_3x", deq_flow.deq_flow_h2, deq_flow.PLAIN, "locuslab/deq-flow v2, 3x", things=360_000),
    **_deq("deq_flow_b_one", deq_flow.deq_flow_b, deq_flow.ANDERSON, "v1, one-step gradient", one=True),
}


def recipe(name: str) -> Recipe:
    """Returns the recipe called `name`; raises FleetflowError for an unknown name."""
    if name not in RECIPES:
        raise unknown("recipe", name, sorted(RECIPES))
    return RECIPES[name]
