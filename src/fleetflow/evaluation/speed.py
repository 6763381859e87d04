"""Benchmark: time per pair, always as ratios to other ways of computing it in the same process."""

import copy
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fleetflow.data.dataset import Files, to_frame
from fleetflow.evaluation.baselines import CLASSICAL, DIS, Method, method
from fleetflow.evaluation.evaluate import evaluate
from fleetflow.evaluation.machine import in_line, machine
from fleetflow.evaluation.protocol import fit_for, protocol
from fleetflow.evaluation.report import plain
from fleetflow.evaluation.submit import predict_flow
from fleetflow.inference.cuda_graphs import Graphed
from fleetflow.inference.device import Precision, autocast
from fleetflow.inference.predictor import Predictor
from fleetflow.io.atomic import write_atomically, writing
from fleetflow.io.images import list_frames, read_image
from fleetflow.io.video import VideoReader
from fleetflow.models.base import FlowModel
from fleetflow.models.catalog import multiply_adds
from fleetflow.models.weights import header, load, members, shipped
from fleetflow.ops.kernels import reference
from fleetflow.registry import unknown
from fleetflow.types import FleetflowError

LEAST, SLOW = 5, 2000.0  # runs that a function gets at least, unless one takes so many milliseconds
COLORS = {True: "tab:blue", False: "dimgray"}  # of networks of ours, and of peers
DOT = 4  # pixels from the middle of a dot to its side
LABELS = tuple((dx, dy, side) for dy in (4, -11, 14, -21, 24, -31, 34) for dx, side in ((6, "left"), (-6, "right")))
CLIP = 6  # frames of a clip that video_reuse is measured on
COLUMNS = ["", "p50 ms", "p95 ms", "runs", "x DIS", "x plain", "EPE px"]  # of `table`; x: times as long as that


class Timing(NamedTuple):
    """Milliseconds per call: median and 95th percentile of `runs` calls, taken in turn with the others."""

    name: str
    p50: float
    p95: float
    runs: int
    epe: float | None = None  # pixels, mean of the sets, where pairs were given


def time_in_turn(functions: dict[str, Callable[[], object]], seconds: float, rare: frozenset[str]) -> list[Timing]:
    """Returns the timing of each function; they run in turn, so that a noisy machine slows all alike.

    rare: those that run only every fourth round. What takes less than 2 s runs five times at least, after two calls
    that are not counted.
    """
    for function in functions.values():
        function()
        function()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    began, turn = time.perf_counter(), 0

    def enough(times: list[float]) -> bool:
        return len(times) >= LEAST or bool(times) and min(times) >= SLOW

    while (early := time.perf_counter() - began < seconds) or not all(map(enough, taken.values())):
        for name, function in functions.items():
            if name in rare and turn % 4 and early:
                continue
            start = time.perf_counter()
            function()
            taken[name].append(1000 * (time.perf_counter() - start))
        turn += 1
    return [
        Timing(name, float(np.percentile(times, 50)), float(np.percentile(times, 95)), len(times))
        for name, times in taken.items()
    ]


class Report(NamedTuple):
    """What a benchmark found of one network on this machine; the fields of a JSON row."""

    network: str
    weights: str  # "package", "random", or the file
    sha256: str  # of the weights
    size: tuple[int, int]  # height, width
    batch: int  # pairs that ours and the plain definition are given at once; milliseconds are of one pair
    iterations: int | None  # of refinement; None for a network without
    device: str
    precision: str
    threads: int
    timings: list[Timing]  # of one pair: ours, the plain definition, the peers
    difference: float  # pixels, mean over the example pair: our precision against float32
    training: float | None  # samples per second, 256x320, batch 8, forward, backward and update
    memory: float | None  # MB that a prediction of a batch needs beyond the loaded network; None: not measured
    parameters: int
    multiply_adds_448x1024: int | None  # of a pair of that size, own iterations; None where other iterations were taken
    epe: float | None  # pixels, mean of the sets, where pairs were given; None for random weights
    pairs: int  # that the EPE was measured on
    protocol: dict[str, str]  # how it was measured
    machine: dict[str, str]  # processor, system, versions

    def times(self, timing: Timing, name: str) -> float | None:
        """Returns a time as a multiple of that of the first row whose name ends so; None where there is none."""
        base = [row.p50 for row in self.timings if row.name.endswith(name)]
        return timing.p50 / base[0] if base else None


PLAIN = "plain fp32"
DIS_NAME = CLASSICAL[DIS]


def benchmark(
    networks: tuple[str, ...],
    height: int,
    width: int,
    *,
    device: str = "cpu",
    threads: int = 0,
    precision: Precision = "auto",
    iterations: int | None = None,
    seconds: float = 20.0,
    peers: tuple[str, ...] = ("dis",),
    training: Callable[[str, torch.dtype, float], float] | None = None,
    pairs: Files | None = None,
    dataset: str = "pairs",
    batch: int = 1,
) -> Iterator[Report]:
    """Yields for each network timings of one pair [height, width], loss of precision, memory, speed of training.

    networks: names, NETWORK:CHECKPOINT, files of ours, blends A+B. pairs: pairs with truth to measure the accuracy of
    networks with weights and of peers on; dataset: theirs. iterations: of refinement; None takes each network's own.
    training: measures samples per second of (network, dtype, seconds), such as `training.speed.training_speed`.
    batch: pairs at once, as tensors, for ours and the plain definition; peers and accuracy take one pair after another.
    Timed in turn: ours; the plain definition, which is the same network in float32, contiguous, under
    `fleetflow.reference()`, frames as tensors; and the peers: dis, farneback, deepflow (OpenCV, on the CPU), or a
    Python file with a function predict(image1, image2) -> flow, all on uint8 [H, W, 3] RGB and float32 [H, W, 2].
    Raises FleetflowError, before anything is timed, for unknown names, impossible sizes and peers that fail.
    """
    prepare(threads, (height, width))
    if batch < 1:
        raise FleetflowError(f"--batch is {batch}; expected a number of pairs from 1 on")
    for network in networks[1:]:
        load_any(network)  # what is wrong with it is said before the first is measured
    rivals = [_peer(name) for name in dict.fromkeys(peers)]
    if len({rival.name for rival in rivals}) < len(rivals):
        raise FleetflowError(f"two of the peers {', '.join(peers)} have the same name; rename one of the files")
    accuracy = {rival.name: _epe(rival, pairs) for rival in rivals} if pairs is not None else {}
    images = _example()
    image1, image2 = (_tiled(image, height, width) for image in images)
    for network in networks:
        model, variant, known = fit_for(load_any(network), dataset), _variant(network), has_weights(network)
        exact = copy.deepcopy(model)  # before the predictor fuses it; random weights are the same, too
        predictor = Predictor(model, device=device, precision=precision)
        where = predictor.device
        exact = exact.to(where)
        frames = [to_frame(image).repeat(batch, 1, 1, 1).to(where) for image in (image1, image2)]

        ours = partial(predict_flow, predictor, iterations=iterations)
        batched: dict[str, Callable[[], object]] = {
            f"{network}, fleetflow": call(predictor, image1, image2, batch, iterations),
            f"{network}, {PLAIN}": partial(_definition, exact, frames, iterations),
        }
        functions = {**batched, **{rival.name: partial(rival, image1, image2) for rival in rivals}}
        timings = [
            timing._replace(p50=timing.p50 / batch, p95=timing.p95 / batch) if timing.name in batched else timing
            for timing in time_in_turn(functions, seconds, frozenset({f"{network}, {PLAIN}"}))
        ]
        epe = _epe(predictor, pairs, iterations) if pairs is not None and known else None
        epes = {timings[0].name: epe, **accuracy}
        trained = training is not None and where.type == "cpu" and len(members(network)) == 1
        same = partial(predict_flow, Predictor(exact, device=device, precision="fp32"), iterations=iterations)
        yield Report(
            network=network,
            weights=("package" if network == variant else network) if known else "random",
            sha256=predictor.label()["sha256"],
            size=(height, width),
            batch=batch,
            iterations=exact.iterations if iterations is None else iterations,
            device=torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
            precision=str(predictor.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            timings=[timing._replace(epe=epes.get(timing.name)) for timing in timings],
            difference=float(np.linalg.norm(ours(*images) - same(*images), axis=2).mean()),
            training=training(variant, predictor.dtype, seconds / 2) if trained else None,
            memory=_memory(network, height, width, batch, device, precision, iterations),
            parameters=sum(weight.numel() for weight in exact.parameters()),
            multiply_adds_448x1024=sum(map(multiply_adds, variant.split("+")))
            if iterations in (None, exact.iterations)
            else None,
            epe=epe,
            pairs=len(pairs) if pairs is not None else 0,
            protocol=protocol(predictor, pairs, iterations) if epe is not None else {},
            machine=machine(),
        )


def prepare(threads: int, size: tuple[int, int] = (1, 1)) -> None:
    """Gives torch so many threads, 0 leaves it those it has; raises FleetflowError for impossible threads and sizes."""
    if threads < 0:
        raise FleetflowError(f"--threads is {threads}; expected a number of threads, or 0 for all")
    if min(size) < 1:
        raise FleetflowError(f"--size is {size[0]} {size[1]}; expected a height and a width in pixels")
    if threads:
        torch.set_num_threads(threads)


def call(
    predictor: Predictor, image1: np.ndarray, image2: np.ndarray, batch: int, iterations: int | None
) -> Callable[[], object]:
    """Returns a function that predicts a pair of pictures, or so many copies of it at once, as a batch of tensors."""
    if batch == 1:
        return partial(predict_flow, predictor, image1, image2, iterations=iterations)
    frames = [to_frame(image).repeat(batch, 1, 1, 1).to(predictor.device) for image in (image1, image2)]
    frames = [frame.contiguous(memory_format=torch.channels_last) for frame in frames]
    run = Graphed(predictor.model)

    def predict() -> Tensor:
        with torch.inference_mode(), autocast(predictor.device, predictor.dtype):
            return run(*frames, None, iterations).flow.float().cpu()

    return predict


def _definition(model: FlowModel, frames: list[Tensor], iterations: int | None) -> Tensor:
    with torch.inference_mode(), reference():
        return model(*frames, iterations=iterations).flow.cpu()


def _peer(name: str) -> Method:
    """A classical method by name, or the function `predict` of a Python file (the user's own, so it is run)."""
    found = method(name)
    if found is None:
        raise unknown("peer", name, [*CLASSICAL, "FILE.py"])
    return found


def _epe(predict: Predictor | Method, pairs: Files, iterations: int | None = None) -> float:
    return evaluate(predict, pairs, iterations=iterations)["mean of sets"]["epe"]


def _memory(
    network: str, height: int, width: int, batch: int, device: str, precision: Precision, iterations: int | None
) -> float | None:
    """MB by which a prediction raises the peak, in its own process, as a peak does not go down; None where it fails."""
    code = (
        "import sys, torch\n"
        "from fleetflow.evaluation import speed as b\n"
        "network, height, width, batch, device, precision, iterations, threads = sys.argv[1:]\n"
        "torch.set_num_threads(int(threads))\n"
        "p = b.Predictor(b.load_any(network), device=device, precision=precision)\n"
        "iterations = int(iterations) if iterations else None\n"
        "b.predict_flow(p, *(b._tiled(image, 64, 64) for image in b._example()), iterations=iterations)\n"
        "images = [b._tiled(image, int(height), int(width)) for image in b._example()]\n"
        "peak = torch.cuda.max_memory_allocated if p.device.type == 'cuda' else b._peak\n"
        "function = b.call(p, *images, int(batch), iterations)\n"
        "peak(); before = peak(); function(); print((peak() - before) / 1e6)\n"
    )
    ways = (device, precision, "" if iterations is None else iterations, torch.get_num_threads())
    values = (network, height, width, batch, *ways)
    run = subprocess.run([sys.executable, "-c", code, *map(str, values)], capture_output=True, text=True)
    return float(run.stdout) if run.returncode == 0 else None


def _peak() -> int:
    """Bytes of memory that this process has held at most: since the last call on Linux, elsewhere since its start."""
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _example() -> list[np.ndarray]:
    folder = Path(str(resources.files("fleetflow") / "example"))
    return [read_image(folder / f"frame{k}.png") for k in (1, 2)]


def _tiled(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The picture, repeated and cut to a size."""
    rows, columns = -(-height // image.shape[0]), -(-width // image.shape[1])
    return np.ascontiguousarray(np.tile(image, (rows, columns, 1))[:height, :width])


def load_any(network: str) -> FlowModel:
    """Returns the network, with its weights where the package has them (the time does not depend on them)."""
    return load(network, weights=has_weights(network))


def has_weights(network: str) -> bool:
    """Returns True for NETWORK:CHECKPOINT, for a file, and for a network whose weights are in the package."""
    try:
        return all(":" in part or "." in part or bool(shipped(part)) for part in members(network))
    except FleetflowError:
        return False


def _variant(network: str) -> str:
    """The name of the network in NETWORK, NETWORK:CHECKPOINT or the path of a file of ours; A+B of a blend."""
    if "." in network and ":" not in network:
        return header(network)["network"]
    return "+".join(part.partition(":")[0] for part in members(network))


# ---- what is written ----


def table(report: Report) -> list[list[str]]:
    """Returns the timings as text, a row for each of COLUMNS."""
    rows = []
    for timing in report.timings:
        values = [report.times(timing, DIS_NAME), report.times(timing, PLAIN), timing.epe]
        cells = ["-" if value is None else _digits(value) for value in values]
        rows.append([timing.name, f"{timing.p50:.1f}", f"{timing.p95:.1f}", str(timing.runs), *cells])
    return rows


def _digits(value: float) -> str:
    """The value with three digits that say something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def facts(report: Report) -> list[str]:
    """Returns what else was found, one line each."""
    ours = report.timings[0]
    dis, plain_time = report.times(ours, DIS_NAME), report.times(ours, PLAIN)
    lines = [f"{_digits(1 / plain_time)} times as fast as the plain definition"]
    if dis:
        lines[0] = f"{_digits(dis)} times the time of DIS; {lines[0]}"
    if report.batch > 1:
        lines.append(f"batches of {report.batch}, as tensors; milliseconds are of one pair, peers take single ones")
    if report.iterations:
        lines.append(f"{report.iterations} refinement iterations")
    adds = report.multiply_adds_448x1024
    cost = "" if adds is None else f", {adds / 1e9:.1f} G multiply-adds at 448x1024"
    lines.append(f"{report.parameters:,} parameters{cost}")
    memory = "could not be measured" if report.memory is None else f"{report.memory:.0f} MB"
    lines.append(f"memory of a {'prediction' if report.batch == 1 else 'batch'}: {memory}")
    lines.append(f"mean difference to float32: {report.difference:.4f} px")
    if report.training:
        lines.append(f"training at 256x320, batch 8: {report.training:.1f} samples/s")
    if report.weights == "random":
        lines.append("weights are random: no accuracy is measured, and the difference is that of random weights")
    if report.epe is not None:
        lines.append(f"EPE, mean of the sets, {report.pairs} pairs: {report.epe:.2f} px")
        lines.append(f"protocol: {in_line(report.protocol)}")
    return lines


def clips(paths: tuple[Path, ...]) -> dict[str, list[Tensor]]:
    """Returns the first frames of videos and of folders of pictures, by name, as `video_reuse` takes them."""
    found = {}
    for path in paths:
        pictures = map(read_image, list_frames(path)) if path.is_dir() else VideoReader(path)
        name = str(path) if path.name in found else path.name
        found[name] = [to_frame(picture) for picture in islice(pictures, CLIP)]
    return found


def add_row(report: Report, path: Path) -> None:
    """Adds a line of JSON to a file: the fields of the report, and our time as a multiple of two others."""
    ours = report.timings[0]
    row = {
        **report._asdict(),
        "times_dis": report.times(ours, DIS_NAME),
        "times_plain": report.times(ours, PLAIN),
        "timings": [timing._asdict() for timing in report.timings],
    }
    append([row], path)


def append(rows: list[dict], path: Path) -> None:
    """Adds a line of JSON to a file for each row; not-a-number becomes null, an infinite number "infinite"."""
    with writing(path), path.open("a") as file:
        file.writelines(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)


def pareto(reports: list[Report], path: Path) -> None:
    """Writes a picture of accuracy against speed: a dot for each network and peer, the best ones joined.

    Raises FleetflowError where nothing has an accuracy, or matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise FleetflowError('the plot needs matplotlib; install it with pip install "fleetflow[plot]"') from None
    dots = _dots(reports)
    if not dots:
        raise FleetflowError("no network has weights and there is no peer: no accuracy can be shown; name others")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for milliseconds, epe, _, ours in dots:
        axes.plot(milliseconds, epe, "o" if ours else "s", color=COLORS[ours])
    best = [dot for k, dot in enumerate(dots) if all(dot[1] < other[1] for other in dots[:k])]
    axes.plot([dot[0] for dot in best], [dot[1] for dot in best], color="tab:blue", alpha=0.4, zorder=1)
    height, width = reports[0].size
    axes.set_xscale("log")
    axes.margins(0.2)
    axes.set_ylim(bottom=0)
    batch = f" in batches of {reports[0].batch}" if reports[0].batch > 1 else ""
    axes.set_xlabel(f"milliseconds for {height}x{width}{batch}, {reports[0].threads} threads ({reports[0].device})")
    axes.set_ylabel(f"EPE [px], mean of the sets, {reports[0].pairs} pairs")
    axes.grid(alpha=0.3, which="both")
    _label(axes, dots)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _dots(reports: list[Report]) -> list[tuple[float, float, str, bool]]:
    """Milliseconds, EPE, name, and whether it is ours, of all that has an EPE, the fastest first."""
    found: dict[str, list[Timing]] = {}
    for report in reports:
        for timing in report.timings:
            if timing.epe is not None:
                found.setdefault(timing.name, []).append(timing)
    networks = {report.timings[0].name: report.network for report in reports}
    short = {name: _short(networks.get(name, name)) for name in found}
    counts = Counter(short.values())
    names = {name: short[name] if counts[short[name]] == 1 else networks.get(name, name) for name in found}
    return sorted(
        (float(np.median([timing.p50 for timing in timings])), timings[0].epe, names[name], name in networks)
        for name, timings in found.items()
    )


def _short(name: str) -> str:
    """The name of a network, of a checkpoint's file, or of a method without its settings."""
    network, _, checkpoint = name.removeprefix("OpenCV ").partition(" (")[0].partition(":")
    return f"{network} ({Path(checkpoint).stem})" if checkpoint else Path(network).stem


def _label(axes, dots: list[tuple[float, float, str, bool]]) -> None:
    """Writes the names of the dots where they cover nothing and, if possible, no other dot is nearer; or not at all."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()
    renderer = axes.figure.canvas.get_renderer()
    middles = np.array([axes.transData.transform(dot[:2]) for dot in dots])
    taken = [Bbox.from_extents(*(middle - DOT), *(middle + DOT)) for middle in middles]
    for k, (x, y, name, ours) in enumerate(dots):
        for strict, (dx, dy, side) in product((True, False), LABELS):
            text = axes.annotate(name, (x, y), (dx, dy), textcoords="offset points", ha=side, color=COLORS[ours])
            box = text.get_window_extent(renderer)
            away = np.linalg.norm(middles - np.clip(middles, box.min, box.max), axis=1)
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            free = inside and not any(box.overlaps(other) for other in taken)
            if free and (away.argmin() == k or not strict):
                taken.append(box)
                break
            text.remove()
