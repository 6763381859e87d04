"""Benchmark: time per pair, always as ratios to other ways of computing it in the same process."""

import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fleetflow.evaluate import DIS, classical
from fleetflow.io import read_image
from fleetflow.models.weights import load
from fleetflow.ops.kernels import reference
from fleetflow.optimise import optimisers
from fleetflow.predict import Precision, Predictor, autocast
from fleetflow.types import FleetflowError


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
    """What a benchmark found on this machine."""

    timings: list[Timing]  # of one pair; the first is ours
    difference: float  # pixels, mean over the example pair: our precision against float32
    training: float  # samples per second, 256x320, batch 8, forward, backward and update


def benchmark(
    network: str, height: int, width: int, *, threads: int = 0, precision: Precision = "auto", seconds: float = 20.0
) -> Report:
    """Returns timings of one pair [height, width] on the CPU, the loss of precision, and the speed of training.

    Timed in turn: ours; the plain definition, which is the same network in float32, contiguous, under
    `fleetflow.reference()`, frames as tensors; and OpenCV's DIS, where it is installed.
    """
    if threads:
        torch.set_num_threads(threads)
    example = Path(str(resources.files("fleetflow") / "example"))
    images = [read_image(example / f"frame{k}.png") for k in (1, 2)]
    image1, image2 = (_tiled(image, height, width) for image in images)
    predictor = Predictor(_load(network), device="cpu", precision=precision)
    plain = _load(network)
    frames = [
        torch.from_numpy(image).permute(2, 0, 1)[None].float().div(255).contiguous() for image in (image1, image2)
    ]

    def definition():
        with torch.inference_mode(), reference():
            return plain(*frames)

    functions: dict[str, Callable[[], object]] = {
        f"{network}, fleetflow": lambda: predictor(image1, image2),
        f"{network}, plain fp32": definition,
    }
    try:
        dis = classical(DIS)
        functions["OpenCV DIS (medium)"] = lambda: dis(image1, image2)
    except FleetflowError:
        pass
    timings = time_in_turn(functions, seconds, frozenset({f"{network}, plain fp32"}))
    exact = Predictor(plain, device="cpu", precision="fp32")
    difference = float(np.linalg.norm(predictor(*images) - exact(*images), axis=2).mean())
    return Report(timings, difference, training_speed(network, predictor.dtype, seconds / 2))


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


def _load(network: str):
    """The network with its weights where the package has them; the time does not depend on them."""
    try:
        return load(network)
    except FleetflowError:
        return load(network, weights=False)
