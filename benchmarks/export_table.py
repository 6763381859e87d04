"""Every network in every runtime: how far an exported file is from its network, as the table of docs/exported.md.

    python benchmarks/export_table.py --keep exported.json

Each network is exported with open sizes and compared in each runtime on real-looking pairs at two sizes and three
numbers of pairs, twice in one session (`fleetflow.export.parity`); with --size, at that size only. Networks without
weights in the package have the deterministic ones of tests/golden/fill.py, those of the parity tests. What has been
measured is kept in --keep, so that an interrupted run goes on where it was.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from fleetflow.export.graph import Sizes, plain, traced
from fleetflow.export.onnx import write_onnx
from fleetflow.export.openvino import write_openvino
from fleetflow.export.parity import LIMITS, compare, pairs, passes
from fleetflow.export.session import Session
from fleetflow.export.torch_export import write_pt2
from fleetflow.export.write import SUFFIXES
from fleetflow.models.base import FlowModel
from fleetflow.models.weights import load
from fleetflow.registry import models
from fleetflow.types import FleetflowError

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "golden"))
from fill import fill_module  # noqa: E402

TARGETS = {"onnx": "ONNX Runtime", "openvino": "OpenVINO, float32", "pt2": "torch.export"}
ITERATIONS = 2  # of networks that refine: one step more is the same operators again
RULES = {  # beginning of a network's name -> rule of fill.py
    "fastflownet": "fastflownet",
    "lightflow": "lightflow",
    "flownet": "flownet",
    "liteflownet2": "liteflownet2",
    "pwcnet": "pwcnet",
    "raft": "raft_basic",
    "gma": "gma",
    "deq_flow": "deq_flow_v2_h",
}


def network(name: str) -> tuple[FlowModel, str]:
    """Returns a network, and whose weights it has: "ours" or "filled"."""
    try:
        return load(name), "ours"
    except FleetflowError:  # none in the package
        rule = next(rule for beginning, rule in RULES.items() if name.startswith(beginning))
        rule = name.replace("flownet_", "flownet2") if rule == "flownet" else rule
        return fill_module(models[name](), rule).eval(), "filled"


def mean_flow(model: FlowModel) -> float:
    """Returns the mean length in pixels of the network's flow on the first pair of the comparison."""
    _, image1, image2, _ = next(iter(pairs(Sizes())))
    frames = [torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255 for image in (image1, image2)]
    with torch.inference_mode():
        return float(model(*frames, iterations=model.iterations and ITERATIONS).flow.norm(dim=1).mean())


def measured(name: str, targets: list[str], sizes: Sizes) -> Iterator[tuple[str, dict]]:
    """Yields the row of a network in each runtime; it is traced once for all of them."""
    model, weights = network(name)
    about = {"weights": weights, "flow": mean_flow(model), "sizes": sizes._asdict()}
    model, iterations = plain(model), model.iterations and ITERATIONS
    said = {"network": name, "version": "", "sizes": sizes._asdict(), "iterations": iterations}
    with tempfile.TemporaryDirectory() as folder:
        program = traced(model, sizes, iterations)
        onnx = Path(folder) / "net.onnx"
        write_onnx(program, onnx, said, ("image1", "image2"), ("flow",))
        for target in targets:
            file = onnx.with_suffix(SUFFIXES[target])
            try:
                if target == "openvino":
                    write_openvino(onnx, file, said)
                elif target == "pt2":
                    write_pt2(program, file, said)
                rows = compare(Session(file), model, sizes, iterations)
            except FleetflowError as error:
                yield target, {**about, "error": str(error)}
                continue
            worst = {key: max(getattr(row, key) for row in rows) for key in ("largest", "p999", "mean")}
            change = max((abs(row.epe) for row in rows if row.epe is not None), default=0.0)
            yield target, {**about, **worst, "epe": change, "passes": passes(rows, LIMITS["fp32"])}


def table(known: dict[str, dict]) -> None:
    """Prints the rows as Markdown: the largest distance, the 99.9th percentile and the mean in pixels."""
    print("| network | weights | mean flow, px |", *(f" {runtime} |" for runtime in TARGETS.values()))
    print("|---|---|--:|", *("--:|" for _ in TARGETS))
    for name in models:
        rows = [known.get(f"{name} {target}") for target in TARGETS]
        if any(rows):
            about = next(row for row in rows if row)
            print(f"| {name} | {about['weights']} | {about['flow']:.1f} |", *(f" {cell(row)} |" for row in rows))


def cell(row: dict | None) -> str:
    if row is None:
        return ""
    return row.get("error") or " / ".join(f"{row[key]:.0e}" for key in ("largest", "p999", "mean"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(models))
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--size", nargs=2, type=int, help="trace with one size, which takes a third of the time")
    parser.add_argument("--keep", type=Path, default=Path("exported.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes(*given.size, batch=1) if given.size else Sizes()
    known = json.loads(given.keep.read_text()) if given.keep.is_file() else {}
    for name in given.networks:
        missing = [target for target in given.targets if "largest" not in known.get(f"{name} {target}", {})]
        for target, row in measured(name, missing, sizes) if missing else ():
            known[f"{name} {target}"] = row
            given.keep.write_text(json.dumps(known, indent=1))
            print(name, target, row, flush=True)
        gc.collect()
    table(known)


if __name__ == "__main__":
    main()
