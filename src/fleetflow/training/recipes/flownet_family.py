"""Recipes of FlowNet and its descendants: Adam, flow / 20, a loss on every level."""

from dataclasses import replace
from functools import partial

from fleetflow.data.augment.flownet import flownet
from fleetflow.data.augment.liteflownet2 import JITTER, liteflownet2, liteflownet2_kitti, liteflownet2_sintel
from fleetflow.data.datasets.flyingchairs import chairs_sdhom
from fleetflow.data.datasets.hd1k import hd1k
from fleetflow.data.datasets.sintel import sintel
from fleetflow.models.flownet import start_stack
from fleetflow.models.liteflownet2 import grow
from fleetflow.training import losses, schedules
from fleetflow.training.optimizers import adam
from fleetflow.training.recipe import Augment, Batches, Recipe, Source, Stage
from fleetflow.training.recipes.sources import (
    CHAIRS_TEST,
    KITTI_TEST,
    NO_CLIP,
    SINTEL_TEST,
    chairs,
    kitti_both,
    sintel_both,
    subset,
    things,
)

FLOWNET2 = partial(losses.pyramid, weights=losses.FLOWNET2)
FLOWNET_SD = partial(losses.pyramid, weights=losses.FLOWNET2, unit=1 / 20)
FUSED = partial(losses.pyramid, weights=(0.0, 0.0, 1.0), mean=True)  # the fused flow alone
FINAL = partial(losses.pyramid, weights=(1.0,), mean=True)  # the same, where frames are scaled: without steps
PWC_FINE = partial(losses.pyramid, weights=losses.FLOWNET2, measure=losses.robust, compare=losses.at_known)
LITE_LATER = partial(schedules.multi_step, milestones=(120_000, 160_000, 200_000), of=240_000)


def pwc(network: str, first: Augment, sparse: Augment, source: str) -> dict[str, Recipe]:
    """PWC-Net's schedule (arXiv 1709.02371, section 4): Chairs, Things, then each fine-tuning from --start."""
    base = Stage(
        "chairs",
        (Batches(1_200_000, 8, 384, 448),),
        learning_rate=1e-4,
        schedule=schedules.s_long,
        loss=FLOWNET2,
        optimizer=adam,
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
    tuned = replace(fine, learning_rate=3e-5, schedule=schedules.pwcnet_sintel, loss=PWC_FINE, needs_weights=True)
    on_sintel = replace(tuned, name="sintel", batches=(Batches(300_000, 4, 384, 768),), sources=sintel_both(first))
    on_kitti = replace(
        tuned, name="kitti", batches=(Batches(300_000, 4, 320, 896),), sources=kitti_both(sparse), validation=KITTI_TEST
    )
    mixed = replace(
        on_sintel,
        name="mixed",
        batches=(Batches(300_000, 4, 320, 768),),  # frames of KITTI are 370 rows high
        sources=(*sintel_both(first, 10), *kitti_both(sparse), Source(hd1k, "HD1K", augment=sparse)),
    )
    return {
        network: Recipe(network, (base, second), source),
        f"{network}_sintel": Recipe(network, (on_sintel,), f"{source}; after {network}"),
        f"{network}_kitti": Recipe(network, (on_kitti,), f"{source}; after {network}"),
        f"{network}_mixed": Recipe(network, (mixed,), f"{source}; the mixture is ours; after {network}"),
    }


def liteflownet2_stages() -> dict[str, Recipe]:
    """mmflow's configurations: five stages on Chairs, then Things, then Sintel with KITTI, then KITTI alone."""
    base = Stage(
        "m6s6",
        (Batches(300_000, 8, 320, 448),),
        learning_rate=1e-4,
        schedule=schedules.liteflownet2_pre,
        loss=partial(losses.pyramid, weights=losses.LITEFLOWNET2[:1]),
        optimizer=adam,
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
    later[1:] = [replace(stage, batches=(Batches(240_000, 8, 320, 448),), schedule=LITE_LATER) for stage in later[1:]]
    later[-1] = replace(later[-1], learning_rate=6e-5)
    last = replace(later[-1], grow=None, learning_rate=5e-5)
    on_things = replace(
        last,
        name="things",
        batches=(Batches(500_000, 8, 384, 768),),
        learning_rate=3e-6,
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
        needs_weights=True,
    )
    on_sintel = replace(
        tuned,
        name="sintel",
        batches=(Batches(600_000, 4, 320, 768),),
        schedule=schedules.liteflownet2_sintel,
        sources=(*sintel_both(liteflownet2_sintel), *kitti_both(partial(liteflownet2_kitti, jitter=JITTER))),
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
        "liteflownet2_kitti": Recipe("liteflownet2", (on_kitti,), f"{source}; after liteflownet2_sintel"),
    }


def flownet2_parts() -> dict[str, Recipe]:
    """FlowNet 2.0 (arXiv 1612.01925): SD on ChairsSDHom; C, CS, CSS, each on Chairs, then Things; then the fusion."""
    base = Stage(
        "c",
        (Batches(1_200_000, 8, 320, 448),),
        learning_rate=1e-4,
        schedule=schedules.s_long,
        loss=FLOWNET2,
        optimizer=adam,
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
        batches=(Batches(40_000, 4, 436, 1024),),
        learning_rate=1e-5,
        schedule=schedules.constant,
        loss=FINAL,
        sources=(Source(partial(sintel, split="train", render="clean"), "Sintel"),),
        validation=(Source(partial(sintel, split="val", render="clean"), "Sintel"),),
        validate_every=2_000,
        needs_weights=True,
    )
    fusion = on_things(replace(base, name="fusion", network="flownet2", loss=FUSED, grow=start_stack))
    source = "arXiv 1612.01925"
    return {
        "flownet2_sd": Recipe("flownet_sd", (sd,), source),
        "flownet2_css": Recipe(
            "flownet_css", tuple(step for stage in (base, *stack) for step in (stage, on_things(stage))), source
        ),
        "flownet2": Recipe("flownet2", (fusion,), f"{source}; --start flownet_css:A flownet_sd:B"),
        "flownet2_sintel": Recipe("flownet2", (tune,), "ours; after flownet2; six scenes are held back"),
    }
