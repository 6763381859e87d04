"""FastFlowNet: the published parameters, names and outputs."""

import json

import numpy as np
import pytest
import torch

import fleetflow
from fleetflow.data.generate import generate
from fleetflow.models.fastflownet import KEPT, FastFlowNet, init_as_matcher
from fleetflow.ops.correlation import local_correlation


def frames(golden):
    return [torch.from_numpy(golden[k]).permute(2, 0, 1)[None].float() / 255 for k in ("img1", "img2")]


def test_parameters():
    assert sum(weight.numel() for weight in FastFlowNet().parameters()) == 1_366_114
    assert len(KEPT) == 53


def test_names_and_shapes_are_the_published_ones(shared):
    published = json.loads((shared / "golden" / "fastflownet.keys.json").read_text())
    own = [(key, list(value.shape)) for key, value in FastFlowNet().state_dict().items()]
    assert own == [(key, shape) for key, shape, *_ in published["state_dict"]]


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("name", ["fastflownet", "fastflownet_odd"])
def test_reproduces_the_official_outputs(shared, fill, tmp_path, name, plain):
    """Through a .pth file, as a user has it; every stored intermediate first, so that a failure names its layer."""
    golden = np.load(shared / "golden" / f"{name}.npz")
    torch.save(fill.fill_module(FastFlowNet(), "fastflownet").state_dict(), tmp_path / "published.pth")
    model = fleetflow.load(f"fastflownet:{tmp_path / 'published.pth'}")
    seen = {}
    for level, decoder in ((k, getattr(model, f"decoder{k}")) for k in (6, 5, 4, 3, 2)):
        decoder.conv1.register_forward_pre_hook(
            lambda _, inputs, k=level: seen.__setitem__(f"cost{k}", inputs[0][:, :53])
        )
    model.pconv3_3.register_forward_hook(lambda _, inputs, output: seen.__setitem__("feat", output))
    with fleetflow.reference() if plain else torch.inference_mode(), torch.no_grad():
        flow = model(*frames(golden)).flow
        model.train()
        if not name.endswith("odd"):
            flows = model(*frames(golden)).intermediate_flows
            for level, step in zip((6, 5, 4, 3, 2), flows):
                expected = torch.from_numpy(golden[f"flow{level}"]) * 20 / 2**level
                torch.testing.assert_close(step, expected, rtol=0, atol=1e-4, msg=f"flow{level}")
    for key in ("cost6", "cost3"):
        torch.testing.assert_close(seen[key], torch.from_numpy(golden[key]), rtol=0, atol=1e-4, msg=key)
    torch.testing.assert_close(seen["feat"][:1], torch.from_numpy(golden["feat13"]), rtol=0, atol=1e-4, msg="feat13")
    assert (flow - torch.from_numpy(golden["flow"])).abs().max() < 1e-3


def test_intermediate_flows_at_the_odd_size(shared, fill):
    golden = np.load(shared / "golden" / "fastflownet_odd.npz")
    model = fill.fill_module(FastFlowNet(), "fastflownet").train()
    both = torch.from_numpy(golden["net_input"])
    with torch.no_grad():
        flows = model.estimate(both[:, :3], both[:, 3:], None, None).intermediate_flows
    for level, step in zip((6, 5, 4, 3, 2), flows):
        expected = torch.from_numpy(golden[f"flow{level}"]) * 20 / 2**level
        torch.testing.assert_close(step, expected, rtol=0, atol=1e-4, msg=f"flow{level}")


def test_preprocessing_is_the_published_one(shared):
    """BGR, and the mean over both frames taken before the resize."""
    golden = np.load(shared / "golden" / "fastflownet.npz")
    frame1, frame2 = FastFlowNet().prepare(*frames(golden))
    both = torch.cat((frame1, frame2), 1)
    torch.testing.assert_close(both, torch.from_numpy(golden["net_input"]), rtol=0, atol=1e-6)


def test_other_weights_and_sizes_agree_with_the_definition(fill):
    model = fill.fill_module(FastFlowNet(), "fastflownet", holdout=True).eval()
    generator = torch.Generator().manual_seed(1)
    for size in ((64, 128), (97, 30), (1, 200)):
        a, b = torch.rand(2, 1, 3, *size, generator=generator)
        with torch.no_grad():
            fast = model(a, b).flow
            with fleetflow.reference():
                plain = model(a, b).flow
        assert (fast - plain).abs().max() < 1e-3


@pytest.mark.parametrize("level", [6, 4, 2])
def test_the_matching_start_follows_the_correlation(level):
    """The laid-out path, without the random channels beside it, points to where the correlation is high."""
    torch.manual_seed(0)
    model = FastFlowNet()
    init_as_matcher(model)
    decoder = getattr(model, f"decoder{level}")
    with torch.no_grad():
        decoder.conv7.weight[:, 4:] = 0
    for right, down in ((2, 0), (-2, 0), (0, 2), (0, -2), (2, 2)):
        volume = torch.zeros(1, 87, 16, 16)
        volume[:, KEPT.index((down + 4) * 9 + right + 4)] = 0.2
        with torch.no_grad():
            found = decoder(volume)[0][0, :, 8, 8]
        truth = torch.tensor([float(right), float(down)])
        assert torch.nn.functional.cosine_similarity(found, truth, dim=0) > 0.7, (level, right, down, found)


def test_correlation_channels_are_the_kept_ones():
    a, b = torch.rand(2, 1, 4, 9, 11)
    full = local_correlation(a, b, 4)
    torch.testing.assert_close(local_correlation(a, b, 4, KEPT), full[:, list(KEPT)])


@pytest.mark.parametrize(("size", "most"), [((200, 300), 4), ((436, 1024), 2)])
def test_nothing_to_see_is_hardly_any_motion(size, most):
    """With our weights: a picture of one color, twice. Before blank scenes were trained this was up to 44 pixels."""
    predictor = fleetflow.Predictor(fleetflow.load("fastflownet"), device="cpu")
    for shade in (0, 90, 255):
        blank = np.full((*size, 3), shade, np.uint8)
        assert np.linalg.norm(predictor(blank, blank), axis=2).max() < most


def test_the_same_picture_twice_is_no_motion():
    frame = generate(1, 192, 256, seed=0).frame1[0]
    image = (255 * frame).round().byte().permute(1, 2, 0).numpy()
    flow = fleetflow.Predictor(fleetflow.load("fastflownet"), device="cpu")(image, image)
    assert np.linalg.norm(flow, axis=2).mean() < 0.25
