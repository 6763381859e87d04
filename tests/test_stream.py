"""Streams: the same flows as pair by pair, warm starts, cuts, budgets, live sources, occlusion and uncertainty."""

import copy
import gc
import pickle
import socket
import threading

import av
import numpy as np
import pytest
import torch

import fleetflow
from fleetflow.inference.pace import Effort, Pace, efforts
from fleetflow.inference.stream import moved_along
from fleetflow.io.live import Newest
from fleetflow.models.base import FlowModel
from fleetflow.motion.confidence import CLUES, Confidence, known
from fleetflow.types import FleetflowError, Prediction

NETWORKS = {"fastflownet": None, "liteflownet2": None, "raft_small": 1, "deq_flow_tiny": 2}  # and iterations


def walk(count: int, height: int = 136, width: int = 152, step: int = 3, seed: int = 0) -> list[np.ndarray]:
    """Frames of one texture that moves to the right, `step` pixels a frame."""
    generator = np.random.default_rng(seed)
    texture = generator.integers(0, 256, (height // 8, width // 8 + count * step, 3)).repeat(8, 0).repeat(8, 1)
    start = texture.shape[1] - width
    return [texture[:, start - k * step : start - k * step + width].astype(np.uint8) for k in range(count)]


@pytest.mark.parametrize("name", NETWORKS)
def test_flows_are_those_of_pair_by_pair(name):
    predictor = fleetflow.Predictor(name, device="cpu", precision="fp32", iterations=NETWORKS[name])
    frames = walk(3, 64, 72)
    stream, both = (fleetflow.Stream(predictor, warm_start=False, occlusion=way) for way in (False, True))
    assert stream(frames[0]) is None and both(frames[0]) is None
    for before, frame in zip(frames, frames[1:]):
        step, ways = stream(frame), both(frame)
        flow = predictor(before, frame)
        assert np.abs(step.flow - flow).max() < 1e-3 and np.abs(ways.flow - flow).max() < 1e-3
        assert np.abs(ways.backward - predictor(frame, before)).max() < 1e-3
        assert not step.warm and not step.cut and step.backward is None and step.prediction.features is None
        assert step.size == frame.shape[:2] and step.iterations == NETWORKS[name] and step.latency > 0


def test_a_frame_is_looked_at_once():
    predictor = fleetflow.Predictor("raft_small", device="cpu", precision="fp32", iterations=1)
    count, plain = [], predictor.model.frame_features
    predictor.model.frame_features = lambda frame: count.append(len(frame)) or plain(frame)
    for both_ways in (False, True):
        count.clear()
        stream = fleetflow.Stream(predictor, uncertainty=both_ways)
        for frame in walk(4):
            stream(frame)
        assert count == [1] * 4


class Adding(FlowModel):
    """Moves by one pixel more at each pair that goes on from the last one; its state is the flow."""

    stride, fit, iterations = 1, "pad", 4

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def prepare(self, frame1, frame2):
        return frame1, frame2

    def estimate(self, frame1, frame2, previous, iterations):
        start = 0 if previous is None else previous.flow if previous.state is None else previous.state
        flow = torch.zeros_like(frame1[:, :2]) + self.weight + start + torch.tensor([1.0, 0]).view(2, 1, 1)
        return Prediction(flow, state=flow)


def adding() -> fleetflow.Predictor:
    return fleetflow.Predictor(Adding(), device="cpu", precision="fp32")


def test_a_warm_start_ends_at_a_cut():
    frames = [*walk(3, 144, 256), *(frame // 3 for frame in walk(3, 144, 256, step=1, seed=1))]
    steps = [step for step in map(fleetflow.Stream(adding()), frames) if step]
    assert [step.flow[..., 0].mean() for step in steps] == [1, 2, 1, 1, 2]
    assert [step.cut for step in steps] == [False, False, True, False, False]
    assert [step.warm for step in steps] == [False, True, False, False, True]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))])
def test_a_copy_goes_on_by_itself(copied):
    stream, frames = fleetflow.Stream(adding()), walk(4, 144, 256)
    stream(frames[0]), stream(frames[1])
    other = copied(stream)
    assert [each(frames[2]).flow[..., 0].mean() for each in (stream, other)] == [2, 2]
    stream.close()
    assert other(frames[3]).flow[..., 0].mean() == 3


def test_a_search_that_goes_on_takes_fewer_iterations():
    stream = fleetflow.Stream(adding(), warm_iterations=1)
    steps = [step for step in map(stream, walk(4, 144, 256)) if step]
    assert [step.iterations for step in steps] == [4, 1, 1]


def test_both_directions_go_on_too():
    """The flow back is moved to where the surface went: against itself."""
    stream = fleetflow.Stream(adding(), occlusion=True)
    steps = [step for step in map(stream, walk(3, 144, 256)) if step]
    assert steps[1].warm and steps[1].flow[..., 0].mean() == steps[1].backward[..., 0].mean() == 2


def test_a_flow_is_moved_along():
    flow = torch.zeros(1, 2, 64, 96)
    flow[:, 0, 16:32, 16:32] = 16.0
    moved = moved_along(flow, flow)
    assert moved[0, 0, 24, 40] == pytest.approx(16, abs=0.5) and moved[0, 0, 56, 80] == 0, "the faster one wins"


def test_sizes_resets_and_refusals():
    stream = fleetflow.Stream(adding())
    small, large = np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)
    stream(small)
    with pytest.raises(FleetflowError, match="a frame of 9x8 follows one of 8x8"):
        stream(large)
    stream.reset()
    assert stream(large) is None and stream(large).flow.shape == (9, 8, 2)
    with pytest.raises(FleetflowError, match="budget_ms is 0"):
        fleetflow.Stream(adding(), budget_ms=0)
    with pytest.raises(FleetflowError, match="a Predictor has its own device"):
        fleetflow.Stream(adding(), iterations=3)
    with stream:
        pass
    with pytest.raises(FleetflowError, match="closed"):
        stream(large)


def test_efforts_become_cheaper():
    found = efforts(Effort((720, 1280), 12))
    assert found[0] == Effort((720, 1280), 12) and found[-1] == Effort((180, 320), 3)
    assert all(one.cost() > other.cost() for one, other in zip(found, found[1:]))
    assert [one.size for one in efforts(Effort((100, 64), None))] == [(100, 64), (70, 64), (64, 64)]


def test_a_pace_keeps_the_budget_and_comes_back():
    """Time is what an effort costs on a machine whose speed changes; the choice settles, and follows."""
    whole = Effort((720, 1280), 12)
    pace, busy = Pace(0.05, whole), 0.2 / whole.cost()
    for _ in range(20):
        pace.took(busy * pace.effort.cost(), pace.effort)
    assert busy * pace.effort.cost() <= 0.05 < busy * pace.efforts[pace.efforts.index(pace.effort) - 1].cost()
    slow = pace.effort
    for _ in range(20):
        pace.took(10 * busy * pace.effort.cost(), pace.effort)
    assert pace.effort == pace.efforts[-1]
    for _ in range(60):
        pace.took(busy / 100 * pace.effort.cost(), pace.effort)
    assert pace.effort == whole != slow


def test_a_budget_makes_a_stream_faster_and_says_so():
    frames = walk(30, 80, 160)
    stream = fleetflow.Stream(adding(), budget_ms=1e-4)
    steps = [stream(frame) for frame in frames][1:]
    assert (steps[0].iterations, steps[0].size) == (4, (80, 160))
    assert (steps[-1].iterations, steps[-1].size) == (2, (64, 64))
    assert all(step.flow.shape == (80, 160, 2) for step in steps)


def test_a_live_source_drops_what_nobody_waited_for():
    """All frames have come before the first is asked for: the newest is taken, and the others are counted."""
    come = threading.Event()

    def source():
        yield from walk(5, 16, 16)
        come.set()
        asked.wait(10)
        yield from walk(1, 16, 16)

    asked = threading.Event()
    with Newest(source()) as newest:
        assert come.wait(10)
        found = iter(newest)
        assert next(found)[1] == 4
        asked.set()
        assert next(found)[1] == 0
        assert list(found) == []


def test_follow_gives_steps_and_counts_the_rest():
    class Decoder:
        """As those of others that know their frames by number alone."""

        def __getitem__(self, number: int) -> np.ndarray:
            return walk(6, 16, 16)[number]

    for source in (iter(walk(6, 16, 16)), Decoder()):
        stream = fleetflow.Stream(adding())
        steps = list(stream.follow(source))
        assert len(steps) + 1 + stream.dropped == 6 and all(step.flow.shape == (16, 16, 2) for step in steps)


def test_a_stream_over_the_network(tmp_path):
    """MPEG-TS over a local connection: every frame is the first, a step, or counted as dropped."""
    frames = walk(6, 64, 96)
    with av.open(str(tmp_path / "clip.ts"), "w", format="mpegts") as container:
        video = container.add_stream("mpeg2video", rate=25)
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send():
            connection, _ = server.accept()
            with connection:
                connection.sendall((tmp_path / "clip.ts").read_bytes())

        thread = threading.Thread(target=send)
        thread.start()
        with fleetflow.Stream(adding()) as stream:
            source = fleetflow.read_video(f"tcp://127.0.0.1:{server.getsockname()[1]}")
            steps = list(stream.follow(source))
            assert len(steps) + 1 + stream.dropped == 6
        thread.join()
    assert all(
        0 < step.time <= 0.2 + 1e-6 and step.interval == pytest.approx(0.04 * (1 + step.dropped)) for step in steps[1:]
    )


def test_an_error_of_the_source_arrives():
    def source():
        yield from walk(1, 16, 16)
        raise FleetflowError("the cable is out")

    with pytest.raises(FleetflowError, match="the cable is out"):
        for _ in fleetflow.Stream(adding()).follow(source()):
            pass


def test_closing_from_another_thread_ends_a_stream():
    stopped, stream, steps = threading.Event(), fleetflow.Stream(adding()), []

    def source():
        while not stopped.wait(0.005):
            yield from walk(1, 16, 16)

    def loop():
        for step in stream.follow(source()):
            steps.append(step)
            threading.Thread(target=stream.close).start()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and steps and not stopped.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name == "fleetflow live"]


def test_memory_does_not_grow():
    stream = fleetflow.Stream("raft_small", device="cpu", iterations=1, uncertainty=True)
    counts = []
    for k, frame in enumerate(walk(9)):
        stream(frame)
        if k in (3, 8):
            gc.collect()
            counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert counts[0] == counts[1]


def test_confidence_grows_with_what_is_wrong():
    """A square that moves over a texture: what it uncovers and covers is uncertain, and hidden in the next frame."""
    generator = np.random.default_rng(1)
    ground = generator.integers(0, 256, (32, 40, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    square = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    frames = []
    for x in (40, 52):
        frame = ground.copy()
        frame[40:88, x : x + 48] = square
        frames.append(frame)
    stream = fleetflow.Stream(
        "raft_small", device="cpu", precision="fp32", iterations=8, occlusion=True, uncertainty=True
    )
    stream(frames[0])
    step = stream(frames[1])
    covered = np.zeros(ground.shape[:2], bool)
    covered[44:84, 90:98] = True
    assert step.occlusion.shape == step.uncertainty.shape == ground.shape[:2] and step.occlusion.dtype == np.float32
    assert step.uncertainty.min() > 0 and 0 <= step.occlusion.min() and step.occlusion.max() <= 1
    assert step.uncertainty[covered].mean() > 2 * np.median(step.uncertainty)
    assert step.occlusion[covered].mean() > 2 * np.median(step.occlusion)


@pytest.mark.parametrize("key", known())
def test_the_maps_in_the_package_only_grow(key):
    confidence: Confidence = known()[key]
    assert len(confidence.weights) == len(confidence.hidden) == len(CLUES) + 1
    assert min(confidence.weights[:-1]) >= 0 and min(confidence.hidden[:-1]) >= 0 and 0 < confidence.half < 1
    assert list(confidence.score) == sorted(set(confidence.score)) and list(confidence.bound) == sorted(
        confidence.bound
    )
    ramp = torch.linspace(0, 3, 8).view(1, 1, 1, 8).expand(1, len(CLUES), 1, 8)
    assert bool((confidence.uncertainty(ramp)[0, 0].diff() >= 0).all())
