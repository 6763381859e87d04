"""The FlowNet family: the published parameters, names and outputs, each stage of the stacks on its own."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, SLOW, skip_without

import fleetflow
from fleetflow.models.flownet import LEVELS, FlowNet2, FlowNetFusion, _length, _warp_inside
from fleetflow.registry import models
from fleetflow.types import FleetflowError

PUBLISHED = {  # variant: reference file, parameters
    "flownet_s": ("flownet2s", 38_676_506),
    "flownet_c": ("flownet2c", 39_175_298),
    "flownet_sd": ("flownet2sd", 45_371_666),
    "flownet_cs": ("flownet2cs", 77_870_620),
    "flownet_css": ("flownet2css", 116_565_942),
    "flownet2": ("flownet2", 162_518_834),
}
SINGLE = ("flownet_s", "flownet_c", "flownet_sd")


def empty(build):
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build()


def filled(fill, build, name, **keywords):
    """The network with the deterministic weights of the reference outputs."""
    model = empty(build)
    entries = [(key, tuple(value.shape), "float32") for key, value in model.state_dict().items()]
    state = {key: torch.from_numpy(value) for key, value in fill.make_state(entries, name, **keywords).items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def frames(golden):
    return [torch.from_numpy(golden[k]).permute(2, 0, 1)[None].float() / 255 for k in ("img1", "img2")]


def watch(seen, name, layer, before=None):
    """Notes the layer's result in `seen`, or the channels `before` of what it is given."""
    if before is None:
        layer.register_forward_hook(lambda _, inputs, output: seen.__setitem__(name, output))
    else:
        layer.register_forward_pre_hook(lambda _, inputs: seen.__setitem__(name, inputs[0][:, before]))


def compare(seen, golden):
    """To 2e-5 of the largest value: processors round differently, and FlowNetSD's flow is 84 of its units long."""
    for name, value in seen.items():
        expected = torch.from_numpy(golden[name])
        if name.endswith("corr"):  # every seventh channel is stored, as it was before the leaky ReLU
            value, expected = value[:, ::7], F.leaky_relu(expected, 0.1)
        bar = 2e-5 * float(expected.abs().max())
        torch.testing.assert_close(value[:, : expected.shape[1]], expected, rtol=0, atol=bar, msg=name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    assert sum(weight.numel() for weight in empty(models[name]).parameters()) == PUBLISHED[name][1]


@pytest.mark.parametrize(
    "build,stem", [*((models[k], v[0]) for k, v in PUBLISHED.items()), (FlowNetFusion, "flownetfusion")]
)
def test_names_and_shapes_are_the_published_ones(shared, build, stem):
    published = json.loads((shared / "golden" / f"{stem}.keys.json").read_text())
    own = [(key, list(value.shape)) for key, value in empty(build).state_dict().items()]
    assert own == [(key, shape) for key, shape, *_ in published["state_dict"]]


@pytest.mark.parametrize("name", SINGLE)
def test_single_networks_reproduce_the_official_outputs(shared, fill, name):
    stem = PUBLISHED[name][0]
    golden = np.load(shared / "golden" / f"{stem}.npz")
    model = filled(fill, models[name], stem)
    seen = {}
    watch(seen, "conv3_1", model.conv3_1)
    if name == "flownet_c":
        watch(seen, "corr", model.conv3_1, slice(32, None))
    for level in LEVELS:
        watch(seen, f"predict_flow{level}", getattr(model, f"predict_flow{level}"))
    with torch.no_grad():
        flow = model(*frames(golden)).flow
        compare(seen, golden)
        assert (flow - torch.from_numpy(golden["flow"])).abs().max() < 2e-4

        prediction = model.train()(*frames(golden))
        for level, step in zip(LEVELS, prediction.intermediate_flows, strict=True):
            pixels = torch.from_numpy(golden[f"predict_flow{level}"]) * 20 / 2**level
            torch.testing.assert_close(step, pixels, rtol=0, atol=2e-4, msg=f"level {level}")
        torch.testing.assert_close(prediction.flow, flow)


@pytest.mark.parametrize("name", ["flownet_cs", "flownet_css", "flownet2"] if SLOW else ["flownet2"])
def test_stacks_reproduce_the_official_outputs(shared, fill, name):
    stem = PUBLISHED[name][0]
    golden = np.load(shared / "golden" / f"{stem}.npz")
    model = filled(fill, models[name], stem)
    seen = {}
    for part in ("flownetc", "flownets_1", "flownets_2", "flownets_d"):
        if hasattr(model, part):
            watch(seen, part, getattr(model, part).predict_flow2)
    watch(seen, "concat1", model.flownets_1.conv1, slice(6, 12))
    if name == "flownet2":
        watch(seen, "flownetc_corr", model.flownetc.conv3_1, slice(32, None))
        watch(seen, "concat_fusion", model.flownetfusion.conv0, slice(3, 11))
        watch(seen, "flownetfusion_predict_flow2", model.flownetfusion.predict_flow2)
        watch(seen, "flownetfusion_predict_flow1", model.flownetfusion.predict_flow1)
    with torch.no_grad():
        flow = model(*frames(golden)).flow
        compare(seen, golden)
        assert (flow - torch.from_numpy(golden["flow"])).abs().max() < 2e-4
        iterations = model.train()(*frames(golden)).intermediate_flows
    if name == "flownet2":  # pixels everywhere, and the last one is the result
        coarse, middle = (torch.from_numpy(golden[f"flownetfusion_predict_flow{k}"]) / 2**k for k in (2, 1))
        expected = (coarse, middle, flow)
    else:
        last = torch.from_numpy(golden["flownets_1" if name == "flownet_cs" else "flownets_2"])
        assert len(iterations) == len(LEVELS)
        iterations, expected = iterations[-1:], (last * 5,)
    for step, pixels in zip(iterations, expected, strict=True):
        torch.testing.assert_close(step, pixels, rtol=0, atol=2e-4)


def test_the_fusion_network_alone(shared, fill):
    golden = np.load(shared / "golden" / "flownetfusion.npz")
    with torch.no_grad():
        flows = filled(fill, FlowNetFusion, "flownetfusion")(torch.from_numpy(golden["net_input"]))
    for key, flow in zip(("flow2", "flow1", "flow"), flows, strict=True):
        torch.testing.assert_close(flow, torch.from_numpy(golden[key]), rtol=0, atol=1e-4, msg=key)


def test_reads_a_published_checkpoint(shared, fill, tmp_path):
    """The layout of NVIDIA's .pth.tar; another network of the family is refused and named."""
    state = filled(fill, models["flownet_s"], "flownet2s").state_dict()
    path = tmp_path / "FlowNet2-S_checkpoint.pth.tar"
    torch.save({"arch": "FlowNet2S", "epoch": 5, "state_dict": state, "best_EPE": 1.5}, path)
    model = fleetflow.load(f"flownet_s:{path}")
    golden = np.load(shared / "golden" / "flownet2s.npz")
    with torch.no_grad():
        flow = model(*frames(golden)).flow
    assert (flow - torch.from_numpy(golden["flow"])).abs().max() < 2e-4
    with pytest.raises(FleetflowError, match="looks like flownet_s"):
        fleetflow.load(f"flownet_c:{path}")


@pytest.fixture(scope="module")
def network_c():
    torch.manual_seed(0)
    return models["flownet_c"]().eval()


@pytest.mark.parametrize("height,width", [(1, 1), (70, 131)])
def test_any_size(network_c, height, width):
    with torch.no_grad():
        flow = network_c(*torch.rand(2, 1, 3, height, width)).flow
    assert flow.shape == (1, 2, height, width) and flow.isfinite().all()


def test_pairs_of_a_batch_do_not_touch_each_other(network_c):
    frame1, frame2 = torch.rand(2, 2, 3, 64, 128)
    frame1[0] *= 0.2  # another mean color
    with torch.no_grad():
        both, alone = network_c(frame1, frame2).flow, network_c(frame1[1:], frame2[1:]).flow
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-3)


def test_preprocessing():
    """Each color of a pair has mean 0 over both frames; nothing else changes."""
    frame1, frame2 = torch.rand(2, 2, 3, 9, 14)
    prepared = torch.stack(empty(models["flownet_s"]).prepare(frame1, frame2))
    assert prepared.mean((0, 3, 4)).abs().max() < 1e-6
    torch.testing.assert_close(prepared[0] - prepared[1], frame1 - frame2)
    torch.testing.assert_close(prepared[0, ..., 1:] - prepared[0, ..., :1], frame1[..., 1:] - frame1[..., :1])


TRAINED = [("flownet_c", torch.float32), ("flownet_c", torch.bfloat16), ("flownet2", torch.float32)]


@pytest.mark.parametrize(
    "name,dtype",
    itertools.product([*SINGLE, "flownet2"], [torch.float32, torch.bfloat16]) if SLOW else TRAINED,
)
def test_trains(name, dtype):
    """Steps that are finite, with a gradient in every parameter; the other networks are parts of the largest."""
    skip_without(dtype)
    torch.manual_seed(0)
    model = models[name]().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    frame1, frame2 = torch.rand(2, 1, 3, 64, 64)
    for _ in range(1 if name == "flownet2" and not SLOW else 2):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            prediction = model(frame1, frame2)
        loss = (prediction.flow - 1).abs().mean() + sum(
            (step - 1).abs().mean() for step in prediction.intermediate_flows
        )
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite() and prediction.flow.dtype == torch.float32
        for key, weight in model.named_parameters():
            assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any(), key
        optimizer.step()


def test_warping_stays_inside_the_picture():
    """As the official operator, which is sampling with positions clamped; gradients too."""
    golden = np.load(GOLDEN / "ops_correlation.npz")
    frame, flow, expected = (torch.from_numpy(golden[f"resample2d_{key}"]) for key in ("img", "flow", "out"))
    torch.testing.assert_close(_warp_inside(frame, flow), expected, rtol=0, atol=1e-5)
    frame, flow = frame.double().requires_grad_(), (flow.double() * 3).requires_grad_()
    y, x = torch.meshgrid(torch.arange(10), torch.arange(14), indexing="ij")
    x, y = x + flow[:, 0], y + flow[:, 1]
    assert (x.min() < 0) and (x.max() > 13) and (y.min() < 0) and (y.max() > 9)
    grid = torch.stack((2 * x / 13 - 1, 2 * y / 9 - 1), -1)
    sampled = F.grid_sample(frame, grid, padding_mode="border", align_corners=True)
    weight = torch.linspace(-1, 1, sampled.numel(), dtype=torch.float64).view(sampled.shape)
    wanted = torch.autograd.grad((sampled * weight).sum(), (frame, flow))
    found = torch.autograd.grad((_warp_inside(frame, flow) * weight).sum(), (frame, flow))
    for one, two in zip(found, wanted):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


def test_the_length_of_no_error_has_a_gradient():
    zero = torch.zeros(1, 3, 2, 2, requires_grad=True)
    _length(zero).sum().backward()
    assert zero.grad.abs().max() == 0
    assert _length(torch.tensor([2.0, 3.0, 6.0]).view(1, 3, 1, 1)).item() == 7


def test_fresh_weights_are_the_published_ones():
    torch.manual_seed(0)
    fusion = FlowNetFusion()
    assert fusion.conv2[0].bias.min() >= 0 and 0.4 < fusion.conv2[0].bias.mean() < 0.6
    bound = (6 / (9 * (128 + 128))) ** 0.5
    assert 0.99 * bound < fusion.conv2_1[0].weight.abs().max() <= bound
    assert empty(FlowNet2).flownets_1.upsampled_flow6_to_5.bias is None
