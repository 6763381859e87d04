"""Networks as torch.export, torch.jit.trace and torch.compile see them, without a context manager; other dtypes."""

import itertools

import pytest
import torch
from conftest import SLOW, skip_without
from torch import nn

from fleetflow.registry import models
from fleetflow.types import FleetflowError

NAMES = ["fastflownet", "raft_small", "deq_flow_tiny", "gma", "lightflow_050", "liteflownet2", "pwcnet", "flownet_cs"]
SMALLEST = (  # of each family
    *("deq_flow_tiny", "fastflownet", "fastflownet_refine", "flownet_s", "gma", "lightflow_050"),
    *("liteflownet2_m6s6", "pwcnet", "raft_small"),
)
WAYS = ("trace", "export", "compile")
QUICK = [
    *((name, "trace") for name in SMALLEST),
    *((name, "compile") for name in ("fastflownet", "deq_flow_tiny", "liteflownet2_m6s6")),
    ("fastflownet", "export"),
]
QUIETLY = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


class Flow(nn.Module):
    """A network as a function of two frames that returns the flow alone."""

    def __init__(self, name: str):
        super().__init__()
        torch.manual_seed(0)
        self.network = models[name]().eval()
        self.iterations = 2 if self.network.iterations else None

    def forward(self, frame1, frame2):
        return self.network(frame1, frame2, None, self.iterations).flow


def frames() -> tuple[torch.Tensor, torch.Tensor]:
    frame = torch.rand(1, 3, 128, 136, generator=torch.Generator().manual_seed(1))
    return frame, frame.roll((1, 2), (2, 3))


def captured(way: str, network: nn.Module, pair: tuple[torch.Tensor, ...]):
    if way == "trace":
        return torch.jit.trace(network, pair, check_trace=False)
    if way == "export":
        return torch.export.export(network, pair).module()
    return torch.compile(network, fullgraph=True, backend="eager")


@pytest.fixture(scope="module")
def program():
    """FastFlowNet as `torch.export` sees it, for frames of 64x64."""
    pair = tuple(frame[..., :64, :64] for frame in frames())
    with torch.no_grad():
        return torch.export.export(Flow("fastflownet"), pair)


@QUIETLY
@pytest.mark.parametrize(
    "name,way",
    itertools.product(sorted(models), WAYS) if SLOW else QUICK,
)
@torch.no_grad()
def test_networks_are_captured(name, way, program):
    """`torch.compile` without a break of its graph; a few, all of them if slow."""
    network, pair = Flow(name), [frame[..., :64, :64] for frame in frames()]
    pair = [(255 * frame).round() / 255 for frame in pair]  # as PWC-Net rounds in an exported graph
    expected = network(*pair)
    torch._dynamo.reset()
    known = (name, way) == ("fastflownet", "export")
    found = program.module() if known else captured(way, network, tuple(pair))
    torch.testing.assert_close(found(*pair), expected, rtol=1e-4, atol=1e-3)


@QUIETLY
def test_an_exported_network_consists_of_operators_of_torch(program):
    spaces = {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")}
    assert spaces == {"aten"}


@torch.no_grad()
def test_the_compiler_keeps_a_registered_operator_as_one_node():
    from fleetflow.ops.warp import warp

    seen = []

    def look(module, _):
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    torch.compile(lambda a, b: warp(a, b), fullgraph=True, backend=look)(torch.rand(1, 3, 4, 5), torch.rand(1, 2, 4, 5))
    assert "fleetflow.warp.default" in seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, *([torch.float16] if SLOW else [])])
@pytest.mark.parametrize("name", NAMES if SLOW else ["fastflownet", "deq_flow_tiny", "lightflow_050", "pwcnet"])
@torch.no_grad()
def test_networks_of_other_dtypes_run_or_refuse_in_one_line(name, dtype):
    """float64 agrees with float32; half precision stays finite."""
    if dtype == torch.bfloat16 and name in ("pwcnet", "deq_flow_tiny"):
        skip_without(dtype)
    network, pair = Flow(name), frames()
    expected = network(*pair)
    try:
        flow = network.to(dtype)(*(frame.to(dtype) for frame in pair))
    except FleetflowError as error:
        assert "\n" not in str(error)
        return
    assert flow.dtype in (dtype, torch.float32) and flow.isfinite().all()
    if dtype == torch.float64:
        torch.testing.assert_close(flow, expected, rtol=1e-3, atol=1e-3, check_dtype=False)


@pytest.mark.parametrize("name", ["raft_small", "gma", "deq_flow_tiny"])
@torch.no_grad()
def test_encode_step_and_decode_are_the_network(name):
    """Three pure parts: a loop of one's own gives what the network gives, and leaves the features as they were."""
    network, pair = Flow(name).network, frames()
    features, state = network.encode(*network.prepare(*pair))
    for _ in range(3):
        state = network.step(features, state)
    torch.testing.assert_close(network.decode(state), network(*pair, iterations=3).flow, rtol=0, atol=1e-4)
    features, again = network.encode(*network.prepare(*pair))
    once = network.step(features, again)
    network.step(features, once)
    torch.testing.assert_close(network.step(features, again), once, rtol=0, atol=1e-6)
