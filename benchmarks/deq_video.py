"""Measures what DEQ-Flow saves by starting from the last fixed point, and by solvers better than plain iteration.

    python benchmarks/deq_video.py SHARED NETWORK[:CHECKPOINT] [--height 136] [--frames 4] [--only CLIP ...]

SHARED: the folder beside the repository with data/ and golden/. Without a checkpoint the weights are those of the
reference outputs (golden/fill.py), made so that the map contracts: they say how the solvers behave, not how well
a trained network does. Prints two tables in Markdown.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fleetflow.evaluation.video_reuse import (
    PICARD,
    Race,
    Reuse,
    generated_clips,
    race_cells,
    reuse_cells,
    solver_race,
    video_reuse,
)
from fleetflow.io.images import read_image
from fleetflow.io.video import VideoReader
from fleetflow.models.deq_flow import DEQFlow, own_names
from fleetflow.models.weights import load
from fleetflow.registry import models

RULES = {
    "deq_flow_tiny": "deq_flow_v2_tiny",
    "deq_flow_b": "deq_flow_v1_b",
    "deq_flow_h": "deq_flow_v1_h",
    "deq_flow_h2": "deq_flow_v2_h",
}


def golden(shared: Path, name: str) -> DEQFlow:
    """Returns the network, one of RULES, with the weights of the reference outputs."""
    sys.path.insert(0, str(shared / "golden"))
    import fill

    rule = RULES[name]
    published = json.loads((shared / "golden" / f"{rule}.keys.json").read_text())["state_dict"]
    made = fill.make_state([row[:3] for row in published], rule)
    model = models[name]()
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    model.load_state_dict(counters | own_names({key: torch.from_numpy(value) for key, value in made.items()}))
    return model.eval()


def real_clips(shared: Path, height: int, frames: int) -> dict[str, list[Tensor]]:
    """Returns the frame sequences of SHARED/data, `frames` of each, resized to `height` pixels."""
    data = shared / "data"
    whale, benchmark = data / "sequences" / "rubberwhale", data / "middlebury-flow" / "RubberWhale"
    files = {
        "Yosemite": sorted((data / "sequences" / "yosemite").iterdir()),
        "RubberWhale": [
            *(whale / f"frame{k}.png" for k in ("08", "09")),
            *(benchmark / f"img{k}.png" for k in (1, 2)),
            *(whale / f"frame{k}.png" for k in (12, 13)),
        ],
        "car": sorted((data / "videos" / "car_frames").iterdir()),
    }
    clips = {name: [read_image(path) for path in paths[:frames]] for name, paths in files.items()}
    for name in ("cockatoo", "realshort"):
        reader = iter(VideoReader(data / "videos" / f"{name}.mp4"))
        clips[name] = [picture for picture, _ in zip(reader, range(frames))]
    return {
        name: [resized(torch.from_numpy(picture.copy()), height) for picture in pictures]
        for name, pictures in clips.items()
    }


def resized(picture: Tensor, height: int) -> Tensor:
    """Returns [3, height, W] in [0, 1] for a picture uint8 [h, w, 3]."""
    frame = picture.permute(2, 0, 1)[None].float() / 255
    size = (height, round(height * frame.shape[3] / frame.shape[2]))
    return F.interpolate(frame, size=size, mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)


def tables(reuse: list[Reuse], race: list[Race]) -> str:
    """Returns both results in Markdown."""
    lines = ["| clip | pairs | residual | cold | warm | warm / cold |", "|---|--:|--:|--:|--:|--:|"]
    lines += [f"| {' | '.join(reuse_cells(row))} |" for row in reuse]
    lines += ["", f"| solver | pairs | evaluations | of {PICARD} |", "|---|--:|--:|--:|"]
    lines += [f"| {' | '.join(race_cells(row))} |" for row in race]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("network", help="NETWORK:CHECKPOINT, or a network alone for the weights of the reference")
    parser.add_argument("--height", type=int, default=136)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--only", nargs="+", default=[], help="names of clips")
    args = parser.parse_args()
    model = load(args.network) if ":" in args.network else golden(args.shared, args.network)
    clips = real_clips(args.shared, args.height, args.frames)
    clips |= generated_clips(3, args.frames, args.height, args.height * 4 // 3)
    clips = {name: clip for name, clip in clips.items() if not args.only or name in args.only}
    print(tables(video_reuse(model, clips), solver_race(model, {name: clip[:2] for name, clip in clips.items()})))


if __name__ == "__main__":
    main()
