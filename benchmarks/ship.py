"""Scores a finished run on the real pairs; makes its weights those of the package if they are better; README table.

    python benchmarks/ship.py runs/NAME DIR

DIR: the folder of real pairs, with MANIFEST.json, which holds the errors of DIS and RAFT-small on each.
"""

import json
import sys
from pathlib import Path

import torch

from fleetflow.data.pairs import pairs
from fleetflow.evaluate import evaluate
from fleetflow.metrics import mean_over_sets
from fleetflow.models import weights
from fleetflow.predict import Predictor
from fleetflow.types import FleetflowError

ROOT = Path(__file__).parents[1]
UNVERIFIED = "ambush_4_final_0004"  # a pair whose truth is in doubt


def main(run: Path, root: Path) -> None:
    source = run / "weights.safetensors"
    header = weights.header(source)
    model = weights.load(str(source))
    files = pairs(root, without=(UNVERIFIED,))
    table = evaluate(Predictor(model, device="cpu"), files)
    scores = {name: {key: round(row[key], 2) for key in ("epe", "out3")} for name, row in table.items()}
    new = scores["mean of sets"]
    print(json.dumps(scores, indent=1))
    target = ROOT / "src" / "fleetflow" / "weights" / f"{header['network']}.safetensors"
    try:
        old = json.loads(weights.header(target)["scores"])["mean of sets"]
    except (FleetflowError, KeyError):
        old = {"epe": float("inf"), "out3": float("inf")}
    if new["epe"] >= old["epe"] or new["out3"] > old["out3"]:
        print(f"kept {target.name}: {old} is not worse than {new}")
        return
    weights.save(model, target, {**header, "scores": scores}, dtype=torch.float16)
    print(f"{target.name}: {old} -> {new}")
    peers = json.loads((root / "MANIFEST.json").read_text())["pairs"]
    peers = [row for row in peers if Path(row["dir"]).name != UNVERIFIED]
    columns = [scores]
    for peer in ("dis", "raft_small"):
        rows = [(Path(row["dir"]).parts[0], {"epe": row[peer]["epe"], "out3": row[peer]["out3_pct"]}) for row in peers]
        columns.append(mean_over_sets(rows))
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition("<!-- scores -->\n")
    after = rest.partition("<!-- /scores -->")[2]
    readme.write_text(before + "<!-- scores -->\n" + markdown(columns) + "<!-- /scores -->" + after)


def markdown(columns: list[dict]) -> str:
    """Returns the table of the README: sets down, methods across, "EPE / % over 3 px"."""
    lines = ["| set | FastFlowNet, ours | OpenCV DIS | RAFT-small |", "|---|--:|--:|--:|"]
    for name in columns[0]:
        cells = [f"{column[name]['epe']:.2f} / {column[name]['out3']:.1f}" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
