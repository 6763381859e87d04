"""The page of results: figures of the weights in the package, and of others as they were recorded."""

import json
from pathlib import Path

import numpy as np
import pytest
import results

from fleetflow.data.datasets.pairs import pairs
from fleetflow.evaluation import baselines
from fleetflow.evaluation.evaluate import evaluate
from fleetflow.evaluation.metrics import mean_over_sets


def test_the_page_of_results_is_that_of_the_weights():
    page = Path(__file__).parents[1] / "docs" / "results.md"
    expected = results.page(results.our_scores())
    assert page.read_text() == expected, "run: python benchmarks/results.py docs/results.md"
    assert "`fastflownet`, ours" in expected


def test_tables_of_results_are_whole():
    for table in results.page({}).split("\n\n"):
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1, rows
    assert all(len(row.paper.split()) == len(row.again.split()) == 4 for row in results.GENERALISATION)
    ours = results.page({"some": {"mean of sets": {"epe": 1.5, "out3": 2.25}}})
    assert "`some`, ours" in ours and "| mean of sets | 1.50 / 2.2 |" in ours


def test_rows_of_deq_flow_name_their_evaluations():
    page = results.page({})
    for row in ("DEQ-Flow-B v1, 60 evaluations | 1.43", "DEQ-Flow-B (torchdeq, run 2) | 1.435",
                "DEQ-Flow-H v1, run 3, 55 evaluations | 1.36", "RAFT-H-1x (RAFT as large as DEQ-Flow-H) | 1.36",
                "DEQ-Flow-H-3x v2, 60 evaluations | 1.27 / - | 2.50", "DEQ-Flow-H-3x v2, 120 evaluations"):  # fmt: skip
        assert row in page, row
    assert "DEQ-Flow 60 evaluations." not in page and "TartanAir, a ResNet from ImageNet" in page


def test_peers_are_those_of_the_recorded_errors(shared):
    """What the page says of other networks is what was recorded with the pairs."""
    pairs_of = json.loads((shared / "data" / "MANIFEST.json").read_text())["pairs"]
    kept = [row for row in pairs_of if Path(row["dir"]).name != "ambush_4_final_0004"]
    for peer, name in zip(("spynet_sintelFinal", "raft_small"), list(results.PEERS)[2:], strict=True):
        rows = [(Path(row["dir"]).parts[0], {"epe": row[peer]["epe"], "out3": row[peer]["out3_pct"]}) for row in kept]
        table = mean_over_sets(rows)
        for place, (epe, out3) in zip(results.SETS, results.PEERS[name]):
            assert (epe, out3) == pytest.approx((table[place]["epe"], table[place]["out3"]), abs=0.051)


def test_peers_of_opencv_are_what_the_command_measures(shared):
    """Three sets of the page, measured again; other versions of OpenCV differ by more."""
    cv2 = pytest.importorskip("cv2")
    if cv2.__version__ != results.OPENCV:
        pytest.skip(f"the page is of OpenCV {results.OPENCV}")
    files = pairs(shared / "data", without=("ambush_4_final_0004",))
    files.pairs = [pair for pair in files.pairs if pair.group in ("middlebury-flow", "flyingchairs", "yosemite")]
    for method, name in ((baselines.FARNEBACK, "OpenCV Farneback"), (baselines.DIS, "OpenCV DIS")):
        table = evaluate(baselines.classical(method), files)
        for place, (epe, out3) in zip(results.SETS, results.PEERS[name]):
            if place in table and place != "mean of sets":
                assert (epe, out3) == pytest.approx((table[place]["epe"], table[place]["out3"]), abs=0.051), place
    for rows in results.PEERS.values():
        means = np.mean(rows[:-1], axis=0)
        assert rows[-1] == pytest.approx(means, abs=0.11), "the last row is the mean of the sets"
    assert str(baselines.FARNEBACK_SETTINGS) in results.page({})
