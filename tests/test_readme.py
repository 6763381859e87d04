"""The README is executed: its Python, its commands, its table, its links."""

import re
import shlex
import shutil
import subprocess
import tomllib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import lay_out_example
from results import PEERS, SETS, network_table, our_scores

import fleetflow
from fleetflow.cli import main as cli
from fleetflow.io.flow import read_flow
from fleetflow.io.images import read_image
from fleetflow.registry import models

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLE = Path(str(resources.files("fleetflow") / "example"))


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, flags=re.S)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the files that the README speaks of."""
    lay_out_example(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python(place):
    names: dict = {}
    for block in blocks("python"):
        exec(block, names)
    flow, _ = read_flow(place / "flow.flo")
    assert np.array_equal(flow, names["flow"]) and flow.shape == (320, 448, 2)
    truth, valid = read_flow(EXAMPLE / "flow.png")
    assert np.linalg.norm(flow - truth, axis=2)[valid].mean() < 0.35 * np.linalg.norm(truth, axis=2)[valid].mean()


def test_the_commands(place):
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("fleetflow ")]
    assert len(lines) >= 5
    for line in lines:
        assert cli.main(shlex.split(line)[1:]) == 0, line
    assert (place / "flow.flo").exists() and (place / "out" / "clip_side.mp4").exists()
    assert {path.name for path in (place / "out").glob("*_kitti.png")} == {"1_kitti.png", "2_kitti.png", "3_kitti.png"}


def test_the_two_commands_for_a_fresh_machine():
    """What they run once everything is installed; the installation itself is what `make test` has just done."""
    first = blocks("sh")[0]
    assert [line.split("#")[0].strip() for line in first.strip().splitlines()] == ["make demo", "make test"]
    assert "fleetflow demo" in (ROOT / "Makefile").read_text().split("\ndemo:")[1].split("\n\n")[0]
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"
    if shutil.which("make"):
        run = subprocess.run(["make", "-n", "demo", "test"], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0 and "pytest" in run.stdout


def test_the_demo(place, capsys):
    assert cli.main(["demo"]) == 0
    shown = capsys.readouterr().out
    error, still = re.search(r"mean error ([\d.]+) px \(frames held still: ([\d.]+) px\)", shown).groups()
    assert float(error) < 0.35 * float(still)
    assert read_image(shown.strip().splitlines()[-1]).shape[1] > 4 * 300


def test_the_table_is_that_of_the_shipped_weights():
    table = README.split("<!-- networks -->")[1].split("<!-- /networks -->")[0].strip()
    assert table == network_table(our_scores()), "run benchmarks/ship.py, or results.network_table"
    ours, dis = our_scores()["fastflownet"]["mean of sets"], dict(zip(SETS, PEERS["OpenCV DIS"]))["mean of sets"]
    assert ours["epe"] < dis[0] and ours["out3"] < dis[1], "better than DIS in both figures"


def inline() -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.S))


def test_what_the_text_names_is_there(place):
    """Commands, targets of make, extras; a checkpoint is loaded as it says."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names, makefile = set(cli.COMMANDS) | {"COMMAND"}, (ROOT / "Makefile").read_text()
    torch.save(models["fastflownet"]().state_dict(), "PATH.pth")
    for words in inline():
        if words.startswith("fleetflow "):
            assert words.split()[1] in names, words
        elif words.startswith("make "):
            assert f"\n{words.split()[1]}:" in makefile, words
        elif words.startswith("pip install"):
            assert set(re.findall(r"\[(\w+)\]", words)) <= set(extras), words
        elif words.startswith("fleetflow."):
            assert isinstance(eval(words, {"fleetflow": fleetflow}), torch.nn.Module)


def test_the_front_door_is_short():
    assert len(README.splitlines()) <= 90


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
