"""Losses: the published values, by hand, and safe with unknown truth; the optimizers that go with them."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from torch import nn

from fleetflow.evaluation.metrics import end_point_error
from fleetflow.training import losses
from fleetflow.training import optimizers as optimize
from fleetflow.types import FleetflowError, Prediction, Sample

CAFFE = losses.FLOWNET2
PYTORCH = (0.02, 0.04, 0.08, 0.16, 0.32)  # NVIDIA's port turns the weights round: the finest weighs most
NAN = float("nan")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "losses.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files if name != "meta_json"}


def step_of(flow20: torch.Tensor, width: int = 128) -> torch.Tensor:
    """A flow in units of 20 px as a step: in pixels of its own grid."""
    return flow20 * losses.UNIT * flow20.shape[-1] / width


def sample_of(flow: torch.Tensor, valid: torch.Tensor | None = None) -> Sample:
    frame = flow.new_zeros(len(flow), 3, *flow.shape[-2:])
    return Sample(frame, frame, flow, torch.ones_like(flow[:, 0], dtype=torch.bool) if valid is None else valid.bool())


def enlarge(flow: torch.Tensor) -> torch.Tensor:
    return F.interpolate(flow, size=(64, 128), mode="bilinear", align_corners=False)


PYRAMIDS = {
    "flownet2_multiscale_L1": (False, {"weights": PYTORCH, "measure": losses.absolute, "mean": True}),
    "flownet2_multiscale_L2": (False, {"weights": PYTORCH, "mean": True}),
    "flownet2_multiscale_L2_epe": (False, {"weights": PYTORCH, "mean": True}),
    "lightflow_L2Loss": (False, {"weights": (0, 0, 0, 0, 1), "mean": True}),
    "lightflow_multiscaleEPE": (False, {"weights": CAFFE}),
    "pwc_MultiLevelEPE_p2": (False, {"weights": CAFFE}),
    "pwc_MultiLevelEPE_robust": (False, {"weights": CAFFE, "measure": losses.robust}),
}


@pytest.mark.parametrize("name", PYRAMIDS)
def test_pyramid_is_the_published_loss(golden, name):
    sparse, options = PYRAMIDS[name]
    steps = tuple(step_of(golden[f"pred_level{level}"]) for level in (6, 5, 4, 3, 2))
    sample = sample_of(golden["gt"], golden["valid"] if sparse else None)
    torch.testing.assert_close(losses.pyramid(Prediction(steps[-1], steps), sample, **options), golden[name])


LITEFLOWNET2 = {
    "lfn2_MultiLevelEPE": (False, {}),
    "lfn2_MultiLevelEPE_valid": (True, {}),
    "lfn2_MultiLevelEPE_mean": (False, {"mean": True}),
    "lfn2_Charbonnier_downsample": (True, {"measure": losses.charbonnier}),
    "lfn2_Charbonnier_upsample": (True, {"measure": losses.charbonnier, "compare": losses.enlarged}),
}


@pytest.mark.parametrize("name", LITEFLOWNET2)
def test_pyramid_is_the_published_loss_of_liteflownet2(golden, name):
    sparse, options = LITEFLOWNET2[name]
    steps = tuple(step_of(golden[f"pred_level{level}"]) for level in (5, 4, 3, 2))
    prediction = Prediction(losses.UNIT * enlarge(golden["pred_level2"]), steps)
    sample = sample_of(golden["gt"], golden["valid"] if sparse else None)
    loss = losses.pyramid(prediction, sample, weights=losses.LITEFLOWNET2, **options)
    torch.testing.assert_close(loss, golden[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name,measure", [("flownet2_L1Loss", losses.absolute), ("flownet2_L2Loss", losses.end_point)])
def test_full_resolution_losses(golden, name, measure):
    prediction = Prediction(golden["pred_full"])
    loss = losses.pyramid(prediction, sample_of(golden["gt"]), weights=(1,), measure=measure, mean=True, unit=1)
    torch.testing.assert_close(loss, golden[name])


def test_lightflow(golden):
    prediction = Prediction(golden["pred_full"], (golden["pred_level6"], step_of(golden["pred_level2"])))
    sample, sparse = sample_of(golden["gt"]), sample_of(golden["gt"], golden["valid"])
    torch.testing.assert_close(losses.lightflow(prediction, sample), golden["lightflow_L1Loss"])
    error = end_point_error(enlarge(golden["pred_level2"]), golden["gt"] / 20)
    torch.testing.assert_close(error.mean(), golden["lightflow_realEPE"])
    torch.testing.assert_close(error[sparse.valid].mean(), golden["lightflow_realEPE_sparse"])


def test_sequence(golden):
    prediction = Prediction(golden["seq_preds"][-1], tuple(golden["seq_preds"]))
    sample = sample_of(golden["gt"], golden["valid"])
    torch.testing.assert_close(losses.sequence(prediction, sample), golden["raft_sequence_loss"])
    torch.testing.assert_close(losses.correction(prediction, sample), golden["raft_sequence_loss"])
    error = end_point_error(prediction.flow, sample.flow)[sample.valid]
    table = torch.stack([error.mean(), *((error < limit).float().mean() for limit in (1, 3, 5))])
    torch.testing.assert_close(table, golden["raft_sequence_metrics"])
    fast = sample.flow.clone()
    fast[0, 0, :4] = 500
    loss = losses.sequence(prediction, sample._replace(flow=fast), gamma=0.85)
    torch.testing.assert_close(loss, golden["raft_sequence_loss_bigflow"])


def made(seed: int = 0) -> tuple[Prediction, Sample]:
    """Five steps of strides 16 to 1 and a truth of which a half is unknown."""
    generator = torch.Generator().manual_seed(seed)
    steps = tuple(torch.randn(2, 2, 32 // s, 48 // s, generator=generator) for s in (16, 8, 4, 2, 1))
    flow = 5 * torch.randn(2, 2, 32, 48, generator=generator)
    valid = torch.rand(2, 32, 48, generator=generator) < 0.5
    valid[0, :16, :16] = False  # a whole cell of every grid
    return Prediction(steps[-1], steps), sample_of(torch.where(valid[:, None], flow, 0), valid)


ALL = {
    "multi_scale": losses.multi_scale,
    "lightflow": losses.lightflow,
    "sequence": losses.sequence,
    "correction": losses.correction,
    **{
        f"pyramid {measure.__name__} {compare.__name__}": partial(losses.pyramid, measure=measure, compare=compare)
        for measure in (losses.end_point, losses.absolute, losses.robust, losses.charbonnier)
        for compare in (losses.at_known, losses.at_mean, losses.enlarged)
    },
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("unknown", [NAN, float("inf")])
def test_unknown_truth_gives_no_gradient(name, unknown):
    """Numbers that are none where the truth is unknown change neither loss nor gradient; nor does a perfect step."""
    prediction, sample = made()
    steps = prediction.intermediate_flows
    if name in ("sequence", "correction"):
        steps = (steps[-1], steps[-1] + 1, sample.flow.clone())
    found = []
    for truth in (sample.flow, torch.where(sample.valid[:, None], sample.flow, unknown)):
        leaves = [step.clone().requires_grad_() for step in steps]
        loss = ALL[name](Prediction(leaves[-1], tuple(leaves)), sample._replace(flow=truth))
        loss.backward()
        found.append((loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)))
    for plain, strange in zip(*found, strict=True):
        assert strange.isfinite().all()
        torch.testing.assert_close(strange, plain, rtol=0, atol=0)
    assert found[0][0] > 0 and any((gradient != 0).any() for gradient in found[0][1:])


@pytest.mark.parametrize("name", ALL)
def test_a_batch_without_any_truth_teaches_nothing(name):
    prediction, sample = made()
    steps = prediction.intermediate_flows
    if name in ("sequence", "correction"):
        steps = (steps[-1],)
    leaves = tuple(step.clone().requires_grad_() for step in steps)
    nothing = sample._replace(valid=torch.zeros_like(sample.valid), flow=torch.full_like(sample.flow, NAN))
    loss = ALL[name](Prediction(leaves[-1], leaves), nothing)
    loss.backward()
    assert loss.isfinite() and all(leaf.grad is None or (leaf.grad == 0).all() for leaf in leaves)


def test_steps_count_in_pixels_of_their_own_grid():
    """A uniform flow that every step knows exactly has no loss on any grid, on oblong cells either."""
    flow = torch.tensor([8.0, -4.0]).view(1, 2, 1, 1).expand(1, 2, 32, 48).contiguous()
    scale = torch.tensor([1.0, 2.0]).view(2, 1, 1)  # the grid is three times coarser to the right, but six downwards
    steps = tuple(flow[..., : 32 // s, : 48 // s] / s for s in (16, 8, 4, 2, 1))
    oblong = (flow / (3 * scale))[..., :5, :16]
    sample = sample_of(flow[..., :30, :])
    for compare in (losses.at_known, losses.at_mean, losses.enlarged):
        assert losses.pyramid(Prediction(flow, steps), sample_of(flow), compare=compare) < 1e-5
        loss = losses.pyramid(Prediction(flow[..., :30, :], (oblong,)), sample, weights=(1,), compare=compare)
        assert loss < 1e-4, compare.__name__


@pytest.mark.parametrize("loss", [losses.sequence, losses.correction])
def test_a_prediction_without_steps_is_refused(loss):
    prediction, sample = made()
    with pytest.raises(FleetflowError, match="training mode"):
        loss(Prediction(prediction.flow), sample)


def test_weights_that_do_not_fit_are_refused():
    prediction, sample = made()
    with pytest.raises(FleetflowError, match="5 steps for 2 weights"):
        losses.pyramid(prediction, sample, weights=(1, 1))
    with pytest.raises(FleetflowError, match="one step more than weights"):
        losses.multi_scale(prediction, sample, weights=(1, 1))
    with pytest.raises(FleetflowError, match="all weights"):
        losses.pyramid(prediction, sample, weights=(0,) * 5)


def network() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    model[2].requires_grad_(False)
    return model


def test_adam_leaves_the_biases_their_own_decay():
    """Light Flow: 4e-5 for all that is called weight, the scales of normalization included, 0 for biases."""
    model = network()
    (update,) = optimize.adam(model, 1e-3, 4e-5, bias_decay=0.0)
    weights, biases = update.param_groups
    assert (weights["weight_decay"], biases["weight_decay"]) == (4e-5, 0.0)
    assert {id(p) for p in weights["params"]} == {id(model[0].weight), id(model[1].weight)}
    assert {id(p) for p in biases["params"]} == {id(model[0].bias), id(model[1].bias)}
    assert [group["weight_decay"] for group in optimize.adamw(model, 1e-3, 1e-4)[0].param_groups] == [1e-4, 1e-4]


@pytest.mark.parametrize("make,plain", [(optimize.adam, torch.optim.Adam), (optimize.adamw, torch.optim.AdamW)])
def test_groups_change_nothing_without_a_bias_decay(make, plain):
    found = []
    for build in (lambda m: make(m, 1e-2, 0.1)[0], lambda m: plain(m.parameters(), 1e-2, weight_decay=0.1)):
        torch.manual_seed(0)
        model = network()
        update = build(model)
        for _ in range(3):
            update.zero_grad()
            model(torch.ones(1, 3, 8, 8)).square().mean().backward()
            update.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-7)


def test_a_truth_that_is_no_number_has_no_part_where_it_is_marked_valid():
    flow = torch.zeros(1, 2, 64, 64)
    flow[..., 3, 3], flow[..., 40, 9] = float("nan"), float("inf")
    frame = torch.zeros(1, 3, 64, 64)
    sample = Sample(frame, frame, flow, torch.ones(1, 64, 64, dtype=torch.bool))
    steps = tuple(torch.ones(1, 2, 64 // s, 64 // s) for s in (64, 32, 16, 8, 4))
    found = torch.ones(1, 2, 64, 64, requires_grad=True)
    loss = losses.multi_scale(Prediction(found, steps), sample)
    loss.backward()
    assert loss.isfinite() and found.grad.isfinite().all()


def test_motion_beyond_all_reach_has_no_weight():
    flow = torch.zeros(1, 2, 64, 128)
    flow[:, 0, :, 64:] = 500
    steps = tuple(torch.zeros(1, 2, 64 >> k, 128 >> k) for k in (6, 5, 4, 3, 2))
    prediction = Prediction(torch.ones(1, 2, 64, 128), steps)
    half = Sample(*sample_of(flow)[:2], flow, flow[:, 0] < 400)
    assert losses.multi_scale(prediction, sample_of(flow)) == losses.multi_scale(prediction, half)
    assert losses.multi_scale(prediction, sample_of(flow), max_flow=600) > 10


def test_what_was_trained_before_moves_slowly():
    model = torch.nn.ModuleDict({"old": torch.nn.Conv2d(3, 4, 3), "new": torch.nn.Conv2d(3, 4, 3)})
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    for optimizer in optimize.optimizers(model, 0.02, 0.0, slow="old"):
        optimizer.step()
    moved = {name: (weight - before[name]).norm().item() for name, weight in model.named_parameters()}
    for kind in ("weight", "bias"):
        assert moved[f"old.{kind}"] == pytest.approx(0.1 * moved[f"new.{kind}"], rel=1e-3), moved
