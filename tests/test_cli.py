"""The command line: what is wrong is one line on standard error, exit code 1, no half-written output."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fleetflow.cli import COMMANDS, main
from fleetflow.io import write_flow, write_image
from fleetflow.models import weights
from fleetflow.models.fastflownet import FastFlowNet


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


def test_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["predict", "a.png", "b.png", "--precison", "fp32"])
    assert caught.value.code == 2
    assert "--precision" in capsys.readouterr().err.replace("\n", ""), "it says what was meant"


def test_every_command_has_help():
    for command in COMMANDS:
        run = subprocess.run([sys.executable, "-m", "fleetflow.cli", command, "--help"], capture_output=True, text=True)
        assert run.returncode == 0 and "usage: fleetflow" in run.stdout, run.stderr


def test_models_and_recipes(capsys):
    assert main(["models"]) == 0
    assert "1,366,114" in capsys.readouterr().out
    assert main(["recipes"]) == 0
    assert "fastflownet_synthetic" in capsys.readouterr().out


def test_convert(tmp_path, capsys):
    network = FastFlowNet()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "published.pth")
    words = ["convert", str(tmp_path / "published.pth"), "fastflownet", str(tmp_path / "own.safetensors")]
    assert main([*words, "--licence", "MIT"]) == 0
    assert weights.header(tmp_path / "own.safetensors")["licence"] == "MIT"
    ours = weights.load(str(tmp_path / "own.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), network.state_dict().values()))
    assert main([*words[:3], str(tmp_path / "own.pth")]) == 1
    assert "safetensors" in capsys.readouterr().err


def test_benchmark_prints_ratios_and_writes_rows(tmp_path, capsys):
    peer = tmp_path / "still.py"
    peer.write_text("import numpy\ndef predict(image1, image2):\n    return numpy.zeros((*image1.shape[:2], 2))\n")
    words = ["benchmark", "fastflownet", "lightflow_050", "--size", "64", "64", "--seconds", "0.1", "--threads", "1"]
    out = tmp_path / "rows.jsonl"
    assert main([*words, "--peers", "dis", str(peer), "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("plain fp32", "times ours", "samples/s", "still", "times the time of DIS"))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["parameters"] for row in rows] == [1_366_114, 653_406]
    assert all(len(row["timings"]) == 4 and row["memory"] >= 0 and row["size"] == [64, 64] for row in rows)
    assert main([*words, "--peers", "nobody.py"]) == 1 and "nobody.py does not exist" in capsys.readouterr().err
    assert main([*words, "--plot", "x.png"]) == 1 and "--root" in capsys.readouterr().err


def test_benchmark_of_reading(tmp_path, capsys):
    for name in ("a", "b"):
        folder = tmp_path / "set" / name
        for k in (1, 2):
            write_image(folder / f"img{k}.png", np.full((16, 24, 3), k, np.uint8))
        write_flow(folder / "flow.png", np.zeros((16, 24, 2), np.float32))
    assert main(["benchmark", "data", "pairs", "--root", str(tmp_path), "--seconds", "0.2"]) == 0
    assert "samples/s" in capsys.readouterr().out
    assert main(["benchmark", "data", "pairs"]) == 1 and "--root" in capsys.readouterr().err


def test_benchmark_of_video_reuse(capsys):
    assert main(["benchmark", "deq_flow_tiny", "--video"]) == 0
    shown = capsys.readouterr().out
    assert "warm / cold" in shown and "weights are random" in shown and "generated 2" in shown
    assert main(["benchmark", "fastflownet", "--video"]) == 1
    assert "no fixed point" in capsys.readouterr().err
