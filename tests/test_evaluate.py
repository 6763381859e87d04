"""Errors by hand, the mean over sets, DIS on real pairs, what is written of an evaluation, and the page of results."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fleetflow import evaluate as job
from fleetflow import results
from fleetflow.cli import main
from fleetflow.data.dataset import datasets
from fleetflow.data.pairs import pairs
from fleetflow.io import write_flow, write_image
from fleetflow.metrics import mean_over_sets, pair_errors
from fleetflow.models.base import FlowModel
from fleetflow.predict import Predictor
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
    table = job.evaluate(lambda a, b: np.zeros((16, 20, 2), np.float32), pairs(root))
    length = np.linalg.norm(flow[tree[2]], axis=1).mean()
    assert table["mean of sets"]["epe"] == pytest.approx(length, rel=0.01)
    pytest.importorskip("cv2")
    table, lines = tmp_path / "t.json", tmp_path / "t.csv"
    assert main(["evaluate", "dis", "pairs", "--root", str(root), "--json", str(table), "--csv", str(lines)]) == 0
    content = json.loads(table.read_text())
    assert set(content["score"]) == {"one", "two", "mean of sets"} and set(content["pooled"]) == {"one", "two", "all"}
    assert sum(band["pixels"] for band in content["epe_by_speed"]) == 957 and content["epe_by_speed"][0]["to"] == 0.5
    assert content["model"] == "dis" and content["protocol"]["per image"] and content["machine"]["torch"]
    rows = list(csv.DictReader(lines.open()))
    assert [row["pair"] for row in rows] == ["a", "b", "c"] and float(rows[0]["epe"]) > 0 and rows[0]["pixels"] == "319"
    output = capsys.readouterr().out
    assert "mean of sets" in output and "protocol: per image" in " ".join(output.split())
    assert main(["evaluate", "dis", "pairs", "--root", str(root), "--steps", "3"]) == 1
    assert "no refinement steps" in capsys.readouterr().err


class Unsure(FlowModel):
    """Estimates half of the steps it is given as motion, and doubts the left half of the frame."""

    stride, fit, steps = 4, "pad", 2

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def prepare(self, frame1, frame2):
        return frame1, frame2

    def estimate(self, frame1, frame2, previous, steps):
        flow = torch.full_like(frame1[:, :2], steps / 2) * self.scale
        residual = torch.zeros_like(flow[:, 0])
        residual[:, :, : residual.shape[2] // 2] = 1
        return Prediction(flow, residual=residual)


def test_measure_agrees_with_evaluate_and_knows_confidence(tree):
    files = pairs(tree[0])
    predictor = Predictor(Unsure().eval(), device="cpu", precision="fp32")
    result = job.measure(predictor, files, model="unsure", dataset="pairs")
    assert result.score() == job.evaluate(predictor, files), "the house score"
    assert result.protocol["steps"] == "2" and result.protocol["precision"] == "float32"
    assert result.curves().shape == (2, 20) and "AUSE" in job.rows_pooled(result)[-1][0]
    more = job.measure(predictor, files, model="unsure", dataset="pairs", steps=20)
    assert more.score()["mean of sets"]["epe"] > result.score()["mean of sets"]["epe"]
    assert more.protocol["steps"] == "20" and "steps: 20" in job.protocol_line(more)
    assert job.fit_for(Unsure(), "kitti2015").fit == "pad_bottom" and job.fit_for(Unsure(), "sintel").fit == "pad"


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
    files = job.open_files("sintel", tmp_path, options=("render=clean",))
    assert len(files) == 1 and "clean" in files.pairs[0].frame1.parts
    assert len(job.open_files("sintel", tmp_path, without=("alley_1/frame_0001",))) == 0
    for options in (("colour=red",), ("render=red",)):
        with pytest.raises(FleetflowError, match="final|render"):
            job.open_files("sintel", tmp_path, options=options)


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
    job.as_json(result, tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text(), parse_constant=pytest.fail)
    assert content["score"]["one"]["epe"] == "infinite" and content["skipped"] == ["one/a"]
    assert content["pooled"]["all"]["s40+"] == {"value": None, "pixels": 0}
    assert any("infinite" in row for row in job.rows_by_set(result))
    for name in ("one/b", "two/c"):
        (root / name / "flow.npz").unlink(missing_ok=True)
        write_flow(root / name / "flow.png", flow, valid & False)
    with pytest.raises(FleetflowError, match="no pair"):
        job.measure(broken, pairs(root), model="broken", dataset="pairs")


def test_classical_methods():
    with pytest.raises(FleetflowError, match="no classical method"):
        job.classical("horn_schunck")
    cv2 = pytest.importorskip("cv2")
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in job.CLASSICAL:
        if name == job.DEEPFLOW and not hasattr(cv2, "optflow"):
            continue
        assert job.classical(name)(image, image).shape == (64, 64, 2)


def test_deepflow_needs_contrib(monkeypatch):
    cv2 = pytest.importorskip("cv2")
    monkeypatch.delattr(cv2, "optflow", raising=False)
    with pytest.raises(FleetflowError, match="opencv-contrib"):
        job.classical("deepflow")


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
    predict = job.classical(job.DIS)
    for k, pair in enumerate(files.pairs):
        sample = files[k]
        images = [(frame * 255).round().byte().permute(1, 2, 0).numpy() for frame in sample[:2]]
        numbers = pair_errors(torch.from_numpy(predict(*images)).permute(2, 0, 1), sample)
        expected = recorded[f"{pair.group}/{pair.name}"]
        assert numbers["epe"] == pytest.approx(expected["epe"], rel=0.03), pair.name
        assert numbers["out3"] == pytest.approx(expected["out3_pct"], abs=0.4), pair.name


# ---- the page of results ----


def test_the_page_of_results_is_that_of_the_weights():
    page = Path(__file__).parents[1] / "docs" / "results.md"
    expected = results.page(results.our_scores())
    assert page.read_text() == expected, "run: python -m fleetflow.results docs/results.md"
    assert "`fastflownet`, ours" in expected


def test_tables_of_results_are_whole():
    for table in results.page({}).split("\n\n"):
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1, rows
    assert all(len(row.paper.split()) == len(row.again.split()) == 4 for row in results.GENERALISATION)
    ours = results.page({"some": {"mean of sets": {"epe": 1.5, "out3": 2.25}}})
    assert "`some`, ours" in ours and "| mean of sets | 1.50 / 2.2 |" in ours


def test_peers_are_those_of_the_recorded_errors(shared):
    """What the page says of other methods is what was recorded with the pairs."""
    pairs_of = json.loads((shared / "data" / "MANIFEST.json").read_text())["pairs"]
    kept = [row for row in pairs_of if Path(row["dir"]).name != "ambush_4_final_0004"]
    for peer, name in zip(("farneback", "dis", "spynet_sintelFinal", "raft_small"), results.PEERS, strict=True):
        rows = [(Path(row["dir"]).parts[0], {"epe": row[peer]["epe"], "out3": row[peer]["out3_pct"]}) for row in kept]
        table = mean_over_sets(rows)
        for place, (epe, out3) in zip(results.SETS, results.PEERS[name]):
            assert (epe, out3) == pytest.approx((table[place]["epe"], table[place]["out3"]), abs=0.051)
