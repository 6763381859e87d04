"""The recipes: each can begin, its loss fits its network, and its schedule ends lower than it began."""

import inspect
import math

import pytest
import torch

from fleetflow.data.generate import generate
from fleetflow.models.flownet import start_stack
from fleetflow.models.weights import without_memory
from fleetflow.registry import models
from fleetflow.training.recipes import RECIPES, recipe
from fleetflow.training.recipes.flownet_family import FINAL
from fleetflow.types import FleetflowError, Sample

STAGES = {f"{name}/{stage.name}": (plan, stage) for name, plan in RECIPES.items() for stage in plan.stages}


def kind(plan, stage) -> str:
    """What decides whether a loss fits: the network as it is built, and the loss."""
    build = stage.build or models[stage.network or plan.network]
    return f"{getattr(build, 'func', build).__name__} {stage.build} {stage.loss}"


# One stage of each kind; the published widths of DEQ-Flow differ in nothing that a loss sees.
KINDS = {kind(plan, stage): key for key, (plan, stage) in STAGES.items() if not key.startswith(("deq_flow_h", "gma"))}


@pytest.mark.parametrize("key", KINDS.values())
def test_the_loss_fits_the_network(key):
    plan, stage = STAGES[key]
    torch.manual_seed(0)
    model = (stage.build or models[stage.network or plan.network])().train()
    sample = generate(1, 64, 128, seed=1)
    if stage.loss is FINAL:  # of a network that scales, for frames it does not divide
        sample = Sample(*(tensor[..., :50, :] for tensor in sample[:4]))
    with torch.no_grad():
        iterations = 2 if stage.iterations else None
        loss = stage.loss(model(sample.frame1, sample.frame2, iterations=iterations), sample)
    assert loss.ndim == 0 and math.isfinite(loss.item()) and loss.item() > 0
    assert stage.optimizer(model, stage.learning_rate, stage.weight_decay)


@pytest.mark.parametrize("key", STAGES)
def test_a_stage_is_whole(key):
    plan, stage = STAGES[key]
    network = without_memory(stage.network or plan.network)
    assert stage.steps > 0
    stride, fit = network.stride, network.fit
    for part in stage.batches:
        whole = part.height % stride == 0 == part.width % stride
        assert whole or (fit == "scale" and stage.loss is FINAL), f"{stride} does not divide {part}"
    factors = [stage.schedule(step, stage.steps) for step in (0, stage.steps // 2, stage.steps - 1)]
    assert 0 < factors[2] <= max(factors) <= 1
    assert all(source.folder and source.repeat > 0 for source in stage.sources)


FRAMES = {  # the smallest official frames, height and width
    "FlyingChairs_release": (384, 512),
    "ChairsSDHom": (384, 512),
    "FlyingThings3D": (540, 960),
    "FlyingThings3D_subset": (540, 960),
    "Sintel": (436, 1024),
    "KITTI2012": (370, 1224),
    "KITTI2015": (370, 1224),
    "HD1K": (1080, 2560),
}


@pytest.mark.parametrize("key", [key for key, (_, stage) in STAGES.items() if stage.sources])
def test_the_crop_fits_the_frames(key):
    stage = STAGES[key][1]
    for source in stage.sources:
        height, width = FRAMES[source.folder]
        for part in stage.batches:
            assert part.height <= height and part.width <= width, f"{part} is larger than {source.folder}"


SCALES = {  # RAFT's core/datasets.py: by stage and folder, the range of scales and whether frames are mirrored
    "chairs": {"FlyingChairs_release": (-0.1, 1.0, True)},
    "things": {"FlyingThings3D": (-0.4, 0.8, True)},
    "sintel": {
        "Sintel": (-0.2, 0.6, True),
        "KITTI2015": (-0.3, 0.5, True),
        "HD1K": (-0.5, 0.2, True),
        "FlyingThings3D": (-0.2, 0.6, True),
    },
    "kitti": {"KITTI2015": (-0.2, 0.4, False)},
}


@pytest.mark.parametrize("name", ["raft", "raft_small", "gma", "deq_flow_b", "deq_flow_h2_3x"])
def test_each_set_is_scaled_as_raft_scales_it(name):
    for stage in recipe(name).stages:
        found = {}
        for source in stage.sources:
            keys = inspect.signature(source.augment).parameters
            found[source.folder] = (*keys["scale"].default, keys["mirror"].default)
        assert found == SCALES[stage.name]


def test_fine_tuning_needs_weights():
    tuned = {key.split("/")[0] for key, (_, stage) in STAGES.items() if stage.needs_weights}
    expected = {name for name in RECIPES if name.endswith(("_sintel", "_kitti", "_mixed"))}
    assert tuned >= expected and not any(stage.needs_weights for stage in recipe("raft").stages)


def test_sparse_truth_is_never_interpolated():
    """Every fourth pixel of a frame of KITTI's size is known: of these, most must be left."""
    known = torch.zeros(1, 376, 1242, dtype=torch.bool)
    known[:, ::2, ::2] = True
    flow = torch.where(known[:, None], torch.ones(1, 2, 376, 1242), 0)
    sample = Sample(torch.rand(1, 3, 376, 1242), torch.rand(1, 3, 376, 1242), flow, known)
    ways = {
        (source.augment, stage.batches[0].height, stage.batches[0].width)
        for _, stage in STAGES.values()
        for source in stage.sources
        if source.folder.startswith("KITTI")
    }
    for augment, *size in ways:
        new = augment(sample, torch.Generator().manual_seed(0), tuple(size))
        assert new.valid.float().mean() > 0.1, augment


def terms(name: str) -> list[tuple[int, int, int]]:
    """Of each stage, the evaluations of the search, the terms of the loss and the steps that are differentiated."""
    found = [stage.build.keywords["equilibrium"] for stage in recipe(name).stages]
    return [(each.iterations, len(each.keep) + 1, each.gradient.steps) for each in found]


def test_published_figures():
    assert recipe("lightflow").stages[0].steps == 70_122
    rates = [recipe("lightflow").stages[0].schedule(174 * epoch, 70_122) for epoch in (0, 58, 174, 232, 289, 347)]
    assert [1e-3 * rate for rate in rates] == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4, 6.25e-5, 3.125e-5])
    assert [stage.name for stage in recipe("liteflownet2").stages][:5] == [
        "m6s6",
        "m6s6r6",
        "m5s5r5",
        "m4s4r4",
        "m3s3r3",
    ]
    lite = recipe("liteflownet2").stages
    assert [stage.steps for stage in lite] == [300_000, 300_000, 240_000, 240_000, 240_000, 500_000]
    assert [stage.learning_rate for stage in lite] == [1e-4, 1e-4, 1e-4, 1e-4, 6e-5, 3e-6]
    assert [lite[3].schedule(step, 240_000) for step in (119_999, 120_000, 239_999)] == [1, 1 / 2, 1 / 8]
    assert [stage.steps for stage in recipe("raft").stages] == [100_000, 100_000, 100_000, 50_000]
    assert terms("deq_flow_h") == [(42, 6, 1), (42, 6, 3), (42, 6, 3), (42, 6, 1)]
    assert terms("deq_flow_h2") == [(36, 6, 1), (40, 2, 3), (40, 2, 3), (40, 2, 3)]
    assert terms("deq_flow_b_one") == [(36, 6, 1), (40, 1, 1)]
    assert terms("deq_flow_h_one") == [(42, 6, 1), (37, 1, 1)]
    assert terms("deq_flow_h2_one") == [(36, 1, 1), (40, 1, 1)]
    assert [stage.steps for stage in recipe("deq_flow_h2_3x").stages][:2] == [120_000, 360_000]
    with pytest.raises(FleetflowError, match="did you mean"):
        recipe("raft_smal")


def test_a_stack_takes_what_it_is_made_of_and_trains_the_newest():
    torch.manual_seed(0)
    first, stack = models["flownet_c"](), models["flownet_cs"]()
    start_stack(stack, first)
    assert torch.equal(stack.flownetc.conv1[0].weight, first.conv1[0].weight)
    trained = {name.split(".")[0] for name, weight in stack.named_parameters() if weight.requires_grad}
    assert trained == {"flownets_1"}
    later = models["flownet_cs"]()
    start_stack(later, stack)
    assert all(torch.equal(a, b) for a, b in zip(later.state_dict().values(), stack.state_dict().values()))
    assert not later.flownetc.conv1[0].weight.requires_grad and later.flownets_1.conv1[0].weight.requires_grad
