"""PWC-Net: the published parameters, names and outputs, and the resize of 8-bit pictures."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fleetflow
from fleetflow.layers.masked_warp import inside, masked_warp
from fleetflow.layers.resize_8bit import resize_8bit
from fleetflow.models.pwcnet import FLOW_SCALE, LEVELS
from fleetflow.models.weights import without_memory
from fleetflow.ops.warp import warp
from fleetflow.registry import models
from fleetflow.types import FleetflowError

COUNTS = {"pwcnet": 9_374_340, "pwcnet_old": 8_749_280}


def frames(golden):
    return [torch.from_numpy(golden[k]).permute(2, 0, 1)[None].float() / 255 for k in ("img1", "img2")]


def watched(model):
    """Returns a dictionary that the next prediction fills with the intermediate tensors of the reference outputs."""
    seen = {}

    def keep(layer, name, change=lambda output: output):
        layer.register_forward_hook(lambda _, inputs, output: seen.__setitem__(name, change(output)))

    def volume(layer, name):
        layer.register_forward_pre_hook(lambda _, inputs: seen.__setitem__(name, inputs[0][:, :81].clone()))

    for level in (6, 5, 4, 3):
        keep(getattr(model, f"predict_flow{level}"), f"flow{level}")
    keep(model.predict_flow2, "flow2_before_context")
    keep(model.conv6b, "feat6", lambda features: features[:1])
    volume(model.conv6_0, "corr6")
    volume(model.conv3_0, "corr3")
    return seen


@pytest.mark.parametrize("name", COUNTS)
def test_names_and_shapes_are_the_published_ones(shared, name):
    published = json.loads((shared / "golden" / f"{name}.keys.json").read_text())
    own = [(key, list(value.shape)) for key, value in without_memory(name).state_dict().items()]
    assert own == [(key, shape) for key, shape, *_ in published["state_dict"]]


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    model = without_memory(name)
    assert sum(weight.numel() for weight in model.parameters()) == COUNTS[name]
    assert [key for key, weight in model.named_parameters() if not weight.requires_grad] == [
        "deconv2.weight",
        "deconv2.bias",
    ]


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("file", ["pwcnet", "pwcnet_odd", "pwcnet_old"])
def test_reproduces_the_official_outputs(shared, fill, tmp_path, file, plain):
    """Through a .pth.tar file, as a user has it; every stored intermediate first, so that a failure names its layer."""
    golden, name = np.load(shared / "golden" / f"{file}.npz"), file.removesuffix("_odd")
    state = fill.fill_module(models[name](), "pwcnet").state_dict()
    torch.save({"epoch": 1, "state_dict": state} if plain else state, tmp_path / "published.pth.tar")
    model = fleetflow.load(f"{name}:{tmp_path / 'published.pth.tar'}")
    seen = watched(model)
    with fleetflow.reference() if plain else torch.inference_mode(), torch.no_grad():
        flow = model(*frames(golden)).flow
    for key in ("feat6", "corr6", "flow6", "flow5", "flow4", "corr3", "flow3", "flow2_before_context"):
        if key in golden:
            expected = torch.from_numpy(golden[key])
            found = seen[key]
            if found.shape != expected.shape:  # every second or fourth channel is stored
                found = found[:, :: -(-found.shape[1] // expected.shape[1])]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4, msg=key)
    assert (flow[0].permute(1, 2, 0) - torch.from_numpy(golden["flow"])).abs().max() < 1e-4


def test_steps_are_flows_in_pixels_of_their_own_grid(shared, fill):
    golden = np.load(shared / "golden" / "pwcnet.npz")
    model = fill.fill_module(models["pwcnet"](), "pwcnet").train()
    with torch.no_grad():
        prediction = model(*frames(golden))
    expected = [golden[key] for key in ("flow6", "flow5", "flow4", "flow3", "flow_quarter")]
    for level, step, flow in zip(LEVELS, prediction.intermediate_flows, expected, strict=True):
        pixels = torch.from_numpy(flow) * (FLOW_SCALE / 2**level)
        torch.testing.assert_close(step, pixels, rtol=0, atol=1e-4, msg=f"level {level}")
    full = F.interpolate(prediction.intermediate_flows[-1] * 4, scale_factor=4, mode="bilinear")
    torch.testing.assert_close(prediction.flow, full, rtol=0, atol=1e-4)


def test_colors_are_reversed_and_keep_their_range(shared):
    golden = np.load(shared / "golden" / "pwcnet.npz")
    both = torch.cat(models["pwcnet"]().prepare(*frames(golden)), 1)
    torch.testing.assert_close(both, torch.from_numpy(golden["net_input"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", COUNTS)
def test_other_weights_and_sizes_agree_with_the_definition(fill, name):
    model = fill.fill_module(models[name](), "pwcnet", holdout=True).eval()
    for size in ((64, 128), (97, 70), (1, 130)):
        image1, image2, _ = fill.make_pair(*size, seed=7)
        pair = [torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 for image in (image1, image2)]
        with torch.no_grad():
            fast = model(*pair).flow
            with fleetflow.reference():
                slow = model(*pair).flow
        assert fast.shape == (1, 2, *size) and fast.abs().max() > 0.1
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-3)


def test_inside_is_a_warped_picture_of_ones():
    generator = torch.Generator().manual_seed(5)
    flow = 4 * torch.randn(2, 2, 9, 11, generator=generator)
    flow[0, :, 2:4] = torch.tensor([0.0, 1.0])[:, None, None]  # whole pixels, to the last row and beyond it
    ones = warp(torch.ones(2, 1, 9, 11), flow)
    for threshold in (0.9999, 0.999):
        assert torch.equal(inside(flow, threshold), ones >= threshold)
    features = torch.randn(2, 3, 9, 11, generator=generator)
    assert torch.equal(masked_warp(features, flow), warp(features, flow) * inside(flow, 0.9999))
    still = torch.zeros(1, 2, 3, 4)
    assert inside(still, 0.9999).all() and not inside(still - 5, 0.9999).any()


@pytest.mark.parametrize("size", [(131, 187), (1, 1), (63, 1), (100, 300)])
def test_8_bit_pictures_are_resized_as_by_opencv(size):
    cv2 = pytest.importorskip("cv2", reason="compares with OpenCV")
    image = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    new = tuple(-(-side // 64) * 64 for side in size)
    own = resize_8bit(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255, new)
    expected = cv2.resize(image, new[::-1], interpolation=cv2.INTER_LINEAR)
    assert np.array_equal((own[0].permute(1, 2, 0) * 255).round().numpy(), expected)


def test_the_other_one_is_refused_with_its_name(tmp_path):
    torch.save(models["pwcnet_old"]().state_dict(), tmp_path / "old.pth.tar")
    with pytest.raises(FleetflowError, match="looks like pwcnet_old"):
        fleetflow.load(f"pwcnet:{tmp_path / 'old.pth.tar'}")


def test_predictor_and_gradients(fill):
    """Convolutions fused for prediction give the same flow; every step reaches every trained parameter."""
    model = fill.fill_module(models["pwcnet"](), "pwcnet").eval()
    image1, image2, _ = fill.make_pair(64, 128)
    pair = [torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 for image in (image1, image2)]
    with torch.no_grad():
        expected = model(*pair).flow[0].permute(1, 2, 0).numpy()
    flow = fleetflow.Predictor(model, device="cpu", precision="fp32")(image1, image2)
    assert np.abs(flow - expected).max() < 1e-3
    sum(step.square().mean() for step in model.train()(*pair).intermediate_flows).backward()
    for key, weight in model.named_parameters():
        if weight.requires_grad:
            assert weight.grad.isfinite().all() and weight.grad.abs().max() > 0, key
