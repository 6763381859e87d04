"""Throughput of `fleetflow batch`: local processes and Ray against one process with one thread, and the engine's own cost.

    python benchmarks/batch.py --clips 40 --frames 60 --size 448 1024
    python benchmarks/batch.py --overhead --ray

The three ways take turns, and every figure is a ratio within one run: nothing else should run on the machine.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fleetflow.batch.run import batch
from fleetflow.batch.task import Settings
from fleetflow.inference.files import predict_video
from fleetflow.inference.predictor import Predictor
from fleetflow.io.video import VideoWriter

MEMORY = """
import resource, sys
from fleetflow.batch.manifest import Item, checked
from fleetflow.batch.records import Store
store = Store(sys.argv[1])
store.save_items(checked(Item(f"clip-{k}", f"/clips/{k:09d}.mp4") for k in range(int(sys.argv[2]))))
for shard in store.shards():
    for item in store.items(shard):
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def write_clips(folder: Path, clips: int, frames: int, size: tuple[int, int]) -> list[Path]:
    """Writes clips of random textures that move; returns their paths, and a list of them beside them."""
    height, width = size
    paths = []
    for k in range(clips):
        coarse = np.random.default_rng(k).integers(0, 256, (height // 8 + 1, width // 8 + 9, 3))
        picture = np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8)
        paths.append(folder / f"{k:05d}.mp4")
        with VideoWriter(paths[-1], 25) as writer:
            for t in range(frames):
                writer.write(np.ascontiguousarray(picture[:height, t % 64 : t % 64 + width]))
    (folder / "clips.txt").write_text("\n".join(map(str, paths)))
    return paths


def one_process(paths: list[Path], output: Path, settings: Settings) -> float:
    """Returns the seconds that one process with one thread takes, without the time to load torch and the network."""
    torch.set_num_threads(1)
    predictor = Predictor(settings.model, device="cpu")
    began = time.perf_counter()
    for path in paths:
        predict_video(predictor, path, output / path.stem, settings.format)
    return time.perf_counter() - began


def a_batch(folder: Path, output: Path, settings: Settings, on: str, workers: int) -> float:
    """Returns the seconds that a batch takes, from its first line to its summary."""
    began = time.perf_counter()
    summary = batch(folder / "clips.txt", output, settings, on=on, workers=workers)
    seconds = time.perf_counter() - began
    if summary.done != summary.items:
        sys.exit(f"only {summary.done} of {summary.items} clips were done: {summary.failed}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fastflownet")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--frames", type=int, default=60, help="of each clip")
    parser.add_argument("--size", type=int, nargs=2, default=(448, 1024))
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", action="store_true", help="also on Ray")
    parser.add_argument("--overhead", action="store_true", help="1,000 clips of two frames of 64x64 instead")
    parser.add_argument("--memory", action="store_true", help="lists of 1,000 and 100,000 items instead")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fleetflow-batch-"))
    try:
        if given.memory:
            for count in (1_000, 100_000):
                words = [sys.executable, "-c", MEMORY, str(folder / str(count)), str(count)]
                peak = float(subprocess.run(words, capture_output=True, check=True).stdout)
                print(f"list of {count:,} items: the run takes {peak:.0f} MiB at most")
            return
        if given.overhead:
            given.clips, given.frames, given.size, given.rounds = 1000, 2, (64, 64), 1
        settings = Settings(model=given.model, format=("npz",), device="cpu")
        paths = write_clips(folder, given.clips, given.frames, tuple(given.size))
        ways = {"one process, one thread": lambda output: one_process(paths, output, settings)}
        ways["local"] = lambda output: a_batch(folder, output, settings, "local", given.workers)
        if given.ray:
            ways["ray"] = lambda output: a_batch(folder, output, settings, "ray", given.workers)
        compare(ways, folder, given)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compare(ways: dict, folder: Path, given: argparse.Namespace) -> None:
    """Times the ways in turn, and prints seconds, frames a second, and ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(given.rounds):
        for name, way in ways.items():
            seconds[name].append(way(folder / f"out-{turn}-{name[:5]}"))
            shutil.rmtree(folder / f"out-{turn}-{name[:5]}", ignore_errors=True)
            print(f"round {turn + 1}: {name}: {seconds[name][-1]:.1f} s", flush=True)
    alone = statistics.median(seconds["one process, one thread"])
    local = statistics.median(seconds["local"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        line = f"{name}: {middle:.1f} s, {given.clips * given.frames / middle:.1f} frames/s"
        line += f", {alone / middle:.2f} times one process, {local / middle:.2f} of local"
        if given.overhead and name != "one process, one thread":
            line += f"; at most {1000 * middle / given.clips:.1f} ms an item, start included"
        print(line)


if __name__ == "__main__":
    main()
