"""Measures streams: against the same flows pair by pair, in memory, and what a warm start is worth.

    python benchmarks/stream.py clip CLIP NETWORK[:CHECKPOINT] ... [--frames 300] [--size 720 1280] [--one]
    python benchmarks/stream.py warm NETWORK[:CHECKPOINT] ... --root PHOTOS [--clips 2]

clip: each network predicts CLIP (played forth and back until there are enough frames), frame by frame in turns with the
same pairs through a `Predictor`: so both see the same machine, and time is that of the processor. Prints the largest
difference of the flows, the throughput of the stream over that pair by pair, in one direction and in both, and how memory
grew from frame 50 to the last one.
warm: EPE and percentage over 3 px on clips of `footage`, split=validation, but their first pairs: cold with 12 iterations,
warm with 4 behind a first pair of 12, and cold with 4. Prints Markdown.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import chain, cycle, islice
from pathlib import Path
from statistics import median

import numpy as np
import torch

from fleetflow.data.dataset import to_images
from fleetflow.data.datasets.footage import CLASSES, footage
from fleetflow.inference.memory import resident
from fleetflow.inference.predictor import Predictor
from fleetflow.inference.stream import Stream
from fleetflow.io.video import read_video

SETTLED = 50  # frames, after which memory must not grow
HELD = 24  # frames of the clip that are held in memory
WAYS = {"cold, 12": (12, False), "warm, 4": (12, True), "cold, 4": (4, False)}
WARM = 4  # iterations of a warm search


def frames_of(path: Path, count: int) -> Iterator[np.ndarray]:
    """Yields `count` frames: the first HELD of the clip, forth and back."""
    held = list(islice(read_video(path), HELD))
    return islice(chain.from_iterable(cycle((held[:-1], held[:0:-1]))), count)


def by_clip(
    network: str,
    path: Path,
    count: int,
    size: tuple[int, int] | None,
    iterations: int | None,
    directions: tuple[bool, ...] = (False, True),
) -> str:
    """Returns the row of a network in the table of clips. directions: whether the flow back is asked for, too."""
    predictor = Predictor(network, size=size, iterations=iterations)
    cells = [f"`{network}`"]
    for both in directions:
        stream, last = Stream(predictor, warm_start=False, occlusion=both), None
        seconds, memory, apart = ([], []), [], 0.0
        for k, frame in enumerate(frames_of(path, count)):
            began = time.process_time()
            step = stream(frame)
            between = time.process_time()
            if step is not None:
                flow = predictor(last, frame)
                if both:
                    predictor(frame, last)
                ended = time.process_time()
                apart = max(apart, float(np.abs(flow - step.flow).max()))
                if k > 3:
                    seconds[0].append(between - began)
                    seconds[1].append(ended - between)
            memory.append(resident(predictor.device))
            last = frame
        grown = memory[-1] / memory[min(SETTLED, len(memory) - 1)] - 1
        cells += [f"{apart:.1e}", f"{median(seconds[1]) / median(seconds[0]):.2f}", f"{100 * grown:.1f} %"]
    return f"| {' | '.join(cells)} |"


def by_start(network: str, root: Path | None, clips: int) -> list[str]:
    """Returns the rows of a network in the table of starts."""
    scores: dict[str, dict[str, list[tuple[float, float]]]] = {way: {} for way in WAYS}
    for way, (iterations, warm) in WAYS.items():
        predictor = Predictor(network, iterations=iterations)
        for name, about in CLASSES.items():
            limit = clips * about.pairs
            files, stream = footage(root, split="validation", classes=name, limit=limit, size="256x448"), None
            for k in range(len(files)):
                sample = files[k]
                image1, image2 = to_images(sample)
                if k % about.pairs == 0:
                    stream = Stream(predictor, warm_start=warm, warm_iterations=WARM)
                    stream(image1)
                step = stream(image2)
                if k % about.pairs:
                    error = (torch.from_numpy(step.flow).permute(2, 0, 1) - sample.flow).norm(dim=0)[sample.valid]
                    over = 100 * (error > 3).float().mean().item()
                    scores[way].setdefault(name, []).append((error.mean().item(), over))
    rows = []
    for way, classes in scores.items():
        means = [tuple(sum(column) / len(rows) for column in zip(*rows)) for rows in classes.values()]
        whole = tuple(sum(column) / len(means) for column in zip(*means))
        rows.append(
            f"| `{network}` | {way} | {' | '.join(f'{epe:.2f} / {over:.1f}' for epe, over in (*means, whole))} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    clip, warm = jobs.add_parser("clip"), jobs.add_parser("warm")
    clip.add_argument("clip", type=Path)
    clip.add_argument("--frames", type=int, default=300)
    clip.add_argument("--size", type=int, nargs=2)
    clip.add_argument("--iterations", type=int)
    clip.add_argument("--one", action="store_true", help="one direction only")
    warm.add_argument("--root", type=Path)
    warm.add_argument("--clips", type=int, default=2)
    for job in (clip, warm):
        job.add_argument("networks", nargs="+")
    options = parser.parse_args()
    if options.job == "warm":
        print(
            f"| network | start, iterations | {' | '.join((*CLASSES, 'mean'))} |\n|---|---|{'--:|' * (len(CLASSES) + 1)}"
        )
        for network in options.networks:
            print("\n".join(by_start(network, options.root, options.clips)), flush=True)
        return
    columns = ("largest difference, px", "throughput over pair by pair", "memory grew")
    directions = {"one direction": False} if options.one else {"one direction": False, "both": True}
    both = [f"{column}, {way}" for way in directions for column in columns]
    print(f"| network | {' | '.join(both)} |\n|---|{'--:|' * len(both)}")
    for network in options.networks:
        size = tuple(options.size) if options.size else None
        row = by_clip(network, options.clip, options.frames, size, options.iterations, tuple(directions.values()))
        print(row, flush=True)


if __name__ == "__main__":
    main()
