"""Adapting: the losses without truth on scenes that are known, and a run that helps, stops in time, and resumes."""

import dataclasses
import multiprocessing
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import kill_points, killed_at

from fleetflow.cli.main import main
from fleetflow.data.generate import generate
from fleetflow.data.generate.worlds import shapes_world
from fleetflow.evaluation.video_reuse import read_clips
from fleetflow.inference.predictor import Predictor
from fleetflow.io.atomic import lock_folder
from fleetflow.io.images import write_image
from fleetflow.io.video import VideoWriter
from fleetflow.models import weights
from fleetflow.training import adapt as job
from fleetflow.training import unsupervised as losses
from fleetflow.types import FleetflowError

HEIGHT, WIDTH, SIDE = 96, 160, 40
BEHIND, FRONT = (3, 1), (-4, 2)  # pixels (u, v) from one frame to the next


def quiet(_):
    pass


@dataclasses.dataclass
class Layers:
    """A sequence of a square that moves before a moving ground, both from the generator."""

    frames: list[np.ndarray]  # uint8 [H, W, 3]
    flows: list[torch.Tensor]  # [1, 2, H, W] forwards, one for each pair
    backward: list[torch.Tensor]
    hidden: list[torch.Tensor]  # [1, H, W] bool: pixels of the ground that the square covers next, or that go outside


@pytest.fixture(scope="module")
def layers() -> Layers:
    count = 9
    surfaces = generate(2, 128, 224, seed=4, mixture={shapes_world: 1.0}, camera=False).frame1
    ground, square = (255 * surfaces).round().byte().permute(0, 2, 3, 1).numpy()
    frames, covered = [], []
    for t in range(count):
        x, y = 60 - BEHIND[0] * t, 20 - BEHIND[1] * t
        frame = ground[y : y + HEIGHT, x : x + WIDTH].copy()
        x, y = 80 + FRONT[0] * t, 20 + FRONT[1] * t
        frame[y : y + SIDE, x : x + SIDE] = square[:SIDE, :SIDE]
        frames.append(frame)
        covered.append(torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool))
        covered[-1][0, y : y + SIDE, x : x + SIDE] = True

    def motion(front: torch.Tensor, sign: int) -> torch.Tensor:
        return sign * torch.where(front[:, None], *(torch.tensor(m).float().view(1, 2, 1, 1) for m in (FRONT, BEHIND)))

    flows = [motion(front, 1) for front in covered[:-1]]
    hidden = []
    for now, then, flow in zip(covered, covered[1:], flows):
        moved = torch.zeros_like(then)  # the next square, as far as the ground of this frame goes under it
        moved[:, : -BEHIND[1], : -BEHIND[0]] = then[:, BEHIND[1] :, BEHIND[0] :]
        hidden.append(moved & ~now | ~losses.inside(flow))
    return Layers(frames, flows, [motion(front, -1) for front in covered[1:]], hidden)


@pytest.fixture(scope="module")
def folder(layers, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("frames")
    for k, frame in enumerate(layers.frames):
        write_image(place / f"{k}.png", frame)
    return place


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory) -> Path:
    """The weights of the package with noise of an eighth of each layer's spread."""
    network = weights.load("fastflownet")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.add_(weight.std() / 8 * torch.randn(weight.shape, generator=generator))
    path = tmp_path_factory.mktemp("start") / "perturbed.safetensors"
    weights.save(network, path, {"network": "fastflownet", "license": "CC0"})
    return path


# ---- losses ----


def test_census_sees_motion_and_not_lighting():
    frame = generate(2, 64, 96, seed=1, mixture={shapes_world: 1.0}, camera=False).frame1
    moved = losses.census_distance(frame, frame.roll(1, -1)).mean()
    assert losses.census_distance(frame, frame).max() == 0
    assert losses.census_distance(frame, frame + 0.2).max() < 1e-3
    assert losses.census_distance(frame, 0.7 * frame + 0.2).mean() < 0.2 * moved
    assert 0.1 < moved < 1


def test_occlusion_of_a_layered_scene(layers):
    for flow, backward, hidden in zip(layers.flows, layers.backward, layers.hidden):
        assert 0.03 < hidden.float().mean() < 0.2
        for occlusion in ("consistency", "range"):
            assert torch.equal(~losses.visible(flow, backward, occlusion), hidden)
        sure = losses.confidence(flow, backward)
        assert sure[~hidden].min() > 0.99 and sure[hidden].max() < 0.2
    with pytest.raises(FleetflowError, match="consistency or range"):
        losses.visible(flow, backward, "maybe")


@pytest.mark.parametrize("occlusion", ["consistency", "range"])
def test_occlusion_of_generated_scenes(occlusion):
    sample = generate(4, 96, 160, seed=1, camera=False, full=True)
    found = ~losses.visible(sample.flow, sample.backward, occlusion)
    assert (found == sample.occluded).float().mean() > 0.95
    assert found[sample.occluded].float().mean() > 0.95


def test_the_range_map_counts_every_pixel_once():
    flow = torch.zeros(1, 2, 8, 9)
    flow[:, 0, :, :4] = 2.25
    landed = losses.range_map(flow)
    assert landed.sum().item() == pytest.approx(72)
    assert landed[0, 0].tolist() == [0, 0, 0.75, 1, 2, 2, 1.25, 1, 1]


def test_smoothness_orders_and_edges():
    x = torch.arange(12.0).expand(1, 2, 10, 12)
    flat = torch.full((1, 3, 10, 12), 0.5)
    assert losses.smoothness(torch.ones_like(x), flat, 1) < 2e-3
    assert losses.smoothness(x, flat, 1) > 0.4 and losses.smoothness(x, flat, 2) < 2e-3
    step = (x > 5).float()
    edge = step[:, :1].expand(-1, 3, -1, -1)
    for order in (1, 2):
        assert losses.smoothness(step, edge, order) < 0.1 * losses.smoothness(step, flat, order)
    with pytest.raises(FleetflowError, match="1 or 2"):
        losses.smoothness(x, flat, 3)


def test_the_census_loss_is_lowest_at_the_truth_and_leads_there(layers):
    frame1, frame2 = (job.to_frame(frame)[None] for frame in layers.frames[:2])
    seen = ~layers.hidden[0]
    truth = layers.flows[0]
    at = [losses.photometric(frame1, frame2, truth + d, seen) for d in (0.0, 0.3, -0.3, 1.0)]
    assert min(at) == at[0] and at[3] > at[1]
    flow = (truth + 0.3).requires_grad_()
    losses.photometric(frame1, frame2, flow, seen).backward()
    assert flow.grad.isfinite().all() and (flow.grad.sum((2, 3)) > 0).all()


def test_another_view_keeps_the_flow_true(layers, monkeypatch):
    """Warped by its own flow, the second view is the first: the flow was turned and enlarged as the frames were."""
    monkeypatch.setattr(job, "film", lambda frames, camera, generator: frames)
    frame1, frame2 = (job.to_frame(frame)[None].expand(2, -1, -1, -1) for frame in layers.frames[:2])
    flow = layers.flows[0].expand(2, -1, -1, -1)
    trust = (~layers.hidden[0]).float().expand(2, -1, -1)
    still = torch.zeros_like(flow)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        view1, view2, taught, sure = job._another_view(frame1, frame2, flow, trust, generator)
        sure = (sure > 0.99) & losses.inside(taught)
        assert view1.shape == frame1.shape and sure.float().mean() > 0.6
        right, wrong, none = (losses.photometric(view1, view2, f, sure) for f in (taught, flow, still))
        assert right < 0.8 * wrong and right < 0.6 * none


# ---- runs ----


def epe(path: Path, layers: Layers, numbers: range) -> float:
    predictor = Predictor(weights.load(str(path)), precision="fp32")
    errors = []
    for k in numbers:
        flow = predictor.predict(*layers.frames[k : k + 2]).flow - layers.flows[k]
        errors.append(flow.square().sum(1).sqrt().mean().item())
    return float(np.mean(errors))


def test_adapting_lowers_the_error(layers, folder, perturbed, tmp_path):
    output = tmp_path / "own.safetensors"
    pairs = job.read_pairs(folder)
    assert len(pairs) == 8 and len(job.split(pairs)[1]) == 2
    said = []
    (outcome,) = job.adapt(
        pairs, output, start=str(perturbed), steps=24, measure_every=12, size=(64, 128), report=said.append
    )
    assert outcome.weights == output and outcome.stopped is None and outcome.step > 0
    assert outcome.best.census < outcome.start.census and outcome.best.l1 <= outcome.start.l1
    before, after = (epe(path, layers, range(6, 8)) for path in (perturbed, output))
    assert after < 0.95 * before, "on the held-back pairs"
    assert len(said) == 2 and "left" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["own.safetensors"]
    header = weights.header(output)
    assert header["network"] == "fastflownet" and header["pairs"] == "6" and header["recipe"] == "adapt"
    assert header["license"].startswith("CC0; adapted to frames")
    with pytest.raises(FleetflowError, match="there already"):
        job.adapt(pairs, output)


@pytest.mark.parametrize("lost, why", [(1.5, "census error went"), (float("inf"), "collapsed towards zero")])
def test_a_loss_that_rewards_zero_flow_is_stopped(folder, tmp_path, monkeypatch, lost, why):
    monkeypatch.setattr(job, "LOST", lost)
    monkeypatch.setattr(job, "photometric", lambda frame1, frame2, flow, visible: flow.abs().mean())
    output = tmp_path / "own.safetensors"
    (outcome,) = job.adapt(
        job.read_pairs(folder),
        output,
        steps=400,
        batch=1,
        measure_every=4,
        size=(64, 64),
        learning_rate=0.05,
        report=quiet,
    )
    assert why in outcome.stopped
    assert outcome.best.length > 0.5 * outcome.start.length
    assert outcome.best.census <= outcome.start.census and outcome.best.l1 <= outcome.start.l1
    if outcome.step == 0:
        begun = weights.load("fastflownet").state_dict()
        assert all(torch.equal(value, begun[key]) for key, value in weights.read_state(output).items())


def test_what_ends_a_run():
    start = job.WarpingError(10.0, 3.0, 4.0)
    assert job.verdict(start, start) is None
    assert job.verdict(start, job.WarpingError(9.0, 3.0, 1.0)) is None, "less flow that matches better is right"
    assert "collapsed" in job.verdict(start, job.WarpingError(10.0, 3.0, 1.9))
    assert "went from 10.000 to 16.000" in job.verdict(start, job.WarpingError(16.0, 3.0, 4.0))
    assert job.verdict(start, job.WarpingError(float("nan"), 3.0, 4.0))


def test_a_killed_run_goes_on_exactly(folder, tmp_path):
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    pairs, fork = job.read_pairs(folder), multiprocessing.get_context("fork")
    options = {"batch": 1, "measure_every": 2, "size": (64, 64), "precision": "fp32"}
    said, says = fork.Pipe(duplex=False)
    process = fork.Process(target=job.adapt, args=(pairs, killed), kwargs={"steps": 6, "report": says.send, **options})
    process.start()
    assert said.recv().startswith("step 2/6")
    while (tmp_path / "killed-unfinished.pt").stat().st_mtime_ns < killed.stat().st_mtime_ns:
        time.sleep(0.005)  # until the state of step 0 or 2 is written
    process.kill()
    process.join()
    assert weights.load(str(killed)), "what lies there is whole"
    with pytest.raises(FleetflowError, match="something else"):
        job.adapt(pairs, killed, steps=7, **options)
    outcomes = [job.adapt(pairs, path, steps=6, report=quiet, **options)[0] for path in (killed, whole)]
    assert outcomes[0][2:] == outcomes[1][2:]
    one, two = (weights.read_state(path) for path in (killed, whole))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_two_networks_teach_each_other(folder, perturbed, tmp_path):
    output = tmp_path / "one.safetensors"
    outcomes = job.adapt(
        job.read_pairs(folder), output, start="fastflownet", other=f"fastflownet:{perturbed}", steps=2, batch=1,
        measure_every=2, size=(64, 64), report=quiet,
    )  # fmt: skip
    assert [outcome.weights.name for outcome in outcomes] == ["one.safetensors", "one-other.safetensors"]
    for outcome in outcomes:
        assert weights.header(outcome.weights)["network"] == outcome.network == "fastflownet"
        assert outcome.best.census <= outcome.start.census


def test_a_network_learns_only_what_the_other_is_sure_of():
    flow = torch.zeros(1, 2, 4, 4, requires_grad=True)
    trust = torch.zeros(1, 4, 4)
    trust[..., :2] = 1
    losses.distillation(flow, torch.ones(1, 2, 4, 4), trust).backward()
    assert (flow.grad[..., :2] < 0).all() and (flow.grad[..., 2:] == 0).all()


def test_the_command_on_a_video(layers, tmp_path, capsys):
    with VideoWriter(tmp_path / "clip.mp4", 10) as writer:
        for frame in layers.frames:
            writer.write(frame)
    words = ["adapt", str(tmp_path / "clip.mp4"), "--from", "fastflownet", "-o", str(tmp_path / "own.safetensors")]
    assert main([*words, "--steps", "1", "--batch", "1", "--size", "64", "64", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "census %" in shown and "own.safetensors" in shown and "0:00 left" in shown
    assert weights.header(tmp_path / "own.safetensors")["frames"] == "clip.mp4"


def test_a_damaged_clip_is_said(layers, tmp_path, capsys):
    write_mkv(tmp_path / "whole.mkv", layers.frames)
    whole = (tmp_path / "whole.mkv").read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) // 2])
    words = ["adapt", str(cut), "-o", str(tmp_path / "own.safetensors"), "--steps", "0", "--threads", "1"]
    assert main(words) == 1
    shown = capsys.readouterr()
    assert "warning: " in shown.out and "damaged or cut" in shown.out and (tmp_path / "own.safetensors").exists()
    assert "damaged or cut" in shown.err and "what could be read was learned from" in shown.err
    with pytest.raises(FleetflowError, match="damaged or cut"):
        read_clips((cut,))
    write_mkv(tmp_path / "short.mkv", layers.frames[:4])
    short = (tmp_path / "short.mkv").read_bytes()
    cut.write_bytes(short[: len(short) // 2])
    with pytest.raises(FleetflowError, match="damaged or cut"):  # not that it has too few frames
        job.read_pairs(cut)


def write_mkv(path: Path, frames: list[np.ndarray]) -> None:
    """Matroska, of which a part can be read; an .mp4 has its table at the end."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "bgr0"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def test_what_cannot_be_adapted_to(folder, tmp_path):
    with pytest.raises(FleetflowError, match="does not exist"):
        job.read_pairs(tmp_path / "none.mp4")
    write_image(tmp_path / "1.png", np.zeros((8, 8, 3), np.uint8))
    write_image(tmp_path / "2.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(FleetflowError, match="three frames"):
        job.read_pairs(tmp_path)
    write_image(tmp_path / "3.png", np.zeros((8, 9, 3), np.uint8))
    with pytest.raises(FleetflowError, match="another size"):
        job.read_pairs(tmp_path)
    with pytest.raises(FleetflowError, match="safetensors"):
        job.adapt(job.read_pairs(folder), tmp_path / "own.pth")


@pytest.mark.parametrize(
    "option",
    [{"batch": 0}, {"measure_every": 0}, {"learning_rate": float("nan")}, {"threads": -1}, {"steps": -1}],
    ids=str,
)
def test_numbers_out_of_range_are_refused(folder, tmp_path, option):
    with pytest.raises(FleetflowError, match="expected a number from"):
        job.adapt(job.read_pairs(folder), tmp_path / "own.safetensors", **option)


def test_files_that_are_in_the_way(folder, tmp_path):
    pairs, output = job.read_pairs(folder), tmp_path / "own.safetensors"
    (tmp_path / "own-other.safetensors").write_text("mine")
    with pytest.raises(FleetflowError, match="own-other.safetensors is there already"):
        job.adapt(pairs, output, other="fastflownet")
    output.write_text("mine")
    (tmp_path / "own-unfinished.pt").write_text("half")
    with pytest.raises(FleetflowError, match="own.safetensors is there already"):
        job.adapt(pairs, output, steps=1, report=quiet)
    assert output.read_text() == "mine"
    output.unlink()
    for content in ("half", {"request": 1, "step": "a", "bad": 0, "students": []}):
        if isinstance(content, dict):
            torch.save(content, tmp_path / "own-unfinished.pt")
        with pytest.raises(FleetflowError, match="own-unfinished.pt is damaged") as error:
            job.adapt(pairs, output, steps=1, report=quiet)
        assert "\n" not in str(error.value)
    with lock_folder(tmp_path, "train it"), pytest.raises(FleetflowError, match='in use by "train it"'):
        job.adapt(pairs, output, steps=1, report=quiet)


def test_killed_at_every_rename(layers, tmp_path, monkeypatch):
    """Whatever was written, the same call leaves what an uninterrupted run leaves, and nothing else."""
    monkeypatch.setattr(job, "film", lambda frames, camera, generator: frames)
    frames = [frame[:64, :64] for frame in layers.frames[:4]]
    options = {"steps": 2, "batch": 1, "measure_every": 1, "size": (64, 64), "precision": "fp32", "report": quiet}
    pairs = list(zip(frames, frames[1:]))
    job.adapt(pairs, tmp_path / "whole" / "own.safetensors", **options)
    whole = weights.read_state(tmp_path / "whole" / "own.safetensors")
    for n, when in kill_points(19):
        output = tmp_path / f"{n}-{when}" / "own.safetensors"
        if not killed_at(n, when, lambda output=output: job.adapt(pairs, output, **options)):
            break
        if not output.exists() or output.with_name("own-unfinished.pt").exists():
            job.adapt(pairs, output, **options)
        state = weights.read_state(output)
        assert all(torch.equal(state[key], whole[key]) for key in whole), f"killed {when} rename {n}"
        assert [path.name for path in output.parent.iterdir()] == ["own.safetensors"], f"killed {when} rename {n}"
    assert n >= 5, "state and weights of the start, and the states of both steps"


def test_long_clips_are_thinned_evenly(folder, layers, monkeypatch):
    monkeypatch.setattr(job, "MEMORY", 6 * layers.frames[0].nbytes)
    pairs = job.read_pairs(folder)
    assert len(pairs) == 3
    assert all(np.array_equal(pair[0], layers.frames[3 * k]) for k, pair in enumerate(pairs))
