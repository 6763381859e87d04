"""The command for a machine with a GPU: its dry run on the CPU, phases that fail or take too long, what it carries."""

import contextlib
import io
import json
import sys

import gpu_run
import numpy as np
import pytest
from conftest import SLOW
from PIL import Image

from fleetflow.data.generate.held_out import use_of


def in_this_process(phase, seconds: float, out) -> dict:
    """As `gpu_run.run_phase`, without the seconds that a process takes to begin."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setenv("PHASE_SECONDS", str(seconds))
        patch.setattr(sys, "argv", phase.command[1:])
        gpu_run.main()
    return {"rows": [json.loads(line) for line in printed.getvalue().splitlines() if line.startswith('{"')]}


def test_the_dry_run(tmp_path, monkeypatch):
    """Training and scoring on the photographs that it carries; if slow the phases that measure, and in processes."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    (tmp_path / "carry" / "photographs").mkdir(parents=True)
    for use in ("train", "validation"):
        name = next(f"{k}.jpg" for k in range(999) if use_of(f"{k}.jpg") == use)
        Image.fromarray(noise).save(tmp_path / "carry" / "photographs" / name)
    every = gpu_run.phases(tmp_path / "out", tmp_path / "carry", "fastflownet", True)
    assert [phase.name for phase in every] == ["checks", "networks", "kernels", "train", "score"]
    if not SLOW:
        monkeypatch.setattr(gpu_run, "phases", lambda *_: every[3:])
        monkeypatch.setattr(gpu_run, "run_phase", in_this_process)
    found = gpu_run.run(tmp_path / "out", tmp_path / "carry", "fastflownet", 9.0, True)
    assert json.loads((tmp_path / "out" / "gpu_run.json").read_text()) == found
    rows = {name: phase["rows"] for name, phase in found["phases"].items()}
    assert "failed" not in found["phases"]["train"], found["phases"]["train"]
    assert [row["name"] for row in rows["train"]] == ["trial", "train"] and rows["train"][1]["step"] == 4
    assert [row["name"] for row in rows["score"]] == ["fastflownet", "weights.safetensors"]
    assert all(np.isfinite(row["epe"]) for row in rows["score"])
    if SLOW:
        assert any("eager_ms" in row for row in rows["networks"]) and rows["kernels"]
    assert 1e6 < found["weights_bytes"] <= gpu_run.WEIGHTS
    left = {path.name for path in (tmp_path / "out").iterdir()}
    log = {"gpu_run.log"} if SLOW else set()  # of the processes
    assert left == {"gpu_run.json", "weights.safetensors"} | log


def test_a_phase_that_fails_or_hangs_does_not_stop_the_next(tmp_path, monkeypatch):
    def python(code):
        return [sys.executable, "-c", code]

    todo = [
        gpu_run.Phase("breaks", python("print('oh'); raise SystemExit(3)"), 60),
        gpu_run.Phase("hangs", python("import time; print('{\"a\": 1}', flush=True); time.sleep(600)"), 5),
        gpu_run.Phase("rest", python("import os; print('{\"s\": ' + os.environ['PHASE_SECONDS'] + '}')"), 0),
        gpu_run.Phase("last", python("print('{\"b\": 2}')"), 20),
    ]
    monkeypatch.setattr(gpu_run, "phases", lambda *_: todo)
    found = gpu_run.run(tmp_path, None, "fastflownet", 4.0, True)["phases"]
    assert found["breaks"]["failed"] == "exit status 3: oh"
    assert found["hangs"]["failed"] == "it took longer than 5 s" and found["hangs"]["rows"] == [{"a": 1}]
    assert 100 < found["rest"]["rows"][0]["s"] < 4 * 60 - 20 - 20  # what is left, but for the last
    assert found["last"]["rows"] == [{"b": 2}]


def test_no_time_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "phases", lambda *_: [gpu_run.Phase("late", [sys.executable, "-c", ""], 60)])
    assert gpu_run.run(tmp_path, None, "fastflownet", 0.1, True)["phases"] == {"late": {"failed": "no time was left"}}


@pytest.mark.parametrize("limit", [10**9, 30_000])
def test_photographs_are_shrunk_under_their_names(tmp_path, limit):
    noise = np.random.default_rng(0).integers(0, 256, (400, 700, 4), dtype=np.uint8)
    (tmp_path / "from" / "a").mkdir(parents=True)
    for name in ("a/1.jpg", "2.jpg"):
        Image.fromarray(noise[..., :3]).save(tmp_path / "from" / name)
    Image.fromarray(noise[:60, :50]).save(tmp_path / "from" / "cut.png")
    (tmp_path / "from" / "notes.txt").write_text("no picture")
    total = gpu_run.shrink(tmp_path / "from", tmp_path / "to", limit)
    names = sorted(path.name for path in (tmp_path / "to").iterdir())
    assert names == (["1.jpg", "2.jpg", "cut.png"] if limit == 10**9 else ["cut.png"])
    assert total == sum(path.stat().st_size for path in (tmp_path / "to").iterdir()) <= limit
    assert Image.open(tmp_path / "to" / "cut.png").size == (50, 60)
    if limit == 10**9:
        assert Image.open(tmp_path / "to" / "1.jpg").size == (560, 320)
