"""The command line: what is wrong is one line on standard error, exit code 1, no half-written output."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch
import tyro
from conftest import SLOW

import fleetflow
from fleetflow.cli.main import COMMANDS, main
from fleetflow.cli.options import Format, Positional, Several, flat
from fleetflow.io.flow import read_flow
from fleetflow.io.images import write_image
from fleetflow.models import weights
from fleetflow.models.fastflownet import FastFlowNet
from fleetflow.types import FleetflowError


@pytest.fixture
def files(tmp_path):
    write_image(tmp_path / "a.png", np.zeros((8, 9, 3), np.uint8))
    write_image(tmp_path / "small.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "empty").mkdir()
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    return tmp_path


WRONG = [
    ["predict", "a.png", "nowhere.png"],
    ["predict", "a.png", "small.png"],
    ["predict", "a.png", "text.png"],
    ["predict", "a.png", "cut.png"],
    ["predict", "a.png", "a.png", "a.png"],
    ["predict", "text.mp4"],
    ["predict", "empty"],
    ["predict", "a.png", "a.png", "-m", "fastflownett"],
    ["predict", "a.png", "a.png", "-m", "fastflownet:text.pth"],
    ["predict", "a.png", "a.png", "-m", "fastflownet:nowhere.pth"],
    ["predict", "a.png", "a.png", "--device", "gpu"],
    ["predict", "a.png", "a.png", "--device", "hpu"],
    ["predict", "a.png", "a.png", "--device", "meta"],
    ["predict", "a.png", "a.png", "-f"],
    ["predict", "a.png", "a.png", "-o", "flow.flo", "-f", "kitti"],
    ["predict", "a.png", "a.png", "--scale", "0"],
    ["predict", "a.png", "a.png", "-o", "a.png"],
    ["predict", "a.png"],
    ["motion"],
    ["motion", "empty"],
    ["motion", ".", "--sheet", "sheet.gif"],
    ["track", "text.mp4"],
    ["benchmark", "speed", "--root", "empty", "--plot", "plot.jpg"],
    ["train", "no_such_recipe"],
    ["train", "fastflownet_synthetic", "--resume", "--folder", "empty"],
    ["evaluate", "fastflownet", "pairs", "--root", "empty"],
    ["evaluate", "fastflownet", "no_such_set", "--root", "empty"],
]


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_one_line_and_no_output(words, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    before = {path.relative_to(files) for path in files.rglob("*")}
    assert main(words) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("fleetflow: ") and "\n" not in error and "Traceback" not in error
    assert len(error) > 25
    after = {path.relative_to(files) for path in files.rglob("*") if path.is_file()}
    assert after <= before, after - before


def test_pillow_does_not_speak_beside_us(tmp_path):
    """A directory of a TIFF file that goes on behind its end: Pillow warns, and then refuses it."""
    (tmp_path / "cut.tif").write_bytes(b"II*\0\x08\0\0\0" + b"\x20\0\0\1\3\0\1\0\0\0")
    words = ["predict", str(tmp_path / "cut.tif"), str(tmp_path / "cut.tif"), "-o", str(tmp_path / "out")]
    run = subprocess.run([sys.executable, "-m", "fleetflow", *words], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("fleetflow: ") and run.stderr.count("\n") == 1, run.stderr


def test_predict_takes_the_options_of_a_pair(files, capsys):
    frame = str(files / "a.png")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 9, 3), dtype=np.uint8)
    for name, picture in zip("ab", pictures):
        write_image(files / f"{name}.png", picture)
    words = ["predict", frame, str(files / "b.png"), "-o"]
    assert main([*words, str(files / "flow.png"), "-f", "kitti"]) == 0
    assert read_flow(files / "flow.png")[0].shape == (8, 9, 2)
    for scale in ("1", "1000"):
        assert main([*words, str(files / scale), "-f", "color", "--scale", scale]) == 0
    assert (files / "1" / "a_color.png").read_bytes() != (files / "1000" / "a_color.png").read_bytes()


def test_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["predict", "a.png", "b.png", "--precison", "fp32"])
    assert caught.value.code == 2
    assert "--precision" in capsys.readouterr().err.replace("\n", ""), "it says what was meant"


def test_models_and_recipes(capsys):
    assert main(["models"]) == 0
    assert "1,366,114" in capsys.readouterr().out
    assert main(["recipes"]) == 0
    assert "fastflownet_synthetic" in capsys.readouterr().out


def test_convert(tmp_path, capsys):
    network = FastFlowNet()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "published.pth")
    words = ["convert", str(tmp_path / "published.pth"), "fastflownet", str(tmp_path / "own.safetensors")]
    assert main([*words, "--license", "MIT"]) == 0
    assert weights.header(tmp_path / "own.safetensors")["license"] == "MIT"
    ours = weights.load(str(tmp_path / "own.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), network.state_dict().values()))
    assert main([*words[:3], str(tmp_path / "own.pth")]) == 1
    assert "safetensors" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "own.safetensors"), "fastflownet", str(tmp_path / "own.safetensors")]) == 1
    assert "the checkpoint itself" in capsys.readouterr().err


def test_repeated_options_keep_all_their_values(monkeypatch):
    def command(
        inputs: Positional[tuple[Path, ...]],
        /,
        set: Several[str] = (),
        format: Annotated[Several[Format], tyro.conf.arg(aliases=["-f"])] = (),
        scale: float = 0,
    ) -> None:
        called.append((inputs, flat(set), flat(format), scale))

    monkeypatch.setitem(COMMANDS, "models", command)
    called = []
    words = "models a.png - --set a=1 --scale -3 --set=b=2 --set c=3 d=4 -f flo -f color side --format npz"
    assert main(words.split()) == 0
    formats = ("flo", "color", "side", "npz")
    assert called == [((Path("a.png"), Path("-")), ("a=1", "b=2", "c=3", "d=4"), formats, -3)]


def test_the_version(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"fleetflow {fleetflow.__version__}\n"


def test_debug_shows_the_traceback(files):
    words = ["predict", str(files / "a.png"), "nowhere.png"]
    for place in (0, 1, 3):
        with pytest.raises(FleetflowError, match="nowhere.png"):
            main([*words[:place], "--debug", *words[place:]])


def test_a_bug_of_ours_shows_its_traceback(monkeypatch):
    def command() -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(COMMANDS, "models", command)
    with pytest.raises(ZeroDivisionError):
        main(["models"])


def run(words, **options):
    return subprocess.run([sys.executable, "-m", "fleetflow", *words], stderr=subprocess.PIPE, text=True, **options)


def test_output_that_nobody_reads_ends_quietly():
    for words in (["--version"], ["predict", "--help"]):
        read, write = os.pipe()
        os.close(read)
        ended = run(words, stdout=write)
        os.close(write)
        assert ended.stderr == "" and ended.returncode == 141, ended.stderr
    ended = subprocess.run(
        f"{sys.executable} -m fleetflow --version >&-", shell=True, stderr=subprocess.PIPE, text=True
    )
    assert ended.stderr == "" and ended.returncode == 0


def test_a_full_disk_behind_the_output_is_one_line():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        ended = run(["--version"], stdout=full)
    assert ended.returncode == 1 and ended.stderr.startswith("fleetflow: ") and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_terminals_that_cannot_show_everything(encoding, files, monkeypatch):
    for command in ((), *((name,) for name in COMMANDS)):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        sys.stdout.flush()
        shown = sys.stdout.buffer.getvalue().decode(encoding)
        assert ended.value.code == 0 and "usage: fleetflow" in shown and "\\u" not in shown, command
        assert shown.rstrip().splitlines()[-3] == "examples:"
    monkeypatch.undo()
    if encoding != "ascii" and not SLOW:
        return
    own = {**os.environ, "PYTHONIOENCODING": encoding}
    (files / "码").mkdir()
    pair = [str(files / "a.png"), str(files / "a.png")]
    ended = run(["predict", *pair, "-o", str(files / "码"), "-f", "flo"], env=own, stdout=subprocess.PIPE)
    assert ended.returncode == 0 and ended.stderr == "" and "\\u7801" in ended.stdout
    assert (files / "码" / "a.flo").exists()


def test_home_in_an_option_is_expanded(tmp_path, monkeypatch, capsys):
    """A shell leaves --output=~/t.csv as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["motion", "~/no.mp4", "--output=~/t.csv"]) == 1
    assert f"{tmp_path}/no.mp4" in capsys.readouterr().err and not (tmp_path / "~").exists()
