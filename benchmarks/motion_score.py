"""Scores of generated clips whose motion is known: rank correlations, cuts of generated edits, and what a pair costs.

python benchmarks/motion_score.py docs/lab/motion_score.json

Clips have 12 frames of 512x288, edits are 8 shots of 6 to 11 of them. Constants were chosen on split=validation;
split=test is reported. "objects" is all that moves beside what lies behind, "shown objects" what of it the frames show
(motion/evidence.py, with the true flow), and "shown camera" the camera's motion where the frames show it: on a plain wall
in noise a plain thing moves unseen, and so does the camera. "true flow" scores the clips with a network that makes no
error, which is the most that any can have. Intervals hold nine of ten correlations of clips drawn anew from these
(bootstrap).
"""

import argparse
import json
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from long_clips import LongClip, drawn_clip
from PIL import Image

import fleetflow
from fleetflow.data.datasets.footage import seed_of
from fleetflow.evaluation.baselines import classical
from fleetflow.inference.device import use_threads
from fleetflow.motion.camera import affine_flows, fit_similarity
from fleetflow.motion.cuts import START, find_cuts, is_cut
from fleetflow.motion.evidence import LONG, contrasts, moved_beside
from fleetflow.motion.layers import SHOWN, followed, is_shown
from fleetflow.motion.scores import RATE, WIDTH, ClipMotion, score
from fleetflow.ops.warp import warp

KINDS = ("moving", "ground", "shake", "pan", "drive", "front", "small", "plain")
SHOTS, EDITS = 8, 20


def ranks(values: list[float]) -> np.ndarray:
    """Returns ranks from 0; equal values share the mean of theirs."""
    values = np.asarray(values)
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])


def spearman(one: list[float], other: list[float]) -> float:
    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def interval(one: list[float], other: list[float], times: int = 1000) -> list[float]:
    """Returns the 5th and 95th percentile of the rank correlation of pairs drawn anew, with replacement, from these."""
    generator, pairs = np.random.default_rng(0), np.array((one, other))
    drawn = [pairs[:, generator.integers(0, len(one), len(one))] for _ in range(times)]
    return np.percentile([spearman(*each) for each in drawn], (5, 95)).round(3).tolist()


def true_flows(clip: LongClip) -> torch.Tensor:
    """Returns [T - 1, 2, h, w], the true flows as a network would see them, at a width of WIDTH."""
    return at_width(torch.stack([torch.where(pair.valid, pair.flow, 0) for pair in clip.samples]))


def at_width(flows: torch.Tensor) -> torch.Tensor:
    """Returns flows [N, 2, h, w] made WIDTH wide."""
    shrink = flows.shape[3] / WIDTH
    return F.interpolate(flows, scale_factor=1 / shrink, mode="area") / shrink


def small_pictures(clip: LongClip) -> list[np.ndarray]:
    """Returns the frames as `score` gives them to a network."""
    height, width = clip.frames[0].shape[:2]
    size = (WIDTH, round(height * WIDTH / width))
    return [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in clip.frames]


def score_of_truth(clip: LongClip) -> ClipMotion:
    """Returns the score of a clip with its true flows for a network: what its frames show of its motion."""
    flows = true_flows(clip).permute(0, 2, 3, 1).numpy()
    known = {(a.tobytes(), b.tobytes()): flow for (a, b), flow in zip(pairwise(small_pictures(clip)), flows)}
    return score(clip.frames, lambda first, second: known[first.tobytes(), second.tobytes()], fps=RATE)


def shown_camera(clip: LongClip) -> float:
    """Returns pixels a pair at the width of the clip: the mean true motion of what lies behind; 0 if the frames do not show it.

    They do where what lies behind is more alike, in frames one or LONG pairs apart, with the true motion taken back than as
    it is, and than moved the other way. On a plain wall it is not.
    """
    planes, behind = contrasts(small_pictures(clip)), at_width(torch.stack(clip.behind).nan_to_num())
    own = torch.stack([(pair.flow - flow).norm(dim=0) < 0.5 for pair, flow in zip(clip.samples, clip.behind)])
    known = own & torch.stack([pair.valid for pair in clip.samples])
    places = (F.interpolate(known[:, None].float(), size=behind.shape[2:], mode="area") == 1).float()
    motions = [fit_similarity(flow.permute(1, 2, 0).numpy()) for flow in behind]
    for count in (1, min(LONG, len(motions))):
        ways = affine_flows(followed(motions, count), behind.shape[2:])
        there = [warp(places[: len(ways)], way) == 1 for way in (torch.zeros_like(ways), ways, -ways)]
        if is_shown(ways, planes, torch.stack(there).all(0), SHOWN):
            return float(np.nanmean(clip.camera))
    return 0.0


def shown_objects(clip: LongClip) -> float:
    """Returns pixels a pair at the width of the clip: the mean true motion beside the camera's that its frames show."""
    flows, shrink = true_flows(clip), clip.frames[0].shape[1] / WIDTH
    cameras = [fit_similarity(flow) for flow in flows.permute(0, 2, 3, 1).numpy()]
    return shrink * float(moved_beside(flows, cameras, contrasts(small_pictures(clip))).norm(dim=1).mean())


def f1_of_cuts(clips: dict[str, LongClip], split: str) -> dict[str, float]:
    """Returns the hits, misses, false alarms and F1 of cuts in edits; one cut in seven is to the same place, mirrored."""
    generator = np.random.default_rng(seed_of("edits", split))
    hits = misses = false = 0
    for _ in range(EDITS):
        frames, true, last = [], [], ""
        for shot in range(SHOTS):
            mirrored = bool(last) and generator.uniform() < 1 / 7
            name = last if mirrored else str(generator.choice([name for name in clips if name != last]))
            part = clips[name].frames[: int(generator.integers(6, 12))]
            true += [len(frames)] if shot else []
            frames += [np.ascontiguousarray(frame[::-1, ::-1]) for frame in part] if mirrored else part
            last = "" if mirrored else name
        found = find_cuts(frames)
        hits += len({*found} & {*true})
        misses += len({*true} - {*found})
        false += len({*found} - {*true})
    return {"hits": hits, "misses": misses, "false alarms": false, "f1": 2 * hits / (2 * hits + misses + false)}


def cost(frames: list[np.ndarray], network, dis, runs: int = 3) -> dict[str, float]:
    """Returns milliseconds of processor time a looked-at pair, the least of some runs, and ratios to DIS alone."""

    def least(action) -> float:
        times = []
        for _ in range(runs):
            start = time.process_time()
            action()
            times.append(time.process_time() - start)
        return 1000 * min(times) / (len(frames) - 1)

    size = (WIDTH, round(frames[0].shape[0] * WIDTH / frames[0].shape[1]))
    small = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames]
    times = {
        "score": least(lambda: score(frames, network, fps=RATE)),
        "score with dis": least(lambda: score(frames, dis, fps=RATE)),
        "dis at 256": least(lambda: [dis(a, b) for a, b in zip(small, small[1:])]),
        "dis at the size of the clip": least(lambda: [dis(a, b) for a, b in zip(frames, frames[1:])]),
        "cuts": least(lambda: [is_cut(frame, START) for frame in frames]),
    }
    return {"pixels": list(frames[0].shape[:2]), "ms": {name: round(value, 1) for name, value in times.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="fastflownet")
    parser.add_argument("--split", default="test")
    parser.add_argument("--number", type=int, default=3, help="clips of each class")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    use_threads(given.threads)
    network, method = fleetflow.Predictor(given.model), classical("dis")
    networks = {given.model: network, "dis": lambda first, second: method(first, second)}
    names = [f"{kind}/{number}" for number in range(given.number) for kind in KINDS]
    clips = {name: drawn_clip(name, split=given.split, count=12, slower=0.5, scale=1.0) for name in names}
    scale = RATE * WIDTH / clips[names[0]].frames[0].shape[1]
    true = {
        part: [scale * float(np.nanmean(getattr(clip, part))) for clip in clips.values()]
        for part in ("camera", "objects")
    }
    true["shown camera"] = [scale * shown_camera(clip) for clip in clips.values()]
    true["shown objects"] = [scale * shown_objects(clip) for clip in clips.values()]
    result: dict = {"model": given.model, "split": given.split, "clips": len(clips), "spearman": {}}
    scores = {label: partial(score, network=each, fps=RATE) for label, each in networks.items()}
    found_by = {label: [each(clip.frames) for clip in clips.values()] for label, each in scores.items()}
    found_by["true flow"] = [score_of_truth(clip) for clip in clips.values()]
    for label, found in found_by.items():
        scored = {part: [getattr(row, part.split()[-1]) for row in found] for part in true}
        result["spearman"][label] = {
            part: {"rank correlation": spearman(true[part], scored[part]), "5-95 %": interval(true[part], scored[part])}
            for part in true
        }
        result.setdefault("rows", {})[label] = [
            [name, *(round(values[k], 2) for values in true.values()), round(row.camera, 2), round(row.objects, 2)]
            for k, (name, row) in enumerate(zip(clips, found))
        ]
        print(label, result["spearman"][label], flush=True)
    result["cuts"] = f1_of_cuts(clips, given.split)
    print("cuts", result["cuts"], flush=True)
    frames = clips[names[0]].frames
    large = [np.asarray(Image.fromarray(frame).resize((1280, 720))) for frame in frames]
    result["cost"] = [cost(each, network, networks["dis"]) for each in (frames, large)]
    print("cost", json.dumps(result["cost"]))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
