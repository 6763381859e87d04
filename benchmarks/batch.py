"""Throughput of `fleetflow batch`: local processes and Ray against one process with one thread, and the engine's own cost.

    python benchmarks/batch.py --folder /tmp/clips
    python benchmarks/batch.py --folder /tmp/clips --ways local ray
    python benchmarks/batch.py --folder /tmp/clips --overhead
    python benchmarks/batch.py --folder /tmp/clips --ways local --workers 1 --size 448 1024 --format kitti
    python benchmarks/batch.py --folder /tmp/clips --ways local --workers 1 --size 720 1280 --frames 250 --do motion
    python benchmarks/batch.py --memory

Clips are made once and kept in the folder. The ways take turns, each in a process of its own, so that loading torch and the
network counts for all. "Between the ends" leaves that out: from the end of the first clip to that of the last. Processor
time is that of all processes of a way, Ray's own among them; unlike the clock's it hardly depends on what else the machine
does. Linux only.
"""

import argparse
import ctypes
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fleetflow.io.video import VideoWriter

PR_SET_CHILD_SUBREAPER = 36  # of prctl(2): who loses its parent becomes our child, and its processor time is counted
WAYS = {"alone": "one process, one thread", "local": "local", "ray": "Ray"}

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


def write_clips(folder: Path, clips: int, frames: int, size: tuple[int, int]) -> Path:
    """Writes clips of random textures that move, unless they are there; returns the list of them."""
    height, width = size
    listed = folder / f"{clips}x{frames}-{height}x{width}" / "clips.txt"
    if listed.exists():
        return listed
    listed.parent.mkdir(parents=True, exist_ok=True)
    for k in range(clips):
        coarse = np.random.default_rng(k).integers(0, 256, (height // 8 + 1, width // 8 + 9, 3))
        picture = np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8)
        with VideoWriter(listed.parent / f"{k:05d}.mp4", 25) as writer:
            for t in range(frames):
                writer.write(np.ascontiguousarray(picture[:height, t % 64 : t % 64 + width]))
    listed.write_text("".join(f"{k:05d}.mp4\n" for k in range(clips)))
    return listed


def one_process(listed: Path, output: Path, given: argparse.Namespace, ends: list[float]) -> None:
    """What a loop over `fleetflow predict` would do, with the network loaded once."""
    import torch

    from fleetflow.inference.files import predict_video
    from fleetflow.inference.predictor import Predictor

    torch.set_num_threads(1)
    predictor = Predictor(given.model, device="cpu")
    for name in listed.read_text().split():
        predict_video(predictor, listed.parent / name, output / Path(name).stem, [given.format])
        ends.append(time.time())


def a_batch(listed: Path, output: Path, given: argparse.Namespace, ends: list[float]) -> None:
    from fleetflow.batch.run import batch
    from fleetflow.batch.task import Settings

    settings = Settings(given.do, given.model, (given.format,), device="cpu")
    progress = lambda _: ends.append(time.time())  # noqa: E731
    summary = batch(listed, output, settings, on=given.way, workers=given.workers, progress=progress)
    if summary.done != summary.items:
        sys.exit(f"only {summary.done} of {summary.items} clips were done: {summary.failed}")


def measured(way: str, words: list[str]) -> dict[str, float]:
    """Runs a way in a process of its own; returns seconds by the clock, between the ends, and of processors."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    found = subprocess.run([sys.executable, __file__, "--way", way, *words], stdout=subprocess.PIPE, check=True)
    whole = time.time() - began
    try:
        while True:  # the processes that it has left: they end by themselves
            os.wait()
    except ChildProcessError:
        pass
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    ends = json.loads(found.stdout.splitlines()[-1])
    return {"clock": whole, "between": ends[-1] - ends[0], "processor": processor}


def compare(ways: dict[str, str], words: list[str], given: argparse.Namespace) -> None:
    """Measures the ways in turn, and prints medians and ratios within each round."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    rounds: list[dict[str, dict[str, float]]] = []
    for turn in range(given.rounds):
        rounds.append({})
        for name, way in ways.items():
            found = rounds[-1][name] = measured(way, words)
            print(f"round {turn + 1}: {name}: " + ", ".join(f"{k} {v:.1f} s" for k, v in found.items()), flush=True)
    names = list(ways)
    for kind in ("clock", "between", "processor"):
        for name in names:
            middle = statistics.median(each[name][kind] for each in rounds)
            clips = given.clips - (kind == "between")
            line = f"{kind}: {name}: {middle:.1f} s, {1000 * middle / clips:.1f} ms a clip"
            for other in names[: names.index(name)]:
                ratio = statistics.median(each[other][kind] / each[name][kind] for each in rounds)
                line += f"; {ratio:.2f} times as fast as {other}"
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where clips are kept; results go there, and are removed")
    parser.add_argument("--model", default="fastflownet")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--frames", type=int, default=25, help="of each clip")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 448))
    parser.add_argument("--do", default="predict", help="of batches")
    parser.add_argument("--format", default="npz", help="of predict")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["alone", "local"])
    parser.add_argument("--overhead", action="store_true", help="1,000 clips of two frames of 64x64 instead")
    parser.add_argument("--memory", action="store_true", help="lists of 1,000 and 100,000 items instead")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.do != "predict" and "alone" in given.ways and not given.way:
        parser.error("one process alone can predict only; give --ways local")
    folder = given.folder or Path(tempfile.mkdtemp(prefix="fleetflow-batch-"))
    output = Path(tempfile.mkdtemp(dir=folder, prefix="out-")) if folder.exists() else folder / "out"
    try:
        if given.overhead:
            given.clips, given.frames, given.size = 1000, 2, (64, 64)
        if given.memory:
            for count in (1_000, 100_000):
                asked = [sys.executable, "-c", MEMORY, str(output / str(count)), str(count)]
                peak = float(subprocess.run(asked, capture_output=True, check=True).stdout)
                print(f"list of {count:,} items: the run takes {peak:.0f} MiB at most")
            return
        listed = write_clips(folder, given.clips, given.frames, tuple(given.size))
        if given.way:
            ends: list[float] = []
            if given.way == "alone":
                one_process(listed, output, given, ends)
            else:
                a_batch(listed, output, given, ends)
            print(json.dumps(ends))
            return
        numbers = {"clips": given.clips, "frames": given.frames, "workers": given.workers}
        words = [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
        words += ["--folder", str(folder), "--size", *map(str, given.size)]
        words += ["--model", given.model, "--do", given.do, "--format", given.format]
        compare({WAYS[way]: way for way in given.ways}, words, given)
    finally:
        shutil.rmtree(output, ignore_errors=True)
        if not given.folder:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
