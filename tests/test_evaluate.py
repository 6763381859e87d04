"""Errors by hand, the mean over sets, and the published errors of OpenCV's DIS on real pairs."""

import json

import numpy as np
import pytest
import torch

from fleetflow import evaluate as job
from fleetflow.cli import main
from fleetflow.data.dataset import datasets
from fleetflow.data.pairs import pairs
from fleetflow.io import write_flow, write_image
from fleetflow.metrics import mean_over_sets, pair_errors
from fleetflow.types import FleetflowError, Sample


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
    assert main(["evaluate", "dis", "pairs", "--root", str(root), "--json", str(tmp_path / "t.json")]) == 0
    assert set(json.loads((tmp_path / "t.json").read_text())) == {"one", "two", "mean of sets"}
    assert "mean of sets" in capsys.readouterr().out


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
