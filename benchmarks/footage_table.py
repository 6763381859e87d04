"""Networks side by side on the data set footage, as the tables of docs/footage.md: python benchmarks/footage_table.py

Every clip is made once and shown to all networks. What has been measured is kept in --keep, a JSON file, so that an
interrupted run goes on where it was.
"""

import argparse
import json
from pathlib import Path

import torch

from fleetflow.data.dataset import Files, open_files
from fleetflow.evaluation.evaluate import Evaluation, PairResult, measure
from fleetflow.evaluation.metrics import Mean
from fleetflow.evaluation.protocol import open_model
from fleetflow.evaluation.tables import CLIP_COLUMNS, protocol_line, rows_of_clips

MODELS = ("fastflownet", "deq_flow_tiny", "raft_small", "liteflownet2", "lightflow", "dis")


def stored(pair: PairResult) -> dict:
    """Returns the result of a pair as JSON has it."""
    kept = {"group": pair.group, "name": pair.name, "errors": pair.errors, "sums": pair.sums}
    for name in ("histogram", "still", "speeds"):
        kept[name] = getattr(pair, name).tolist()
    return {**kept, "boundaries": pair.boundaries}


def loaded(row: dict) -> PairResult:
    """Returns what `stored` was given, without the curves."""
    tensors = {name: torch.tensor(row[name]) for name in ("histogram", "still", "speeds")}
    sums = {name: Mean(*value) for name, value in row["sums"].items()}
    return PairResult(**{**row, **tensors, "sums": sums, "curves": None})


def clips(files: Files) -> list[Files]:
    """Returns the pairs of each clip."""
    names = dict.fromkeys((pair.group, pair.name.split("/")[0]) for pair in files.pairs)
    return [
        Files([pair for pair in files.pairs if (pair.group, pair.name.split("/")[0]) == name], about=files.about)
        for name in names
    ]


def rows(results: dict[str, Evaluation]) -> None:
    """Prints the tables in Markdown."""
    groups = [name for name in next(iter(results.values())).score() if name != "mean of sets"]
    print("| EPE px / % over 3 px |", *(f" {name} |" for name in results))
    print("|---|", *("--:|" for _ in results))
    for group in [*groups, "mean of sets"]:
        scores = [result.score()[group] for result in results.values()]
        print(f"| {group} |", *(f" {score['epe']:.2f} / {score['out3']:.1f} |" for score in scores))
    print("\n|", " | ".join(["network", *CLIP_COLUMNS[1:]]), "|")
    print("|---|", *("--:|" for _ in CLIP_COLUMNS[1:]))
    for name, result in results.items():
        print(f"| {name} |", " | ".join(rows_of_clips(result)[-1][1:]), "|")
    for name, result in results.items():
        print(f"\n{name}: {protocol_line(result)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--root", help="photographs and cut-outs; default: procedural surfaces")
    parser.add_argument("--options", nargs="*", default=["split=test"])
    parser.add_argument("--keep", type=Path, default=Path("footage.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(given.keep.read_text()) if given.keep.is_file() else {}
    predictors = {model: open_model(model, "footage") for model in given.models}
    parts = clips(open_files("footage", given.root, options=tuple(given.options)))
    results = {}
    for part in parts:
        for model, predict in predictors.items():
            key = f"{model} {part.pairs[0].group}/{part.pairs[0].name}"
            result = measure(predict, part, model=model, dataset="footage") if key not in known else None
            if result:
                known[key] = [stored(pair) for pair in result.pairs]
                results[model] = result
        if result:
            given.keep.write_text(json.dumps(known))
            print(f"{part.pairs[0].group}/{part.pairs[0].name}", flush=True)
    for model in given.models:
        pairs = [loaded(row) for key, kept in known.items() if key.rpartition(" ")[0] == model for row in kept]
        about = results[model] if model in results else Evaluation(model, "footage", {}, {}, [], [])
        results[model] = about._replace(pairs=pairs)
    rows({model: results[model] for model in given.models})


if __name__ == "__main__":
    main()
