"""What every network of the registry keeps to."""

import itertools

import pytest
import torch
from conftest import SLOW, skip_without
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetflow.models import weights
from fleetflow.models.base import FlowModel
from fleetflow.registry import Registry, models
from fleetflow.training.losses import multi_scale
from fleetflow.types import FleetflowError, Prediction, Sample

LARGE = 9_500_000  # parameters; larger networks are checked without running them
NAMES = models.names()
ON_META = {name: weights.without_memory(name) for name in NAMES}
SIZES = {name: sum(weight.numel() for weight in ON_META[name].parameters()) for name in NAMES}
SMALL = [name for name in NAMES if SIZES[name] < LARGE]
FAMILIES = {type(ON_META[name]): name for name in sorted(SMALL, key=lambda name: -SIZES[name])}  # the smallest of each
RUN = SMALL if SLOW else list(FAMILIES.values())


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return {name: models[name]().eval() for name in SMALL}


@pytest.mark.parametrize("name", NAMES)
def test_contract(name):
    model = ON_META[name]
    assert isinstance(model, FlowModel) and model.fit in ("pad", "scale") and model.stride >= 1
    assert type(model).forward is FlowModel.forward, "networks write prepare and estimate, not forward"
    assert models[name].__doc__, "a variant says what it is and whose checkpoints it reads"


@pytest.mark.parametrize("name,height,width", [*((name, 131, 70) for name in SMALL), *((name, 1, 1) for name in RUN)])
def test_flow_has_the_size_of_the_frames(networks, name, height, width):
    frame1, frame2 = torch.rand(2, 1, 3, height, width)
    iterations = 2 if networks[name].iterations else None
    with torch.no_grad():
        prediction = networks[name](frame1, frame2, iterations=iterations)
    assert prediction.flow.shape == (1, 2, height, width)
    assert prediction.flow.dtype == torch.float32 and prediction.flow.isfinite().all()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(1, 130), st.integers(1, 130))
def test_any_size(height, width):
    torch.manual_seed(0)
    model = models["fastflownet"]().eval()
    with torch.no_grad():
        assert model(*torch.rand(2, 1, 3, height, width)).flow.shape == (1, 2, height, width)


@pytest.mark.parametrize("name", RUN)
def test_pairs_of_a_batch_do_not_touch_each_other(networks, name):
    frame1, frame2 = torch.rand(2, 2, 3, 64, 128)
    iterations = 2 if networks[name].iterations else None
    with torch.no_grad():
        both = networks[name](frame1, frame2, iterations=iterations).flow
        assert both.shape == (2, 2, 64, 128)
        alone = networks[name](frame1[1:], frame2[1:], iterations=iterations).flow
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name,dtype", itertools.product(RUN, [torch.float32, torch.bfloat16]))
def test_trains(name, dtype):
    """Finite loss and a gradient in every parameter."""
    torch.manual_seed(0)
    model = models[name]().train()
    if model.iterations:
        skip_without(dtype)
    frame1, frame2 = torch.rand(2, 2, 3, 64, 64)
    iterations = 1 if model.iterations else None
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        prediction = model(frame1, frame2, iterations=iterations)
    loss = (prediction.flow - 1).abs().mean() + sum(
        (step.float() - 1).abs().mean() for step in prediction.intermediate_flows
    )
    loss.backward()
    assert loss.isfinite()
    missing = [key for key, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert not missing, f"no gradient in {missing[:5]}"
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize("name", RUN)
def test_saves_and_loads(networks, name, tmp_path):
    path = tmp_path / "own.safetensors"
    weights.save(networks[name], path, {"network": name, "license": "Apache-2.0"}, dtype=torch.float32)
    loaded = weights.load(str(path)).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in networks[name].state_dict().items())


def test_frames_that_are_wrong():
    model = models["fastflownet"]().eval()
    good = torch.rand(1, 3, 64, 64)
    for frame1, frame2, words in (
        (good[0], good, "batch axis"),
        (good[:, :1], good, r"\[N, 3, H, W\]"),
        (good.mul(255).byte(), good, "divide uint8"),
        (good * 255, good, "divide uint8"),
        (good, good[..., :60], "same size"),
    ):
        with pytest.raises(FleetflowError, match=words) as caught:
            model(frame1, frame2)
        assert "\n" not in str(caught.value)
    with pytest.raises(FleetflowError, match="iterations"):
        model(good, good, iterations=3)
    with pytest.raises(FleetflowError, match="trains on multiples of 8"):
        models["raft_small"]().train()(good[..., :60], good[..., :60])
    scaled = model.train()(good[..., :60], good[..., :60])
    assert scaled.flow.shape[-1] == 60
    with pytest.raises(FleetflowError, match="frames that its stride does not divide give none"):
        multi_scale(scaled, Sample(good, good, torch.zeros(1, 2, 64, 60), torch.ones(1, 64, 60, dtype=torch.bool)))


class Shift(FlowModel):
    """Says what size it was given: flow (fitted width, fitted height) everywhere."""

    stride = 8

    def __init__(self, fit: str):
        super().__init__()
        self.fit = fit

    def prepare(self, frame1, frame2):
        return frame1, frame2

    def estimate(self, frame1, frame2, previous, iterations):
        height, width = frame1.shape[-2:]
        flow = torch.tensor([float(width), float(height)]).view(1, 2, 1, 1).expand(len(frame1), 2, height, width)
        return Prediction(flow, residual=frame1[:, 0])


def test_fit_scale_scales_the_flow_back_and_pad_does_not():
    frame = torch.rand(1, 3, 9, 20)
    scaled = Shift("scale").eval()(frame, frame.flip(3)).flow  # fitted to 16x24, so u counts 20/24 and v 9/16
    assert scaled[0, :, 0, 0].tolist() == pytest.approx([24 * 20 / 24, 16 * 9 / 16])
    padded = Shift("pad").eval()(frame, frame.flip(3))
    assert padded.flow[0, :, 0, 0].tolist() == [24, 16]
    torch.testing.assert_close(padded.residual, frame[:, 0])


def test_registry_says_what_was_meant():
    with pytest.raises(FleetflowError, match='did you mean "fastflownet"'):
        models["fastflownt"]
    with pytest.raises(FleetflowError, match="known: .*fastflownet"):
        models["zzz"]
    assert "fastflownet" in models and "zzz" not in models
    empty = Registry("thing", "fleetflow.layers")

    @empty.register
    def thing():
        return 5

    assert empty["thing"]() == 5


@pytest.mark.parametrize("size", [(64, 128), (70, 131)] if SLOW else [(70, 131)])
@pytest.mark.parametrize(
    "name", sorted(path.stem for path in weights.shipped("fastflownet").parent.glob("*.safetensors"))
)
@torch.no_grad()
def test_nothing_moves_where_nothing_moves(name, size):
    """Identical frames, whatever they show, and frames of a single color, alike or not; every weight of the package."""
    model = weights.load(name)
    iterations = None if SLOW or not model.iterations else 2
    gray, noise = torch.full((1, 3, *size), 0.4), torch.rand(1, 3, *size)
    ramp = torch.linspace(0, 1, size[1]).expand(1, 3, *size).contiguous()
    for frame1, frame2 in (
        (gray, gray),
        (noise, noise),
        (ramp, ramp),
        (gray, gray + 0.1),
        (gray, noise),
        (noise, gray),
    ):
        flow = model(frame1, frame2, iterations=iterations).flow
        assert flow.shape == (1, 2, *size) and flow.abs().max() == 0
    both = model(torch.cat((noise, noise)), torch.cat((noise, noise.roll(2, 3))), iterations=iterations).flow
    assert both[0].abs().max() == 0 and both[1].abs().max() > 0, "each pair by itself"
    almost = noise.clone()
    almost[..., -1, -1] = 1 - almost[..., -1, -1]
    assert model(noise, almost, iterations=iterations).flow.abs().max() > 0, "one pixel makes it another pair"


def test_still_pairs_are_left_alone_in_training():
    model, frame = models["fastflownet"]().train(), torch.rand(1, 3, 64, 64)
    assert model(frame, frame).flow.abs().max() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -2.0, 255.0])
def test_frames_of_values_that_are_no_colors(value):
    model, good = models["fastflownet"]().eval(), torch.rand(1, 3, 64, 64)
    bad = good.clone()
    bad[0, 1, 20, 30] = value
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(FleetflowError, match=r"not finite|expected values in \[0, 1\]") as caught:
            model(*pair)
        assert "\n" not in str(caught.value)
