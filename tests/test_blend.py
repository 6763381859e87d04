"""Blends of networks: which flow counts where, memories, names."""

import json
import math

import pytest
import results
import torch

import fleetflow
from fleetflow.data.generate import generate
from fleetflow.data.generate.worlds import drive_world, shapes_world
from fleetflow.inference.predictor import Predictor
from fleetflow.layers.planes import OUTSIDE, halved, matching_cost, with_planes
from fleetflow.layers.warm_start import reduced
from fleetflow.models import weights
from fleetflow.models.base import FlowModel
from fleetflow.models.blend import SHARPNESS, Blend, _mixed
from fleetflow.types import FleetflowError, Prediction


class Says(FlowModel):
    """A network that says what it is told to, and remembers the previous prediction it was given."""

    stride, fit = 1, "pad"

    def __init__(self, flow: torch.Tensor, memory: torch.Tensor | None = None, iterations: int | None = None):
        super().__init__()
        self.flow, self.state, self.previous, self.iterations, self.begun = flow, memory, "not called", iterations, []

    def prepare(self, frame1, frame2):
        return frame1, frame2

    def estimate(self, frame1, frame2, previous, iterations):
        self.previous, self.took = previous, iterations
        self.begun.append(previous)
        return Prediction(self.flow, state=self.state)


@pytest.fixture(scope="module")
def pair():
    return generate(2, 96, 128, seed=3, mixture={shapes_world: 1.0})


def test_the_true_flow_counts_where_another_is_wrong(pair):
    wrong = pair.flow + 8
    wrong[..., 64:] = pair.flow[..., 64:]
    found = Blend([Says(wrong), Says(pair.flow)], planes=False).eval()(pair.frame1, pair.frame2)
    error = (found.flow - pair.flow).norm(dim=1)
    known = pair.valid & (torch.arange(128) < 60)
    assert error[known].median() < 0.35 * 8 * 2**0.5  # a plain mean has half
    assert error[..., 68:].max() < 1e-4


def test_what_a_flow_counts_is_the_softmax_of_the_census_and_of_a_fixed_cost_outside():
    frame = torch.rand(1, 3, 32, 41)
    flows = [torch.zeros(1, 2, 32, 41), torch.full((1, 2, 32, 41), 1e3)]
    costs = [matching_cost(*[halved(frame)] * 2, reduced(flow, (16, 21))) for flow in flows]  # equal frames: 0
    assert torch.equal(costs[0], torch.zeros(1, 16, 21)) and (costs[1] == OUTSIDE).all()
    share = torch.sigmoid(torch.tensor(-SHARPNESS * OUTSIDE))
    flow, apart = _mixed(costs, flows)
    torch.testing.assert_close(flow, torch.full_like(flow, 1e3) * share)
    torch.testing.assert_close(apart, torch.full((1, 32, 41), 2e3 * 2**0.5) * share * (1 - share))


def test_one_network_twice_is_that_network(pair):
    found = Blend([Says(pair.flow), Says(pair.flow)], planes=False).eval()(pair.frame1, pair.frame2)
    torch.testing.assert_close(found.flow, pair.flow)
    assert found.uncertainty.shape == (2, 96, 128) and found.uncertainty.max() < 1e-4
    assert found.state is None


def test_the_uncertainty_is_the_mean_distance_from_the_blended_flow():
    flat = torch.full((1, 3, 64, 64), 0.5)  # nothing to compare, so both count one half
    flows = [torch.zeros(1, 2, 64, 64), torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 64, 64)]
    found = Blend([Says(flow) for flow in flows]).eval()(flat, flat)
    inner = found.uncertainty[..., :32, :32]  # further right and down the second leaves the picture
    assert torch.allclose(inner, torch.full_like(inner, 2.5), atol=1e-3)


def test_each_network_gets_its_own_memory_back(pair):
    memory = torch.ones(2)
    one, two = Says(pair.flow), Says(pair.flow, memory)
    blend = Blend([one, two]).eval()
    first = blend(pair.frame1, pair.frame2)
    assert one.previous is None and two.previous is None and first.state == (None, memory)
    blend(pair.frame1, pair.frame2, first)
    assert one.previous is None and two.previous.state is memory
    with pytest.raises(FleetflowError, match="not that of this blend"):
        blend(pair.frame1, pair.frame2, Prediction(pair.flow, state=memory))


def test_a_network_that_refines_begins_with_the_blend_of_those_before_it(pair):
    memory = torch.ones(2)
    first, second, refines = Says(pair.flow), Says(pair.flow + 1), Says(pair.flow, memory, iterations=3)
    blend = Blend([first, second, refines]).eval()
    found = blend(pair.frame1, pair.frame2)
    assert second.previous is None and refines.previous.state is None
    mixed = Blend([first, second], planes=False).eval()(pair.frame1, pair.frame2)
    begun, again = refines.begun
    torch.testing.assert_close(begun.flow, mixed.flow)
    without = Blend([first, second, refines], planes=False).eval()(pair.frame1, pair.frame2)
    torch.testing.assert_close(again.flow, without.flow)  # with what it found in the first round
    blend(pair.frame1, pair.frame2, found)
    assert refines.previous.state is memory, "along a video, the pair before"
    given = Prediction(pair.flow - 2)
    blend(pair.frame1, pair.frame2, given)
    assert refines.previous is given


@pytest.mark.parametrize("motion, handicap", [(0.0, 0.0), (5.0, 0.02), (100.0, 0.12)])
def test_networks_count_less_the_more_one_moves_that_has_seen_their_flows(motion, handicap):
    flat = torch.full((1, 3, 64, 512), 0.5)  # nothing to compare: the costs are alike
    flow = torch.zeros(1, 2, 64, 512)
    flow[:, 0] = motion
    first, refines = Says(flow + torch.tensor([0.0, 2.0]).view(2, 1, 1)), Says(flow, torch.ones(1), iterations=1)
    found = Blend([first, refines], planes=False).eval()(flat, flat).flow[..., 8:40, 8:200]
    share = 1 / (1 + math.exp(SHARPNESS * handicap))
    torch.testing.assert_close(found[:, 1], torch.full_like(found[:, 1], 2 * share))


def test_a_blend_of_our_networks_has_fewer_wrong_pixels_than_the_best_of_them():
    blend, wrong = fleetflow.load(results.BLEND), torch.zeros(3, dtype=torch.float64)
    mixture = {shapes_world: 0.5, drive_world: 0.5}
    for index in range(2):
        pairs = generate(4, 256, 352, seed=77, index=index, mixture=mixture)
        for k, model in enumerate((blend, *blend.members)):
            with torch.inference_mode():
                error = (model(pairs.frame1, pairs.frame2).flow - pairs.flow).norm(dim=1)
            wrong[k] += ((error > 3) & pairs.valid).sum()
    assert wrong[0] < 0.97 * wrong[1:].min(), wrong


def test_plain_regions_take_the_flow_of_a_plane_in_the_end(pair):
    wrong = pair.flow + torch.randn(pair.flow.shape, generator=torch.Generator().manual_seed(0))
    without, found = (
        Blend([Says(wrong), Says(wrong)], planes).eval()(pair.frame1, pair.frame2) for planes in (False, True)
    )
    assert torch.equal(found.flow, with_planes(pair.frame1, pair.frame2, without.flow))
    assert not torch.equal(found.flow, without.flow) and torch.equal(found.uncertainty, without.uncertainty)


def test_steps_are_for_the_networks_that_refine(pair):
    plain, refines = Says(pair.flow), Says(pair.flow, torch.ones(2), iterations=12)
    blend = Blend([plain, refines]).eval()
    found = blend(pair.frame1, pair.frame2)
    assert (plain.took, refines.took) == (None, 3), "a quarter, as it begins with the flow of the first"
    blend(pair.frame1, pair.frame2, found)
    assert refines.took == 12, "all of them from its own state on"
    blend(pair.frame1, pair.frame2, iterations=7)
    assert (plain.took, refines.took) == (None, 7)
    with pytest.raises(FleetflowError, match="at least 1"):
        blend(pair.frame1, pair.frame2, iterations=0)
    with pytest.raises(FleetflowError, match="Says has no refinement iterations"):
        Blend([plain, plain]).eval()(pair.frame1, pair.frame2, iterations=7)


def test_the_published_score_is_that_of_these_weights():
    label = Predictor(fleetflow.load(results.BLEND), device="cpu", precision="fp32").label()
    stored = json.loads(results.BLENDED.read_text())
    assert stored["sha256"] == label["sha256"], "python benchmarks/ship.py blend DIR scores the blend again"
    every = results.our_scores()
    blend, parts = every[results.BLEND], [every[name] for name in weights.members(results.BLEND)]
    for key in ("epe", "out3"):
        assert blend["mean of sets"][key] < min(part["mean of sets"][key] for part in parts)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (37, 50)])
def test_any_size_of_frame(size):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (*size, 3), dtype=torch.uint8).numpy()
    predict = Predictor(fleetflow.load("fastflownet+raft_small"), device="cpu", precision="fp32")
    assert predict(image, image).shape == (*size, 2)
    assert predict.label()["network"] == "FastFlowNet+RAFT"


def test_names_with_a_plus(tmp_path):
    assert weights.members("fastflownet+raft_small:a.pth") == ["fastflownet", "raft_small:a.pth"]
    assert weights.members("fastflownet:runs/a+b.pth") == ["fastflownet:runs/a+b.pth"]
    assert weights.members("runs/a+b.safetensors") == ["runs/a+b.safetensors"]
    path = tmp_path / "a+b.safetensors"
    weights.save(fleetflow.load("fastflownet"), path, {"network": "fastflownet", "license": "Apache-2.0"})
    assert isinstance(fleetflow.load(f"fastflownet:{path}+fastflownet"), Blend)
    assert not isinstance(fleetflow.load(path), Blend)
    with pytest.raises(FleetflowError, match='did you mean "fastflownet'):
        fleetflow.load("fastflownet+raft_smal")
    with pytest.raises(FleetflowError, match="no weights for gma"):
        fleetflow.load("fastflownet+gma")


def test_a_blend_is_neither_trained_nor_made_of_one(pair):
    with pytest.raises(FleetflowError, match="not trained"):
        Blend([Says(pair.flow), Says(pair.flow)]).train()(pair.frame1, pair.frame2)
    with pytest.raises(FleetflowError, match="two or more"):
        Blend([Says(pair.flow)])
