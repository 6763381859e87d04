"""Distillation: what a sample becomes, and that a stage with a teacher learns its flow."""

import dataclasses

import pytest
import torch
from torch import nn

from fleetflow.data.generate import generate
from fleetflow.data.generate.worlds import blank_world
from fleetflow.models import weights
from fleetflow.models.base import FlowModel
from fleetflow.registry import models
from fleetflow.training import loop, losses, schedules
from fleetflow.training.distill import TRUSTED, taught
from fleetflow.training.optimizers import adamw
from fleetflow.training.recipe import Batches, Recipe, Stage
from fleetflow.training.recipes import RECIPES, recipe
from fleetflow.types import Prediction


class Constant(FlowModel):
    """Says the same flow at every pixel, which can be learned."""

    stride, fit = 1, "pad"

    def __init__(self, right: float = 0.0, down: float = 0.0):
        super().__init__()
        self.vector = nn.Parameter(torch.tensor([right, down]))

    def prepare(self, frame1, frame2):
        return frame1, frame2

    def estimate(self, frame1, frame2, previous, iterations):
        flow = self.vector.view(1, 2, 1, 1).expand(len(frame1), 2, *frame1.shape[2:])
        return Prediction(flow, (flow,) if self.training else ())


def test_the_teachers_flow_counts_where_it_is_not_wrong():
    sample = generate(1, 64, 96, seed=1)
    flow, valid = torch.zeros_like(sample.flow), torch.ones_like(sample.valid)
    flow[:, 0, :, :48] = 1 + 1.1 * TRUSTED
    valid[:, :20] = False
    sample = sample._replace(flow=flow, valid=valid)
    found = taught(Constant(1.0).eval(), sample)
    assert found.valid.all() and not found.flow.requires_grad
    right = found.flow[0, 0]
    assert (right[20:, :48] == 1 + 1.1 * TRUSTED).all(), "wrong and known: the truth stays"
    assert (right[:20, :48] == 1).all(), "unknown: the teacher's"
    assert (right[:, 48:] == 1).all(), "near the truth: the teacher's"
    assert taught(None, sample) is sample


def test_a_stage_with_a_teacher_learns_its_flow(tmp_path, monkeypatch):
    """From pairs that do not move and a teacher who says half a pixel."""
    monkeypatch.setitem(models._functions, "constant", Constant)
    monkeypatch.setattr(weights, "load", lambda name: Constant(0.5, -0.25).eval())
    stage = Stage(
        "learns", (Batches(25, 1, 64, 64),), 0.05, schedules.constant, loss=losses.sequence, optimizer=adamw, ema=0.0,
        mixture={blank_world: 1.0}, teacher="constant",
    )  # fmt: skip
    ends = {}
    for name, teacher in (("taught", "constant"), ("alone", None)):
        plan = Recipe("constant", (dataclasses.replace(stage, teacher=teacher),), "a test")
        monkeypatch.setitem(RECIPES, "constant", plan)
        reached = loop.train("constant", folder=tmp_path / name, workers=0, report=lambda line: None)
        ends[name] = weights.read_state(reached.weights)["vector"]
    assert torch.allclose(ends["taught"], torch.tensor([0.5, -0.25]), atol=0.1)
    assert ends["alone"].abs().max() < 0.1


@pytest.mark.parametrize("name", ["lightflow_distilled"])
def test_the_recipe_has_a_teacher_with_weights(name):
    stages = recipe(name).stages
    assert {stage.teacher for stage in stages} == {"fastflownet"} and recipe(name).samples > 450_000
