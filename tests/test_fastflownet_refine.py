"""FastFlowNet with refinement: how it begins, what an iteration may change, and what it can start from."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fleetflow
from fleetflow.data.generate import generate
from fleetflow.data.generate.worlds import shapes_world
from fleetflow.layers.upsample import convex_upsample
from fleetflow.models.fastflownet_refine import (
    FAR,
    FastFlowNetRefine,
    Gather,
    State,
    bilinear_weights,
    grow,
    margins,
    normalized,
    spoiled,
)
from fleetflow.training import losses
from fleetflow.training.optimizers import optimizers
from fleetflow.types import FleetflowError, Prediction


@pytest.fixture(scope="module")
def pair():
    return generate(2, 128, 192, seed=4, mixture={shapes_world: 1.0})


@pytest.fixture(scope="module")
def fresh():
    """The network as its training begins."""
    torch.manual_seed(0)
    model = FastFlowNetRefine().eval()
    grow(model, fleetflow.load("fastflownet"))
    return model


def test_it_begins_as_fastflownet(pair, fresh):
    with torch.no_grad():
        found = fresh(pair.frame1, pair.frame2).flow
        without = fleetflow.load("fastflownet")(pair.frame1, pair.frame2).flow
    errors = [(flow - pair.flow).norm(dim=1)[pair.valid].mean() for flow in (found, without)]
    assert errors[0] < 1.01 * errors[1], errors
    assert (found - without).norm(dim=1).mean() < 0.1


def test_fresh_weights_enlarge_bilinearly():
    flow = torch.randn(1, 2, 5, 7)
    weights = bilinear_weights(4)
    assert weights.shape == (9, 4, 4) and torch.allclose(weights.sum(0), torch.ones(4, 4))
    logits = weights.clamp(min=1e-9).log().flatten()[None, :, None, None].expand(-1, -1, 5, 7)
    found = convex_upsample(flow, logits, 4, border="replicate")
    expected = 4 * F.interpolate(flow, scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_an_iteration_moves_the_flow_once_its_last_layer_is_not_zero(pair, fresh):
    with torch.no_grad():
        frames = fresh.prepare(pair.frame1, pair.frame2)
        features, state, coarse = fresh.encode(*frames)
        assert [flow.shape[-1] for flow in coarse] == [3, 6, 12, 24] and state.flow.shape == (2, 2, 16, 24)
        assert torch.equal(fresh.step(features, state).flow, state.flow)
        head = fresh.update_block.flow_head.conv2
        head.bias[0] = 1.0
        moved = fresh.step(features, fresh.step(features, state))
        head.bias[0] = 0.0
    torch.testing.assert_close(moved.flow[:, 0], state.flow[:, 0] + 2)
    torch.testing.assert_close(moved.flow[:, 1], state.flow[:, 1])


def test_it_starts_from_a_given_flow_or_its_own_last_one(pair, fresh):
    with torch.no_grad():
        given = fresh(pair.frame1, pair.frame2, Prediction(pair.flow))
        first = fresh(pair.frame1, pair.frame2)
        following = fresh(pair.frame1, pair.frame2, first)
    assert given.state.shape == (2, 2, 16, 24)
    torch.testing.assert_close(given.state, F.interpolate(pair.flow, size=(16, 24), mode="area") / 8)
    assert following.flow.isfinite().all() and not torch.equal(following.flow, first.flow)
    with pytest.raises(FleetflowError, match="expected \\[2, 2, 16, 24\\]"):
        fresh(pair.frame1, pair.frame2, Prediction(pair.flow, state=torch.zeros(2, 2, 4, 4)))


def test_training_judges_every_level_and_iteration(pair, fresh):
    prediction = fresh.train()(pair.frame1, pair.frame2, iterations=3)
    fresh.eval()
    sides = [flow.shape[-1] for flow in prediction.intermediate_flows]
    assert sides == [3, 6, 12, 24, 24, 24, 24, 48]


def test_what_the_recurrent_unit_is_given_is_bounded(pair):
    """Features however large give correlations of at most sqrt(C), and no gate is saturated."""
    x = torch.randn(2, 64, 5, 7)
    torch.testing.assert_close(normalized(x).square().mean(1), torch.ones(2, 5, 7), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalized(1e4 * x), normalized(x), rtol=1e-4, atol=1e-4)
    assert normalized((1e4 * x).half()).isfinite().all() and normalized(0 * x).abs().max() == 0

    torch.manual_seed(1)
    model = FastFlowNetRefine().eval()
    with torch.no_grad():
        for layer in (model.fnet.project, model.cnet.project, model.update_block.encoder.conv):
            layer.weight.mul_(1e5)
        features, state, _ = model.encode(*model.prepare(pair.frame1, pair.frame2))
        assert max(volume.abs().max() for volume in features.pyramid.volumes) <= 64**0.5 + 1e-3
        assert model.step(features, state).hidden.abs().max() < 0.95  # that of a saturated unit is 1


def test_a_long_flow_leaves_the_correlations_their_length():
    """What is correlated and the flow are given to the unit side by side; once the flow hid the rest at over 24 px."""
    torch.manual_seed(2)
    block, given = FastFlowNetRefine().update_block, []
    block.gru.register_forward_pre_hook(lambda _, inputs: given.append(inputs[2]))
    hidden, context, correlation = (torch.randn(1, channels, 5, 7) for channels in (64, 48, 196))
    flow = torch.randn(1, 2, 5, 7)
    for longer in (0.01, 1.0, 100.0):
        inside = torch.full((1, 1, 5, 7), 0.25)
        block(hidden, context, lambda motion: motion[:, :32], correlation, longer * flow, inside)
        seen, told, margin, gathered = given[-1].split((62, 2, 1, 32), 1)
        assert torch.equal(margin, inside) and torch.equal(gathered, seen[:, :32])
        torch.testing.assert_close(seen.square().mean(1), torch.ones(1, 5, 7), rtol=1e-2, atol=0)
        assert torch.equal(told.sign(), flow.sign()) and told.abs().max() < FAR
    torch.testing.assert_close(given[0][:, 62:64], 0.01 * flow, rtol=0.01, atol=0)


def test_margins_are_distances_to_the_nearest_border():
    """On a grid of 24 x 16: x from 0 to 23, y from 0 to 15."""
    places = {
        (12.0, 7.0): 7,
        (0.0, 7.0): 0,
        (23.0, 7.0): 0,
        (20.0, 14.0): 1,
        (-4.0, 7.0): -4,
        (9.0, 17.0): -2,
        (99.0, -50.0): -8,
    }
    target = torch.tensor([*places]).T[None, :, :, None].expand(-1, -1, -1, 24)
    target = F.pad(target, (0, 0, 0, 16 - len(places)), value=7.5)
    expected = torch.tensor([*places.values()]) / FAR
    torch.testing.assert_close(margins(target)[0, 0, : len(places)], expected[:, None].expand(-1, 24))


def test_correlations_without_motion_are_told_whatever_the_start(pair, fresh):
    """Of frames that are equal the middle of the window is the largest, and says so however wrong the start is."""
    model, seen = copy.deepcopy(fresh), []
    model.rest.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        frame1, frame2 = model.prepare(pair.frame1, pair.frame1)
        before = model.encode(frame1, frame2)
        model.encode(frame1, frame2, Prediction(pair.flow + 20))
        assert torch.equal(seen[0], seen[1]) and seen[0].shape == (2, 196, 16, 24)
        assert torch.equal(seen[0][:, :49].amax(1), seen[0][:, 24])
        model.rest[1].bias.fill_(1.0)
        after = model.encode(frame1, frame2)
    assert (after[1].hidden > before[1].hidden).all() and (after[0].context >= before[0].context).all()
    assert torch.equal(after[1].flow, before[1].flow)


@pytest.mark.parametrize("memory_limit", [2**30, 0])
def test_places_that_look_alike_share_their_motion(memory_limit):
    """Two kinds of places, told apart by one channel of the context each: each kind is told its own mean."""
    gather = Gather()
    with torch.no_grad():
        gather.attention.to_qk.weight.copy_(30 * torch.eye(48).repeat(2, 1)[..., None, None])
        gather.values.weight.copy_(torch.eye(32, 64)[..., None, None])
        gather.values.bias.zero_()
        kind = torch.zeros(1, 1, 8, 12)
        kind[..., 2:6, 4:] = 1
        motion = torch.randn(1, 64, 8, 12)
        context = torch.cat((kind, 1 - kind, torch.zeros(1, 46, 8, 12)), 1)
        found = gather(gather.prepare(context, memory_limit), memory_limit, motion)
    for own in (kind, 1 - kind):
        mean = (motion[:, :32] * own).sum((2, 3), keepdim=True) / own.sum()
        torch.testing.assert_close(found * own, mean * own, rtol=1e-4, atol=1e-4)


def test_in_training_alone_some_starts_are_spoiled(pair, fresh):
    torch.manual_seed(3)
    flow = torch.randn(400, 2, 3, 4)
    changed = spoiled(flow, 0.25)
    rows = (changed != flow).flatten(1).any(1)
    assert 60 < rows.sum() < 140 and (changed != flow).flatten(1).all(1).sum() == rows.sum()
    assert (changed - flow)[rows].abs().mean() > 1

    def starts(model: FastFlowNetRefine) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model.encode(*model.prepare(pair.frame1, pair.frame2))[1].flow for _ in range(6)]

    model = FastFlowNetRefine(spoil=0.5)
    model.load_state_dict(fresh.state_dict())
    own = starts(fresh)[0]
    for network, training, same in ((model, False, True), (model, True, False), (copy.deepcopy(fresh), True, True)):
        assert all(torch.equal(start, own) for start in starts(network.train(training))) == same


def test_a_few_steps_of_training_correct_a_wrong_start(pair, fresh):
    """The iterations once stopped learning: their gates were saturated, and what they gave did not change the flow."""
    torch.manual_seed(0)
    model = FastFlowNetRefine(spoil=1.0)
    model.load_state_dict(fresh.state_dict())
    with torch.no_grad():
        for head in (model.fnet, model.cnet):  # as large as features without a norm became
            head.project.weight.mul_(1e5)
    learning = optimizers(model.train(), 0.02, 0.01, slow="fastflownet", share=0.0)
    for _ in range(30):
        losses.multi_scale(model(pair.frame1, pair.frame2, iterations=2), pair, weights=0.8, power=1.0).backward()
        for optimizer in learning:
            optimizer.step()
        silent = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
        model.zero_grad()
    frozen = dict(fresh.fastflownet.named_parameters())
    assert silent == [f"fastflownet.{name}" for name in frozen]
    assert all(torch.equal(weight, frozen[name]) for name, weight in model.fastflownet.named_parameters())

    truth, known = losses.shrink_flow(pair.flow, pair.valid, (16, 24))
    with torch.no_grad():
        features, state, _ = model.eval().encode(*model.prepare(pair.frame1, pair.frame2))
        states = [State(state.hidden, truth + torch.tensor((2.0, -1.0)).view(1, 2, 1, 1))]
        for _ in range(2):
            states.append(model.step(features, states[-1]))
    errors = [((state.flow - truth).norm(dim=1) * known).sum() / known.sum() for state in states]
    assert errors[2] < 0.9 * errors[0], errors


def test_the_iterations_of_shipped_weights_correct_a_wrong_start():
    """Weights whose iterations did nothing were once shipped: one iteration and eight differed by 0.001 px."""
    sample = generate(2, 128, 192, seed=4)
    model = fleetflow.load("fastflownet_refine").eval()
    half = Prediction(0.5 * sample.flow)
    with torch.no_grad():
        flows = [model(sample.frame1, sample.frame2, half, iterations=count).flow for count in (1, 4)]
    errors = [(flow - sample.flow).norm(dim=1)[sample.valid].mean() for flow in flows]
    assert errors[1] < 0.7 * errors[0] and errors[0] < (half.flow - sample.flow).norm(dim=1)[sample.valid].mean(), (
        errors
    )


def test_it_grows_from_fastflownet_alone(fresh):
    with pytest.raises(FleetflowError, match="not from LightFlow"):
        grow(fresh, fleetflow.load("lightflow", weights=False))
