"""The benchmark: the same weights on both sides, stated conditions, accuracy only of trained weights, peers, plot."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from fleetflow import benchmark as job
from fleetflow.cli import main
from fleetflow.io import read_image, write_flow, write_image
from fleetflow.models import weights
from fleetflow.types import FleetflowError

STILL = "import numpy\ndef predict(image1, image2):\n    return numpy.zeros((*image1.shape[:2], 2))\n"
FAST = {"seconds": 0.01, "training": False, "peers": (), "threads": 1}


@pytest.fixture
def still(tmp_path):
    path = tmp_path / "still.py"
    path.write_text(STILL)
    return path


@pytest.fixture
def root(tmp_path):
    """Two sets of pairs that move by 3 and 4 px, and one pair that moves by 50."""
    for k, (name, speed) in enumerate((("one/a", 3), ("two/b", 4), ("two/far", 50))):
        for number in (1, 2):
            image = np.random.default_rng(k).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            write_image(tmp_path / "pairs" / name / f"img{number}.png", image)
        write_flow(tmp_path / "pairs" / name / "flow.png", np.full((64, 64, 2), (speed, 0), np.float32))
    return tmp_path / "pairs"


def test_what_is_printed_and_kept(still, root, tmp_path, capsys, monkeypatch):
    """One row for each network, in a folder that was not there; accuracy of weights and peers, not of chance."""
    monkeypatch.setattr(job, "training_speed", lambda *_: 7.25)
    cv2 = pytest.importorskip("cv2")
    words = ["benchmark", "fastflownet", "lightflow_050", "--size", "64", "64", "--seconds", "0.1", "--threads", "1"]
    out = tmp_path / "to" / "come" / "rows.jsonl"
    words += ["--peers", "dis", str(still), "--root", str(root), "--without", "far", "--json", str(out)]
    assert main([*words, "--plot", str(tmp_path / "plots" / "p.png")]) == 0
    shown = capsys.readouterr().out
    for phrase in ("plain fp32", "x DIS", "x plain", "7.2 samples/s", "still", "times the time of DIS", "2 pairs",
                   "weights are random: no accuracy", "left out: far", "opencv: "):  # fmt: skip
        assert phrase in shown, phrase
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["parameters"] for row in rows] == [1_366_114, 653_406]
    for row in rows:
        ours, plain, dis, peer = row["timings"]
        assert row["times_dis"] == ours["p50"] / dis["p50"] and row["times_plain"] == ours["p50"] / plain["p50"]
        assert plain["runs"] >= 5 and row["memory"] >= 0 and len(row["sha256"]) == 64
        assert (row["size"], row["batch"], row["steps"], row["pairs"], row["threads"]) == ([64, 64], 1, None, 2, 1)
        assert row["machine"]["opencv"] == f"{cv2.__version__}, 1 threads"
        assert peer["epe"] == 3.5 and dis["epe"] > 0 and plain["epe"] is None
    known, random = rows
    assert known["weights"] == "package" and known["epe"] == known["timings"][0]["epe"] > 0
    assert "far" in known["protocol"]["left out"] and known["sha256"].startswith(known["protocol"]["weights"][7:])
    assert random["weights"] == "random" and random["epe"] is None and random["timings"][0]["epe"] is None
    assert read_image(tmp_path / "plots" / "p.png").std() > 10


def test_training_is_timed():
    assert job.training_speed("lightflow_050", torch.float32, 0.0) > 0


def test_what_is_refused_before_anything_is_measured(still, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job, "time_in_turn", lambda *_: pytest.fail("it was measured"))
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.py").write_text("def predict(a, b):\n    return a\n")
    for words, error in (
        (["fastflownet", "--peers", "nobody.py"], "nobody.py does not exist"),
        (["fastflownet", "--peers", "disk"], 'did you mean "dis"'),
        (["fastflownet", "--peers", str(tmp_path / "bad.py")], "expected float [128, 192, 2]"),
        (["fastflownet", "--plot", "x.png"], "--root"),
        (["fastflownet", "--threads", "-2"], "--threads is -2"),
        (["fastflownet", "--size", "0", "64"], "--size is 0 64"),
        (["fastflownet", "fastflow"], 'did you mean "fastflownet"'),
        (["fastflownet", "--json", str(tmp_path / "file" / "rows")], "cannot be written"),
        (["fastflownet", "--json", str(tmp_path)], "is a folder"),
    ):
        assert main(["benchmark", *words]) == 1, words
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and error in lines[0], lines


def test_random_weights_are_the_same_on_both_sides():
    report = next(job.benchmark(("lightflow_050",), 64, 64, precision="fp32", **FAST))
    assert report.weights == "random" and report.difference < 1e-3


def test_a_file_of_ours(tmp_path):
    path = tmp_path / "own.safetensors"
    network = weights.load("lightflow_050", weights=False)
    weights.save(network, path, {"network": "lightflow_050", "licence": "none"}, dtype=torch.float32)
    assert job.has_weights(str(path)) and job.has_weights("fastflownet") and not job.has_weights("raft")
    report = next(job.benchmark((str(path),), 64, 64, **FAST))
    assert report.weights == str(path) and report.parameters == 653_406


def test_steps_are_taken_and_stated():
    report = next(job.benchmark(("raft_small",), 64, 64, steps=2, **FAST))
    assert report.steps == 2 and report.multiply_adds is None and "2 refinement steps" in job.facts(report)
    with pytest.raises(FleetflowError, match="no refinement steps"):
        next(job.benchmark(("lightflow_050",), 64, 64, steps=2, **FAST))


def test_a_failed_probe_of_memory_is_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_example", lambda example=job._example: example())
    monkeypatch.setattr(job.sys, "executable", "false")
    report = next(job.benchmark(("lightflow_050",), 64, 64, **FAST))
    assert report.memory is None and any("could not be measured" in fact for fact in job.facts(report))
    job.add_row(report._replace(difference=float("nan")), tmp_path / "rows.jsonl")
    row = json.loads((tmp_path / "rows.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["memory"] is None and row["difference"] is None


def test_calls_that_are_timed(monkeypatch):
    """Two calls to warm up, then five of each at least, but of what takes 2 s one; rare ones every fourth round."""
    now, calls = [0.0], []

    def call(name: str, seconds: float) -> None:
        calls.append(name)
        now[0] += seconds

    monkeypatch.setattr(job.time, "perf_counter", lambda: now[0])
    functions = {"ours": partial(call, "ours", 0.1), "plain": partial(call, "plain", 1.0)}
    ours, plain = job.time_in_turn(functions, 2.0, frozenset({"plain"}))
    assert calls[:5] == ["ours", "ours", "plain", "plain", "ours"]
    assert plain.runs == 5 and plain.p50 == pytest.approx(1000)
    assert ours.runs > plain.runs and ours.p50 == pytest.approx(100)
    (slow,) = job.time_in_turn({"slow": partial(call, "slow", 3.0)}, 0.0, frozenset())
    assert slow.runs == 1


def report_of(network: str, milliseconds: float, epe: float | None) -> job.Report:
    timings = [
        job.Timing(f"{network}, fleetflow", milliseconds, milliseconds, 5, epe),
        job.Timing(f"{network}, plain fp32", 2 * milliseconds, 2 * milliseconds, 5),
        job.Timing(job.DIS_NAME, 20.0, 21.0, 5, 4.1),
    ]
    empty = {name: None for name in job.Report._fields}
    return job.Report(**{**empty, "network": network, "size": (448, 1024), "device": "cpu", "threads": 2,
                         "timings": timings, "epe": epe, "pairs": 29})  # fmt: skip


def test_the_plot_shows_all_that_has_an_accuracy_under_names_that_can_be_read(tmp_path, monkeypatch):
    """Dots that nearly lie upon each other: no name covers another, all stand inside, and the axis begins at zero."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    reports = [
        report_of("lightflow", 21, 4.15), report_of("lightflow_050", 20.5, 4.2), report_of("raft", 960, 2.0),
        report_of("raft_small:folder/raft-small.pth", 950, 1.95), report_of("/a/raft.safetensors", 940, 2.05),
        report_of("gma", 1500, None),
    ]  # fmt: skip
    job.pareto(reports, tmp_path / "p.png")
    (axes,) = figures[0].axes
    axes.figure.draw_without_rendering()
    names = [text.get_text() for text in axes.texts]
    short = ["DIS", "lightflow", "lightflow_050", "raft", "raft_small (raft-small)", "/a/raft.safetensors"]
    assert sorted(names) == sorted(short), "one dot each, none for random weights, the full name where short ones agree"
    boxes = [text.get_window_extent() for text in axes.texts]
    assert all(axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max) for box in boxes)
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
    assert axes.get_ylim()[0] == 0
    with pytest.raises(FleetflowError, match="no accuracy"):
        job.pareto([reports[-1]._replace(timings=reports[-1].timings[:2])], tmp_path / "q.png")


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
    assert main(["benchmark", "deq_flow_tiny_gma", "--video"]) == 0
    shown = capsys.readouterr().out
    for part in ("warm / cold", "Anderson, damping 2", "weights are random", "generated 2"):
        assert part in shown
    assert main(["benchmark", "fastflownet", "--video"]) == 1
    assert "no fixed point" in capsys.readouterr().err
