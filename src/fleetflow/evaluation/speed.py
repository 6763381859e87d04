"""Benchmark: the time of a pair, always beside other ways of computing it in the same process."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from fleetflow.data.dataset import Files, to_frame
from fleetflow.evaluation.baselines import CLASSICAL, DIS, Method, method
from fleetflow.evaluation.calls import call, example, has_weights, load_any, reference_flow, tiled, variant
from fleetflow.evaluation.evaluate import evaluate
from fleetflow.evaluation.machine import machine
from fleetflow.evaluation.peak_memory import peak_memory
from fleetflow.evaluation.protocol import fit_for, protocol
from fleetflow.evaluation.submit import predict_flow
from fleetflow.inference.device import Precision, use_threads
from fleetflow.inference.exported import ExportedModel
from fleetflow.inference.memory import fits_nothing
from fleetflow.inference.predictor import Predictor
from fleetflow.models.base import FlowModel
from fleetflow.models.catalog import multiply_adds
from fleetflow.registry import unknown
from fleetflow.types import FleetflowError

LEAST, SLOW = 5, 2000.0  # runs that a function gets at least, unless one takes so many milliseconds


class Timing(NamedTuple):
    """Milliseconds per call: median and 95th percentile of `runs` calls, taken in turn with the others."""

    name: str
    p50: float
    p95: float
    runs: int
    epe: float | None = None  # pixels, mean of the sets, where pairs were given


def time_in_turn(
    functions: dict[str, Callable[[], object]],
    seconds: float,
    rare: frozenset[str],
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Returns the timing of each function; they run in turn, so that a noisy machine slows all alike.

    Args:
        rare: those that run only every fourth round. What takes less than 2 s runs five times at least, after two calls
            that are not counted.
        clock: seconds; `time.process_time` counts what the processor did for this process, on all threads.
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
            start = clock()
            function()
            taken[name].append(1000 * (clock() - start))
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
    batch: int  # pairs that ours and the reference are given at once; milliseconds are of one pair
    iterations: int | None  # of refinement; None for a network without
    device: str
    precision: str
    threads: int
    timings: list[Timing]  # of one pair: ours, the reference implementation, the peers
    difference: float  # pixels, mean over the example pair: our precision against float32
    training: float | None  # samples per second, 256x320, batch 8, forward, backward and update
    memory: float | None  # MB that a prediction of a batch needs beyond the loaded network; None: not measured
    parameters: int
    multiply_adds_448x1024: int | None  # of a pair of that size, own iterations; None where other iterations were taken
    epe: float | None  # pixels, mean of the sets, where pairs were given; None for random weights
    pairs: int  # that the EPE was measured on
    protocol: dict[str, str]  # how it was measured
    machine: dict[str, str]  # processor, system, versions

    def unsteady(self) -> list[str]:
        """Returns a line for each timing whose 95th percentile is over twice its median, as on a busy machine."""
        return [
            f"the 95th percentile of {row.name} is {row.p95 / row.p50:.1f} times its median: other programs were "
            "running; repeat it on a quiet machine"
            for row in self.timings
            if row.p95 > UNSTEADY * row.p50
        ]

    def times(self, timing: Timing, name: str) -> float | None:
        """Returns a time as a multiple of that of the first row whose name ends so; None where there is none."""
        base = [row.p50 for row in self.timings if row.name.endswith(name)]
        return timing.p50 / base[0] if base else None


REFERENCE = "reference fp32"
DIS_NAME = CLASSICAL[DIS]


UNSTEADY = 2.0  # times the median: a 95th percentile beyond it says that other programs were running


class Conditions(NamedTuple):
    """What all networks of a benchmark are measured under; see `benchmark`."""

    height: int
    width: int
    batch: int
    device: str
    precision: Precision
    iterations: int | None
    seconds: float
    dataset: str


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

    Timed in turn are ours; the reference implementation, which is the same network in float32, contiguous, under
    `fleetflow.reference()`, frames as tensors; and the peers, all on uint8 [H, W, 3] RGB and float32 [H, W, 2].

    Args:
        networks: names, NETWORK:CHECKPOINT, files of ours.
        threads: of torch; 0 leaves it those it has.
        iterations: of refinement; None takes each network's own.
        seconds: how long each network is measured.
        peers: dis, farneback, deepflow (OpenCV, on the CPU), or a Python file with a function
            predict(image1, image2) -> flow.
        training: measures samples per second of (network, dtype, seconds), such as `training.speed.training_speed`.
        pairs: pairs with truth to measure the accuracy of networks with weights and of peers on; dataset: theirs.
        batch: pairs at once, as tensors, for ours and the reference; peers and accuracy take one after another.

    Raises:
        FleetflowError: before anything is timed, for unknown names, impossible sizes and peers that fail.
    """
    prepare(threads, (height, width), seconds)
    if batch < 1:
        raise FleetflowError(f"--batch is {batch}; expected a number of pairs from 1 on")
    for network in networks[1:]:
        load_any(network)  # what is wrong with it is said before the first is measured
    methods = [_peer(name) for name in dict.fromkeys(peers)]
    if len({peer.name for peer in methods}) < len(methods):
        raise FleetflowError(f"two of the peers {', '.join(peers)} have the same name; rename one of the files")
    accuracy = {peer.name: _epe(peer, pairs) for peer in methods} if pairs is not None else {}
    conditions = Conditions(height, width, batch, device, precision, iterations, seconds, dataset)
    for network in networks:
        yield _measured(network, conditions, methods, accuracy, pairs, training)


def _measured(
    network: str, conditions: Conditions, peers: list[Method], accuracy: dict[str, float], pairs: Files | None,
    training: Callable[[str, torch.dtype, float], float] | None,
) -> Report:  # fmt: skip
    """The report of one network; accuracy: the EPE of each peer on the pairs."""
    height, width, batch, device, precision, iterations, seconds, dataset = conditions
    model, name, known = fit_for(load_any(network), dataset), variant(network), has_weights(network)
    exact = copy.deepcopy(model)  # before the predictor fuses it; random weights are the same, too
    predictor = Predictor(model, device=device, precision=precision)
    exact = exact.to(predictor.device)
    timings = _timings(network, predictor, exact, peers, conditions)
    epe = _epe(predictor, pairs, iterations) if pairs is not None and known else None
    epes = {timings[0].name: epe, **accuracy}
    trains = training if predictor.device.type == "cpu" and not isinstance(exact, ExportedModel) else None
    own = iterations in (None, exact.iterations) and not isinstance(exact, ExportedModel)
    return Report(
        network=network,
        weights=("package" if network == name else network) if known else "random",
        sha256=predictor.label()["sha256"],
        size=(height, width),
        batch=batch,
        iterations=exact.iterations if iterations is None else iterations,
        device=torch.cuda.get_device_name(predictor.device)
        if predictor.device.type == "cuda"
        else predictor.device.type,
        precision=str(predictor.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        timings=[timing._replace(epe=epes.get(timing.name)) for timing in timings],
        difference=_difference(predictor, exact, conditions),
        training=trains(name, predictor.dtype, seconds / 2) if trains else None,
        memory=peak_memory(
            network, height=height, width=width, batch=batch, device=device, precision=precision, iterations=iterations
        ),
        parameters=sum(weight.numel() for weight in exact.parameters()),
        multiply_adds_448x1024=sum(map(multiply_adds, name.split("+"))) if own else None,
        epe=epe,
        pairs=len(pairs) if pairs is not None else 0,
        protocol=protocol(predictor, pairs, iterations) if pairs is not None and epe is not None else {},
        machine=machine(),
    )


def _timings(
    network: str, predictor: Predictor, exact: FlowModel, peers: list[Method], conditions: Conditions
) -> list[Timing]:
    """The timings of one pair: ours, the reference implementation `exact`, the peers."""
    batch, iterations = conditions.batch, conditions.iterations
    image1, image2 = (tiled(image, conditions.height, conditions.width) for image in example())
    frames = [to_frame(image).repeat(batch, 1, 1, 1).to(predictor.device) for image in (image1, image2)]
    slow = f"{network}, {REFERENCE}"
    batched: dict[str, Callable[[], object]] = {
        f"{network}, fleetflow": call(predictor, image1, image2, batch, iterations),
        slow: partial(reference_flow, exact, frames, iterations),
    }
    if isinstance(exact, ExportedModel):  # has no reference implementation but its network's
        del batched[slow]
    functions = {**batched, **{peer.name: partial(peer, image1, image2) for peer in peers}}
    return [
        timing._replace(p50=timing.p50 / batch, p95=timing.p95 / batch) if timing.name in batched else timing
        for timing in time_in_turn(functions, conditions.seconds, frozenset({slow}))
    ]


def _difference(predictor: Predictor, exact: FlowModel, conditions: Conditions) -> float:
    """Pixels, mean over the example pair: how far the flow is from that in float32."""
    same = Predictor(exact, device=conditions.device, precision="fp32")
    ours, theirs = (predict_flow(each, *example(), iterations=conditions.iterations) for each in (predictor, same))
    return float(np.linalg.norm(ours - theirs, axis=2).mean())


def prepare(threads: int, size: tuple[int, int] = (1, 1), seconds: float = 1.0) -> None:
    """Gives torch so many threads, 0 leaves it those it has; raises FleetflowError for what cannot be measured."""
    if not 0 < seconds < math.inf:
        raise FleetflowError(f"--seconds is {seconds}; expected how long to measure, more than 0")
    if min(size) < 1:
        raise FleetflowError(f"--size is {size[0]} {size[1]}; expected a height and a width in pixels")
    if fits_nothing(*size):
        raise FleetflowError(
            f"--size is {size[0]} {size[1]}, whose frames take more memory than there is; take a smaller one"
        )
    use_threads(threads)


def _peer(name: str) -> Method:
    """A classical method by name, or the function `predict` of a Python file (the user's own, so it is run)."""
    found = method(name)
    if found is None:
        raise unknown("peer", name, [*CLASSICAL, "FILE.py"])
    return found


def _epe(predict: Predictor | Method, pairs: Files, iterations: int | None = None) -> float:
    return evaluate(predict, pairs, iterations=iterations)["mean of sets"]["epe"]
