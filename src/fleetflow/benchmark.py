"""Benchmark: time per pair, always as ratios to other ways of computing it in the same process."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from fleetflow.evaluate import DIS, classical
from fleetflow.models.weights import load
from fleetflow.ops.kernels import reference
from fleetflow.predict import Precision, Predictor
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


def benchmark(
    network: str, height: int, width: int, *, threads: int = 0, precision: Precision = "auto", seconds: float = 20.0
) -> list[Timing]:
    """Returns timings of one pair [height, width] on the CPU: ours, the plain fp32 definition, and OpenCV's DIS.

    The plain definition is the same network in float32, contiguous, under `fleetflow.reference()`, frames as tensors.
    """
    if threads:
        torch.set_num_threads(threads)
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    image1 = np.ascontiguousarray(np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:height, :width])
    image2 = np.roll(image1, 3, axis=1)
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
    return time_in_turn(functions, seconds, frozenset({f"{network}, plain fp32"}))


def _load(network: str):
    """The network with its weights where the package has them; the time does not depend on them."""
    try:
        return load(network)
    except FleetflowError:
        return load(network, weights=False)
