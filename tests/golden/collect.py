"""Collects every fourth pixel of the official flows into flows.npz: python tests/golden/collect.py ../shared/golden.

The inputs are closed formulas and the weights follow a rule (fill.py), so nothing else has to be stored. What official
operators, losses and solvers make of small random numbers is taken as it is.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

STEP = 4
CASES = {  # reference output: network, rule of fill.py, refinement iterations
    "fastflownet": ("fastflownet", "fastflownet", None),
    "fastflownet_odd": ("fastflownet", "fastflownet", None),
    "lightflow": ("lightflow", "lightflow", None),
    "liteflownet2": ("liteflownet2", "liteflownet2", None),
    "liteflownet2_odd": ("liteflownet2", "liteflownet2", None),
    "pwcnet": ("pwcnet", "pwcnet", None),
    "pwcnet_odd": ("pwcnet", "pwcnet", None),
    "flownet2c": ("flownet_c", "flownet2c", None),
    "flownet2sd": ("flownet_sd", "flownet2sd", None),
    "raft_basic_odd": ("raft", "raft_basic", 4),
    "raft_small": ("raft_small", "raft_small", 12),
    "raft_small_odd": ("raft_small", "raft_small", 4),
    "gma_odd": ("gma", "gma", 4),
    "deq_flow_v2_tiny": ("deq_flow_tiny", "deq_flow_v2_tiny", None),
    "deq_flow_v1_b": ("deq_flow_b", "deq_flow_v1_b", None),
}


WHOLE = ("deq_solvers.npz", "losses.npz", "ops_correlation.npz")


def collect(source: Path, target: Path) -> None:
    """Writes flows.npz, one array [h, w, 2] a case, and the official names of the DEQ networks' weights; copies WHOLE."""
    flows, names = {}, {}
    for case, (_, rule, iterations) in CASES.items():
        stored = np.load(source / f"{case}.npz")
        meta = json.loads(str(stored["meta_json"]))
        assert iterations is None or meta["iters"] == iterations, case
        flow = stored["flow"]
        flow = flow[0].transpose(1, 2, 0) if flow.ndim == 4 else flow
        flows[case] = np.ascontiguousarray(flow[::STEP, ::STEP])
        if rule.startswith("deq"):
            names[rule] = [row[:3] for row in json.loads((source / f"{rule}.keys.json").read_text())["state_dict"]]
    np.savez_compressed(target / "flows.npz", **flows)
    for name in WHOLE:
        shutil.copyfile(source / name, target / name)
    (target / "names.json").write_text(json.dumps(names, separators=(",", ":")))


if __name__ == "__main__":
    collect(Path(sys.argv[1]), Path(__file__).parent)
