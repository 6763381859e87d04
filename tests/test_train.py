"""Training: it learns, resumes exactly, survives a kill, and stops on numbers that are none."""

import dataclasses
import json
import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config as inductor
from conftest import skip_without

from fleetflow.cli.main import main
from fleetflow.data.datasets.pairs import pairs
from fleetflow.data.generate import generate
from fleetflow.data.generate.worlds import shapes_world
from fleetflow.io.flow import write_flow
from fleetflow.io.images import write_image
from fleetflow.models import weights
from fleetflow.registry import models
from fleetflow.training import dataloader as feed
from fleetflow.training import logging as runlog
from fleetflow.training import loop as job
from fleetflow.training import losses, recipes
from fleetflow.training import optimizers as optimize
from fleetflow.training import step as training_step
from fleetflow.training.distributed import Team
from fleetflow.training.optimizers import adamw
from fleetflow.training.recipe import Batches, Recipe, Source, changed
from fleetflow.training.recipes.flownet_family import FINAL
from fleetflow.training.schedules import warm_flat_cool
from fleetflow.training.step import Training
from fleetflow.types import FleetflowError, Prediction, Sample

GENERATED = recipes.RECIPES["fastflownet_synthetic"].stages[0]


def plan_of(*batches: Batches, **changes) -> Recipe:
    return Recipe("fastflownet", (dataclasses.replace(GENERATED, batches=batches, **changes),), "a test")


TINY = plan_of(Batches(2, 2, 64, 64), Batches(2, 2, 64, 128))
TWO = Recipe(
    "fastflownet",
    tuple(
        dataclasses.replace(GENERATED, name=name, batches=(Batches(2, 2, 64, 64),), init=init)
        for name, init in (("one", GENERATED.init), ("two", None))
    ),
    "a test",
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "tiny", TINY)
    monkeypatch.setitem(recipes.RECIPES, "two", TWO)


def losses_of(folder) -> list[float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def quiet(_):
    pass


def photographs(folder: Path, count: int = 3) -> Path:
    for k in range(count):
        write_image(folder / f"{k}.png", np.random.default_rng(k).integers(0, 255, (20, 30, 3), np.uint8))
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_gives_the_losses_of_an_uninterrupted_run(tiny, tmp_path, precision):
    if precision == "bf16":
        skip_without(torch.bfloat16)
    options = {"precision": precision, "workers": 0, "report": quiet}
    whole = job.train("tiny", folder=tmp_path / "whole", **options)
    job.train("tiny", folder=tmp_path / "parts", steps=1, **options)
    job.train("tiny", folder=tmp_path / "parts", steps=3, resume=True, **options)
    parts = job.train("tiny", folder=tmp_path / "parts", resume=True, **options)
    assert whole.step == parts.step == 4
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


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """The folder of a run of two steps, begun with a setting, photographs, a seed and a precision."""
    place = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.RECIPES, "tiny", TINY)
        options = {"textures": photographs(place / "photos"), "settings": {"batch": "4"}, "seed": 3, "workers": 0}
        job.train("tiny", folder=place / "run", steps=2, precision="fp32", report=quiet, **options)
        job.train("tiny", folder=place / "whole", steps=4, precision="fp32", report=quiet, **options)
    return place


@pytest.fixture
def run(begun, tmp_path) -> Path:
    return Path(shutil.copytree(begun / "run", tmp_path / "run"))


@pytest.mark.parametrize(
    "again", [{}, {"settings": {"batch": "4"}, "seed": 3, "gradient_accumulation": 1, "precision": "fp32"}]
)
def test_resuming_takes_what_is_not_given_from_the_run(tiny, run, begun, again):
    job.train("tiny", folder=run, resume=True, steps=3, workers=0, report=quiet, **again)
    job.train("tiny", folder=run, resume=True, steps=4, workers=0, report=quiet, textures=begun / "photos")
    assert losses_of(run) == losses_of(begun / "whole")
    header = weights.header(run / "weights.safetensors")
    assert header["textures"] == "photographs" and int(header["samples"]) == 16


OTHER = [
    ("recipe tiny, not two", {"name": "two"}),
    ("textures .*photos, not .*other", {"textures": "other"}),
    ("batch 4, not 2", {"settings": {"batch": "2"}}),
    ("learning_rate as in the recipe, not 1", {"settings": {"learning_rate": "1"}}),
    ("seed 3, not 0", {"seed": 0}),
    ("precision fp32, not bf16", {"precision": "bf16"}),
    ("gradient_accumulation 1, not 2", {"gradient_accumulation": 2}),
    ("stage none, not generated", {"stage": "generated"}),
    ("root none", {"root": "other"}),
    ("start none", {"start": ("fastflownet",)}),
]


@pytest.mark.parametrize("message,asked", OTHER, ids=[message for message, _ in OTHER])
def test_resuming_refuses_what_differs_from_the_run(tiny, run, message, asked):
    asked = {key: run.parent / value if key in ("textures", "root") else value for key, value in asked.items()}
    before = (run / "log.jsonl").read_text()
    with pytest.raises(FleetflowError, match=message):
        job.train(**{"name": "tiny", **asked}, folder=run, resume=True, steps=3, workers=0, report=quiet)
    assert (run / "log.jsonl").read_text() == before


def test_a_single_stage_may_be_resumed_with_another_length(tiny, run, tmp_path):
    options = {"resume": True, "steps": 3, "workers": 0, "report": quiet}
    assert job.train("tiny", folder=run, settings={"steps": "20"}, **options).steps == 20
    with pytest.raises(FleetflowError, match="is at step 3 of 2"):
        job.train("tiny", folder=run, settings={"steps": "2"}, **options)
    job.train("two", folder=tmp_path / "two", steps=1, workers=0, report=quiet)
    with pytest.raises(FleetflowError, match="steps as in the recipe, not 12"):  # the border would move
        job.train("two", folder=tmp_path / "two", settings={"steps": "12"}, **options)


def test_photographs_that_moved_are_named_anew(tiny, tmp_path):
    options = {"folder": tmp_path / "run", "workers": 0, "report": quiet}
    old = photographs(tmp_path / "old")
    job.train("tiny", textures=old, steps=1, **options)
    shutil.move(old, tmp_path / "new")
    with pytest.raises(FleetflowError, match="old holds no pictures"):
        job.train("tiny", resume=True, steps=2, **options)
    job.train("tiny", textures=tmp_path / "new", resume=True, steps=2, **options)
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["run"]["textures"] == str(tmp_path / "new")


def test_a_checkpoint_of_an_earlier_version_takes_the_arguments(tiny, run, begun):
    path = run / "checkpoint.pt"
    state = torch.load(path)
    for key in ("stage", "settings", "start", "root", "textures", "precision", "start_samples"):
        del state["run"][key]
    torch.save(state, path)
    options = {"textures": begun / "photos", "settings": {"batch": "4"}, "precision": "fp32"}
    job.train("tiny", folder=run, resume=True, steps=4, workers=0, report=quiet, **options)
    assert losses_of(run) == losses_of(begun / "whole")


def test_a_network_that_does_not_fit_the_checkpoint_is_one_line(tiny, run, monkeypatch):
    other = dataclasses.replace(TINY.stages[0], network="lightflow", init=None)
    monkeypatch.setitem(recipes.RECIPES, "tiny", dataclasses.replace(TINY, stages=(other,)))
    with pytest.raises(FleetflowError, match="is not of stage generated") as caught:
        job.train("tiny", folder=run, resume=True, workers=0, report=quiet)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "foreign", "tensor"])
def test_a_damaged_checkpoint_is_one_line(tiny, run, damage):
    path = run / "checkpoint.pt"
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "text": b"hello"}.get(damage, b""))
    if damage in ("foreign", "tensor"):
        torch.save({"a": 1} if damage == "foreign" else torch.zeros(2), path)
    with pytest.raises(FleetflowError, match="no whole checkpoint of a run .*--start") as caught:
        job.train("tiny", folder=run, resume=True, workers=0, report=quiet)
    assert "\n" not in str(caught.value)


def test_half_a_line_at_the_end_of_the_log_is_dropped(tiny, run):
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    job.train("tiny", folder=run, resume=True, steps=3, workers=0, report=quiet)
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [0, 1, 2]


def test_a_finished_run_still_says_its_error(tiny, run):
    first = job.train("tiny", folder=run, resume=True, settings={"steps": "3"}, workers=0, report=quiet)
    again = job.train("tiny", folder=run, resume=True, workers=0, report=quiet)
    assert first.epe == again.epe and again.step == again.steps


NUMBERS = [
    {"steps": 0}, {"steps": -3},
    {"gradient_accumulation": 0}, {"gradient_accumulation": -1}, {"checkpoint_every": 0}, {"threads": -1},
    {"workers": -1}, {"minutes": -1.0}, {"minutes": float("nan")}, {"seed": -1}, {"seed": 2**64},
]  # fmt: skip


@pytest.mark.parametrize("option", NUMBERS, ids=str)
def test_numbers_out_of_range_are_refused(tiny, tmp_path, option):
    with pytest.raises(FleetflowError, match="expected a number from"):
        job.train("tiny", folder=tmp_path / "run", **{"workers": 0, **option})
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_none(tiny, tmp_path):
    (tmp_path / "a.png").write_text("a file")
    with pytest.raises(FleetflowError, match="a.png cannot be a folder .*--folder"):
        job.train("tiny", folder=tmp_path / "a.png", workers=0)


def test_compiling_without_a_compiler(tiny, tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", (str(tmp_path / "g++"),))
    with pytest.raises(FleetflowError, match="^--compile does not work here .*; install a C.. compiler") as error:
        job.train("tiny", folder=tmp_path / "run", steps=1, workers=0, compile=True, report=quiet)
    assert "\n" not in str(error.value)
    torch._dynamo.reset()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_package(tmp_path, monkeypatch):
    """Not that of the repository in which it happens to run or to be installed."""

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    package = tmp_path / "lib" / "fleetflow"
    (package / "training").mkdir(parents=True)
    (package / "training" / "logging.py").touch()
    (tmp_path / "mine.py").touch()
    git("add", "mine.py")
    git("commit", "-qm", "theirs")
    monkeypatch.setattr(runlog, "__file__", str(package / "training" / "logging.py"))
    assert runlog._commit() == "unknown"
    git("add", "lib")
    git("commit", "-qm", "the package")
    commit = git("rev-parse", "--short", "HEAD")
    git("commit", "-qm", "theirs again", "--allow-empty")
    monkeypatch.chdir("/")
    assert runlog._commit() == commit


def test_training_without_git(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = job.train("tiny", folder=tmp_path / "run", steps=1, workers=0, report=quiet)
    assert weights.header(outcome.weights)["commit"] == "unknown"


@pytest.mark.parametrize("device", ["meta", "hpu", "tpu"])
def test_a_device_that_cannot_train(tiny, tmp_path, device):
    with pytest.raises(FleetflowError, match=device):
        job.train("tiny", folder=tmp_path, device=device, workers=0, steps=1)


def test_processes_without_torchrun(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FleetflowError, match="WORLD_SIZE is 2, but RANK is not set.*torchrun"):
        job.train("tiny", folder=tmp_path, workers=0, steps=1)


def half_frozen(model, earlier):
    model.load_state_dict(earlier.state_dict())
    for weight in list(model.parameters())[:6]:
        weight.requires_grad_(False)


def test_resuming_inside_a_stage_that_grew_from_another(tmp_path, monkeypatch):
    """What growing freezes is frozen again; without networks to grow from such a stage is refused."""
    one, two = (dataclasses.replace(stage, optimizer=adamw) for stage in TWO.stages)
    plan = dataclasses.replace(TWO, stages=(one, dataclasses.replace(two, grow=half_frozen)))
    monkeypatch.setitem(recipes.RECIPES, "grown", plan)
    options = {"workers": 0, "report": quiet, "precision": "fp32"}
    job.train("grown", folder=tmp_path / "whole", **options)
    job.train("grown", folder=tmp_path / "parts", steps=3, **options)
    job.train("grown", folder=tmp_path / "parts", resume=True, **options)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")
    with pytest.raises(FleetflowError, match="give them with --start"):
        job.train("grown", folder=tmp_path / "alone", stage="two", **options)


def test_repeated_runs_resume_and_begin_alike(tiny, tmp_path, capsys):
    words = ["train", "tiny", "--folder", str(tmp_path), "--steps", "1", "--workers", "0", "--threads", "1"]
    assert main([*words, "--repeat", "0"]) == 1 and "--repeat is 0" in capsys.readouterr().err
    assert main([*words, "--repeat", "2", "--resume"]) == 1 and "nothing to resume" in capsys.readouterr().err
    photos = str(photographs(tmp_path / "photos"))
    assert main([*words, "--folder", str(tmp_path / "seed-0"), "--textures", photos]) == 0
    assert main([*words, "--repeat", "2", "--resume"]) == 0
    assert "over 2 runs" in capsys.readouterr().out
    states = [torch.load(tmp_path / f"seed-{k}" / "checkpoint.pt") for k in (0, 1)]
    assert [state["run"]["seed"] for state in states] == [0, 1]
    assert states[0]["run"]["textures"] == states[1]["run"]["textures"] == photos


def test_starting_from_weights(tiny, tmp_path):
    first = job.train("tiny", folder=tmp_path / "first", steps=2, workers=0, report=quiet)
    start = f"fastflownet:{first.weights}"
    job.train("tiny", folder=tmp_path / "second", start=(start,), steps=1, workers=0, report=quiet)
    fresh, warm = (losses_of(tmp_path / name)[0] for name in ("first", "second"))
    assert warm != fresh
    shutil.rmtree(tmp_path / "first")  # a resumed run needs its start no more, and still says where it came from
    job.train("tiny", folder=tmp_path / "second", resume=True, steps=2, workers=0, report=quiet)
    header = weights.header(tmp_path / "second" / "weights.safetensors")
    assert header["start"] == "fastflownet" and int(header["samples"]) == 8 and header["license"] == "Apache-2.0"
    foreign = tmp_path / "foreign.pth"  # says nothing of its license, so what is made from it is not ours to give
    torch.save(models["fastflownet"]().state_dict(), foreign)
    own = job.train(
        "tiny", folder=tmp_path / "own", start=(f"fastflownet:{foreign}",), steps=1, workers=0, report=quiet
    )
    assert weights.header(own.weights)["license"] == "that of the start: unknown"
    with pytest.raises(FleetflowError, match="no file"):
        job.train("tiny", folder=tmp_path / "third", start=("fastflownet:nowhere.pth",))


def test_time_limit(tiny, tmp_path):
    outcome = job.train("tiny", folder=tmp_path, minutes=0.0, workers=0, report=quiet)
    assert outcome.step == 1 and outcome.checkpoint.exists()


def test_learns_on_one_batch(monkeypatch, tmp_path):
    """On the same two pairs again and again the error falls to a small part of the motion."""
    fixed = generate(2, 64, 64, seed=5, mixture={shapes_world: 1.0})
    plan = plan_of(Batches(24, 2, 64, 64), schedule=partial(warm_flat_cool, warmup=2, cooldown=0.5))
    monkeypatch.setitem(recipes.RECIPES, "one_batch", plan)
    monkeypatch.setattr(feed, "generate", lambda *args, **keywords: fixed)
    job.train("one_batch", folder=tmp_path, workers=0, report=quiet)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["epe"] < 0.5 * fixed.flow.norm(dim=1).mean().item()


def test_every_other_pair_begins_with_the_flow_of_another_network(monkeypatch, tmp_path):
    given = []

    def watched():
        model = models["raft_small"]()
        model.register_forward_pre_hook(lambda _, args: given.append(args))
        return model

    stage = dataclasses.replace(
        GENERATED, batches=(Batches(2, 3, 64, 128),), loss=losses.sequence, init=None, iterations=2, build=watched
    )
    plan = Recipe("raft_small", (dataclasses.replace(stage, initial_flow="fastflownet"),), "a test")
    monkeypatch.setitem(recipes.RECIPES, "follows", plan)
    job.train("follows", folder=tmp_path, workers=0, precision="fp32", report=quiet)
    network = weights.load("fastflownet")
    for (frame1, frame2, previous), begins in zip(given, [(False, True, False), (True, False, True)], strict=True):
        with torch.no_grad():
            flow = network(frame1, frame2).flow
        expected = flow * torch.tensor(begins)[:, None, None, None]
        torch.testing.assert_close(previous.flow, expected, rtol=1e-3, atol=1e-3)
        assert previous.state is None and flow.abs().mean() > 0.1


def test_a_part_that_no_gradient_reaches_is_named_once(monkeypatch, tmp_path):
    def dead():
        model = models["raft_small"]()
        model.update_block.flow_head.conv1.bias.data.fill_(-1e6)  # its units give 0 for every input
        return model

    stage = dataclasses.replace(
        GENERATED, batches=(Batches(4, 1, 64, 128),), loss=losses.sequence, init=None, iterations=1, build=dead
    )
    monkeypatch.setitem(recipes.RECIPES, "dead", Recipe("raft_small", (stage,), "a test"))
    monkeypatch.setattr(training_step, "SILENT_EVERY", 1)
    said = []
    job.train("dead", folder=tmp_path, workers=0, report=said.append)
    expected = {name for name, _ in models["raft_small"]().named_parameters()} - {"update_block.flow_head.conv2.bias"}
    silent = [line for line in said if "the gradient of" in line]
    assert silent == [
        f"step 2  the gradient of {min(expected)} and {len(expected) - 1} more weights is zero: "
        "that part of the network does not learn"
    ]


def test_a_loss_that_is_no_number_is_skipped_then_ends_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "BAD_STEPS", 3)
    calls = []

    def broken(prediction, sample):
        calls.append(1)
        return losses.multi_scale(prediction, sample) * (float("nan") if len(calls) > 1 else 1)

    monkeypatch.setitem(recipes.RECIPES, "tiny", plan_of(Batches(8, 1, 64, 64), loss=broken))
    with pytest.raises(FleetflowError, match="3 steps had a loss that is not a number"):
        job.train("tiny", folder=tmp_path, workers=0, report=quiet, checkpoint_every=1)
    kept = torch.load(tmp_path / "bad_batch-0.pt", weights_only=True)
    assert set(kept) == {"step", "loss", "frame1", "frame2", "flow", "valid"}
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in state.values())


def test_what_diverges_leaves_its_last_good_weights(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "BAD_STEPS", 3)
    calls = []

    def broken(prediction, sample):
        calls.append(1)
        return losses.multi_scale(prediction, sample) * (float("nan") if len(calls) > 4 else 1)

    monkeypatch.setitem(recipes.RECIPES, "tiny", plan_of(Batches(8, 2, 64, 64), loss=broken))
    with pytest.raises(FleetflowError, match="begin another --folder with --start NETWORK:.*lower learning rate"):
        job.train("tiny", folder=tmp_path, workers=0, report=quiet, checkpoint_every=1, gradient_accumulation=2)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    assert torch.load(tmp_path / "bad_batch-0.pt", weights_only=True)["step"] == 4
    assert losses_of(tmp_path)[2:] == [None, None]  # JSON knows no NaN


def test_data_of_a_later_stage_is_missed_at_once(tmp_path, monkeypatch):
    later = dataclasses.replace(TWO.stages[1], sources=(Source(pairs, "nowhere"),))
    monkeypatch.setitem(recipes.RECIPES, "later", dataclasses.replace(TWO, stages=(TWO.stages[0], later)))
    with pytest.raises(FleetflowError, match="nowhere"):
        job.train("later", folder=tmp_path / "run", root=tmp_path, workers=0, report=quiet)
    assert not (tmp_path / "run").exists()
    job.train("later", folder=tmp_path / "run", root=tmp_path, workers=0, report=quiet, steps=1)


def test_saving_memory_leaves_out_what_cannot_be_computed_again():
    for name, wrapped in (("deq_flow_tiny_synthetic", {"fnet", "mask"}), ("lightflow", None)):
        plan = recipes.RECIPES[name]
        stage = plan.stages[0]
        model = job.initial_model(stage, plan, 0, earlier=None, start=(), resumed=False)
        options = (stage, model, Team(0, 1, torch.device("cpu")), torch.float32)
        if wrapped is None:
            with pytest.raises(FleetflowError, match="without --save-memory"):
                Training(*options, save_memory=True)
            continue
        trained = Training(*options, save_memory=True).called
        assert {name for name, child in model.named_children() if "Wrapper" in type(child).__name__} == wrapped
        sample = Sample(*generate(1, 96, 128, seed=1)[:4])
        stage.loss(trained(sample.frame1, sample.frame2), sample).backward()


def test_learning_rate():
    factor = partial(warm_flat_cool, warmup=10, cooldown=0.2)
    assert [factor(step, 100) for step in (0, 50, 90, 99)] == pytest.approx([0.1, 1, 0.5, 0.05])


def test_sizes_and_samples():
    stage = plan_of(Batches(4, 1, 64, 64), Batches(4, 2, 64, 128)).stages[0]
    assert [stage.at(k).batch for k in (0, 3, 4, 7)] == [1, 1, 2, 2]
    assert [stage.samples(k) for k in (0, 4, 6, 8)] == [0, 4, 8, 12]


def test_settings_change_a_recipe():
    plan = changed(TWO, {"learning_rate": "1e-4", "batch": "4", "steps": "10", "freeze_norm": "true"})
    assert plan.steps == 10 and all(stage.steps == 5 for stage in plan.stages)
    assert all(stage.learning_rate == 1e-4 and stage.batches[0].batch == 4 for stage in plan.stages)
    assert plan.stages[0].freeze_norm is True and TWO.steps == 4
    assert changed(TWO, {"iterations": "12"}).stages[0].iterations == 12
    assert changed(recipes.recipe("raft"), {"ema": "0.99"}).stages[0].ema == 0.99  # a number, though it says 0
    assert changed(TWO, {"clip": "inf", "validate_every": "0", "weight_decay": "0"}).stages[0].validate_every == 0
    for name, value, message in (
        ("learnign_rate", "1", "did you mean"),
        ("batch", "many", "expected a whole number from 1 on, such as 2"),
        ("batch", "0", "from 1 on"),
        ("steps", "0", "from 2 on, such as 4"),
        ("steps", "1", "from 2 on, such as 4"),
        ("height", "-64", "from 1 on"),
        ("learning_rate", "-1", "a number from"),
        ("learning_rate", "nan", "a number from"),
        ("ema", "1.5", "from 0 to 1"),
        ("iterations", "0", "from 1 on"),
        ("freeze_norm", "maybe", "expected true or false"),
    ):
        with pytest.raises(FleetflowError, match=message):
            changed(TWO, {name: value})


def test_stages_follow_each_other_and_resume_at_their_border(tiny, tmp_path):
    options = {"workers": 0, "report": quiet, "precision": "fp32"}
    whole = job.train("two", folder=tmp_path / "whole", **options)
    assert whole.step == 4 and (tmp_path / "whole" / "one.safetensors").exists()
    for steps in (2, 3, 4):
        job.train("two", folder=tmp_path / "parts", steps=steps, resume=steps > 2, **options)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")
    header = weights.header(whole.weights)
    assert header["stage"] == "two" and int(header["samples"]) == 8
    with pytest.raises(FleetflowError, match="--start"):  # a later stage does not begin with random weights
        job.train("two", folder=tmp_path / "random", stage="two", **options)
    assert not list((tmp_path / "random").glob("*"))
    one = {**options, "stage": "two", "start": (f"fastflownet:{tmp_path / 'whole' / 'one.safetensors'}",)}
    job.train("two", folder=tmp_path / "alone", **one)
    assert len(losses_of(tmp_path / "alone")) == 2
    assert job.train("two", folder=tmp_path / "less", settings={"steps": "1"}, **one).steps == 1
    with pytest.raises(FleetflowError, match="did you mean"):
        job.train("two", folder=tmp_path / "none", stage="too", **options)


def test_options_that_change_no_number(tiny, tmp_path):
    """Computing activations again gives the same losses to the last bit; a float16 scaler the same to rounding."""
    options = {"workers": 0, "report": quiet, "precision": "fp32", "steps": 3}
    job.train("tiny", folder=tmp_path / "plain", **options)
    job.train("tiny", folder=tmp_path / "memory", save_memory=True, **{**options, "steps": 2})
    job.train("tiny", folder=tmp_path / "memory", save_memory=True, resume=True, **options)
    assert losses_of(tmp_path / "plain") == losses_of(tmp_path / "memory")
    plain, memory = (weights.read_state(tmp_path / name / "weights.safetensors") for name in ("plain", "memory"))
    assert plain.keys() == memory.keys()


def test_training_on_files(tmp_path, monkeypatch):
    """Pairs from a folder, cropped at random, in batches; what a batch holds does not depend on where it began."""
    made = generate(3, 96, 160, seed=3)
    for k in range(3):
        folder = tmp_path / "data" / "mine" / "set" / f"pair{k}"
        for n, frame in enumerate((made.frame1, made.frame2), 1):
            write_image(folder / f"img{n}.png", (frame[k].permute(1, 2, 0) * 255).byte().numpy())
        write_flow(folder / "flow.png", made.flow[k].permute(1, 2, 0).numpy(), made.valid[k].numpy())
    sources = (Source(pairs, "mine", repeat=2),)
    plan = plan_of(Batches(4, 2, 64, 64), sources=sources, validation=(Source(pairs, "mine"),), validate_every=2)
    monkeypatch.setitem(recipes.RECIPES, "files", plan)
    options = {"root": tmp_path / "data", "report": quiet, "precision": "fp32"}
    job.train("files", folder=tmp_path / "whole", workers=0, **options)
    job.train("files", folder=tmp_path / "parts", workers=1, steps=2, **options)
    job.train("files", folder=tmp_path / "parts", workers=1, resume=True, **options)
    rows = [[json.loads(line) for line in (tmp_path / n / "log.jsonl").open()] for n in ("whole", "parts")]
    assert rows[0] == rows[1] and sum("validation" in row for row in rows[0]) == 2
    with pytest.raises(FleetflowError, match="--root"):
        job.train("files", folder=tmp_path / "none")
    monkeypatch.setitem(recipes.RECIPES, "files", changed(plan, {"height": "128"}))
    for workers in (0, 1):
        with pytest.raises(FleetflowError, match="96x160, smaller than the crop 128x64") as caught:
            job.train("files", folder=tmp_path / f"large{workers}", workers=workers, **options)
        assert "\n" not in str(caught.value)
    stage = dataclasses.replace(plan.stages[0], validation=(Source(pairs, "nowhere"),))
    monkeypatch.setitem(recipes.RECIPES, "files", dataclasses.replace(plan, stages=(stage,)))
    with pytest.raises(FleetflowError, match="nowhere.*for validation; --set validate_every=0"):
        job.train("files", folder=tmp_path / "unjudged", workers=0, **options)
    job.train("files", folder=tmp_path / "unjudged", workers=0, settings={"validate_every": "0"}, steps=1, **options)


def write_pairs(folder: Path, count: int, *, known: float = 1.0) -> None:
    """Generated pairs of 96x160 for `folder`: a_img1.png, a_img2.png, a_flow.png; a share of them has known flow."""
    made = generate(count, 96, 160, seed=3)
    for k in range(count):
        for n, frame in enumerate((made.frame1, made.frame2), 1):
            write_image(folder / f"{k}_img{n}.png", (frame[k].permute(1, 2, 0) * 255).byte().numpy())
        valid = made.valid[k].numpy() & (k < known * count)
        write_flow(folder / f"{k}_flow.png", made.flow[k].permute(1, 2, 0).numpy(), valid)


def test_own_pairs_in_place_of_those_of_a_recipe(tiny, tmp_path, capsys):
    """Any data set, by any recipe: one that has none, and one that has others; the run remembers it."""
    write_pairs(tmp_path / "mine", 3)
    options = {"root": tmp_path / "mine", "report": quiet, "precision": "fp32", "workers": 0}
    run = job.train("tiny", folder=tmp_path / "run", data="folder", steps=2, **options)
    assert weights.header(run.weights)["data"] == "folder" and weights.header(run.weights)["license"] != "Apache-2.0"
    assert job.train("tiny", folder=tmp_path / "run", resume=True, steps=3, report=quiet, workers=0).step == 3
    assert len(losses_of(tmp_path / "run")) == 3
    (tmp_path / "mine" / "train.txt").write_text("0_img1.png 0_img2.png 0_flow.png\n")
    (tmp_path / "mine" / "val.txt").write_text("1_img1.png 1_img2.png 1_flow.png\n")
    settings = {"batch": "1", "height": "64", "width": "64", "validate_every": "1"}
    one = {**options, "settings": settings, "steps": 1}
    two = {**one, "settings": {**settings, "batch": "2"}}
    job.train("lightflow", folder=tmp_path / "split", data="folder:split=train", **two)
    assert "validation" in (tmp_path / "split" / "log.jsonl").read_text()
    with pytest.raises(FleetflowError, match="two cells"):
        job.train("lightflow", folder=tmp_path / "cell", data="folder", **one)
    with pytest.raises(FleetflowError, match="did you mean"):
        job.train("tiny", folder=tmp_path / "other", data="foldr", **options)


def test_pairs_without_known_flow(tiny, tmp_path, monkeypatch):
    """A batch without a known pixel is not learned from and has no part in the EPE; a set without any ends the run."""
    monkeypatch.setitem(recipes.RECIPES, "tiny", plan_of(Batches(30, 1, 64, 64)))
    write_pairs(tmp_path / "some", 3, known=1 / 3)
    options = {"data": "folder", "report": quiet, "precision": "fp32", "workers": 0}
    run = job.train("tiny", folder=tmp_path / "run", root=tmp_path / "some", steps=6, **options)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert sum(row["epe"] is None for row in rows) == 4 and run.epe > 0
    write_pairs(tmp_path / "none", 2, known=0)
    with pytest.raises(FleetflowError, match="20 batches in a row have no known flow"):
        job.train("tiny", folder=tmp_path / "stuck", root=tmp_path / "none", **options)


def test_frames_that_are_scaled_in_training():
    """FlowNet2 is tuned on whole Sintel frames: they are scaled to multiples of 64, and the flow back."""
    model = models["flownet_s"]().train()
    frames = torch.rand(2, 3, 100, 128, generator=torch.Generator().manual_seed(1))
    prediction = model(frames, frames.flip(0))
    assert prediction.flow.shape == (2, 2, 100, 128) and prediction.intermediate_flows == ()
    sample = Sample(frames, frames.flip(0), torch.ones(2, 2, 100, 128), torch.ones(2, 100, 128, dtype=torch.bool))
    FINAL(prediction, sample).backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_orthogonal_update(precision):
    """In the precision of the training, in which Muon's products run."""
    for shape in ((6, 40), (40, 6), (8, 8)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found = optimize.orthogonal(matrix)
        values = torch.linalg.svdvals(found.float())
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
