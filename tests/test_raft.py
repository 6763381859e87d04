"""RAFT and GMA: published parameters, names and outputs; warm start; small frames; the published weights."""

import json
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, skip_without

import fleetflow
from fleetflow.layers import residual_encoder
from fleetflow.layers.residual_encoder import InstanceNorm
from fleetflow.layers.small_frames import SMALLEST, enlarged, reduced_flow
from fleetflow.layers.upsample import convex_upsample
from fleetflow.layers.warm_start import SHORT, carry_forward
from fleetflow.models.gma import GMA, Attention
from fleetflow.models.raft import own_names
from fleetflow.models.weights import without_memory
from fleetflow.ops.kernels import reference
from fleetflow.ops.warp import pixel_grid
from fleetflow.registry import models
from fleetflow.types import FleetflowError, Prediction

COUNTS = {"raft": 5_257_536, "raft_small": 990_162, "gma": 5_879_873, "gma_heads2": 5_961_793}
RECORDED = [  # reference outputs, variant, name of the fill rule
    ("raft_basic", "raft", "raft_basic"),
    ("raft_basic_odd", "raft", "raft_basic"),
    ("raft_basic_odd_kitti", "raft", "raft_basic"),
    ("raft_small", "raft_small", "raft_small"),
    ("raft_small_odd", "raft_small", "raft_small"),
    ("gma", "gma", "gma"),
    ("gma_odd", "gma", "gma"),
    ("gma_position_only", "gma_position_only", "gma"),
    ("gma_position_and_content", "gma_position_and_content", "gma"),
    ("gma_heads2", "gma_heads2", "gma"),
]


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return models["raft_small"](iterations=2).eval()


def pair(height, width, count=1, seed=1):
    return torch.rand(2, count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert sum(weight.numel() for weight in without_memory(name).parameters()) == COUNTS[name]


@pytest.mark.parametrize("file,name", [("raft_basic", "raft"), *((k, k) for k in ("raft_small", "gma", "gma_heads2"))])
def test_names_and_shapes_are_the_published_ones(shared, file, name):
    published = json.loads((shared / "golden" / f"{file}.keys.json").read_text())
    own = [(key, list(value.shape)) for key, value in without_memory(name).state_dict().items()]
    assert own == [(key, shape) for key, shape, *_ in published["state_dict"]]


def watched(model) -> dict[str, list]:
    """What the parts of the model return, call by call, from now on."""
    seen = {"corr": [], "motion": [], "net": [], "motion_global": [], "fmap": [], "cnet": [], "attention": []}
    block = model.update_block
    block.encoder.register_forward_pre_hook(lambda _, inputs: seen["corr"].append(inputs[0]))
    block.encoder.register_forward_hook(lambda _, inputs, output: seen["motion"].append(output))
    block.gru.register_forward_hook(lambda _, inputs, output: seen["net"].append(output))
    model.fnet.register_forward_hook(lambda _, inputs, output: seen["fmap"].append(output))
    model.cnet.register_forward_hook(lambda _, inputs, output: seen["cnet"].append(output))
    if isinstance(model, GMA):
        block.aggregator.register_forward_hook(lambda _, inputs, output: seen["motion_global"].append(output))
        model.att.register_forward_hook(
            lambda own, inputs, attended: seen["attention"].append(
                own.mix(attended, inputs[1], torch.eye(16 * 24)[None, None])
            )
        )
    return seen


@pytest.mark.parametrize("file,name,rule", RECORDED, ids=[row[0] for row in RECORDED])
def test_reproduces_the_official_outputs(shared, fill, file, name, rule):
    """Every stored intermediate first, so that a failure names its layer."""
    golden = {key: value for key, value in np.load(shared / "golden" / f"{file}.npz").items()}
    meta = json.loads(str(golden["meta_json"]))
    frames = [torch.from_numpy(golden[key]).permute(2, 0, 1)[None].float() / 255 for key in ("img1", "img2")]
    model = fill.fill_module(models[name](), rule).eval()
    seen = watched(model) if not file.count("odd") and name != "gma_heads2" else {}
    if file.endswith("kitti"):  # padded at the bottom only, before the network sees it
        left, right, top, bottom = meta["pad"]
        frames = [F.pad(frame, (left, right, top, bottom), mode="replicate") for frame in frames]
    with torch.no_grad():
        prediction = model(*frames, iterations=meta["iters"])
    flow = prediction.flow
    if file.endswith("kitti"):
        flow = flow[..., top : top + 131, left : left + 187]
    found = {"flow_low": prediction.state[1], "flow": flow}
    if seen:
        found |= {"fmap1": seen["fmap"][0][:, ::4], "cnet": seen["cnet"][0][:, ::4]}
        found |= {"corr0": seen["corr"][0][:, ::3], "corr_last": seen["corr"][-1][:, ::3]}
        found |= {"motion0": seen["motion"][0][:, ::4], "net_last": seen["net"][-1][:, ::8]}
        found |= {"attention_rows": seen["attention"][0][0, 0, ::16]} if seen["attention"] else {}
        found |= {"motion_global0": seen["motion_global"][0][:, ::4]} if seen["motion_global"] else {}
    compared = [
        key for key in ("fmap1", "cnet", "corr0", "attention_rows", "motion0", "motion_global0") if key in found
    ]
    for key in (*compared, "corr_last", "net_last", "flow_low", "flow"):
        if key in golden and key in found:
            difference = np.abs(found[key].numpy() - golden[key]).max()
            assert difference < 1e-3, f"{key} differs by {difference}"
    assert not seen or {"net_last", "motion0" if name.startswith("gma") else "corr_last"} <= set(golden) & set(found)


@pytest.mark.parametrize("file,name", [("raft_basic", "raft"), ("raft_small", "raft_small")])
def test_every_step_of_training_is_the_official_one(shared, fill, file, name):
    golden = np.load(shared / "golden" / f"{file}.npz")
    frames = [torch.from_numpy(golden[key]).permute(2, 0, 1)[None].float() / 255 for key in ("img1", "img2")]
    model = fill.fill_module(models[name](), file).train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()
    with torch.no_grad():
        prediction = model(*frames, iterations=3)
    assert len(prediction.intermediate_flows) == 3 and prediction.intermediate_flows[-1] is prediction.flow
    expected = torch.from_numpy(golden["flow_up_iter1"])
    torch.testing.assert_close(prediction.intermediate_flows[0], expected, rtol=0, atol=1e-4)
    expected = torch.from_numpy(golden["flow_low_iters"][2:3])
    torch.testing.assert_close(prediction.state[1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["raft_small", "gma_position_and_content"])
def test_without_stored_volumes_the_result_is_the_same(name):
    """Also GMA's attention is then computed a few rows at a time."""
    torch.manual_seed(0)
    stored, lean = models[name](iterations=2).eval(), models[name](iterations=2, memory_limit=200_000).eval()
    lean.load_state_dict(stored.state_dict())
    with torch.no_grad():
        if name.startswith("gma"):
            stored.update_block.aggregator.gamma.fill_(1)
            lean.update_block.aggregator.gamma.fill_(1)
        a, b = stored(*pair(136, 152, 2)).flow, lean(*pair(136, 152, 2)).flow
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_steps_have_a_published_default_and_can_be_chosen(small):
    assert [without_memory(name).iterations for name in ("raft", "raft_small", "gma")] == [20, 20, 20]
    with torch.no_grad():
        frames = pair(128, 128)
        assert torch.equal(small(*frames).flow, small(*frames, iterations=2).flow)
        assert not torch.equal(small(*frames).flow, small(*frames, iterations=3).flow)


# ---- checkpoints


def torchvision_names(size: str) -> list[tuple[str, str]]:
    """(name in torchvision's raft_large or raft_small, our name) of every layer, written from its module tree."""
    inner = 3 if size == "small" else 2
    pairs = []
    for theirs, ours in (("feature_encoder", "fnet"), ("context_encoder", "cnet")):
        pairs += [(f"{theirs}.convnormrelu.{k}", f"{ours}.{layer}1") for k, layer in ((0, "conv"), (1, "norm"))]
        for block in (f"layer{k}.{j}" for k in (1, 2, 3) for j in (0, 1)):
            for n in range(1, inner + 1):
                pairs += [(f"{theirs}.{block}.convnormrelu{n}.0", f"{ours}.{block}.conv{n}")]
                pairs += [(f"{theirs}.{block}.convnormrelu{n}.1", f"{ours}.{block}.norm{n}")]
            pairs += [(f"{theirs}.{block}.downsample.{k}", f"{ours}.{block}.downsample.{k}") for k in (0, 1)]
        pairs += [(f"{theirs}.conv", f"{ours}.conv2")]
    for theirs, ours in (("corr1", "c1"), ("corr2", "c2"), ("flow1", "f1"), ("flow2", "f2"), ("", "")):
        pairs += [(f"update_block.motion_encoder.conv{theirs}.0", f"update_block.encoder.conv{ours}")]
    for unit in (1, 2) if size == "large" else (1,):
        for gate in ("convz", "convr", "convq"):
            own = f"{gate}{unit}" if size == "large" else gate
            pairs += [(f"update_block.recurrent_block.convgru{unit}.{gate}", f"update_block.gru.{own}")]
    pairs += [(f"update_block.flow_head.conv{k}", f"update_block.flow_head.conv{k}") for k in (1, 2)]
    return [
        *pairs,
        ("mask_predictor.convrelu.0", "update_block.mask.0"),
        ("mask_predictor.conv", "update_block.mask.2"),
    ]


@pytest.mark.parametrize("name,size,count", [("raft", "large", 169), ("raft_small", "small", 106)])
def test_reads_the_names_of_torchvision(name, size, count, tmp_path):
    torch.manual_seed(0)
    model = models[name]().eval()
    state = {
        f"{theirs}.{leaf}": model.state_dict()[f"{ours}.{leaf}"]
        for theirs, ours in torchvision_names(size)
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        if f"{ours}.{leaf}" in model.state_dict()
    }
    assert len(state) == count
    torch.save(state, tmp_path / "torchvision.pth")
    loaded = fleetflow.load(f"{name}:{tmp_path / 'torchvision.pth'}").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


def test_reads_the_names_of_princeton_and_says_what_is_wrong(small, tmp_path):
    state = {f"module.{key}": value for key, value in small.state_dict().items()}
    torch.save(state, tmp_path / "raft-small.pth")
    loaded = fleetflow.load(f"raft_small:{tmp_path / 'raft-small.pth'}").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in small.state_dict().items())
    assert own_names(loaded) is loaded
    with pytest.raises(FleetflowError, match="does not fit raft .*looks like raft_small"):
        fleetflow.load(f"raft:{tmp_path / 'raft-small.pth'}")


# ---- warm start


def test_carry_forward_takes_the_nearest_arrival():
    torch.manual_seed(0)
    flow = F.interpolate(6 * torch.randn(2, 2, 4, 5), (37, 44), mode="bicubic")
    carried = carry_forward(flow)
    arrival = (pixel_grid(37, 44, flow) + flow).flatten(2)
    inside = ((arrival > 0) & (arrival < arrival.new_tensor([[44], [37]]))).all(1)
    grid = pixel_grid(37, 44, flow).flatten(1)
    for k in range(2):
        points, vectors = arrival[k][:, inside[k]], flow[k].flatten(1)[:, inside[k]]
        distance = torch.cdist(grid.T, points.T)
        expected = vectors[:, distance.argmin(1)].view(2, 37, 44)
        assert (carried[k] == expected).all(0).float().mean() > 0.999  # all but ties
        assert 0 < inside[k].sum() < 37 * 44, "some leave the picture"


def test_carry_forward_by_hand():
    flow = torch.zeros(1, 2, 8, 16)
    flow[0, :, 3, 4] = torch.tensor([5.0, 2.0])
    carried = carry_forward(flow)
    assert carried[0, :, 3, 4].tolist() == [0, 0], "who stays is replaced by its neighbors"
    gone = torch.full((1, 2, 8, 16), 100.0)
    assert carry_forward(gone).abs().max() == 0
    assert carry_forward(torch.full((1, 2, 4, 6), torch.nan)).abs().max() == 0
    assert carry_forward(torch.full((1, 2, 9, 9), 2.0)).unique().tolist() == [2.0]
    assert carry_forward(torch.zeros(1, 2, 1, 1)).shape == (1, 2, 1, 1)


@pytest.mark.parametrize("name", ["raft_small", "gma"])
def test_the_next_pair_begins_where_the_last_one_ended(name):
    torch.manual_seed(0)
    model = models[name](iterations=1).eval()
    frames = pair(128, 160)
    with torch.no_grad():
        model.update_block.flow_head.conv2.weight.zero_()
        model.update_block.flow_head.conv2.bias.copy_(torch.tensor([0.5, 0.25]))
        first = model(*frames)
        assert first.state[1].shape == (1, 2, 16, 20) and not any(part.requires_grad for part in first.state)
        flow = first.state[1]
        second = model(*frames, previous=first)
        begun = flow if name == "raft_small" else carry_forward(flow)  # few iterations: RAFT goes on with all it had
        torch.testing.assert_close(second.state[1], begun + flow)
        alone = model(*frames, previous=first._replace(state=(torch.zeros_like(first.state[0]), flow)))
        assert torch.equal(alone.state[0], second.state[0]) == (name != "raft_small")
        moved = model(*frames, previous=first, iterations=SHORT + 1)
        torch.testing.assert_close(moved.state[1], carry_forward(flow) + (SHORT + 1) * flow)
        ramp = torch.linspace(-3, 3, 160).expand(1, 2, 128, 160)
        given = model(*frames, previous=Prediction(ramp))
        torch.testing.assert_close(given.state[1], flow + ramp.view(1, 2, 16, 8, 20, 8).mean((3, 5)) / 8)
        with pytest.raises(FleetflowError, match=r"is \[1, 2, 64, 160\]; expected \[1, 2, 128, 160\]"):
            model(*frames, previous=Prediction(ramp[..., :64, :]))
        cut = [frame[..., 3:, 5:] for frame in frames]  # padded by 1 above, 2 below, 2 left, 3 right
        given = model(*cut, previous=Prediction(ramp[..., 3:, 5:]))
        wide = torch.nn.functional.pad(ramp[..., 3:, 5:], (2, 3, 1, 2), mode="replicate")
        torch.testing.assert_close(given.state[1], flow + wide.view(1, 2, 16, 8, 20, 8).mean((3, 5)) / 8)
        for bad in ((first.state[0], flow[..., :3]), (flow,), "a state"):
            with pytest.raises(FleetflowError, match="same network and size"):
                model(*frames, previous=Prediction(first.flow, state=bad))


# ---- sizes, training, parts


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (127, 8), (40, 129)])
def test_small_frames(small, size):
    with torch.no_grad():
        flow = small(*pair(*size)).flow
    assert flow.shape == (1, 2, *size) and flow.isfinite().all()


def test_small_frames_are_enlarged_and_the_flow_comes_back():
    assert enlarged(torch.zeros(1, 3, 64, 96)).shape[2:] == (128, 192), "one factor for both sides"
    assert enlarged(torch.zeros(1, 3, 8, 64)).shape[2:] == (128, 512)
    assert enlarged(torch.zeros(1, 3, 8, 1000)).shape[2:] == (128, 1000), "but not beyond reason"
    large = torch.zeros(1, 3, SMALLEST, 400)
    assert enlarged(large) is large
    flow = torch.tensor([4.0, 8.0]).view(1, 2, 1, 1).expand(1, 2, 128, 192)
    assert reduced_flow(flow, (128, 192)) is flow
    assert reduced_flow(flow, (64, 48))[0, :, 5, 5].tolist() == [1.0, 4.0]


@pytest.mark.parametrize("memory_limit", [2**31, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains(dtype, memory_limit):
    """A gradient in every parameter, none of it zero everywhere; both frames' features are reached."""
    skip_without(dtype)
    torch.manual_seed(0)
    model = models["raft_small"](iterations=2, memory_limit=memory_limit).train()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        prediction = model(*pair(64, 128))  # smaller than 128: enlarged in training too
    assert [tuple(step.shape) for step in prediction.intermediate_flows] == [(1, 2, 64, 128)] * 2
    assert prediction.flow.dtype == torch.float32
    sum((step - 3).abs().mean() for step in prediction.intermediate_flows).backward()
    for key, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().max() > 0, key


def test_unused_position_embeddings_are_not_trained():
    with torch.device("meta"):
        frozen = {
            name: [key for key, weight in models[name]().named_parameters() if not weight.requires_grad]
            for name in ("gma", "gma_position_only", "gma_position_and_content")
        }
    assert frozen["gma"] == ["att.pos_emb.rel_height.weight", "att.pos_emb.rel_width.weight"]
    assert not frozen["gma_position_only"] and not frozen["gma_position_and_content"]


def test_attention_beyond_the_embeddings_is_refused():
    with torch.no_grad(), pytest.raises(FleetflowError, match="cover 1280"):
        attention = Attention(1, content=False, position=True)
        attention.mix(attention(torch.zeros(1, 128, 1, 161), 0), 0, torch.zeros(1, 1, 161, 128))
    with pytest.raises(FleetflowError, match="nothing to attend to"):
        GMA(content=False)


def test_published_enlargements():
    golden = np.load(GOLDEN / "ops_correlation.npz")
    flow, weights, convex, bilinear = (
        torch.from_numpy(golden[key]) for key in ("convex_flow", "convex_mask", "convex_out", "upflow8_out")
    )
    torch.testing.assert_close(convex_upsample(flow, weights), convex, rtol=0, atol=1e-5)
    with torch.device("meta"):
        small = models["raft_small"]()
    torch.testing.assert_close(small.update_block.enlarge(None, flow), bilinear, rtol=0, atol=1e-5)


def test_convex_weights_choose_neighbors():
    """The weight of neighbor k = 5 (to the right) alone, at the fine pixel (1, 0) of factor 2."""
    weights = torch.zeros(1, 36, 3, 4)
    weights[:, (5 * 2 + 1) * 2 + 0] = 100.0
    flow = torch.arange(24.0).view(1, 2, 3, 4)
    fine = convex_upsample(flow, weights, 2)
    torch.testing.assert_close(fine[..., 1::2, 0::2], F.pad(2 * flow[..., 1:], (0, 1)))
    assert fine[0, 0, 2, 2] == pytest.approx(2 * flow[0, 0, :3, :3].mean().item())


@pytest.mark.parametrize("folder", ["yosemite/yos9", "middlebury-flow/Venus", "middlebury-stereo/venus"])
def test_published_weights_give_the_published_errors(shared, folder):
    cv2 = pytest.importorskip("cv2", reason="reads the real pairs with OpenCV")
    weights = shared / "weights" / "raft-small.pth"
    if not weights.is_file():
        pytest.skip("needs ../shared/weights/raft-small.pth")
    sys.path.insert(0, str(shared / "data"))
    import gtio

    manifest = json.loads((shared / "data" / "MANIFEST.json").read_text())
    expected = next(entry for entry in manifest["pairs"] if entry["dir"] == folder)["raft_small"]["epe"]
    files = sorted(file for file in (shared / "data" / folder).iterdir() if re.match(r"img[12]\.", file.name))
    frames = [torch.from_numpy(cv2.imread(str(file))[..., ::-1].copy()).permute(2, 0, 1)[None] / 255 for file in files]
    truth, valid = gtio.load(str(shared / "data" / folder))
    with torch.inference_mode():
        flow = fleetflow.load(f"raft_small:{weights}")(*frames).flow[0].permute(1, 2, 0).numpy()
    assert np.linalg.norm(flow - truth, axis=-1)[valid].mean() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("count", [1, 3])
def test_instance_norm_parity(count):
    """As a batch norm of every sample it is what torch's instance norm is, gradients too."""
    x = torch.randn(count, 6, 9, 7, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    norm, weight = InstanceNorm(6), torch.randn(count, 6, 9, 7, dtype=torch.float64)
    fast = norm(x)
    with reference():
        plain = norm(x)
    grads = [torch.autograd.grad((value * weight).sum(), x)[0] for value in (fast, plain)]
    assert torch.allclose(fast, plain, rtol=0, atol=1e-12) and torch.allclose(*grads, rtol=0, atol=1e-12)
    assert fast.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("channels,height", [(8, 12), (4, 8), (16, 4), (6, 1)])
def test_instance_norm_without_a_gradient(channels, height, monkeypatch):
    """Where nothing is trained it is summed in strips."""
    monkeypatch.setattr(residual_encoder, "AT_ONCE", 3 * 7 * channels)
    x = 3 + 2 * torch.randn(2, channels, height, 7, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last)
    fast = InstanceNorm(channels)(x)
    with reference():
        plain = InstanceNorm(channels)(x)
    assert torch.allclose(fast, plain, rtol=0, atol=1e-12)
    assert fast.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_instance_norm_in_bfloat16():
    """Its moments are those of float32: what is left is the rounding of its input and its result."""
    x = (8 + torch.randn(1, 16, 64, 96)).bfloat16().contiguous(memory_format=torch.channels_last)
    norm = InstanceNorm(16)
    assert (norm(x).float() - norm(x.float())).abs().max() <= 2**-6, "half of the last bit of numbers over 4"
