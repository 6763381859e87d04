"""Makes the weights of a finished run those of the package, if they are better than what is there.

    python benchmarks/ship.py runs/NAME PHOTOS PAIRS

PHOTOS is a folder of photographs and cut-outs, for `footage`; PAIRS one of real pairs with truth. Better: on the
validation part of `footage`, the product of mean EPE and percentage over 3 px is smaller. Nothing is chosen on the
real pairs, but weights that lose to OpenCV's DIS there or on `footage` are not shipped. Scores are of float32 arithmetic,
which gives the same on any number of threads; README and docs/results.md are written anew.
"""

import sys
from pathlib import Path

import torch
from results import PEERS, SETS, network_table, our_scores, page

from fleetflow.data.dataset import Files
from fleetflow.data.datasets.footage import footage
from fleetflow.data.datasets.pairs import pairs
from fleetflow.evaluation.baselines import DIS, classical
from fleetflow.evaluation.evaluate import evaluate
from fleetflow.inference.predictor import Predictor
from fleetflow.models import weights
from fleetflow.types import FleetflowError

ROOT = Path(__file__).parents[1]
UNVERIFIED = "ambush_4_final_0004"  # a pair whose truth is in doubt
OF_A_CLASS = 12  # pairs of footage: three clips or six

Score = dict[str, float]  # epe (pixels), out3 (%)


def main(run: Path, photographs: Path, real: Path) -> None:
    source = run / "weights.safetensors"
    header = weights.header(source)
    target = ROOT / "src" / "fleetflow" / "weights" / f"{header['network']}.safetensors"
    clips, known = footage(photographs, split="validation", limit=OF_A_CLASS), pairs(real, without=(UNVERIFIED,))
    new = score(predictor(source), clips)["mean of sets"]
    if target.exists():
        old = score(predictor(target), clips)["mean of sets"]
        print(f"footage: {old} -> {new}")
        if product(new) >= product(old):
            print(f"kept {target.name}")
            return
    scores = score(predictor(source), known)
    rivals = {
        "footage": (new, score(classical(DIS), clips)["mean of sets"]),
        "real pairs": (
            scores["mean of sets"],
            dict(zip(("epe", "out3"), PEERS["OpenCV DIS"][SETS.index("mean of sets")])),
        ),
    }
    for place, (own, dis) in rivals.items():
        print(f"{place}: {own}, DIS {dis}")
        if product(own) >= product(dis):
            raise FleetflowError(f"{source} loses to DIS on {place} ({own}, {dis}); nothing ships that does: train on")
    model = weights.load(str(source))  # in float16, as it will be stored
    weights.save(model, target, {**header, "scores": scores, "footage": new}, dtype=torch.float16)
    publish()


def predictor(source: Path) -> Predictor:
    return Predictor(weights.load(str(source)), device="cpu", precision="fp32")


def product(score: Score) -> float:
    """Returns what weights are compared by."""
    return score["epe"] * score["out3"]


def score(model: object, files: Files) -> dict[str, Score]:
    """Returns the mean EPE and the percentage over 3 px by set."""
    table = evaluate(model, files)
    return {name: {key: round(row[key], 2) for key in ("epe", "out3")} for name, row in table.items()}


def publish() -> None:
    """Writes the scores in the headers of the package's weights into the README and docs/results.md."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition("<!-- networks -->\n")
    after = rest.partition("<!-- /networks -->")[2]
    readme.write_text(f"{before}<!-- networks -->\n{network_table(our_scores())}\n<!-- /networks -->{after}")
    (ROOT / "docs" / "results.md").write_text(page(our_scores()))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
