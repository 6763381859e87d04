"""Errors by hand, the mean over sets, DIS on real pairs, what is written of an evaluation, and the page of results."""

import csv
import json
import math
import os
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from fleetflow.cli.main import main
from fleetflow.data.dataset import Files, Pair, datasets, open_files
from fleetflow.data.datasets.pairs import pairs
from fleetflow.evaluation import baselines, protocol, records, tables
from fleetflow.evaluation import evaluate as job
from fleetflow.evaluation.machine import machine
from fleetflow.evaluation.metrics import mean_over_sets, pair_errors
from fleetflow.evaluation.warm_start import Warm
from fleetflow.inference.predictor import Predictor
from fleetflow.io.flow import write_flow
from fleetflow.io.images import write_image
from fleetflow.models.base import FlowModel
from fleetflow.registry import models
from fleetflow.types import FleetflowError, Prediction, Sample


def sample_of(flow: torch.Tensor, valid: torch.Tensor) -> Sample:
    frame = torch.zeros(3, *flow.shape[1:])
    return Sample(frame, frame, flow, valid)


def test_errors_by_hand():
    truth = torch.zeros(2, 1, 5)
    truth[0] = torch.tensor([[0.0, 10.0, 100.0, 0.0, 0.0]])
    found = truth.clone()
    found[1, 0, :4] = torch.tensor([2.0, 4.0, 4.0, 0.0])  # errors 2, 4, 4, 0; the last is unknown
    found[:, 0, 4] = 1e6
    valid = torch.tensor([[True, True, True, True, False]])
    numbers = pair_errors(found, sample_of(truth, valid))
    assert numbers == pytest.approx({"epe": 2.5, "out1": 75.0, "out3": 50.0, "out5": 0.0, "fl": 25.0})
    with pytest.raises(FleetflowError, match="no known pixel"):
        pair_errors(found, sample_of(truth, valid & False))


def test_mean_over_sets_weighs_sets_alike():
    rows = [("a", {"epe": 1.0}), ("a", {"epe": 3.0}), ("b", {"epe": 10.0})]
    assert mean_over_sets(rows) == {"a": {"epe": 2.0}, "b": {"epe": 10.0}, "mean of sets": {"epe": 6.0}}


@pytest.fixture
def tree(tmp_path):
    """The layout of the docstring of `pairs` in miniature, both kinds of truth."""
    generator = np.random.default_rng(0)
    flow = generator.normal(0, 3, (16, 20, 2)).astype(np.float32)
    valid = np.ones((16, 20), bool)
    valid[0, 0] = False
    for name in ("one/a", "one/b", "two/c"):
        for k in (1, 2):
            write_image(tmp_path / name / f"img{k}.png", generator.integers(0, 256, (16, 20, 3), dtype=np.uint8))
        if name == "two/c":
            np.savez(tmp_path / name / "flow.npz", flow=flow.astype(np.float16), valid=np.packbits(valid))
        else:
            write_flow(tmp_path / name / "flow.png", flow, valid)
    return tmp_path, flow, valid


def test_pairs_reads_its_layout(tree):
    root, flow, valid = tree
    files = datasets["pairs"](root)
    assert [(pair.group, pair.name) for pair in files.pairs] == [("one", "a"), ("one", "b"), ("two", "c")]
    for k in (0, 2):
        sample = files[k]
        assert sample.frame1.shape == (3, 16, 20) and sample.frame1.max() <= 1
        assert sample.valid.numpy().tolist() == valid.tolist()
        known = sample.flow.permute(1, 2, 0).numpy()[valid]
        assert np.abs(known - flow[valid]).max() < 1 / 64
    assert len(pairs(root, without=("b",))) == 2
    with pytest.raises(FleetflowError, match="holds no pairs"):
        pairs(root / "one")


def test_evaluate_by_command(tree, tmp_path, capsys):
    root, flow, _ = tree
    folder = tmp_path / "still" / "to" / "come"
    table = job.evaluate(lambda a, b: np.zeros((16, 20, 2), np.float32), pairs(root))
    length = np.linalg.norm(flow[tree[2]], axis=1).mean()
    assert table["mean of sets"]["epe"] == pytest.approx(length, rel=0.01)
    pytest.importorskip("cv2")
    table, lines = folder / "t.json", folder / "t.csv"
    assert main(["evaluate", "dis", "pairs", "--root", str(root), "--json", str(table), "--csv", str(lines)]) == 0
    content = json.loads(table.read_text())
    assert set(content["score"]) == {"one", "two", "mean of sets"} and set(content["pooled"]) == {"one", "two", "all"}
    assert sum(band["pixels"] for band in content["epe_by_speed"]) == 957 and content["epe_by_speed"][0]["to"] == 0.5
    assert content["model"] == "dis" and content["protocol"]["per image"] and content["machine"]["torch"]
    rows = list(csv.DictReader(lines.open()))
    assert [row["pair"] for row in rows] == ["a", "b", "c"] and float(rows[0]["epe"]) > 0 and rows[0]["pixels"] == "319"
    assert {(row["model"], row["dataset"]) for row in rows} == {("dis", "pairs")} and "DIS" in rows[0]["protocol"]
    output = capsys.readouterr().out
    assert "mean of sets" in output and "protocol: per image" in " ".join(output.split())
    assert main(["evaluate", "dis", "pairs", "--root", str(root), "--iterations", "3"]) == 1
    assert "no refinement iterations" in capsys.readouterr().err


def test_outputs_that_cannot_be_written_are_named_first(tree, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for option, place in (("--csv", tmp_path / "file" / "t.csv"), ("--html", tmp_path), ("--json", tmp_path)):
        assert main(["evaluate", "nobody", "pairs", "--root", str(tree[0]), option, str(place)]) == 1
        assert "nobody" not in capsys.readouterr().err, "before the network is looked at"


def test_one_file_cannot_hold_two_outputs(tree, tmp_path, capsys):
    words = ["--json", str(tmp_path / "out"), "--html", str(tmp_path / "folder" / ".." / "out")]
    assert main(["evaluate", "nobody", "pairs", "--root", str(tree[0]), *words]) == 1
    assert "two outputs" in capsys.readouterr().err and not (tmp_path / "folder").exists()


def test_files_that_are_read_are_not_replaced(tree, tmp_path, capsys):
    pytest.importorskip("cv2")
    root = tree[0]
    write_flow(tmp_path / "saved" / "one" / "a.flo", np.zeros((16, 20, 2), np.float32))
    (tmp_path / "net.py").write_text("import numpy\ndef predict(a, b):\n    return numpy.ones((*a.shape[:2], 2))\n")
    for name, text in (("about.json", '{"made": "by hand"}'), ("set.json", '{"dataset": "mine", "pairs": "by hand"}')):
        (root / name).write_text(text)
    (root / "own.table").write_text("set,pair,pixels,note\n")
    saved, method = str(tmp_path / "saved"), str(tmp_path / "net.py")
    for model, option, place in (
        ("dis", "--json", root / "one" / "a" / "flow.png"),
        ("dis", "--csv", root / "one" / "a" / "img1.png"),
        ("dis", "--html", root / "about.json"),
        ("dis", "--json", root / "set.json"),
        ("dis", "--csv", root / "own.table"),
        (saved, "--json", tmp_path / "saved" / "one" / "a.flo"),
        (method, "--json", tmp_path / "net.py"),
    ):
        before = place.read_bytes()
        assert main(["evaluate", model, "pairs", "--root", str(root), option, str(place)]) == 1
        assert "choose another output" in capsys.readouterr().err and place.read_bytes() == before
    words = ["--json", "own.json", "--csv", "own.csv", "--html", "own.html"]
    own = [word if word.startswith("--") else str(root / word) for word in words]
    for _ in range(2):  # reports of ours are replaced
        assert main(["evaluate", "dis", "pairs", "--root", str(root), *own]) == 0, capsys.readouterr().err


def test_what_a_method_cannot_take_is_refused(tree, tmp_path, capsys):
    pytest.importorskip("cv2")
    (tmp_path / "net.py").write_text("import numpy\ndef predict(a, b):\n    return numpy.ones((*a.shape[:2], 2))\n")
    for model in ("dis", str(tmp_path / "net.py")):
        for words in (["--device", "cpu"], ["--precision", "bf16"], ["--iterations", "2"], ["--warm-start"]):
            assert main(["evaluate", model, "pairs", "--root", str(tree[0]), *words]) == 1
            error = capsys.readouterr().err
            assert words[0].removeprefix("--") in error and error.count("\n") == 1, error


def test_the_machine_names_its_system():
    assert machine()["system"] == platform.platform() and "cuda" not in machine()


def test_the_protocol_names_weights_pairs_and_boundaries(tree):
    files = open_files("pairs", tree[0], without=("b",))
    files.pairs[0] = files.pairs[0]._replace(masks=lambda: {"occluded": np.zeros((16, 20), bool)})
    predictors = [Predictor(Unsure().eval(), device="cpu", precision="fp32") for _ in range(2)]
    protocol, same = (job.measure(p, files, model="unsure", dataset="pairs").protocol for p in predictors)
    assert protocol == same and protocol["left out"] == "b" and len(protocol["weights"]) == len("sha256 ") + 16
    assert protocol["d-bands"] == "edges of occlusion in 1 pairs, motion that differs by over 1 px in 1 pairs"
    other = Unsure().eval()
    torch.nn.init.constant_(other.scale, 0.5)
    other = job.measure(Predictor(other, device="cpu", precision="fp32"), files, model="unsure", dataset="pairs")
    assert other.protocol["weights"] != protocol["weights"]


def test_pooled_figures_have_their_own_row(tree):
    still = np.zeros((16, 20, 2), np.float32)
    rows = tables.rows_by_set(job.measure(lambda a, b: still, pairs(tree[0]), model="still", dataset="pairs"))
    assert [row[0] for row in rows] == ["one", "two", "mean of sets", "all pixels"]
    means, whole = rows[2:]
    assert [k for k, cell in enumerate(means) if cell == "-"] == [2, 7]
    assert [k for k, cell in enumerate(whole) if cell != "-"] == [0, 2, 7]


class Unsure(FlowModel):
    """Estimates half of the iterations it is given as motion, and doubts the left half of the frame."""

    stride, fit, iterations = 4, "pad", 2

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, frame1, frame2, previous=None, iterations=None):  # frames of one color move here, too
        return self.estimate(frame1, frame2, previous, self.iterations_of(iterations))

    def prepare(self, frame1, frame2):
        return frame1, frame2

    def estimate(self, frame1, frame2, previous, iterations):
        flow = torch.full_like(frame1[:, :2], iterations / 2) * self.scale
        residual = torch.zeros_like(flow[:, 0])
        residual[:, :, : residual.shape[2] // 2] = 1
        return Prediction(flow, residual=residual)


def test_measure_agrees_with_evaluate_and_knows_confidence(tree):
    files = pairs(tree[0])
    predictor = Predictor(Unsure().eval(), device="cpu", precision="fp32")
    result = job.measure(predictor, files, model="unsure", dataset="pairs")
    assert result.score() == job.evaluate(predictor, files), "the house score"
    assert result.protocol["iterations"] == "2" and result.protocol["precision"] == "float32"
    assert result.curves().shape == (2, 20) and "AUSE, mean over 3 pairs" in tables.rows_pooled(result)[-1][0]
    more = job.measure(predictor, files, model="unsure", dataset="pairs", iterations=20)
    assert more.score()["mean of sets"]["epe"] > result.score()["mean of sets"]["epe"]
    assert more.protocol["iterations"] == "20" and "iterations: 20" in tables.protocol_line(more)
    assert (
        protocol.fit_for(Unsure(), "kitti2015").fit == "pad_bottom"
        and protocol.fit_for(Unsure(), "sintel").fit == "pad"
    )


def test_published_iterations_of_a_data_set():
    """RAFT's own evaluation and submissions take 32 and 24; GMA's evaluation takes 12."""
    iterations = {
        name: [protocol.iterations_for(models[name](), dataset, submission=submission)
               for dataset in ("sintel", "kitti2012", "kitti2015", "pairs") for submission in (False, True)]
        for name in ("raft", "raft_small", "gma", "deq_flow_tiny", "lightflow_050")
    }  # fmt: skip
    assert iterations["raft"] == iterations["raft_small"] == [32, 32, 24, 24, 24, 24, 20, 20]
    assert iterations["gma"] == [12, 32, 12, 24, 12, 24, 20, 20]
    assert set(iterations["deq_flow_tiny"]) == {60} and set(iterations["lightflow_050"]) == {None}


def test_the_protocol_says_the_iterations_of_the_data_set(tree, monkeypatch):
    monkeypatch.setattr(protocol, "open_network", lambda name: Unsure().eval())
    monkeypatch.setitem(protocol.ITERATIONS, "Unsure", {"pair": (7, 9)})
    files = pairs(tree[0])
    for given, expected in ((None, "7"), (3, "3")):
        predict = protocol.open_model("unsure", "pairs", iterations=given, device="cpu", precision="fp32")
        result = job.measure(predict, files, model="unsure", dataset="pairs")
        assert result.protocol["iterations"] == expected
        assert result.score() == job.evaluate(predict, files, iterations=int(expected))


class Walking(Unsure):
    """Moves by one pixel more at each pair that goes on from the last one."""

    def estimate(self, frame1, frame2, previous, iterations):
        flow = torch.ones_like(frame1[:, :2]) + (0 if previous is None else previous.state)
        return Prediction(flow, state=flow)


@pytest.fixture
def clip(tmp_path):
    """Three pairs of a scene, one of another scene, and two more that lack the pair between them; the flow is zero."""
    frames = [tmp_path / f"{name}.png" for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1", "c2", "c3", "c4")]
    for frame in frames:
        write_image(frame, np.zeros((8, 8, 3), np.uint8))
    truth = np.zeros((8, 8, 2), np.float32), np.ones((8, 8), bool)
    return Files([Pair("set", frames[k].stem, *frames[k : k + 2], lambda: truth) for k in (0, 1, 2, 4, 6, 8)])


def test_warm_start_goes_on_within_a_scene(clip):
    """The lengths found are 1 at each beginning; the same for a pair alone, as in a report, and after a lost one."""
    predictor = Predictor(Walking().eval(), device="cpu", precision="fp32")
    cold = job.measure(predictor, clip, model="walking", dataset="clip")
    warm = Warm(predictor, clip.pairs)
    result = job.measure(warm, clip, model="walking", dataset="clip")
    lengths = [pair.errors["epe"] / 2**0.5 for pair in result.pairs]
    assert lengths == pytest.approx([1, 2, 3, 1, 1, 1])
    assert "2 of 6 pairs" in result.protocol["start"] and "start" not in cold.protocol
    for k in (2, 0, 1, 2, 4, 1):
        assert job.estimate(warm, clip, k).flow[0, 0, 0] == pytest.approx(lengths[k])


def test_warm_start_is_refused_where_nothing_goes_on(clip, tree):
    forgetful = Warm(Predictor(Unsure().eval(), device="cpu", precision="fp32"), clip.pairs)
    with pytest.raises(FleetflowError, match="Unsure keeps nothing"):
        job.measure(forgetful, clip, model="unsure", dataset="clip")
    there = clip.pairs[0]
    back = there._replace(frame1=there.frame2, frame2=there.frame1)
    walking = Predictor(Walking().eval(), device="cpu", precision="fp32")
    with pytest.raises(FleetflowError, match="no pair here begins"):
        Warm(walking, [there, back])
    with pytest.raises(FleetflowError, match="no pair here begins"):
        Warm(walking, pairs(tree[0]).pairs)


class Broken(Unsure):
    """As unsure, and without a flow where the first pixel of frame1 is dark."""

    def estimate(self, frame1, frame2, previous, iterations):
        prediction = super().estimate(frame1, frame2, previous, iterations)
        return prediction._replace(flow=prediction.flow * (math.nan if frame1[0, 0, 0, 0] < 0.5 else 1))


def test_ause_names_the_pairs_that_it_leaves_out(tree, tmp_path):
    """Of three pairs one has no finite flow: the mean and its pixels are those of the other two."""
    root, _, valid = tree
    for k, name in enumerate(("one/a", "one/b", "two/c")):
        write_image(root / name / "img1.png", np.full((16, 20, 3), 255 * (k != 1), np.uint8))
    predictor = Predictor(Broken().eval(), device="cpu", precision="fp32")
    result = job.measure(predictor, pairs(root), model="broken", dataset="pairs")
    row = tables.rows_pooled(result)[-1]
    assert "AUSE, mean over 2 pairs" in row[0] and row[2] == str(2 * valid.sum())
    assert result.unsorted() == ["one/b"] and "left out of AUSE" in tables.left_out(result)[0]
    records.as_json(result, tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["ause_left_out"] == ["one/b"]
    records.as_csv(result, tmp_path / "t.csv")
    assert [bool(line["ause"]) for line in csv.DictReader((tmp_path / "t.csv").open())] == [True, False, True]


def test_spring_is_judged_by_the_nearest_of_four(tmp_path):
    pytest.importorskip("h5py")
    generator = np.random.default_rng(1)
    for k in (1, 2):
        image = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        write_image(tmp_path / f"train/0001/frame_left/frame_left_000{k}.png", image)
    truth = generator.normal(0, 3, (24, 32, 2)).astype(np.float32)
    truth[5, 7] = np.nan  # the lower right one of the four of pixel (2, 3)
    write_flow(tmp_path / "train/0001/flow_FW_left/flow_FW_left_0001.flo5", truth)
    files = datasets["spring"](tmp_path)
    result = job.measure(lambda a, b: np.zeros((12, 16, 2), np.float32), files, model="still", dataset="spring")
    four = np.stack([truth[y::2, x::2] for y in (0, 1) for x in (0, 1)])
    nearest = np.linalg.norm(four, axis=3).min(0)
    assert result.pairs[0].sums["epe"].count == 12 * 16 - 1, "a pixel is known where all of its four are"
    assert result.score()["spring"]["epe"] == pytest.approx(np.nanmean(nearest), rel=1e-5)
    assert result.pooled()["all"]["epe"].value == pytest.approx(np.nanmean(nearest), rel=1e-5)
    assert "nearest" in result.protocol["truth"] and files[0].truths is None, "training reads one vector"


def test_sets_are_pooled_by_pixels(tree):
    """Pooled, a set with twice as many pixels weighs twice; in the mean of the sets all weigh alike."""
    result = job.measure(lambda a, b: np.zeros((16, 20, 2), np.float32), pairs(tree[0]), model="still", dataset="pairs")
    sums = result.pooled()
    one, two, whole = (sums[name]["epe"] for name in ("one", "two", "all"))
    assert (one.count, two.count, whole.count) == (638, 319, 957)
    assert whole.value == pytest.approx((2 * one.value + two.value) / 3)
    assert result.histogram().sum() == result.speeds()[1].sum() == 957


def test_masks_of_the_data_set(tree):
    mask = np.zeros((16, 20), bool)
    mask[:, :5] = True
    files = pairs(tree[0])
    for k, masks in enumerate(({"occluded": mask}, {"foreground": mask})):
        files.pairs[k] = files.pairs[k]._replace(masks=lambda masks=masks: masks)
    result = job.measure(lambda a, b: np.zeros((16, 20, 2), np.float32), files, model="still", dataset="pairs")
    a, b, _ = (pair.sums for pair in result.pairs)
    assert a["epe_occluded"].count == 79 and a["epe_visible"].count == 240 and "epe_visible" not in b
    assert b["fl_fg"].count == 79 and b["fl_bg"].count == 240 and "fl_fg" not in a
    files.pairs[2] = files.pairs[2]._replace(masks=lambda: {"occluded": mask[:8]})
    with pytest.raises(FleetflowError, match="the same size"):
        job.measure(lambda a, b: np.zeros((16, 20, 2), np.float32), files, model="still", dataset="pairs")


def test_options_of_the_data_set(tmp_path):
    for folder in ("clean", "final", "flow"):
        for k in (1, 2):
            place = tmp_path / "training" / folder / "alley_1" / f"frame_{k:04d}"
            if folder == "flow":
                write_flow(place.with_suffix(".flo"), np.zeros((8, 8, 2)))
            else:
                write_image(place.with_suffix(".png"), np.full((8, 8, 3), 9, np.uint8))
    (tmp_path / "training" / "flow" / "alley_1" / "frame_0002.flo").unlink()
    files = open_files("sintel", tmp_path, options=("render=clean",))
    assert len(files) == 1 and "clean" in files.pairs[0].frame1.parts
    assert len(open_files("sintel", tmp_path, without=("alley_1/frame_0001",))) == 0
    for options in (("color=red",), ("render=red",)):
        with pytest.raises(FleetflowError, match="final|render"):
            open_files("sintel", tmp_path, options=options)


def test_what_cannot_be_measured_is_named(tree, tmp_path):
    root, flow, valid = tree
    write_flow(root / "one" / "a" / "flow.png", flow, valid & False)

    def broken(image1, image2):
        found = np.zeros((16, 20, 2), np.float32)
        found[3, 3] = math.nan
        return found

    result = job.measure(broken, pairs(root), model="broken", dataset="pairs")
    assert result.skipped == ["one/a"] and len(result.pairs) == 2
    assert result.score()["one"]["epe"] == math.inf and result.pooled()["all"]["not_finite"].value > 0
    records.as_json(result, tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text(), parse_constant=pytest.fail)
    assert content["score"]["one"]["epe"] == "infinite" and content["skipped"] == ["one/a"]
    assert content["pooled"]["all"]["s40+"] == {"value": None, "pixels": 0}
    assert any("infinite" in row for row in tables.rows_by_set(result))
    for name in ("one/b", "two/c"):
        (root / name / "flow.npz").unlink(missing_ok=True)
        write_flow(root / name / "flow.png", flow, valid & False)
    with pytest.raises(FleetflowError, match="no pair"):
        job.measure(broken, pairs(root), model="broken", dataset="pairs")


def test_classical_methods():
    with pytest.raises(FleetflowError, match="no classical method"):
        baselines.classical("horn_schunck")
    cv2 = pytest.importorskip("cv2")
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in baselines.CLASSICAL:
        if name == baselines.DEEPFLOW and not hasattr(cv2, "optflow"):
            continue
        cv2.setNumThreads(3)
        assert baselines.classical(name)(image, image).shape == (64, 64, 2)
        assert cv2.getNumThreads() == torch.get_num_threads() == 1, "as many threads as torch"
    assert machine()["opencv"] == f"{cv2.__version__}, 1 threads"


ADAPTERS = {
    "from helper import field\ndef predict(a, b):\n    return field(a)\n": None,
    "def estimate(a, b):\n    return a\n": "has no function predict",
    "def predict(a, b):\n    return a\n": r"returned uint8 \[125, 187, 3\]",
    "import nothing_like_it\n": "ModuleNotFoundError: No module named 'nothing_like_it'",
    "def predict(a, b):\n    raise RuntimeError('no\\nGPU')\n": r"failed on .* \(RuntimeError: no GPU\)",
}


@pytest.mark.parametrize("code", ADAPTERS)
def test_methods_of_the_user(code, tree, tmp_path, capsys):
    """A Python file is run with what lies beside it, tried once, and what is wrong is said in one line."""
    (tmp_path / "helper.py").write_text("import numpy\ndef field(a):\n    return numpy.ones((*a.shape[:2], 2))\n")
    path = tmp_path / "net.py"
    path.write_text(code)
    if ADAPTERS[code]:
        with pytest.raises(FleetflowError, match=ADAPTERS[code]) as caught:
            baselines.method(str(path))
        assert "\n" not in str(caught.value)
        return
    assert main(["evaluate", str(path), "pairs", "--root", str(tree[0])]) == 0
    assert "method: net;" in " ".join(capsys.readouterr().out.split()) and str(tmp_path) not in sys.path
    with pytest.raises(FleetflowError, match="nobody.py does not exist"):
        baselines.method("nobody.py")


@pytest.mark.parametrize(
    "code, words",
    [
        ("    raise ValueError('odd')", r"net.py failed on two pictures of 16x20 \(ValueError: odd\)"),
        ("    return numpy.ones((16, 16, 2))", r"net.py returned float64 \[16, 16, 2\] for pictures of 16x20"),
    ],
)
def test_methods_of_the_user_that_fail_behind_the_trial(code, words, tree, tmp_path, capsys):
    path = tmp_path / "net.py"
    good = "    if len(a) > 100:\n        return numpy.ones((*a.shape[:2], 2))\n"
    path.write_text(f"import numpy\ndef predict(a, b):\n{good}{code}\n")
    assert main(["evaluate", str(path), "pairs", "--root", str(tree[0])]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(words, error), error


def test_methods_of_the_user_are_tried_on_an_odd_size(tmp_path):
    (tmp_path / "net.py").write_text("import numpy\ndef predict(a, b):\n    return numpy.ones((128, 192, 2))\n")
    with pytest.raises(FleetflowError, match=r"returned float64 \[128, 192, 2\] for pictures of 125x187"):
        baselines.method(str(tmp_path / "net.py"))


def test_deepflow_needs_contrib(monkeypatch):
    cv2 = pytest.importorskip("cv2")
    monkeypatch.delattr(cv2, "optflow", raising=False)
    with pytest.raises(FleetflowError, match="opencv-contrib"):
        baselines.classical("deepflow")


def test_a_frame_of_another_size_is_refused(tree):
    root, _, _ = tree
    write_image(root / "one" / "a" / "img2.png", np.zeros((16, 18, 3), np.uint8))
    with pytest.raises(FleetflowError, match="one/a"):
        pairs(root)[0]


def test_dis_on_real_pairs(shared):
    """Reader, metric and mean reproduce the errors of DIS that were recorded with the pairs."""
    pytest.importorskip("cv2")
    recorded = {row["dir"]: row["dis"] for row in json.loads((shared / "data" / "MANIFEST.json").read_text())["pairs"]}
    files = pairs(shared / "data", without=("ambush_4_final_0004",))
    assert len(files) == 29
    files.pairs = [pair for pair in files.pairs if pair.group in ("middlebury-flow", "kitti2015", "yosemite")]
    predict = baselines.classical(baselines.DIS)
    for k, pair in enumerate(files.pairs):
        sample = files[k]
        images = [(frame * 255).round().byte().permute(1, 2, 0).numpy() for frame in sample[:2]]
        numbers = pair_errors(torch.from_numpy(predict(*images)).permute(2, 0, 1), sample)
        expected = recorded[f"{pair.group}/{pair.name}"]
        assert numbers["epe"] == pytest.approx(expected["epe"], rel=0.03), pair.name
        assert numbers["out3"] == pytest.approx(expected["out3_pct"], abs=0.4), pair.name


@pytest.mark.parametrize(
    "signature, got",
    [("a, b, name", True), ("a, b, c", True), ("a, b, *, name", True), ("a, b, name=None", True), ("a, b, c=7", False),
     ("a, b, *rest", False)],
)  # fmt: skip
def test_methods_of_the_user_may_ask_for_the_name_of_the_pair(signature, got, tree, tmp_path):
    """By a parameter `name`, or by a third one that must be given; a third with a default is something else."""
    path, said = tmp_path / "net.py", tmp_path / "names"
    third = signature.rpartition(", ")[2].split("=")[0].lstrip("*")
    path.write_text(
        f"import numpy\ndef predict({signature}):\n    open({str(said)!r}, 'a').write(f'{{{third}}}\\n')\n"
        "    return numpy.ones((*a.shape[:2], 2))\n"
    )
    job.evaluate(baselines.method(str(path)), pairs(tree[0]))
    names = said.read_text().split()
    assert names == (["trial", "one/a", "one/b", "two/c"] if got else ["7" if "7" in signature else "()"] * 4)


def test_without_a_home(tree, tmp_path):
    """Nothing that is kept in a home is needed: not our index, not the folders of matplotlib or torch."""
    (tmp_path / "net.py").write_text("import numpy\ndef predict(a, b):\n    return numpy.ones((*a.shape[:2], 2))\n")
    code = (
        "import os, pwd, sys\n"
        "pwd.getpwuid = lambda number: {}[number]\n"  # a user who is in no list of users
        "from fleetflow.cli.main import main; sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["evaluate", tmp_path / "net.py", "pairs", "--root", tree[0], "--html", tmp_path / "r.html"]
    variables = {key: value for key, value in os.environ.items() if key not in ("HOME", "USER", "LOGNAME")}
    run = subprocess.run([sys.executable, "-c", code, *map(str, words)], env=variables, capture_output=True, text=True)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    assert (tmp_path / "r.html").stat().st_size > 5000
