"""The recipes: each can begin, its loss fits its network, and its schedule ends lower than it began."""

import math

import pytest
import torch

from fleetflow.data.generate import generate
from fleetflow.models.flownet import start_stack
from fleetflow.recipes import RECIPES, recipe
from fleetflow.registry import models
from fleetflow.types import FleetflowError

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
    sample = generate(1, 128, 128, seed=1)
    with torch.no_grad():
        steps = 2 if stage.refinements else None
        loss = stage.loss(model(sample.frame1, sample.frame2, steps=steps), sample)
    assert loss.ndim == 0 and math.isfinite(loss.item()) and loss.item() > 0
    assert stage.optimiser(model, stage.learning_rate, stage.weight_decay)


@pytest.mark.parametrize("key", STAGES)
def test_a_stage_is_whole(key):
    plan, stage = STAGES[key]
    network = models[stage.network or plan.network]
    assert network and stage.steps > 0
    with torch.device("meta"):
        stride = network().stride
    for part in stage.batches:
        assert part.height % stride == 0 == part.width % stride, f"{stride} does not divide {part}"
    factors = [stage.schedule(step, stage.steps) for step in (0, stage.steps // 2, stage.steps - 1)]
    assert 0 < factors[2] <= max(factors) <= 1
    assert all(source.folder and source.repeat > 0 for source in stage.sources)


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
    assert [stage.steps for stage in recipe("raft").stages] == [100_000, 100_000, 100_000, 50_000]
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
