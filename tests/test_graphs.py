"""CUDA graphs: what cannot be recorded runs as always; with a recorder that needs no GPU, the order of things."""

import pytest
import torch

from fleetflow.inference import cuda_graphs as graphs
from fleetflow.inference.cuda_graphs import Graphed, Recording
from fleetflow.models.weights import load
from fleetflow.types import Prediction


class Replay:
    """Stands for a CUDA graph: computes the result anew in the memory that it was recorded with."""

    def __init__(self, function, arguments):
        self.function, self.arguments, self.replays = function, arguments, 0
        self.result = function(*arguments)

    def replay(self):
        self.replays += 1
        self.result.flow.copy_(self.function(*self.arguments).flow)


@pytest.fixture
def recorded(monkeypatch):
    """The list of graphs recorded, on a machine that pretends to have a GPU."""
    made = []

    def record(function, arguments, pool):
        arguments = graphs.tree_map_only(torch.Tensor, torch.Tensor.clone, arguments)
        made.append(Replay(function, arguments))
        return Recording(made[-1], arguments, made[-1].result)

    monkeypatch.setattr(graphs, "_on_cuda", lambda tensors: True)
    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return made


def twice(frame, previous=None, iterations=None):
    return Prediction(2 * frame + (0 if previous is None else previous.flow))


def test_on_the_cpu_a_network_runs_as_always():
    model = load("fastflownet", weights=False).eval()
    graphed = Graphed(model)
    frames = torch.rand(2, 1, 3, 64, 64)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(graphed(*frames, None, None).flow, model(*frames).flow)
    assert not graphed._known


def test_the_second_call_records_and_the_third_replays(recorded):
    graphed = Graphed(twice)
    with torch.no_grad():
        results = [graphed(torch.full((2, 3), float(k))).flow for k in range(5)]
    assert [result[0, 0] for result in results] == [0, 2, 4, 6, 8], "results have memory of their own"
    assert len(recorded) == 1 and recorded[0].replays == 4


def test_every_shape_and_mode_has_its_own_graph(recorded):
    graphed, frame = Graphed(twice, keep=10), torch.rand(1, 3, 4, 6)
    last = frame.to(memory_format=torch.channels_last)
    before = Prediction(torch.ones(()))
    for arguments in ((frame,), (last,), (frame.double(),), (frame[..., :5],), (frame, None, 3), (frame, before)):
        with torch.no_grad():
            graphed(*arguments)
            assert torch.equal(graphed(*arguments).flow, twice(*arguments).flow)
            assert torch.equal(graphed(*arguments).flow, twice(*arguments).flow)
    assert len(recorded) == 6
    with torch.inference_mode():
        graphed(frame), graphed(frame)
    assert len(recorded) == 7


def test_gradients_are_not_lost(recorded):
    frame = torch.rand(2, 3, requires_grad=True)
    graphed = Graphed(twice)
    for _ in range(3):
        assert graphed(frame).flow.requires_grad
    assert not recorded


def test_the_oldest_graph_goes(recorded):
    graphed = Graphed(twice, keep=2)
    with torch.no_grad():
        for size in (1, 2, 3):
            graphed(torch.rand(size)), graphed(torch.rand(size))
        assert len(recorded) == 3 and len(graphed._known) == 2
        graphed(torch.rand(3)), graphed(torch.rand(2))
        assert len(recorded) == 3
        graphed(torch.rand(1)), graphed(torch.rand(1))
    assert len(recorded) == 4


def test_what_cannot_be_recorded_runs_on(recorded, monkeypatch):
    def fails(function, arguments, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphs, "record", fails)
    graphed, frame = Graphed(twice), torch.rand(2, 3)
    with torch.no_grad():
        graphed(frame)
        with pytest.warns(UserWarning, match=r"cannot be recorded .*not permitted when stream is capturing\)"):
            assert torch.equal(graphed(frame).flow, 2 * frame)
        assert torch.equal(graphed(frame).flow, 2 * frame)
    assert list(graphed._known.values()) == ["run"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu():
    model = load("fastflownet", weights=False).eval().to("cuda", memory_format=torch.channels_last)
    graphed = Graphed(model)
    with torch.inference_mode(), torch.autocast("cuda", torch.float16):
        for _ in range(4):
            frames = torch.rand(2, 1, 3, 128, 192, device="cuda")
            torch.testing.assert_close(graphed(*frames, None, None).flow, model(*frames).flow, rtol=1e-2, atol=1e-2)
    assert isinstance(*graphed._known.values(), Recording)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu_what_reads_a_value_runs_on():
    graphed, frame = Graphed(lambda frame: Prediction(frame * frame.mean().item())), torch.rand(2, 3, device="cuda")
    with torch.no_grad():
        graphed(frame)
        with pytest.warns(UserWarning, match="cannot be recorded"):
            graphed(frame)
        torch.testing.assert_close(graphed(frame).flow, frame * frame.mean())
