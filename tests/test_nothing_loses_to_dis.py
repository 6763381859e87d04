"""Nothing ships that loses to OpenCV's DIS: every weight of the package, on footage and on real pairs.

It loses where the product of its mean EPE and its percentage of pixels over 3 px is larger.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import results
from conftest import SLOW

import fleetflow
from fleetflow.data.dataset import Files
from fleetflow.data.datasets.footage import footage
from fleetflow.data.datasets.pairs import pairs
from fleetflow.evaluation.baselines import DIS, classical
from fleetflow.evaluation.evaluate import evaluate
from fleetflow.models import weights

WEIGHTS = sorted((Path(weights.__file__).parents[1] / "weights").glob("*.safetensors"))
NAMES = [path.stem for path in WEIGHTS]
FEW = ("middlebury-stereo", "eth3d")[: 2 if SLOW else 1]  # sets of real pairs, of two and of one


def product(row: dict[str, float]) -> float:
    return row["epe"] * row["out3"]


def kept(files: Files) -> Files:
    """The pairs, made once for all networks."""
    samples = [files[k] for k in range(len(files))]
    return Files([pair._replace(made=partial(tuple, sample), masks=None) for pair, sample in zip(files.pairs, samples)])


@pytest.fixture(scope="module")
def clips():
    """A pair of each class (two if slow), surfaces without photographs, and what DIS makes of them."""
    pytest.importorskip("cv2")
    held = kept(footage(split="validation", limit=2 if SLOW else 1, size="144x256"))
    return held, product(evaluate(classical(DIS), held)["mean of sets"])


def test_there_are_weights():
    assert "fastflownet" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_on_footage(name, clips):
    held, dis = clips
    predictor = fleetflow.Predictor(fleetflow.load(name), device="cpu", precision="fp32")
    assert product(evaluate(predictor, held)["mean of sets"]) < dis


@pytest.mark.parametrize("path", WEIGHTS, ids=NAMES)
def test_by_the_scores_in_the_header(path):
    """On all real pairs, as they were measured when the weights were shipped."""
    scores = json.loads(weights.header(path)["scores"])["mean of sets"]
    epe, out3 = results.PEERS["OpenCV DIS"][results.SETS.index("mean of sets")]
    assert product(scores) < epe * out3


@pytest.mark.parametrize("name", NAMES)
def test_on_real_pairs(name, shared):
    """A set or two, measured again: what the header says is what the weights do, and it is better than DIS."""
    files = pairs(shared / "data")
    files.pairs = [pair for pair in files.pairs if pair.group in FEW]
    table = evaluate(fleetflow.Predictor(fleetflow.load(name), device="cpu", precision="fp32"), files)
    scores = json.loads(weights.header(weights.shipped(name))["scores"])
    for group in FEW:
        epe, out3 = results.PEERS["OpenCV DIS"][results.SETS.index(group)]
        assert table[group]["epe"] == pytest.approx(scores[group]["epe"], rel=0.02, abs=0.02)
        assert product(table[group]) < epe * out3, group
