"""Light Flow: the published parameters, names, outputs and training step."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fleetflow
from fleetflow.models.lightflow import LEVELS, LightFlow, init_as_matcher
from fleetflow.registry import models
from fleetflow.types import FleetflowError


@pytest.fixture
def golden(shared):
    return np.load(shared / "golden" / "lightflow.npz")


def frames(golden):
    return [torch.from_numpy(golden[k]).permute(2, 0, 1)[None].float() / 255 for k in ("img1", "img2")]


@pytest.mark.parametrize("name,count,widest", [("", 2_540_390, 1024), ("_075", 1_442_690, 768), ("_050", 653_406, 512)])
def test_parameters(name, count, widest):
    model = models[f"lightflow{name}"]()
    assert model.conv6b[3].weight.shape == (widest, widest, 1, 1)
    assert model.conv8[0].weight.shape[0] == widest // 4 + widest // 2 and model.conv1[0].weight.shape[0] == 6
    assert model.conv16[3].weight.shape == (2, widest // 64, 1, 1)
    assert sum(weight.numel() for weight in model.parameters()) == count


def test_names_and_shapes_are_the_published_ones(shared):
    published = json.loads((shared / "golden" / "lightflow.keys.json").read_text())
    own = [(key, list(value.shape)) for key, value in LightFlow().state_dict().items()]
    assert own == [(key, shape) for key, shape, *_ in published["state_dict"]]


def test_reproduces_the_official_outputs(golden, fill, tmp_path):
    """Through a .pth file, as a user has it; every stored intermediate first, so that a failure names its layer."""
    state = {f"module.{key}": value for key, value in fill.fill_module(LightFlow(), "lightflow").state_dict().items()}
    content = {"epoch": 231, "arch": "flownetl", "state_dict": state, "best_EPE": 2.5, "div_flow": 20.0}
    torch.save(content, tmp_path / "published.pth")
    model = fleetflow.load(f"lightflow:{tmp_path / 'published.pth'}")
    seen = {}
    names = {"feat6b": model.conv6b, "feat3": model.conv3} | {
        f"pred{k}": getattr(model, f"conv{k}") for k in range(12, 17)
    }
    for name, layer in names.items():
        layer.register_forward_hook(lambda _, inputs, output, name=name: seen.__setitem__(name, output))
    with torch.no_grad():
        flow = model(*frames(golden)).flow
    for name in names:
        expected = torch.from_numpy(golden[name])
        torch.testing.assert_close(seen[name][:, : expected.shape[1]], expected, rtol=0, atol=1e-5, msg=name)
    assert (flow - torch.from_numpy(golden["flow"])).abs().max() < 1e-4


def test_preprocessing_is_the_published_one(golden):
    both = torch.cat(LightFlow().prepare(*frames(golden)), 1)
    torch.testing.assert_close(both, torch.from_numpy(golden["net_input"]), rtol=0, atol=1e-6)


def test_steps_are_flows_in_pixels_of_their_own_grid(golden, fill):
    """With the statistics of evaluation, the iterations in training are the stored flows."""
    model = fill.fill_module(LightFlow(), "lightflow").eval()
    model.training = True  # of the network, not of its normalization
    with torch.no_grad():
        prediction = model(*frames(golden))
    expected = [golden[key] for key in ("pred12", "pred13", "pred14", "pred15", "flow_quarter")]
    for level, step, flow in zip(LEVELS, prediction.intermediate_flows, expected, strict=True):
        pixels = torch.from_numpy(flow) * 20 / 2**level
        torch.testing.assert_close(step, pixels, rtol=0, atol=1e-5, msg=f"level {level}")


def test_the_published_training_step(golden, fill):
    """Output, loss, gradients and running statistics of the official network on a batch of two."""
    model = fill.fill_module(LightFlow(), "lightflow").train()
    both = torch.from_numpy(golden["net_input"])
    both = torch.cat((both, both.flip(3)))
    output = model.estimate(both[:, :3], both[:, 3:], None, None).intermediate_flows[-1] * 4 / 20
    torch.testing.assert_close(output, torch.from_numpy(golden["train_out"]), rtol=0, atol=1e-4)
    truth = torch.from_numpy(golden["gt"]).permute(2, 0, 1)[None] / 20
    loss = (output - F.interpolate(truth, size=output.shape[2:], mode="area")).abs().mean()
    assert float(loss.detach()) == pytest.approx(float(golden["train_loss"]), abs=1e-5)
    loss.backward()
    for name, layer in (
        ("conv16_3_weight", model.conv16[3]),
        ("conv1_0_weight", model.conv1[0]),
        ("conv7_1_weight", model.conv7[1]),
    ):
        expected = torch.from_numpy(golden[f"train_grad_{name}"])
        assert (layer.weight.grad - expected).norm() < 1e-3 * expected.norm(), name
    for name in ("running_mean", "running_var"):
        expected = torch.from_numpy(golden[f"train_{name}_conv1_1"])
        torch.testing.assert_close(getattr(model.conv1[1], name), expected, rtol=0, atol=1e-6, msg=name)


def test_another_width_is_refused_with_its_name(tmp_path):
    torch.save(LightFlow(0.5).state_dict(), tmp_path / "half.pth")
    assert fleetflow.load(f"lightflow_050:{tmp_path / 'half.pth'}").conv11[3].weight.shape[0] == 8
    with pytest.raises(FleetflowError, match="looks like lightflow_050"):
        fleetflow.load(f"lightflow:{tmp_path / 'half.pth'}")


@pytest.mark.parametrize("after,shift", [("conv3", 2), ("conv4b", 8), ("conv5b", 16)])
def test_the_matching_start_compares_the_frames(after, shift):
    """One layer after frame2 was shifted and compared, sums of displacements point to where it has moved."""
    torch.manual_seed(0)
    model = LightFlow().train()
    init_as_matcher(model)
    texture = F.interpolate(torch.rand(1, 3, 256 // shift, 256 // shift), size=(256, 256), mode="bicubic").clamp(0, 1)
    ways = [(shift, 0), (-shift, 0), (0, shift), (0, -shift), (0, 0)]
    seen = []
    getattr(model, after).register_forward_hook(lambda _, inputs, output: seen.append(output))
    moved = torch.cat([texture.roll((down, right), (2, 3)) for right, down in ways])
    with torch.no_grad():
        model(texture.expand_as(moved), moved)
    mean = seen[0][:, :, 2:-2, 2:-2].mean((2, 3))
    right, left, down, up = mean[:, 30:34].unbind(1)
    assert (right - left).argmax() == 0 and (right - left).argmin() == 1
    assert (down - up).argmax() == 2 and (down - up).argmin() == 3
    assert mean[:, 34:43].argmin(1).tolist() == [5, 3, 7, 1, 4]  # the shift with the smallest difference


def test_the_matching_start_needs_channels():
    with pytest.raises(FleetflowError, match="width 1"):
        init_as_matcher(LightFlow(0.75))


def test_stored_norms_do_not_depend_on_the_batch():
    """Their parameters are those of the published network, and a batch leaves their statistics alone."""
    torch.manual_seed(0)
    model = LightFlow(stored=True).train()
    assert model.state_dict().keys() == LightFlow().state_dict().keys()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    frames = torch.rand(2, 2, 3, 64, 128)
    flow = model(*frames).flow
    model.eval()
    other = model(*frames).flow
    assert not flow.equal(other)  # all other norms take the batch's
    after = model.state_dict()
    predictors = [key for key in after if key.startswith(tuple(f"conv{k}.4." for k in range(12, 17)))]
    assert len(predictors) == 25 and all(after[key].equal(before[key]) for key in predictors)
    assert not after["conv16.1.running_mean"].equal(before["conv16.1.running_mean"])
