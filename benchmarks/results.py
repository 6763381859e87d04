"""The page of results: what others published beside what our weights reach, each figure with its protocol.

`python benchmarks/results.py docs/results.md` writes it. Our figures come from the headers of
the weights in the package, so they are those of the weights that one gets; a test checks that the page is theirs.
"""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

from fleetflow.evaluation.baselines import FARNEBACK_SETTINGS
from fleetflow.models.weights import header, shipped
from fleetflow.registry import models
from fleetflow.types import FleetflowError

Scores = dict[str, dict[str, float]]  # set -> epe (pixels), out3 (%)


class Published(NamedTuple):
    """A row of the literature, as printed: EPE on Sintel train clean and final, EPE and Fl-all on KITTI 2015 train."""

    network: str
    paper: str
    again: str  # as ptlflow measured the same weights
    data: str = ""  # beyond FlyingChairs and FlyingThings3D


NONE = "- - - -"

# Papers, and their weights measured again by ptlflow (docs/source/results, paper_results_things.csv and
# paper_ptlflow_metrics.csv of github.com/hmorimitsu/ptlflow). Networks trained on FlyingChairs and FlyingThings3D.
GENERALISATION = (
    Published("FlowNetS", "4.50 5.45 - -", "3.98 5.26 14.19 51.2"),
    Published("FlowNetC", "4.31 5.87 - -", "3.11 4.61 11.50 44.2"),
    Published("FlowNet2-CSS", "2.10 3.23 8.94 29.77", "2.21 3.55 8.91 29.3"),
    Published("FlowNet2", "2.02 3.54 10.08 30.0", "2.22 3.64 10.09 30.5"),
    Published("PWC-Net", "2.55 3.93 10.35 33.7", "2.64 4.06 10.29 33.0"),
    Published("LiteFlowNet", "2.48 4.04 10.39 28.5", "2.59 4.06 10.65 30.4"),
    Published("LiteFlowNet2", "2.24 3.78 - 25.88", NONE),
    Published("FastFlowNet", "2.89 4.14 12.24 33.1", "2.87 4.19 12.34 33.3"),
    Published("RAFT", "1.43 2.71 5.04 17.4", "1.49 2.69 4.96 17.0"),
    Published("RAFT-small", "2.21 3.35 7.51 26.9", "2.12 3.26 7.46 24.7"),
    Published("GMA", "1.30 2.74 4.69 17.1", "1.32 2.75 4.48 16.5"),
    Published("DEQ-Flow-B v1, 60 evaluations", "1.43 2.79 5.43 16.67", NONE),
    Published("DEQ-Flow-B v1, one-step gradient", "1.46 2.85 5.29 16.24", NONE),
    Published("DEQ-Flow-B (torchdeq, run 1)", "1.386 2.774 4.456 14.18", NONE),
    Published("DEQ-Flow-B (torchdeq, run 2)", "1.435 2.741 4.597 15.12", NONE),
    Published("RAFT-H-1x (RAFT as large as DEQ-Flow-H)", "1.36 2.59 4.47 16.16", NONE),
    Published("DEQ-Flow-H v1, run 1, 55 evaluations", "1.45 2.58 3.97 13.41", NONE),
    Published("DEQ-Flow-H v1, run 2, 55 evaluations", "1.37 2.62 3.97 13.62", NONE),
    Published("DEQ-Flow-H v1, run 3, 55 evaluations", "1.36 2.62 4.02 13.92", NONE),
    Published("DEQ-Flow-H v1, one-step gradient", "1.41 2.76 4.44 14.81", NONE),
    Published("DEQ-Flow-H-1x v2, 60 evaluations", "1.27 2.58 3.76 12.95", NONE),
    Published("DEQ-Flow-H-3x v2, 60 evaluations", "1.27 2.50 3.86 13.52", NONE),
    Published("DEQ-Flow-H-3x v2, 120 evaluations", "1.27 2.48 3.77 13.41", NONE),
    Published("NeuFlow v1", "1.66 3.13 12.4 32.5", "1.66 3.13 11.1 30.9"),
    Published("NeuFlow v2", "1.24 2.67 4.33 15.3", "1.26 2.77 4.07 14.5"),
    Published("RAPIDFlow, 12 iterations", "1.58 2.94 5.87 17.7", "1.57 2.90 5.87 17.7"),
    Published("RPKNet", "1.12 2.45 3.78 13.0", "1.12 2.45 3.79 13.0"),
    Published("SEA-RAFT M", "1.21 4.04 4.29 14.2", "1.27 3.85 4.29 13.9", "TartanAir, a ResNet from ImageNet"),
    Published("FlowFormer", "0.95 2.35 4.09 14.7", "0.94 2.34 4.55 15.0"),
    Published("FlowFormer++", "0.90 2.30 3.93 14.1", "0.90 2.30 4.34 15.0", "YouTube-VOS"),
    Published("MemFlow (several frames)", "0.93 2.08 3.88 13.7", "1.08 2.29 4.10 14.1"),
    Published("DPFlow", "1.02 2.26 3.37 11.1", "1.02 2.27 3.39 11.1"),
    Published("WAFT DAv2-a2", "1.01 2.49 3.28 10.9", "1.01 2.48 3.29 10.7", "a depth network"),
    Published("FlowSeek M", "1.10 2.31 3.99 12.1", NONE, "a depth network"),
)

# FlyingChairs alone: EPE on its validation pairs, and who says so.
CHAIRS = (
    ("FlowNetS", "1.951", "readme of FlowNetPytorch"),
    ("FlowNetC", "1.766", "readme of FlowNetPytorch"),
    ("LiteFlowNet2", "1.57", "model zoo of mmflow"),
    ("LightFlow", "3.14", "its paper, arXiv 1804.05830"),
    ("LightFlow, width 0.75", "3.63", "its paper"),
    ("LightFlow, width 0.5", "4.44", "its paper"),
    ("LightFlow, written anew", "3.45", "readme of LightFlowPytorch"),
)

# Test servers: Sintel EPE clean and final, KITTI 2015 Fl-all, Spring over 1 px; and who says so.
SERVERS = (
    ("FlowNet2", "4.16 5.74 10.41 -", "readme of LiteFlowNet2 (FastFlowNet's table: 11.48 %)"),
    ("PWC-Net", "4.39 - 9.60 -", "tables of FastFlowNet and LiteFlowNet2"),
    ("PWC-Net+", "3.45 4.60 7.72 -", "readme of LiteFlowNet2"),
    ("LiteFlowNet", "4.54 5.38 9.38 -", "readme of LiteFlowNet2"),
    ("LiteFlowNet2", "3.48 4.69 7.62 -", "readme of LiteFlowNet2"),
    ("LiteFlowNet3", "3.03 4.53 - -", "readme of LiteFlowNet2"),
    ("FastFlowNet", "4.89 - 11.22 -", "its readme"),
    ("RAFT, warm start", "- 2.855 5.10 -", "its abstract"),
    ("FlowNet2, not tuned", "- - - 6.710", "project page of MEMFOF"),
    ("RAFT, not tuned", "- - - 6.790", "project page of MEMFOF"),
    ("GMA, not tuned", "- - - 7.074", "project page of MEMFOF"),
    ("RPKNet, not tuned", "- - - 4.809", "project page of MEMFOF"),
    ("MemFlow (several frames)", "- - - 4.482", "project page of MEMFOF"),
    ("SEA-RAFT M", "- - - 3.686", "project page of MEMFOF (its readme: 3.69, with the names of 1px and EPE exchanged)"),
    ("MEMFOF (three frames)", "0.963 - 2.94 3.289", "its abstract, arXiv 2506.23151"),
)

# Others on our 29 real pairs (house protocol below): epe, px, and % over 3 px, by set. The two of OpenCV are those of
# `fleetflow evaluate dis` and `farneback`; a test repeats some of them.
OPENCV = "5.0.0"
PEERS: dict[str, tuple[tuple[float, float], ...]] = {
    "OpenCV Farneback": ((7.37, 57.2), (6.44, 33.9), (45.86, 88.5), (22.15, 61.4), (10.54, 41.0), (1.73, 20.5),
                         (5.16, 40.6), (14.36, 39.2), (0.19, 0.3), (12.64, 42.5)),
    "OpenCV DIS": ((2.50, 15.5), (4.02, 19.7), (8.84, 46.8), (12.12, 36.4), (1.80, 8.0), (0.74, 4.8),
                   (1.46, 9.7), (5.30, 15.6), (0.22, 0.9), (4.11, 17.5)),
    "SPyNet, published": ((7.86, 55.6), (2.77, 15.3), (12.73, 57.5), (18.13, 49.9), (2.90, 19.1), (0.38, 2.7),
                          (0.79, 6.1), (3.02, 13.9), (0.12, 0.0), (5.41, 24.4)),
    "RAFT-small, published": ((1.39, 9.6), (1.64, 9.6), (3.06, 25.3), (6.58, 29.6), (1.62, 8.1), (0.44, 1.7),
                              (0.74, 5.2), (1.79, 12.2), (0.19, 0.0), (1.94, 11.2)),
}  # fmt: skip
SETS = ("eth3d", "flyingchairs", "flyingthings3d", "kitti2012", "kitti2015", "middlebury-flow", "middlebury-stereo",
        "sintel", "yosemite", "mean of sets")  # fmt: skip

PAGE = """# Results

`python benchmarks/results.py docs/results.md` writes this page; our figures are those in the
headers of the weights in the package. A figure is worth no more than its protocol, so each table begins with it.

## Our weights on 29 real pairs

**Protocol.** EPE in pixels / percentage of pixels with an error over 3 px. Whole frames; errors averaged over the known
pixels of each pair, then over the pairs of a set, then over the nine sets. No weights of ours were trained on any of
these sets. SPyNet was tuned on Sintel, RAFT-small (20 iterations) was trained on FlyingChairs and FlyingThings3D: their
figures on those sets flatter them. OpenCV {opencv} on gray frames: DIS with its medium preset, Farneback with
{farneback} (scale, levels, window, iterations, neighborhood, sigma). The same with your copy of the
pairs: `fleetflow evaluate NETWORK pairs --root DIR --without ambush_4_final_0004 --precision fp32` (in bfloat16 figures
move by up to 2 %, with the number of threads too); NETWORK may be dis or farneback, without a precision.

{ours}

These are 29 pairs, not the full training sets of the next table: the two must not be compared. What our weights reach
on the full sets of Sintel and KITTI has not been measured; with the data, `fleetflow evaluate` will say.

## Published: trained on FlyingChairs and FlyingThings3D, measured on the training sets of Sintel and KITTI

**Protocol.** Sintel: EPE over all pixels of clean and final. KITTI 2015: EPE and Fl-all over known pixels, occluded
ones too. A cell is *as the paper prints it* / *the same weights measured again by ptlflow*. Authors differ in what they
seldom write: RAFT, DEQ-Flow and SEA-RAFT average the EPE of KITTI over images and pool Fl over pixels (the official
way); ptlflow averages both over images, mmflow pools both. torchvision's retrained RAFT has 4.51 px per image and
4.80 px pooled. RAFT takes 32 iterations on Sintel and 24 on KITTI, as `fleetflow evaluate` does unless `--iterations` says
otherwise. A row of DEQ-Flow names its evaluations where the scripts that belong to it do (Anderson for v1 B, Broyden
for v1 H, plain iteration for v2; the readme's row of H-3x is that of 120). The last column names data beyond the two
sets.

{generalization}

## Published: FlyingChairs

**Protocol.** EPE in pixels on the validation pairs of FlyingChairs, as each source splits the set (the official split
has 640 of them), after training on the others alone. Means over pairs; mmflow's is over all pixels, which is the same
here, as all frames have one size.

{chairs}

## Published: test servers

**Protocol.** The servers of Sintel (EPE), KITTI 2015 (Fl-all, pooled) and Spring (1px: percentage of pixels that are
over 1 px away from the nearest of the four true vectors of a pixel) on hidden truth, after tuning on the training sets
of the benchmark unless the row says otherwise. `fleetflow submit` writes what they take; no weights of ours were tuned
so, or submitted.

{servers}
"""


def our_scores() -> dict[str, Scores]:
    """Returns the scores in the headers of the weights in the package, by network; weights without are left out."""
    found = {}
    for name in models:
        try:
            scores = json.loads(header(shipped(name)).get("scores", "{}"))
        except FleetflowError:
            continue
        if "mean of sets" in scores:
            found[name] = scores
    return found


def page(ours: dict[str, Scores]) -> str:
    """Returns the page of results as Markdown, given our scores by network."""
    names = ("Sintel clean", "Sintel final", "KITTI 2015 EPE", "KITTI 2015 Fl %")
    published = [
        [row.network, *(f"{a} / {b}" for a, b in zip(row.paper.split(), row.again.split())), row.data]
        for row in GENERALISATION
    ]
    chairs = [list(row) for row in CHAIRS]
    servers = [[name, *values.split(), source] for name, values, source in SERVERS]
    return PAGE.format(
        ours=score_table(ours, tuple(PEERS)),
        opencv=OPENCV,
        farneback=FARNEBACK_SETTINGS,
        chairs=_table(["network", "EPE", "source"], chairs),
        generalization=_table(["network", *names, "more data"], published),
        servers=_table(
            ["network", "Sintel clean", "Sintel final", "KITTI 2015 Fl %", "Spring 1px %", "source"], servers
        ),
    )


def score_table(ours: dict[str, Scores], peers: tuple[str, ...]) -> str:
    """Returns the table of our scores by network and of some of PEERS, sets down: "EPE / % over 3 px"."""
    best_first = sorted(ours.items(), key=lambda item: item[1]["mean of sets"]["epe"])
    columns = {f"`{name}`, ours": [_cell(scores.get(place)) for place in SETS] for name, scores in best_first}
    for name in peers:
        columns[name] = [_cell({"epe": epe, "out3": out3}) for epe, out3 in PEERS[name]]
    return _table(["set", *columns], [[place, *row] for place, row in zip(SETS, zip(*columns.values()))])


# Of the networks with weights in the package: for what, and milliseconds for a pair of 448x1024 on two cores
# (docs/performance.md).
USES = {
    "fastflownet": ("video, live, the default", 54),
    "fastflownet_refine": ("fewer wrong pixels than `fastflownet`, for files rather than live", 160),
    "deq_flow_tiny": ("fine detail, small motion, where time does not matter", 1238),
    "raft_small": ("a small network to fine-tune and to study", 511),
    "liteflownet2": ("stage-wise training; motion that is not large", 200),
}


def network_table(ours: dict[str, Scores]) -> str:
    """Returns the README's table: which network for what, with two peers for comparison."""
    rows = []
    for name, (use, milliseconds) in USES.items():
        if name in ours:
            weights = f"ours, {os.path.getsize(shipped(name)) / 1e6:.1f} MB, Apache-2.0"
            rows.append([f"`{name}`", use, _cell(ours[name]["mean of sets"]), str(milliseconds), weights])
    last = SETS.index("mean of sets")
    for name, milliseconds, weights in (
        ("OpenCV DIS", 20, "none needed"),
        ("RAFT-small, published", 511, "of its authors"),
    ):
        epe, out3 = PEERS[name][last]
        rows.append([name, "for comparison", _cell({"epe": epe, "out3": out3}), str(milliseconds), weights])
    return _table(["network", "for what", "EPE px / % over 3 px", "ms", "weights"], rows)


def _cell(score: dict[str, float] | None) -> str:
    return "-" if score is None else f"{score['epe']:.2f} / {score['out3']:.1f}"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(our_scores()))
