"""LiteFlowNet2 and its stages: the published parameters, names and outputs; growing; the weights of Caffe."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN

import fleetflow
from fleetflow.models import liteflownet2
from fleetflow.models.liteflownet2 import (
    CHANNELS,
    KERNELS,
    LEVELS,
    MEAN,
    Enlargement,
    Matching,
    from_caffe,
    grow,
    init_as_matcher,
)
from fleetflow.models.weights import without_memory
from fleetflow.registry import models
from fleetflow.types import FleetflowError

STAGES = {  # name: parameters, the file of the published names
    "liteflownet2": (6_428_112, "liteflownet2"),
    "liteflownet2_m6s6": (1_725_156, "liteflownet2_pre_M6S6"),
    "liteflownet2_m6s6r6": (2_238_541, "liteflownet2_pre_M6S6R6"),
    "liteflownet2_m5s5r5": (3_697_466, "liteflownet2_pre_M5S5R5"),
    "liteflownet2_m4s4r4": (5_101_701, "liteflownet2_pre_M4S4R4"),
}


def frames(golden):
    return [torch.from_numpy(golden[k]).permute(2, 0, 1)[None].float() / 255 for k in ("img1", "img2")]


def made(fill, *size, seed=0):
    image1, image2, _ = fill.make_pair(*size, seed=seed)
    return [torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 for image in (image1, image2)]


@pytest.fixture(scope="module")
def filled(fill):
    """Each network with the deterministic weights of the reference outputs."""
    return {name: fill.fill_module(models[name](), "liteflownet2").eval() for name in STAGES}


def watched(model):
    """Returns a dictionary that the next prediction fills with the intermediate tensors of the reference outputs."""
    seen = {}

    def keep(layer, name, change=lambda output: output):
        layer.register_forward_hook(lambda _, inputs, output: seen.__setitem__(name, change(output)))

    def take(layer, name, argument=0):
        layer.register_forward_pre_hook(lambda _, inputs: seen.__setitem__(name, inputs[argument].clone()))

    for level in (3, 6):
        features = model.encoder["layers"][level - 1]["layers"]
        features.register_forward_hook(
            lambda _, inputs, output, name=f"feat{level}": seen.__setitem__(name, output[:1].clone())
        )
    for level in model.levels:
        networks = model.decoder["decoders"][f"level{level}"]
        take(networks.NetS, f"level{level}_NetM", 2)
        if networks.NetM.corr_up is None:
            take(networks.NetM.layers, f"level{level}_NetM_corr")
        else:
            take(networks.NetM.corr_up, f"level{level}_NetM_corr")
            take(networks.NetM.layers, f"level{level}_NetM_corr_up")
        if networks.NetR is None:
            keep(networks, f"level{level}_NetS")
            keep(networks, f"level{level}_upflow_layer")  # none in the first stage
        else:
            take(networks.NetR, f"level{level}_NetS", 1)
            keep(networks.NetR, f"level{level}_NetR")
            keep(networks.NetR.dist_layer, f"level{level}_NetR_dist_layer")
        if level > model.levels[-1]:
            keep(networks.upflow_layer, f"level{level}_upflow_layer")
    return seen


@pytest.mark.parametrize("name", STAGES)
def test_names_and_shapes_are_the_published_ones(shared, name):
    published = json.loads((shared / "golden" / f"{STAGES[name][1]}.keys.json").read_text())
    own = [(key, list(value.shape)) for key, value in without_memory(name).state_dict().items()]
    assert own == [(key, shape) for key, shape, *_ in published["state_dict"]]


@pytest.mark.parametrize("name", STAGES)
def test_parameters(name):
    model = without_memory(name)
    assert sum(weight.numel() for weight in model.parameters()) == STAGES[name][0]
    assert model.grid == 2 ** (model.levels[-1] - 1)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("file", ["liteflownet2", "liteflownet2_odd", "liteflownet2_pre_M6S6"])
def test_reproduces_the_official_outputs(shared, filled, tmp_path, file, plain):
    """Through a .pth file, as a user has it; every stored intermediate first, so that a failure names its layer."""
    golden = np.load(shared / "golden" / f"{file}.npz")
    name = "liteflownet2_m6s6" if file.endswith("M6S6") else "liteflownet2"
    torch.save({"meta": {"epoch": 1}, "state_dict": filled[name].state_dict()}, tmp_path / "published.pth")
    model = fleetflow.load(f"{name}:{tmp_path / 'published.pth'}")
    seen = watched(model)
    with fleetflow.reference() if plain else torch.inference_mode(), torch.no_grad():
        flow = model(*frames(golden)).flow
    others = {"img1", "img2", "net_input", "flow", "upsample_kernel", "meta_json"}
    compared = [key for key in golden if key not in others]
    assert len(compared) == {"liteflownet2": 20, "liteflownet2_odd": 0, "liteflownet2_pre_M6S6": 6}[file]
    for key in compared:
        expected, found = torch.from_numpy(golden[key]), seen[key]
        if found.shape != expected.shape:  # every fourth or sixth channel is stored
            found = found[:, :: -(-found.shape[1] // expected.shape[1])]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4, msg=key)
    assert (flow[0].permute(1, 2, 0) - torch.from_numpy(golden["flow"])).abs().max() < 1e-4


@pytest.mark.parametrize("file", ["liteflownet2", "liteflownet2_odd"])
def test_preprocessing_is_the_published_one(shared, file):
    """BGR, resized as 8-bit pictures; the stored frames still have their mean."""
    golden = np.load(shared / "golden" / f"{file}.npz")
    both = torch.cat(
        [frame + torch.tensor(MEAN)[:, None, None] for frame in models["liteflownet2"]().prepare(*frames(golden))], 1
    )
    torch.testing.assert_close(both, torch.from_numpy(golden["net_input"]), rtol=0, atol=1e-6)


def test_the_filter_is_the_published_one(shared):
    golden = np.load(shared / "golden" / "liteflownet2.npz")
    assert torch.equal(Enlargement(2).weight, torch.from_numpy(golden["upsample_kernel"]))
    even = Enlargement(3)(torch.ones(1, 3, 4, 5))[0, :, 2:-2, 2:-2]  # away from the border
    shares = {(y, x): float(even[0, y, x]) for y in (0, 1) for x in (0, 1)}
    assert shares == {(0, 0): 0.9375, (0, 1): 1.0, (1, 0): 1.0, (1, 1): 1.0}


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("level,prefix", [(4, "lfn2"), (3, "lfn2_l3")])
def test_correlation_is_the_published_one(level, prefix, plain):
    golden = np.load(GOLDEN / "ops_correlation.npz")
    one, two, expected = (torch.from_numpy(golden[f"{prefix}_{key}"]) for key in ("f1", "f2", "out"))
    network, seen = Matching(level), []
    (network.corr_up or network.layers).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    with fleetflow.reference() if plain else torch.no_grad(), torch.no_grad():
        network(one, two)
    torch.testing.assert_close(seen[0], F.leaky_relu(expected, 0.1), rtol=0, atol=1e-5)


def test_steps_are_flows_in_pixels_of_their_own_grid(shared, filled):
    golden = np.load(shared / "golden" / "liteflownet2.npz")
    model = filled["liteflownet2"].train()
    with torch.no_grad():
        prediction = model(*frames(golden))
    model.eval()
    for level, step in zip(LEVELS, prediction.intermediate_flows, strict=True):
        pixels = torch.from_numpy(golden[f"level{level}_NetR"]) * (20 / 2 ** (level - 1))
        torch.testing.assert_close(step, pixels, rtol=0, atol=1e-4, msg=f"level {level}")
    full = F.interpolate(prediction.intermediate_flows[-1] * 4, scale_factor=4, mode="bilinear")
    torch.testing.assert_close(prediction.flow, full, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["liteflownet2", "liteflownet2_m4s4r4"])
def test_other_weights_and_sizes_agree_with_the_definition(fill, name):
    model = fill.fill_module(models[name](), "liteflownet2", holdout=True).eval()
    for size in ((64, 128), (97, 70), (1, 130), (1, 1)):
        pair = made(fill, *size, seed=7)
        with torch.no_grad():
            fast = model(*pair).flow
            with fleetflow.reference():
                slow = model(*pair).flow
        assert fast.shape == (1, 2, *size) and fast.isfinite().all()
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-3)


def test_a_stage_is_the_upper_part_of_the_next(fill, filled):
    """The flow of each level does not depend on the levels below it."""
    pair = made(fill, 64, 128)
    with torch.no_grad():
        whole = filled["liteflownet2"].train()(*pair).intermediate_flows
        for count, name in enumerate(("liteflownet2_m6s6r6", "liteflownet2_m5s5r5", "liteflownet2_m4s4r4"), 1):
            iterations = filled[name].train()(*pair).intermediate_flows
            assert len(iterations) == count
            torch.testing.assert_close(iterations, whole[:count], rtol=0, atol=1e-5)
    for model in filled.values():
        model.eval()


def test_growing_copies_what_fits():
    torch.manual_seed(0)
    first, second, third, fourth = (models[f"liteflownet2_{name}"]() for name in ("m6s6", "m6s6r6", "m5s5r5", "m4s4r4"))
    for model, earlier in ((second, first), (third, second), (fourth, third)):
        fresh = {key: value.clone() for key, value in model.state_dict().items()}
        grow(model, earlier)
        own, known = model.state_dict(), earlier.state_dict()
        assert all(torch.equal(own[key], value) for key, value in known.items())
        new = [key for key in own if key not in known and key.endswith("conv.weight")]
        assert new and all("NetR" in key or "level" in key for key in new)
        for key in new:
            above = key.replace(f"level{model.levels[-1]}", f"level{earlier.levels[-1]}")
            copied = above in known and known[above].shape == own[key].shape
            assert torch.equal(own[key], known[above] if copied else fresh[key])
    level5, level6 = (third.decoder["decoders"][f"level{level}"] for level in (5, 6))
    assert torch.equal(level5.NetM.pred_flow.weight, level6.NetM.pred_flow.weight)
    assert torch.equal(level5.NetR.dist_layer.weight, level6.NetR.dist_layer.weight)
    assert level5.NetM.pred_flow.weight.data_ptr() != level6.NetM.pred_flow.weight.data_ptr()
    with pytest.raises(FleetflowError, match="later stage first"):
        grow(second, third)


def test_the_stage_before_is_refused_with_its_name(filled, tmp_path):
    torch.save(filled["liteflownet2_m5s5r5"].state_dict(), tmp_path / "stage.pth")
    with pytest.raises(FleetflowError, match="looks like liteflownet2_m5s5r5"):
        fleetflow.load(f"liteflownet2_m4s4r4:{tmp_path / 'stage.pth'}")


def test_predictor_and_gradients(fill, filled):
    """Convolutions fused for prediction give the same flow; every step reaches every parameter."""
    model = fill.fill_module(models["liteflownet2"](), "liteflownet2").eval()
    image1, image2, _ = fill.make_pair(64, 128)
    pair = made(fill, 64, 128)
    with torch.no_grad():
        expected = model(*pair).flow[0].permute(1, 2, 0).numpy()
    flow = fleetflow.Predictor(model, device="cpu", precision="fp32")(image1, image2)
    assert np.abs(flow - expected).max() < 1e-3
    flow = fleetflow.Predictor(model, device="cpu", precision="bf16")(image1, image2)
    assert np.abs(flow - expected).mean() < 0.1
    sum(step.square().mean() for step in model.train()(*pair).intermediate_flows).backward()
    for key, weight in model.named_parameters():
        assert weight.grad.isfinite().all() and weight.grad.abs().max() > 0, key


@pytest.mark.parametrize("level", LEVELS)
def test_the_matching_start_follows_the_motion(level):
    """The laid-out path, without the random channels beside it, points to where features have moved."""
    torch.manual_seed(0)
    model = models["liteflownet2"]()
    init_as_matcher(model)
    network = model.decoder["decoders"][f"level{level}"].NetM
    features = F.avg_pool2d(torch.randn(1, CHANNELS[level], 26, 26), 3, 1)
    with torch.no_grad():
        network.pred_flow.weight[:, 4:] = 0
        for right, down in ((2, 0), (-2, 0), (0, 2), (0, -2), (2, 2)):
            found = network(features, features.roll((down, right), (2, 3)))[0, :, 8:-8, 8:-8].mean((1, 2))
            truth = torch.tensor([float(right), float(down)])
            assert F.cosine_similarity(found, truth, dim=0) > 0.9, (right, down, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_iterations_of_training_lower_the_loss(dtype):
    torch.manual_seed(0)
    model = models["liteflownet2_m5s5r5"]().train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    frame1, frame2 = torch.rand(2, 1, 3, 64, 64)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            iterations = model(frame1, frame2).intermediate_flows
        assert all(step.dtype == torch.float32 for step in iterations)
        loss = sum((step - 1).abs().mean() for step in iterations)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


# ---- the Caffe release ----

TRUE_FILTER = torch.tensor([0.25, 0.75, 0.75, 0.25])[:, None] * torch.tensor([0.25, 0.75, 0.75, 0.25])


def as_released(state):
    """The state of a network in the layout of the Caffe release, {layer: arrays}, written down layer by layer."""
    layers = {}

    def add(layer, here, bias=True):
        layers[layer] = [state[f"{here}.weight"]] + ([state[f"{here}.bias"]] if bias else [])

    convolutions = {1: ["conv1"], 2: ["conv2_1", "conv2_2", "conv2_3"], 3: ["conv3_1", "conv3_2"]}
    convolutions |= {4: ["conv4_1", "conv4_2"], 5: ["conv5"], 6: ["conv6"]}
    for level, names in convolutions.items():
        for k, name in enumerate(names):
            add(name, f"encoder.layers.{level - 1}.layers.{k}.conv")
    for level in (6, 5, 4, 3):
        here = f"decoder.decoders.level{level}"
        for k in range(5):
            add(f"conv{k + 1}_D1_L{level}", f"{here}.NetM.layers.{k}.conv")
            add(f"conv{k + 1}_D2_L{level}", f"{here}.NetS.layers.{k}.conv")
        for k in range(6):
            add(f"conv{k + 1}_R_L{level}", f"{here}.NetR.layers.{k}.conv")
        add(f"scaled_flow_D1_{'' if level == 6 else 'res_'}L{level}", f"{here}.NetM.pred_flow")
        add(f"scaled_flow_D2_res_L{level}", f"{here}.NetS.pred_flow")
        for name in ("sum_exp_kernel_R_L{}", "scaled_flow0_R_L{}_x", "scaled_flow0_R_L{}_y"):
            layers[name.format(level)] = [torch.ones(1, KERNELS[level] ** 2, 1, 1), torch.zeros(1)]
    for level in (6, 5):
        add(f"dist_R_L{level}", f"decoder.decoders.level{level}.NetR.dist_layer")
    for level in (4, 3):
        add(f"distH_R_L{level}", f"decoder.decoders.level{level}.NetR.dist_layer.0")
        add(f"distW_R_L{level}", f"decoder.decoders.level{level}.NetR.dist_layer.1")
        add(f"F0_128_L{level}", f"decoder.decoders.level{level}.rfeat_layer.conv")
    for level in (6, 5, 4):
        add(f"scaled_flow_R_L{level}to{level - 1}", f"decoder.decoders.level{level}.upflow_layer", bias=False)
    add("corr_L3", "decoder.decoders.level3.NetM.corr_up", bias=False)
    for name in ("img0s_aug", "img1s_aug"):
        layers[name] = [torch.ones(1), torch.zeros(0), torch.full((1, 3, 1, 1), 0.4)]
    return layers


def with_true_filters(state):
    """The state with the bilinear filter where mmflow has its own."""
    return {
        key: TRUE_FILTER.expand_as(value).clone() if value.shape[1:] == (1, 4, 4) else value
        for key, value in state.items()
    }


def numbered(layers):
    return {f"{layer}.{k}": array for layer, arrays in layers.items() for k, array in enumerate(arrays)}


def test_weights_of_the_caffe_release_give_its_network(fill, filled, monkeypatch):
    """Its correlation is a mean; the translated weights, with sums, give the flow of its weights with means."""
    state = with_true_filters(filled["liteflownet2"].state_dict())
    model = models["liteflownet2"]().eval()
    pair = made(fill, 64, 128)
    model.load_state_dict(from_caffe(numbered(as_released(state))))
    with torch.no_grad():
        found = model(*pair).flow
        sums = liteflownet2.local_correlation
        monkeypatch.setattr(liteflownet2, "local_correlation", lambda *given: sums(*given) / given[0].shape[1])
        model.load_state_dict(state)
        expected = model(*pair).flow
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_caffemodel_gives_the_same_weights_and_flow(fill, filled, tmp_path):
    pytest.importorskip("google.protobuf", reason="writes a .caffemodel")
    from test_caffe import caffemodel

    state = with_true_filters(filled["liteflownet2"].state_dict())
    released = dict(state)
    for level in LEVELS:
        key = f"decoder.decoders.level{level}.NetM.layers.0.conv.weight"
        released[key] = state[key] * CHANNELS[level]
    layers = {name: [array.numpy() for array in arrays] for name, arrays in as_released(released).items()}
    for legacy in (False, True):
        (tmp_path / "released.caffemodel").write_bytes(caffemodel(layers, "layers" if legacy else "layer", legacy))
        model = fleetflow.load(f"liteflownet2:{tmp_path / 'released.caffemodel'}")
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, state[key], rtol=1e-6, atol=0, msg=key)
    pair = made(fill, 64, 64)
    expected = filled["liteflownet2"]
    own = expected.state_dict()
    original = {key: value.clone() for key, value in own.items()}
    with torch.no_grad():
        expected.load_state_dict(state)
        torch.testing.assert_close(model(*pair).flow, expected(*pair).flow, rtol=0, atol=1e-4)
        expected.load_state_dict(original)


def test_what_is_unknown_in_a_caffe_state_keeps_its_name(filled):
    state = numbered(as_released(filled["liteflownet2"].state_dict()))
    state["conv1_R_L2.0"] = torch.zeros(1)  # of the model for KITTI
    state["sum_exp_kernel_R_L4.0"] = torch.full((1, 25, 1, 1), 2.0)  # no plain sum
    unknown = set(from_caffe(state)) - set(filled["liteflownet2"].state_dict())
    assert unknown == {"conv1_R_L2.0", "sum_exp_kernel_R_L4.0"}
    published = filled["liteflownet2"].state_dict()
    assert from_caffe(published) is published
