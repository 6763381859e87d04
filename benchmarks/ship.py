"""Scores a finished run on the real pairs (in DIR); makes its weights those of the package if they are better.

Better: the product of mean EPE and percentage over 3 px is smaller. They are scored in float32 arithmetic, which gives
the same on any number of threads.

    python benchmarks/ship.py runs/NAME DIR
    python benchmarks/ship.py blend DIR

Then, or alone as the second line asks, the blend of our best weights is scored, and the table of the README and
docs/results.md are written anew.
"""

import json
import sys
from pathlib import Path

import torch
from results import BLEND, BLENDED, our_scores, page, score_table

from fleetflow.data.datasets.pairs import pairs
from fleetflow.evaluation.evaluate import evaluate
from fleetflow.inference.predictor import Predictor
from fleetflow.models import weights
from fleetflow.types import FleetflowError

ROOT = Path(__file__).parents[1]
UNVERIFIED = "ambush_4_final_0004"  # a pair whose truth is in doubt


def main(run: Path, root: Path) -> None:
    source = run / "weights.safetensors"
    header = weights.header(source)
    model = weights.load(str(source))  # in float16, as it will be stored
    scores = score(model, root)
    print(json.dumps(scores, indent=1))
    new, target = scores["mean of sets"], ROOT / "src" / "fleetflow" / "weights" / f"{header['network']}.safetensors"
    try:
        old = json.loads(weights.header(target)["scores"])["mean of sets"]
    except (FleetflowError, KeyError):
        old = {"epe": float("inf"), "out3": float("inf")}
    if new["epe"] * new["out3"] >= old["epe"] * old["out3"]:
        print(f"kept {target.name}: {old} is not worse than {new}")
        return
    weights.save(model, target, {**header, "scores": scores}, dtype=torch.float16)
    print(f"{target.name}: {old} -> {new}")
    blend(root)


def blend(root: Path) -> None:
    """Scores the blend of our best weights, and writes all tables."""
    model = weights.load(BLEND)
    digest = Predictor(model, device="cpu", precision="fp32").label()["sha256"]
    scores = score(model, root)
    print(json.dumps(scores, indent=1))
    BLENDED.write_text(json.dumps({"sha256": digest, "scores": scores}, indent=1) + "\n")
    publish()


def score(model: torch.nn.Module, root: Path) -> dict[str, dict[str, float]]:
    """Returns the mean EPE and the percentage over 3 px by set."""
    files = pairs(root, without=(UNVERIFIED,))
    table = evaluate(Predictor(model, device="cpu", precision="fp32"), files)
    return {name: {key: round(row[key], 2) for key in ("epe", "out3")} for name, row in table.items()}


def publish() -> None:
    """Writes the scores in the headers of the package's weights into the README and docs/results.md."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition("<!-- scores -->\n")
    after = rest.partition("<!-- /scores -->")[2]
    table = score_table(our_scores(), ("OpenCV DIS", "RAFT-small, published"))
    readme.write_text(f"{before}<!-- scores -->\n{table}\n<!-- /scores -->{after}")
    (ROOT / "docs" / "results.md").write_text(page(our_scores()))


if __name__ == "__main__":
    blend(Path(sys.argv[2])) if sys.argv[1] == "blend" else main(Path(sys.argv[1]), Path(sys.argv[2]))
