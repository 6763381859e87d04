"""Tracks over several gaps beside plain chaining from frame to frame, on generated clips of 48 frames with true tracks.

python benchmarks/tracks.py docs/lab/tracks.json --clips moving/0 pan/2 drive/0 front/0 shake/1

Choices (the gaps, the cost of a link) were made on split=validation; split=test is reported.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from long_clips import LongClip, drawn_clip

import fleetflow
from fleetflow.evaluation.tap_vid import TapVid, tap_vid
from fleetflow.inference.device import use_threads
from fleetflow.motion.consistency import SHARE, SLACK
from fleetflow.motion.tracks import GAPS, Network, grid, track

EVERY = 16  # pixels between the points


def plain(frames: list[np.ndarray], points: np.ndarray, network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Returns tracks and visibility from frame to frame: the chain always goes on, a point is visible where a link holds."""
    at, paths, seen = points, [points], [np.ones(len(points), bool)]
    for before, after in zip(frames, frames[1:]):
        there, inside = fleetflow.motion.sample(network(before, after), at)
        back, arrived = fleetflow.motion.sample(network(after, before), at + there)
        allowed = SHARE * (np.square(there).sum(-1) + np.square(back).sum(-1)) + SLACK
        at = (at + there).astype(np.float32)
        paths.append(at)
        seen.append(inside & arrived & (np.square(there + back).sum(-1) <= allowed))
    return np.stack(paths, 1), np.stack(seen, 1)


def remembered(network: Network) -> Network:
    """Returns the network, which predicts each pair of one clip once."""
    known: dict[tuple[int, int], np.ndarray] = {}

    def predict(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        key = id(first), id(second)
        if key not in known:
            known[key] = network(first, second)
        return known[key]

    return predict


def scores(clip: LongClip, network: Network, gaps: tuple[int, ...]) -> dict[str, TapVid]:
    points, size = clip.tracks[:, 0], clip.frames[0].shape[:2]
    network = remembered(network)
    found = track(clip.frames, points, network, gaps)
    judged = {"gaps": (found.points, found.visible), "plain": plain(clip.frames, points, network)}
    return {name: tap_vid(*each, clip.tracks, clip.visible, size=size) for name, each in judged.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="fastflownet")
    parser.add_argument("--split", default="test")
    parser.add_argument("--clips", nargs="+", default=["moving/0", "pan/0", "drive/0", "front/0", "shake/0", "small/1"])
    parser.add_argument("--gaps", nargs="+", type=int, default=list(GAPS))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    use_threads(given.threads)
    predictor, rows = fleetflow.Predictor(given.model), {}
    for name in given.clips:
        clip = drawn_clip(name, split=given.split, points=torch.from_numpy(grid((144, 256), EVERY)))
        rows[name] = {kind: score._asdict() for kind, score in scores(clip, predictor, tuple(given.gaps)).items()}
        print(name, {kind: round(100 * row["average_jaccard"], 1) for kind, row in rows[name].items()}, flush=True)
    mean = {
        kind: {field: float(np.mean([row[kind][field] for row in rows.values()])) for field in TapVid._fields}
        for kind in ("gaps", "plain")
    }
    print("mean", json.dumps(mean, indent=1))
    about = {"model": given.model, "split": given.split, "gaps": given.gaps, "points": EVERY}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps({**about, "mean": mean, "clips": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
