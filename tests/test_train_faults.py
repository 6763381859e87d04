"""Training that is killed, stopped, starved or handed foreign files: nothing is lost, and it ends with one line."""

import dataclasses
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SLOW, in_child, kill_points, killed_at

from fleetflow.cli.main import main
from fleetflow.data import workers
from fleetflow.data.datasets.folder import folder as folder_pairs
from fleetflow.io.atomic import lock_folder
from fleetflow.io.flow import write_flow
from fleetflow.io.images import write_image
from fleetflow.models import weights
from fleetflow.registry import models
from fleetflow.training import dataloader, distributed, losses, recipes
from fleetflow.training import loop as job
from fleetflow.training.checkpoint import Checkpoint
from fleetflow.training.logging import Log
from fleetflow.training.recipe import Batches, Recipe
from fleetflow.training.recipes import finetune  # noqa: F401
from fleetflow.types import FleetflowError, Sample

FORK = multiprocessing.get_context("fork")
STAGE = dataclasses.replace(recipes.RECIPES["fastflownet_synthetic"].stages[0], init=None)


def quiet(_):
    pass


def shifted(count: int, height: int, width: int, seed: int = 0) -> Sample:
    """Noise that moves 2 px to the right."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.rand(count, 3, height, width + 2, generator=generator)
    flow = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1).expand(count, 2, height, width).contiguous()
    return Sample(
        wide[..., 2:].contiguous(),
        wide[..., :-2].contiguous(),
        flow,
        torch.ones(count, height, width, dtype=torch.bool),
    )


def cheap_recipes(set_attribute=setattr, set_item=dict.__setitem__):
    """Recipes of few steps, on pairs that are made in no time."""
    set_attribute(dataloader, "generate", lambda n, h, w, *, seed, index, **_: shifted(n, h, w, seed + index))
    set_attribute(job, "default_textures", lambda: None)
    one = dataclasses.replace(STAGE, name="one", batches=(Batches(1, 1, 64, 64),))
    two = dataclasses.replace(one, name="two")
    set_item(recipes.RECIPES, "two", Recipe("fastflownet", (one, two), "a test"))
    long = dataclasses.replace(one, batches=(Batches(4, 2, 64, 64),))
    set_item(recipes.RECIPES, "long", Recipe("fastflownet", (long,), "a test"))


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    cheap_recipes(monkeypatch.setattr, monkeypatch.setitem)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_train_faults as tests
tests.cheap_recipes()
def train(name, *folder, **options):
    tests.job.train(name, folder=Path(sys.argv[2]), **{**tests.OPTIONS, **options})
"""


def script(path: Path, code: str, folder: Path) -> list[str]:
    """The words that run a script which calls `train` of this file's recipes, in a process of its own."""
    path.write_text(SCRIPT + code)
    return [str(path), str(Path(__file__).parent), str(folder)]


OPTIONS = {"workers": 0, "report": quiet, "precision": "fp32", "threads": 1, "checkpoint_every": 1}


def same(one: Path, two: Path) -> bool:
    first, second = (weights.read_state(path) for path in (one, two))
    return all(torch.equal(first[key], second[key]) for key in first)


FILES = ("weights.safetensors", "one.safetensors", "two.safetensors")


def test_killed_at_every_rename(tmp_path):
    """Whatever was written, the same command with --resume leaves what an uninterrupted run leaves."""
    job.train("two", folder=tmp_path / "whole", **OPTIONS)
    log = (tmp_path / "whole" / "log.jsonl").read_text()
    for n, when in kill_points(19):
        folder = tmp_path / f"{n}-{when}"
        if not killed_at(n, when, lambda folder=folder: job.train("two", folder=folder, **OPTIONS)):
            break
        begun = (folder / "run.json").exists()
        job.train("two", folder=folder, resume=begun, **OPTIONS)
        for name in FILES:
            assert same(folder / name, tmp_path / "whole" / name), f"killed {when} rename {n}: {name}"
        assert (folder / "log.jsonl").read_text() == log, f"killed {when} rename {n}"
        assert not list(folder.glob(".*")), f"killed {when} rename {n}"
    first = min(number for number, _ in kill_points(19) if number > 8)
    assert n == first, "eight renames: note, log, then of each stage checkpoint, weights, weights of the stage"


def test_killed_in_the_middle(tmp_path):
    """kill -9 of a process: what lies there is whole, and the run goes on behind its last checkpoint."""
    options = {**OPTIONS, "settings": {"steps": "400"}, "checkpoint_every": 3}
    run = tmp_path / "run"
    process = FORK.Process(target=job.train, args=("long",), kwargs={"folder": run, **options})
    process.start()
    log, limit = run / "log.jsonl", time.monotonic() + 240
    while not log.exists() or log.read_text().count("\n") < 8:
        assert time.monotonic() < limit and process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    done, step = log.read_text().count("\n"), Checkpoint.load(run / "checkpoint.pt").step
    assert done - 3 <= step <= done
    job.train("long", folder=run, resume=True, steps=step + 2, **options)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(step + 2))


def by_torchrun(path: Path) -> None:
    """Two processes of torchrun, which import all anew."""
    code = "train('long', steps=2, gradient_accumulation=2)\ntrain('long', steps=3, resume=True)\n"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [sys.executable, *launch, *script(path / "run.py", code, path / "two")]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def by_fork(path: Path) -> None:
    """Two copies of this process, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def member(rank: str) -> None:
        os.environ.update(place, RANK=rank, LOCAL_RANK=rank)
        job.train("long", folder=path / "two", steps=2, gradient_accumulation=2, **OPTIONS)
        job.train("long", folder=path / "two", steps=3, resume=True, **OPTIONS)
        distributed.leave()

    team = [FORK.Process(target=member, args=(rank,)) for rank in "01"]
    for process in team:
        process.start()
    for process in team:
        process.join()
    assert [process.exitcode for process in team] == [0, 0]


@pytest.mark.parametrize("start", [by_fork, *([by_torchrun] if SLOW else [])])
def test_two_processes_give_the_losses_of_one(tmp_path, start):
    """A run of two processes, resumed by two and then by one, has the losses of a run of one."""
    start(tmp_path)
    job.train("long", folder=tmp_path / "two", resume=True, **OPTIONS)
    job.train("long", folder=tmp_path / "one", gradient_accumulation=2, **OPTIONS)
    rows = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("one", "two")]
    one, two = ([row["loss"] for row in each] for each in rows)
    assert len(two) == 4 and one == pytest.approx(two, rel=2e-4)


def test_a_finished_run_writes_what_is_missing(tmp_path):
    job.train("two", folder=tmp_path / "run", **OPTIONS)
    job.train("two", folder=tmp_path / "whole", **OPTIONS)
    for name in ("weights.safetensors", "two.safetensors"):
        (tmp_path / "run" / name).unlink()
    outcome = job.train("two", folder=tmp_path / "run", resume=True, **OPTIONS)
    assert outcome.step == 2
    for name in FILES:
        assert same(tmp_path / "run" / name, tmp_path / "whole" / name)


@pytest.mark.parametrize("name", ["weights.safetensors", "log.jsonl", "two.safetensors", "run.json", "bad_batch-0.pt"])
def test_files_of_the_user_stay(tmp_path, name):
    path = tmp_path / name
    path.write_text("mine")
    with pytest.raises(FleetflowError, match=f"{name} is there, and no run of two wrote it"):
        job.train("two", folder=tmp_path, **OPTIONS)
    assert [item.name for item in tmp_path.iterdir()] == [name] and path.read_text() == "mine"


@pytest.mark.parametrize("name", ["weights.safetensors", "log.jsonl"])
def test_files_that_took_the_place_of_ours_stay(tmp_path, name):
    job.train("two", folder=tmp_path, steps=1, **OPTIONS)
    path = tmp_path / name
    if name == "log.jsonl":
        path.write_text("mine\n")
    else:
        weights.save(models["fastflownet"](), path, {"network": "fastflownet", "license": "mine", "recipe": "other"})
    before = path.read_bytes()
    with pytest.raises(FleetflowError, match="no run of two wrote it"):
        job.train("two", folder=tmp_path, resume=True, **OPTIONS)
    assert path.read_bytes() == before


def test_one_training_in_a_folder(tmp_path):
    with lock_folder(tmp_path / "run", "train other"), pytest.raises(FleetflowError, match='in use by "train other"'):
        job.train("two", folder=tmp_path / "run", seed=1, **OPTIONS)
    assert job.train("two", folder=tmp_path / "run", **OPTIONS).step == 2


@pytest.mark.parametrize("size", [300, 100_000])
def test_a_full_disk_is_one_line(tmp_path, size):
    """The note and the log, or the checkpoint, do not fit."""

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        job.train("two", folder=tmp_path / "run", **OPTIONS)

    code, text = in_child(run)
    assert code == 1 and "cannot be written" in text and "\n" not in text, text


def test_tensorboard_needs_a_folder_in_utf8(tmp_path):
    pytest.importorskip("tensorboard")
    with pytest.raises(FleetflowError, match="is no name in UTF-8, as TensorBoard needs it"):
        Log(tmp_path / "b\udcff", 0, 1, print)


def test_tensorboard_on_a_full_disk_is_left_out(tmp_path, capfd):
    """The numbers go into log.jsonl, which is shorter, and the run goes on."""
    pytest.importorskip("tensorboard")
    said = []

    def run():
        log = Log(tmp_path, 0, 9, said.append)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        for step in range(3):
            log._plot("a", 1.0, step)
            if log.board:
                with log._drawing():
                    log.board.flush()
        log.close()
        assert log.board is None and "TensorBoard events cannot be written" in said[-1]

    code, text = in_child(run)
    assert code == 0, text
    assert "Traceback" not in capfd.readouterr().err


def test_converting_onto_a_full_disk_is_one_line(tmp_path, capfd):
    torch.save(models["fastflownet"]().state_dict(), tmp_path / "own.pth")
    words = ["convert", str(tmp_path / "own.pth"), "fastflownet", str(tmp_path / "own.safetensors")]

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        os._exit(main(words))

    code, _ = in_child(run)
    said = capfd.readouterr().err
    assert code == 1 and "cannot be written" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["own.pth"]


def test_a_worker_that_is_killed_is_one_line(tmp_path, monkeypatch):
    def generate(count, height, width, *, index, **_):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return shifted(count, height, width)

    monkeypatch.setattr(dataloader, "generate", generate)
    with pytest.raises(FleetflowError, match="a worker process that makes pairs died .SIGKILL|signal SIGKILL") as error:
        job.train("long", folder=tmp_path / "run", **{**OPTIONS, "workers": 1})
    assert "\n" not in str(error.value)


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return (torch.full((1,), index),)


def test_a_worker_that_dies_while_it_hands_over_is_one_line(monkeypatch):
    """Its pipe breaks before torch hears that it has ended, and raises an error of its own."""
    seen = workers.wait

    def reset(self, *_, **__):
        worker = self._workers[0].pid
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        os.kill(worker, signal.SIGKILL)
        os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
        raise ConnectionResetError(104, "Connection reset by peer")

    def heard(*arguments):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        return seen(*arguments)

    items = workers.Ahead(Numbers(), range(9), workers=1)
    assert next(items)[0] == 0
    monkeypatch.setattr(type(items._items), "_try_get_data", reset)
    monkeypatch.setattr(workers, "wait", heard)
    try:
        with pytest.raises(FleetflowError, match="died .signal SIGKILL"):
            next(items)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def test_without_shared_memory(tmp_path, monkeypatch):
    """As in a container: tensors come through the pipe, and the losses are the same."""

    def full(_):
        raise RuntimeError("unable to allocate shared memory")

    job.train("long", folder=tmp_path / "shared", **{**OPTIONS, "workers": 1, "steps": 2})
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    job.train("long", folder=tmp_path / "pipe", **{**OPTIONS, "workers": 1, "steps": 2})
    assert len({(tmp_path / name / "log.jsonl").read_text() for name in ("shared", "pipe")}) == 1


def huge(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that takes no room until it is copied."""
    return torch.zeros(1).expand(shape)


WRONG = {
    "step": ("step", "3"),
    "step below 0": ("step", -1),
    "skipped": ("skipped", None),
    "recent": ("recent", [["a", "b"]]),
    "recent row": ("recent", [1.0]),
    "random": ("random", torch.zeros(3)),
    "model": ("model", {"conv": 3}),
    "optimizers": ("optimizers", [{"state": {}, "param_groups": []}]),
    "scaler": ("scaler", [1]),
    "best": ("best", {"epe": 1.0}),
}


def test_wrong_values_in_a_checkpoint_are_one_line(tmp_path):
    job.train("long", folder=tmp_path, steps=1, **OPTIONS)
    path = tmp_path / "checkpoint.pt"
    good = path.read_bytes()
    for key in (*WRONG, "seed", "settings", "huge state"):
        path.write_bytes(good)
        state = torch.load(path)
        if key in WRONG:
            state[WRONG[key][0]] = WRONG[key][1]
        elif key == "huge state":
            moments = next(value for value in state["optimizers"][0]["state"].values())
            moments["momentum"] = huge((2**20, 2**20))
        else:
            state["run"][key] = {"seed": "a", "settings": {"batch": 3}}[key]
        torch.save(state, path)
        with pytest.raises(FleetflowError, match="no whole checkpoint|is not of stage") as error:
            job.train("long", folder=tmp_path, resume=True, **OPTIONS)
        assert "\n" not in str(error.value), key


def test_a_checkpoint_that_claims_more_than_it_holds(tmp_path):
    torch.save({"a": torch.zeros(2**22)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as old, zipfile.ZipFile(tmp_path / "packed.pt", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(FleetflowError, match="claims more than it holds"):
        Checkpoint.load(tmp_path / "packed.pt")


def test_the_log_holds_the_learning_rate(tmp_path):
    job.train("long", folder=tmp_path, steps=2, **OPTIONS)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.006 / 200, 0.006 * 2 / 200], rel=1e-5)
    assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if SLOW else [])])
def test_a_signal_ends_a_run_after_its_step(tmp_path, monkeypatch, number):
    """With a checkpoint, as Ctrl-C does, and the run goes on exactly."""
    plan = recipes.RECIPES["long"]
    options = {**OPTIONS, "checkpoint_every": 100}
    job.train("long", folder=tmp_path / "whole", **options)
    calls = []

    def interrupted(prediction, sample):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return losses.multi_scale(prediction, sample)

    stopping = dataclasses.replace(plan, stages=(dataclasses.replace(plan.stages[0], loss=interrupted),))

    def run():
        recipes.RECIPES["long"] = stopping
        signal.signal(number, signal.default_int_handler)
        job.train("long", folder=tmp_path / "run", **options)

    assert in_child(run) == (130, "")
    assert Checkpoint.load(tmp_path / "run" / "checkpoint.pt").step == 2
    job.train("long", folder=tmp_path / "run", resume=True, **options)
    assert (tmp_path / "run" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


# ---- fine-tuning ----


@pytest.fixture
def mine(tmp_path) -> Path:
    """Six pairs of 70x140 with their flow, and a picture of a pair without."""
    place = tmp_path / "mine"
    made = shifted(7, 70, 140, seed=9)
    for k in range(7):
        for n, frame in enumerate((made.frame1, made.frame2), 1):
            write_image(place / f"{k}_img{n}.png", (frame[k].permute(1, 2, 0) * 255).byte().numpy())
        if k < 6:
            write_flow(place / f"{k}_flow.flo", made.flow[k].permute(1, 2, 0).numpy())
    assert len(folder_pairs(place)) == 7
    return place


FINE = {**OPTIONS, "data": "folder", "start": ("fastflownet",), "settings": {"batch": "2", "validate_every": "2"}}


def test_fine_tuning(mine, tmp_path):
    said = []
    outcome = job.train("finetune", folder=tmp_path / "run", root=mine, steps=4, **{**FINE, "report": said.append})
    assert outcome.step == outcome.steps == 4, "--steps is the whole length"
    assert outcome.best.epe <= outcome.best.start and "before training  validation EPE" in "".join(said)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    rates = [row["learning_rate"] for row in rows if "loss" in row]
    assert max(rates) < 0.001 and len([row for row in rows if "validation" in row]) == 2
    about = weights.header(outcome.weights)
    assert about["network"] == "fastflownet" and about["recipe"] == "finetune:fastflownet"
    assert int(about["step"]) == outcome.best.step and about["data"] == "folder"
    run = json.loads((tmp_path / "run" / "run.json").read_text())["run"]
    assert (run["settings"]["height"], run["settings"]["width"]) == ("64", "128"), "the most that fits"
    again = job.train("finetune", folder=tmp_path / "run", resume=True, **OPTIONS)
    assert again.step == 4 and again.best.epe == outcome.best.epe


def test_fine_tuning_never_gives_back_worse(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(job._Session, "_errors", lambda *_: {"epe": 1.0, "out3": 1.0, "fl": 1.0})
    outcome = job.train("finetune", folder=tmp_path / "run", root=mine, steps=2, **FINE)
    start = weights.load("fastflownet").state_dict()
    saved = weights.read_state(outcome.weights)
    assert outcome.best.step == 0 and all(torch.equal(value, start[key].float()) for key, value in saved.items())


def test_fine_tuning_keeps_what_the_network_knows(mine):
    """Every fourth batch is generated, the held-back pairs are learned from by none, and all pairs have flow."""
    plan = dataloader.on_data(recipes.finetune.finetune("fastflownet"), "folder")
    stage = dataclasses.replace(plan.stages[0], batches=(Batches(8, 1, 64, 64),))
    feed = dataloader.Feed(stage, 0, 1, None, mine)
    made = [torch.equal(feed[step, 0][0], shifted(1, 64, 64, step).frame1) for step in range(8)]
    assert made == [False, False, False, True] * 2
    learned, held = (
        {pair.name for pair in source.files(mine).pairs} for source in (stage.sources[0], *stage.validation)
    )
    assert len(learned) == 5 and len(held) == 1 and not learned & held and "6_img1" not in learned | held


@pytest.mark.parametrize(
    "network", [name for name in models if not name.startswith(("flownet_s", "flownet_c", "lite"))]
)
def test_most_networks_can_be_fine_tuned(network):
    try:
        (stage,) = recipes.finetune.finetune(network).stages
    except FleetflowError as error:
        assert "network with a recipe" in str(error)
        return
    stride = weights.without_memory(network).stride
    assert 0 < stage.learning_rate < 1e-3 and stage.batches[0].height % stride == 0 == stage.batches[0].width % stride


def test_what_fine_tuning_needs(mine, tmp_path):
    options = {**OPTIONS, "folder": tmp_path / "run"}
    with pytest.raises(FleetflowError, match="--start NETWORK"):
        job.train("finetune", root=mine, data="folder", **options)
    with pytest.raises(FleetflowError, match="--data folder --root DIR"):
        job.train("finetune", start=("fastflownet",), **options)
    for path in mine.glob("*.flo"):
        path.unlink()
    with pytest.raises(FleetflowError, match="0 pairs with known flow.*fleetflow adapt"):
        job.train("finetune", start=("fastflownet",), root=mine, data="folder", **options)
    assert not (tmp_path / "run").exists()
