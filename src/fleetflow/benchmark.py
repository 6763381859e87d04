"""Benchmark: time per pair, always as ratios to other ways of computing it in the same process."""

import math
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fleetflow.catalog import multiply_adds
from fleetflow.data.dataset import Files
from fleetflow.evaluate import DIS, classical, evaluate, machine
from fleetflow.io import read_image, write_atomically
from fleetflow.models.base import FlowModel
from fleetflow.models.weights import load, shipped
from fleetflow.ops.kernels import reference
from fleetflow.optimise import optimisers
from fleetflow.predict import Precision, Predictor, autocast
from fleetflow.types import FleetflowError

DIS_NAME = "OpenCV DIS (medium)"


class Timing(NamedTuple):
    """Milliseconds per call: median and 95th percentile of `runs` calls, taken in turn with the others."""

    name: str
    p50: float
    p95: float
    runs: int


def time_in_turn(functions: dict[str, Callable[[], object]], seconds: float, slow: frozenset[str]) -> list[Timing]:
    """Returns the timing of each function; they run in turn, so that a noisy machine slows all alike.

    slow: those that run only every fourth round.
    """
    for function in functions.values():
        function()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    began, turn = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or turn < 4:
        for name, function in functions.items():
            if name in slow and turn % 4:
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
    size: tuple[int, int]  # height, width; batch 1
    device: str
    precision: str
    threads: int
    timings: list[Timing]  # of one pair; the first is ours
    difference: float  # pixels, mean over the example pair: our precision against float32
    training: float | None  # samples per second, 256x320, batch 8, forward, backward and update
    memory: float  # MB that a prediction of one pair needs beyond the loaded network
    parameters: int
    multiply_adds: int  # of a pair of 448x1024
    epe: float | None  # pixels, mean of the sets, where pairs were given
    machine: dict[str, str]  # processor, system, versions

    def times_dis(self) -> float | None:
        """Returns the time of a pair as a multiple of that of OpenCV's DIS, where it was measured."""
        dis = [timing.p50 for timing in self.timings if timing.name == DIS_NAME]
        return self.timings[0].p50 / dis[0] if dis else None


def benchmark(
    network: str,
    height: int,
    width: int,
    *,
    device: str = "cpu",
    threads: int = 0,
    precision: Precision = "auto",
    seconds: float = 20.0,
    peers: tuple[str, ...] = ("dis",),
    training: bool = True,
    pairs: Files | None = None,
) -> Report:
    """Returns timings of one pair [height, width], the loss of precision, memory, and the speed of training.

    network: a network, or NETWORK:CHECKPOINT. pairs: pairs with truth to measure the accuracy on.
    Timed in turn: ours; the plain definition, which is the same network in float32, contiguous, under
    `fleetflow.reference()`, frames as tensors; and the peers: dis, farneback, deepflow (OpenCV, on the CPU), or a
    Python file with a function predict(image1, image2) -> flow, all on uint8 [H, W, 3] RGB and float32 [H, W, 2].
    """
    if threads:
        torch.set_num_threads(threads)
    images = _example()
    image1, image2 = (_tiled(image, height, width) for image in images)
    predictor = Predictor(load_any(network), device=device, precision=precision)
    where = predictor.device
    plain = load_any(network).to(where)
    frames = [
        torch.from_numpy(image).permute(2, 0, 1)[None].float().div(255).contiguous().to(where)
        for image in (image1, image2)
    ]

    def definition():
        with torch.inference_mode(), reference():
            return plain(*frames).flow.cpu()

    functions: dict[str, Callable[[], object]] = {
        f"{network}, fleetflow": lambda: predictor(image1, image2),
        f"{network}, plain fp32": definition,
    }
    for peer in peers:
        name, function = _peer(peer)
        functions[name] = partial(function, image1, image2)
    timings = time_in_turn(functions, seconds, frozenset({f"{network}, plain fp32"}))
    exact = Predictor(plain, device=device, precision="fp32")
    difference = float(np.linalg.norm(predictor(*images) - exact(*images), axis=2).mean())
    variant = network.partition(":")[0]
    return Report(
        network=network,
        size=(height, width),
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        precision=str(predictor.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        timings=timings,
        difference=difference,
        training=training_speed(variant, predictor.dtype, seconds / 2) if training and where.type == "cpu" else None,
        memory=_memory(network, height, width, device, precision),
        parameters=sum(weight.numel() for weight in plain.parameters()),
        multiply_adds=multiply_adds(variant),
        epe=evaluate(predictor, pairs)["mean of sets"]["epe"] if pairs is not None else None,
        machine=machine(),
    )


def pareto(reports: list[Report], path: Path) -> None:
    """Writes a picture of accuracy against speed: one dot a network, EPE over milliseconds, the best ones joined."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FleetflowError('the plot needs matplotlib; install it with pip install "fleetflow[plot]"') from None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    dots = sorted((report.timings[0].p50, report.epe, report.network) for report in reports if report.epe is not None)
    for milliseconds, epe, name in dots:
        axes.plot(milliseconds, epe, "o", color="tab:blue")
        axes.annotate(name, (milliseconds, epe), textcoords="offset points", xytext=(5, 5))
    best = [dot for k, dot in enumerate(dots) if all(dot[1] < other[1] for other in dots[:k])]
    axes.plot([dot[0] for dot in best], [dot[1] for dot in best], color="tab:blue", alpha=0.4)
    height, width = reports[0].size
    axes.set_xscale("log")
    axes.margins(0.2)
    axes.set_xlabel(f"milliseconds for {height}x{width}, {reports[0].threads} threads ({reports[0].device})")
    axes.set_ylabel("EPE [px], mean of the sets")
    axes.grid(alpha=0.3, which="both")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _peer(name: str) -> tuple[str, Callable]:
    """A classical method by name, or the function `predict` of a Python file (the user's own, so it is run)."""
    if not name.endswith(".py"):
        return {DIS: DIS_NAME}.get(name, f"OpenCV {name}"), classical(name)
    if not Path(name).is_file():
        raise FleetflowError(
            f"{name} does not exist; a peer is dis, farneback, deepflow or a Python file with predict(a, b)"
        )
    module = runpy.run_path(name)
    if not callable(module.get("predict")):
        raise FleetflowError(f"{name} has no function predict(image1, image2); add one that returns the flow")
    return Path(name).stem, module["predict"]


def _memory(network: str, height: int, width: int, device: str, precision: Precision) -> float:
    """MB by which one prediction raises the peak; on the CPU in a process of its own, as a peak does not go down."""
    code = (
        "import sys, torch\n"
        "from fleetflow import benchmark as b\n"
        "network, height, width, device, precision, threads = sys.argv[1:]\n"
        "torch.set_num_threads(int(threads))\n"
        "p = b.Predictor(b.load_any(network), device=device, precision=precision)\n"
        "p(*(b._tiled(image, 64, 64) for image in b._example()))\n"
        "images = [b._tiled(image, int(height), int(width)) for image in b._example()]\n"
        "peak = torch.cuda.max_memory_allocated if p.device.type == 'cuda' else b._peak\n"
        "peak(); before = peak(); p(*images); print((peak() - before) / 1e6)\n"
    )
    values = (network, str(height), str(width), device, precision, str(torch.get_num_threads()))
    run = subprocess.run([sys.executable, "-c", code, *values], capture_output=True, text=True)
    return float(run.stdout) if run.returncode == 0 else math.nan


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


def training_speed(network: str, dtype: torch.dtype, seconds: float) -> float:
    """Returns samples per second of whole training steps at 256x320, batch 8, on the CPU (median step)."""
    model = load(network, weights=False).to(memory_format=torch.channels_last).train()
    updates = optimisers(model, 1e-4, 0.0)
    frame1, frame2 = (torch.rand(8, 3, 256, 320).to(memory_format=torch.channels_last) for _ in range(2))
    taken: list[float] = []
    while len(taken) < 4 or sum(taken) < seconds:
        start = time.perf_counter()
        with autocast(torch.device("cpu"), dtype):
            prediction = model(frame1, frame2)
        loss = prediction.flow.square().mean() + sum(step.float().square().mean() for step in prediction.steps)
        loss.backward()
        for update in updates:
            update.step()
            update.zero_grad()
        taken.append(time.perf_counter() - start)
    return 8 / float(np.median(taken[1:]))


def _tiled(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The picture, repeated and cut to a size."""
    rows, columns = -(-height // image.shape[0]), -(-width // image.shape[1])
    return np.ascontiguousarray(np.tile(image, (rows, columns, 1))[:height, :width])


def load_any(network: str) -> FlowModel:
    """Returns the network, with its weights where the package has them (the time does not depend on them)."""
    return load(network) if has_weights(network) else load(network, weights=False)


def has_weights(network: str) -> bool:
    """Returns True for NETWORK:CHECKPOINT and for a network whose weights are in the package."""
    try:
        return ":" in network or bool(shipped(network))
    except FleetflowError:
        return False
