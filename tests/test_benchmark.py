"""The benchmark: the same weights on both sides, stated conditions, accuracy only of trained weights, peers, plot."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from fleetflow.cli.main import main
from fleetflow.cli.outputs import is_report
from fleetflow.evaluation import calls, peak_memory, plots, speed_tables, video_reuse
from fleetflow.evaluation import speed as job
from fleetflow.evaluation.records import append
from fleetflow.io.flow import write_flow
from fleetflow.io.images import read_image, write_image
from fleetflow.models import weights
from fleetflow.types import FleetflowError

STILL = "import numpy\ndef predict(image1, image2):\n    return numpy.zeros((*image1.shape[:2], 2))\n"
FAST = {"seconds": 0.01, "peers": (), "threads": 1}


@pytest.fixture
def still(tmp_path):
    path = tmp_path / "still.py"
    path.write_text(STILL)
    return path


@pytest.fixture
def _memory_is_not_measured(monkeypatch):
    """That takes a process of its own for each network."""
    monkeypatch.setattr(job, "peak_memory", lambda *_, **__: 0.0)


any_memory = pytest.mark.usefixtures("_memory_is_not_measured")


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
    monkeypatch.setattr("fleetflow.training.speed.training_speed", lambda *_: 7.25)
    cv2 = pytest.importorskip("cv2")
    words = [
        "benchmark",
        "speed",
        "fastflownet",
        "lightflow_050",
        "--size",
        "64",
        "64",
        "--seconds",
        "0.1",
        "--threads",
        "1",
    ]
    out = tmp_path / "to" / "come" / "rows.jsonl"
    words += ["--peers", "dis", str(still), "--root", str(root), "--without", "far", "--json", str(out)]
    assert main([*words, "--plot", str(tmp_path / "plots" / "p.png")]) == 0
    shown = capsys.readouterr().out
    for phrase in ("reference fp32", "x DIS", "x reference", "7.2 samples/s", "still", "times that of DIS",
                   "speed-up over the reference", "2 pairs",
                   "weights are random: no accuracy", "left out: far", "opencv: "):  # fmt: skip
        assert phrase in shown, phrase
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["parameters"] for row in rows] == [1_366_114, 653_406]
    assert all(row["multiply_adds_448x1024"] > 0 and row["machine"]["system"] for row in rows)
    for row in rows:
        ours, plain, dis, peer = row["timings"]
        assert row["times_dis"] == ours["p50"] / dis["p50"] and row["times_reference"] == ours["p50"] / plain["p50"]
        assert plain["runs"] >= 5 and row["memory"] >= 0 and len(row["sha256"]) == 64
        assert (row["size"], row["batch"], row["iterations"], row["pairs"], row["threads"]) == ([64, 64], 1, None, 2, 1)
        assert row["machine"]["opencv"] == f"{cv2.__version__}, 1 threads"
        assert peer["epe"] == 3.5 and dis["epe"] > 0 and plain["epe"] is None
    known, random = rows
    assert known["weights"] == "package" and known["epe"] == known["timings"][0]["epe"] > 0
    assert "far" in known["protocol"]["left out"] and known["sha256"].startswith(known["protocol"]["weights"][7:])
    assert random["weights"] == "random" and random["epe"] is None and random["timings"][0]["epe"] is None
    assert read_image(tmp_path / "plots" / "p.png").std() > 10
    assert is_report(tmp_path / "plots" / "p.png") and is_report(out), "so that the same command may replace them"
    pytest.importorskip("matplotlib.pyplot").imsave(tmp_path / "frame.png", np.zeros((8, 8, 3)))
    assert not is_report(tmp_path / "frame.png"), "a user's own"


def test_training_is_timed():
    from fleetflow.training.speed import training_speed

    assert training_speed("lightflow_050", torch.float32, 0.0) > 0


def test_what_is_refused_before_anything_is_measured(still, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job, "time_in_turn", lambda *_: pytest.fail("it was measured"))
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.py").write_text("def predict(a, b):\n    return a\n")
    for words, error in (
        (["fastflownet", "--peers", "nobody.py"], "nobody.py does not exist"),
        (["fastflownet", "--peers", "disk"], 'did you mean "dis"'),
        (["fastflownet", "--peers", str(tmp_path / "bad.py")], "expected float [125, 187, 2]"),
        (["fastflownet", "--plot", "x.png"], "--root"),
        (["fastflownet", "--threads", "-2"], "--threads is -2"),
        (["fastflownet", "--size", "0", "64"], "--size is 0 64"),
        (["fastflownet", "fastflow"], 'did you mean "fastflownet"'),
        (["fastflownet", "--json", str(tmp_path / "file" / "rows")], "cannot be written"),
        (["fastflownet", "--json", str(tmp_path)], "is a folder"),
        (["fastflownet", "--batch", "0"], "--batch is 0"),
        (["fastflownet", "--without", "far"], "give --root DIR"),
        (["fastflownet", "--root", ".", "--json", "x.png", "--plot", "x.png"], "two outputs"),
    ):
        assert main(["benchmark", "speed", *words]) == 1, words
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and error in lines[0], lines


def test_what_a_measurement_does_not_take_is_refused(capsys):
    """Each subcommand has its own options, so that none is given in vain."""
    for words, error in (
        (["video", "deq_flow_tiny", "--threads", "-1"], "--threads is -1"),
        (["video", "deq_flow_tiny", "--device", "hpu"], "hpu"),
        (["video", "deq_flow_tiny", "--clips", "x", "--size", "64", "64"], "--size is that of generated clips"),
        (["video", "fastflownet"], "no fixed point"),
        (["data", "pairs"], "give --root DIR"),
        (["data", "pears"], 'did you mean "pairs"'),
        (["data", "pairs", "--seconds", "0"], "--seconds is 0.0; expected"),
        (["speed", "fastflownet", "--seconds", "nan"], "--seconds is nan; expected"),
    ):
        assert main(["benchmark", *words]) == 1, words
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and error in lines[0], lines
    for words in (
        ["video", "deq_flow_tiny", "--iterations", "3"], ["video", "deq_flow_tiny", "--no-training"],
        ["data", "pairs", "--root", ".", "--device", "cuda"], ["data", "pairs", "--root", ".", "--peers", "farneback"],
        ["speed", "fastflownet", "--clips", "x"], ["deq_flow_tiny"], [],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            main(["benchmark", *words])
        assert caught.value.code == 2 and capsys.readouterr().err, words


def test_an_unsteady_machine_is_said():
    report = report_of("raft", 100, 2.0)
    assert report.unsteady() == []
    quick = report.timings[0]._replace(p95=280.0)
    (line,) = report._replace(timings=[quick, *report.timings[1:]]).unsteady()
    assert line.startswith("the 95th percentile of raft, fleetflow is 2.8 times its median")


@any_memory
def test_random_weights_are_the_same_on_both_sides():
    report = next(job.benchmark(("lightflow_050",), 64, 64, precision="fp32", **FAST))
    assert report.weights == "random" and report.difference < 1e-3


@any_memory
def test_a_file_of_ours(tmp_path):
    path = tmp_path / "own.safetensors"
    network = weights.load("lightflow_050", weights=False)
    weights.save(network, path, {"network": "lightflow_050", "license": "none"}, dtype=torch.float32)
    assert calls.has_weights(str(path)) and calls.has_weights("fastflownet") and not calls.has_weights("raft")
    report = next(job.benchmark((str(path),), 64, 64, **FAST))
    assert report.weights == str(path) and report.parameters == 653_406


@any_memory
def test_steps_are_taken_and_stated():
    report = next(job.benchmark(("raft_small",), 64, 64, iterations=2, **FAST))
    assert (
        report.iterations == 2
        and report.multiply_adds_448x1024 is None
        and "2 refinement iterations" in speed_tables.facts(report)
    )
    with pytest.raises(FleetflowError, match="no refinement iterations"):
        next(job.benchmark(("lightflow_050",), 64, 64, iterations=2, **FAST))


def test_a_failed_probe_of_memory_is_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(peak_memory.sys, "executable", "false")
    report = next(job.benchmark(("lightflow_050",), 64, 64, **FAST))
    assert report.memory is None and any("could not be measured" in fact for fact in speed_tables.facts(report))
    append([speed_tables.row(report._replace(difference=float("nan")))], tmp_path / "rows.jsonl")
    row = json.loads((tmp_path / "rows.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["memory"] is None and row["difference"] is None


def test_calls_that_are_timed(monkeypatch):
    """Two calls to warm up, then five of each at least, but of what takes 2 s one; rare ones every fourth round."""
    now, calls = [0.0], []

    def call(name: str, seconds: float) -> None:
        calls.append(name)
        now[0] += seconds

    clock = lambda: now[0]  # noqa: E731
    monkeypatch.setattr(job.time, "perf_counter", clock)
    functions = {"ours": partial(call, "ours", 0.1), "plain": partial(call, "plain", 1.0)}
    ours, plain = job.time_in_turn(functions, 2.0, frozenset({"plain"}), clock)
    assert calls[:5] == ["ours", "ours", "plain", "plain", "ours"]
    assert plain.runs == 5 and plain.p50 == pytest.approx(1000)
    assert ours.runs > plain.runs and ours.p50 == pytest.approx(100)
    (slow,) = job.time_in_turn({"slow": partial(call, "slow", 3.0)}, 0.0, frozenset(), clock)
    assert slow.runs == 1


def report_of(network: str, milliseconds: float, epe: float | None) -> job.Report:
    timings = [
        job.Timing(f"{network}, fleetflow", milliseconds, milliseconds, 5, epe),
        job.Timing(f"{network}, reference fp32", 2 * milliseconds, 2 * milliseconds, 5),
        job.Timing(job.DIS_NAME, 20.0, 21.0, 5, 4.1),
    ]
    empty = {name: None for name in job.Report._fields}
    return job.Report(**{**empty, "network": network, "size": (448, 1024), "batch": 1, "device": "cpu", "threads": 2,
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
    plots.pareto(reports, tmp_path / "p.png")
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
        plots.pareto([reports[-1]._replace(timings=reports[-1].timings[:2])], tmp_path / "q.png")


def test_benchmark_of_reading(tmp_path, capsys):
    for name in ("a", "b"):
        folder = tmp_path / "set" / name
        for k in (1, 2):
            write_image(folder / f"img{k}.png", np.full((16, 24, 3), k, np.uint8))
        write_flow(folder / "flow.png", np.zeros((16, 24, 2), np.float32))
    words = ["--root", str(tmp_path), "--seconds", "0.2", "--threads", "1", "--without", "b"]
    assert main(["benchmark", "data", "pairs", *words, "--json", str(tmp_path / "to" / "rows")]) == 0
    shown = capsys.readouterr().out
    assert "samples/s" in shown and "system: " in shown, "the machine belongs to the numbers"
    assert is_report(tmp_path / "to" / "rows")
    picture = tmp_path / "set" / "a" / "img1.png"
    before = picture.read_bytes()
    assert main(["benchmark", "data", "pairs", *words, "--json", str(picture)]) == 1
    assert "no report of ours" in capsys.readouterr().err and picture.read_bytes() == before
    rows = [json.loads(line) for line in (tmp_path / "to" / "rows").read_text().splitlines()]
    assert [row["workers"] for row in rows][:2] == [0, 1] and rows[0]["samples_per_second"] > 0
    assert rows[0]["dataset"] == "pairs" and rows[0]["pairs"] == 1 and rows[0]["machine"]["threads"] == "1"


def test_benchmark_of_video_reuse(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(video_reuse, "MOST", 6)
    monkeypatch.setattr(video_reuse, "PICARD", 5)
    words = ["benchmark", "video", "deq_flow_tiny_gma", "--size", "128", "136", "--threads", "1"]
    assert main([*words, "--json", str(tmp_path / "rows")]) == 0
    shown = capsys.readouterr().out
    for part in ("warm / cold", "Anderson, damping 2", "weights are random", "generated 2", "over 6", "system: "):
        assert part in shown, part
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert {row["network"] for row in rows} == {"deq_flow_tiny_gma"} and rows[0]["weights"] == "random"
    assert [6.0, "infinite"] in [row["cold"] for row in rows if "cold" in row]
    assert "Broyden" in [row.get("solver") for row in rows] and rows[0]["machine"]["threads"] == "1"


def test_a_batch_is_timed_by_the_pair(monkeypatch):
    """Ours and the plain definition take it at once, so a pair has its share; a peer takes one pair."""
    sizes = []
    monkeypatch.setattr(job, "reference_flow", lambda model, frames, iterations: sizes.append(len(frames[0])))
    monkeypatch.setattr(job, "peak_memory", lambda network, *, batch, **_: float(batch))

    def timed(functions, *_):
        for function in functions.values():
            function()
        return [job.Timing(name, 12.0, 24.0, 5) for name in functions]

    monkeypatch.setattr(job, "time_in_turn", timed)
    pytest.importorskip("cv2")
    report = next(job.benchmark(("lightflow_050",), 64, 64, batch=3, **{**FAST, "peers": ("dis",)}))
    assert sizes == [3] and report.batch == 3 and report.memory == 3
    assert [(timing.p50, timing.p95) for timing in report.timings] == [(4.0, 8.0), (4.0, 8.0), (12.0, 24.0)]
    assert any("batches of 3" in fact for fact in speed_tables.facts(report))
    assert "memory of a batch: 3 MB" in speed_tables.facts(report)


def test_a_batch_is_predicted_as_its_pairs_are():
    predictor = job.Predictor(weights.load("lightflow_050", weights=False), device="cpu", precision="fp32")
    images = [calls.tiled(image, 64, 64) for image in calls.example()]
    one, three = (calls.call(predictor, *images, count, None)() for count in (1, 3))
    assert three.shape == (3, 2, 64, 64) and np.abs(three[2].permute(1, 2, 0).numpy() - one).max() < 1e-3


@any_memory
def test_accuracy_on_another_data_set(tmp_path):
    """Options choose the pass of Sintel, and the name of the data set how a network fits its frames."""
    for kind, speed in (("clean", 3), ("final", 4)):
        for k in (1, 2):
            write_image(tmp_path / f"training/{kind}/alley_1/frame_000{k}.png", np.full((64, 64, 3), speed, np.uint8))
    write_flow(tmp_path / "training/flow/alley_1/frame_0001.flo", np.full((64, 64, 2), (3, 0), np.float32))
    out = tmp_path / "rows.jsonl"
    words = ["fastflownet", "--size", "64", "64", "--seconds", "0.01", "--threads", "1", "--no-training", "--peers"]
    place = ["--root", str(tmp_path), "--dataset", "sintel", "--options", "render=clean", "--json", str(out)]
    (tmp_path / "bright.py").write_text(
        "import numpy\ndef predict(a, b):\n    return numpy.full((*a.shape[:2], 2), (float(a[0, 0, 0]), 0))\n"
    )
    assert main(["benchmark", "speed", *words, str(tmp_path / "bright.py"), *place]) == 0
    assert json.loads(out.read_text())["timings"][2]["epe"] == 0, "pictures of the clean pass are as bright as it moves"


@any_memory
def test_a_peer_that_fails_on_the_size_is_not_timed(tmp_path, capsys):
    path = tmp_path / "peer.py"
    path.write_text("import numpy\ndef predict(a, b):\n    return numpy.zeros((125, 187, 2))\n")
    words = [
        "benchmark",
        "speed",
        "lightflow_050",
        "--size",
        "64",
        "64",
        "--seconds",
        "0.01",
        "--no-training",
        "--threads",
        "1",
    ]
    assert main([*words, "--peers", str(path)]) == 1
    assert "peer.py returned float64 [125, 187, 2] for pictures of 64x64" in capsys.readouterr().err


def test_clips_of_one_name_are_both_kept(tmp_path):
    for name in ("one/clip", "two/clip"):
        for k in range(3):
            write_image(tmp_path / name / f"{k}.png", np.zeros((8, 8, 3), np.uint8))
    assert len(video_reuse.read_clips((tmp_path / "one/clip", tmp_path / "two/clip"))) == 2
