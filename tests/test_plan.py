"""What `fleetflow recipes` prints of a stage tells it from every other."""

import itertools
from dataclasses import replace
from functools import partial

import pytest

from fleetflow.data.augment.raft import raft
from fleetflow.data.datasets.sintel import sintel
from fleetflow.data.generate import worlds
from fleetflow.models.deq_flow import ANDERSON, deq_flow_b
from fleetflow.training import losses, schedules
from fleetflow.training.optimizers import adam, adamw
from fleetflow.training.recipe import Batches, Source, Stage
from fleetflow.training.recipes import RECIPES, recipe
from fleetflow.training.recipes.describe import described

STAGES = {f"{name}/{stage.name}": stage for name, plan in RECIPES.items() for stage in plan.stages}


def test_recipes_that_differ_are_described_differently():
    for (one, first), (other, second) in itertools.combinations(RECIPES.items(), 2):
        if repr(first.stages) != repr(second.stages):  # partials are equal to themselves alone, but print alike
            lines = ([described(stage) for stage in plan.stages] for plan in (first, second))
            assert next(lines) != next(lines), f"{one} and {other} look alike"
    for (one, first), (other, second) in itertools.combinations(STAGES.items(), 2):
        first, second = (replace(stage, validation=(), validate_every=0) for stage in (first, second))
        assert (repr(first) == repr(second)) == (described(first) == described(second)), f"{one} and {other}"


@pytest.mark.parametrize("key", STAGES)
def test_two_lines_a_stage(key):
    lines = described(STAGES[key]).split("\n")
    assert len(lines) == 2 and lines[0].startswith(key.split("/")[1]) and max(map(len, lines)) <= 280
    assert "functools" not in "".join(lines) and "<" not in "".join(lines)


CHANGES = {
    "batches": (Batches(5, 2, 64, 64), Batches(5, 2, 64, 128)),
    "learning_rate": 2e-4,
    "schedule": partial(schedules.multi_step, milestones=(4, 8)),
    "loss": partial(losses.sequence, gamma=0.85),
    "optimizer": partial(adam, bias_decay=0.0),
    "weight_decay": 0.1,
    "clip": 1.0,
    "ema": 0.0,
    "sources": (Source(sintel, "Sintel"),),
    "mixture": {worlds.shapes_world: 1.0},
    "freeze_norm": True,
    "iterations": 7,
    "network": "raft",
    "build": partial(deq_flow_b, equilibrium=ANDERSON),
    "initial_flow": "fastflownet",
    "teacher": "fastflownet",
    "init": partial(print, "weights"),
    "grow": print,
    "needs_weights": True,
    "generated_every": 4,
    "echo": 2,
    "keep_best": True,
}


def test_every_field_of_a_stage_is_described():
    stage = Stage("first", (Batches(10, 2, 64, 64),), 1e-4, schedules.constant)
    unsaid = {"name", "validation", "validate_every"}
    assert set(CHANGES) | unsaid == set(Stage.__dataclass_fields__)
    for name, value in CHANGES.items():
        assert described(replace(stage, **{name: value})) != described(stage), name


@pytest.mark.parametrize(
    "change", [{"iterations": 30}, {"keep": (6,)}, {"gradient": replace(ANDERSON.gradient, steps=3)}]
)
def test_an_equilibrium_is_described(change):
    stage = recipe("deq_flow_b").stages[0]
    other = partial(deq_flow_b, equilibrium=replace(stage.build.keywords["equilibrium"], **change))
    assert described(replace(stage, build=other)) != described(stage)


def test_what_is_said():
    chairs, things, mixed, _ = (described(stage) for stage in recipe("deq_flow_h2").stages)
    assert "Picard, 36 evaluations, 6 loss terms, 1 phantom step  " not in things and "clip 1 " in chairs
    assert "Picard, 40 evaluations, 2 loss terms, 3 phantom steps, through the flow" in things
    assert "FlyingThings3D clean + final (raft scale -0.4 0.8)" in things and "correction gamma 0.8" in things
    assert "Sintel clean + final x100 (raft scale -0.2 0.6); KITTI2015 x200 (raft_sparse" in mixed
    first = described(recipe("pwcnet").stages[0])
    assert "s_long milestones 400k 600k 800k 1000k, of 1200k" in first and "no clip" in first and "EMA" not in first
    assert "rate 3e-05 pwcnet_sintel  " in described(recipe("pwcnet_sintel").stages[0])
    assert "adam bias_decay 0, decay 4e-05" in described(recipe("lightflow").stages[0])
    assert "multi_step milestones 120k 160k 200k, of 240k" in described(recipe("liteflownet2").stages[2])
    stage = replace(recipe("raft_small_synthetic").stages[0], optimizer=adamw, loss=losses.sequence)
    assert "EMA 0.98  6 iterations\n" in described(stage)
    assert described(stage).endswith("sequence  generated pairs: shapes 0.9, blank 0.1")
    told = (Source(partial(sintel, split="train", render="clean"), "Sintel", 3, partial(raft, mirror=False)),)
    assert described(replace(stage, sources=told)).endswith("sequence  Sintel train clean x3 (raft no mirror)")
