"""Training: it learns, resumes exactly, survives a kill, and stops on numbers that are none."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from fleetflow import losses, optimise, recipes
from fleetflow import train as job
from fleetflow.data.generate.worlds import shapes_world
from fleetflow.models import weights
from fleetflow.recipes import Recipe, Stage
from fleetflow.types import FleetflowError, Prediction, Sample

TINY = dataclasses.replace(
    recipes.RECIPES["fastflownet_synthetic"], stages=(Stage(4, 1, 64, 64), Stage(4, 2, 64, 128)), warmup=2
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "tiny", TINY)


def losses_of(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def quiet(_):
    pass


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_gives_the_losses_of_an_uninterrupted_run(tiny, tmp_path, precision):
    options = {"precision": precision, "workers": 0, "report": quiet}
    whole = job.train("tiny", folder=tmp_path / "whole", **options)
    job.train("tiny", folder=tmp_path / "parts", steps=3, **options)
    job.train("tiny", folder=tmp_path / "parts", steps=6, resume=True, **options)
    parts = job.train("tiny", folder=tmp_path / "parts", resume=True, **options)
    assert whole.step == parts.step == 8
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")
    one, two = (weights.read_state(outcome.weights) for outcome in (whole, parts))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_worker_process_gives_the_same_losses(tiny, tmp_path):
    for workers in (0, 1):
        job.train("tiny", folder=tmp_path / str(workers), steps=3, workers=workers, report=quiet, precision="fp32")
    assert losses_of(tmp_path / "0") == losses_of(tmp_path / "1")


def test_a_run_is_not_overwritten_and_a_missing_one_not_resumed(tiny, tmp_path):
    job.train("tiny", folder=tmp_path, steps=1, workers=0, report=quiet)
    with pytest.raises(FleetflowError, match="--resume"):
        job.train("tiny", folder=tmp_path)
    with pytest.raises(FleetflowError, match="nothing to resume"):
        job.train("tiny", folder=tmp_path / "none", resume=True)
    with pytest.raises(FleetflowError, match="did you mean"):
        job.train("fastflownet_synthetc", folder=tmp_path / "x")


def test_starting_from_weights(tiny, tmp_path):
    first = job.train("tiny", folder=tmp_path / "first", steps=2, workers=0, report=quiet)
    start = f"fastflownet:{first.weights}"
    job.train("tiny", folder=tmp_path / "second", start=start, steps=1, workers=0, report=quiet)
    fresh, warm = (losses_of(tmp_path / name)[0] for name in ("first", "second"))
    assert warm != fresh
    with pytest.raises(FleetflowError, match="no file"):
        job.train("tiny", folder=tmp_path / "third", start="fastflownet:nowhere.pth")


def test_time_limit(tiny, tmp_path):
    outcome = job.train("tiny", folder=tmp_path, minutes=0.0, workers=0, report=quiet)
    assert outcome.step == 1 and outcome.checkpoint.exists()


def test_a_killed_run_loses_at_most_one_checkpoint_interval(tmp_path):
    """kill -9 in the middle: what lies there is whole, and the run goes on behind its last checkpoint."""
    code = (
        "import sys; from fleetflow import recipes, train; from pathlib import Path; import dataclasses\n"
        "plan = recipes.RECIPES['fastflownet_synthetic']\n"
        "stages = (recipes.Stage(400, 1, 64, 64),)\n"
        "recipes.RECIPES['tiny'] = dataclasses.replace(plan, stages=stages)\n"
        "train.train('tiny', folder=Path(sys.argv[1]), workers=0, checkpoint_every=3, threads=1,\n"
        "            resume='resume' in sys.argv, steps=int(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen([*command, "400"], stdout=subprocess.DEVNULL)
    log, limit = tmp_path / "log.jsonl", time.monotonic() + 240
    while not log.exists() or log.read_text().count("\n") < 8:
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = log.read_text().count("\n")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert done - 3 <= state["step"] <= done
    subprocess.run([*command, str(state["step"] + 2), "resume"], check=True, stdout=subprocess.DEVNULL)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(state["step"] + 2))


def test_learns_on_one_batch(monkeypatch, tmp_path):
    """On the same four pairs again and again the error falls to a small part of the motion."""
    fixed = job.generate(4, 64, 128, seed=5, mixture={shapes_world: 1.0})
    plan = dataclasses.replace(TINY, stages=(Stage(120, 4, 64, 128),), cooldown=0.5)
    monkeypatch.setitem(recipes.RECIPES, "one_batch", plan)
    monkeypatch.setattr(job, "generate", lambda *args, **keywords: fixed)
    job.train("one_batch", folder=tmp_path, workers=0, report=quiet)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["epe"] < 0.5 * fixed.flow.norm(dim=1).mean().item()


def test_a_loss_that_is_no_number_is_skipped_then_ends_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "BAD_STEPS", 3)
    real, calls = job.multi_scale, []

    def broken(prediction, sample):
        calls.append(1)
        return real(prediction, sample) * (float("nan") if len(calls) > 1 else 1)

    monkeypatch.setattr(job, "multi_scale", broken)
    with pytest.raises(FleetflowError, match="3 steps had a loss that is not a number"):
        job.train("tiny", folder=tmp_path, workers=0, report=quiet, checkpoint_every=1)
    kept = torch.load(tmp_path / "bad_batch.pt", weights_only=True)
    assert set(kept) == {"frame1", "frame2", "flow", "valid"}
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in state.values())


def test_learning_rate():
    plan = Recipe(
        "x", (Stage(100, 1, 64, 64),), 1.0, warmup=10, cooldown=0.2, weight_decay=0, clip=1, ema=0.9, source=""
    )
    assert job.learning_rate(plan, 0) == pytest.approx(0.1)
    assert job.learning_rate(plan, 50) == 1
    assert job.learning_rate(plan, 90) == pytest.approx(0.5)
    assert job.learning_rate(plan, 99) == pytest.approx(0.05)


def test_stages_and_samples():
    assert [TINY.stage(k).batch for k in (0, 3, 4, 7)] == [1, 1, 2, 2]
    assert [TINY.samples(k) for k in (0, 4, 6, 8)] == [0, 4, 8, 12]


def test_orthogonal_update():
    for shape in ((6, 40), (40, 6), (8, 8)):
        values = torch.linalg.svdvals(
            optimise.orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(2)))
        )
        assert values.min() > 0.3 and values.max() < 1.4


def test_unknown_pixels_have_no_part_in_the_loss():
    flow = torch.zeros(1, 2, 64, 64)
    flow[..., 10:20, 10:20] = float("nan")
    valid = flow[:, 0].isfinite()
    sample = Sample(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64), flow, valid)
    found = torch.ones(1, 2, 64, 64, requires_grad=True)
    steps = tuple(torch.ones(1, 2, 64 // s, 64 // s) for s in (64, 32, 16, 8, 4))
    loss = losses.multi_scale(Prediction(found, steps), sample, weights=(0.0,) * 4, power=1.0, epsilon=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(2**0.5, rel=1e-4)
    assert found.grad.isfinite().all() and found.grad[..., 10:20, 10:20].abs().max() == 0
    assert found.grad[..., 0, 0].abs().min() > 0


def test_shrink_flow():
    flow = torch.zeros(1, 2, 4, 4)
    flow[0, 0, :2, :2] = torch.tensor([[1.0, 2.0], [3.0, 100.0]])
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[0, 1, 1] = False
    small, share = losses.shrink_flow(flow, valid, (2, 2))
    assert small[0, 0, 0, 0].item() == pytest.approx(2.0 / 2)
    assert share[0].tolist() == [[0.75, 1.0], [1.0, 1.0]]
