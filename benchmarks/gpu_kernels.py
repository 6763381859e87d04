"""Measures fleetflow on one GPU: the Triton kernels, the networks, training. For the bars of the benchmark desk.

    python benchmarks/gpu_kernels.py FOLDER

Prints JSON and writes it to FOLDER/gpu_NAME.json, NAME that of the GPU. The parts run one after the other, each in a
process of its own, and within it every measurement is tried by itself: what fails is reported with its error, and the
next one goes on. All times are medians in milliseconds. It takes less than 8 minutes on an H200.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch

from fleetflow.data.generate import default_textures, generate
from fleetflow.evaluation.machine import machine
from fleetflow.inference.cuda_graphs import Graphed, Recording, record
from fleetflow.inference.device import autocast
from fleetflow.inference.predictor import Predictor
from fleetflow.models.fastflownet import KEPT, init_as_matcher
from fleetflow.models.weights import load
from fleetflow.ops import all_pairs, correlation, dilated_correlation, kernels, warp
from fleetflow.registry import models
from fleetflow.training.losses import multi_scale
from fleetflow.training.optimizers import optimizers
from fleetflow.types import FleetflowError

SECONDS = {"networks": 150, "training": 80, "kernels": 110, "tiles": 60, "profile": 60}  # longest time of each part
SIZE = (448, 1024)
Items = Iterator[tuple[str, Callable[[], object]]]
cuda = torch.cuda.is_available()
device = torch.device("cuda" if cuda else "cpu")


def synchronise() -> None:
    if cuda:
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], object], seconds: float = 0.4) -> float:
    """Returns the median over blocks of calls, of the mean time of a call within a block."""
    for _ in range(2):
        function()
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    calls = max(1, min(500, int(seconds / 6 / (time.perf_counter() - start))))
    blocks = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronise()
        blocks.append(1000 * (time.perf_counter() - start) / calls)
    return round(median(blocks), 4)


def timed(function: Callable, *tensors: torch.Tensor) -> dict[str, object]:
    """Returns the time of function(*tensors), as it is and replayed as a CUDA graph, and why there is no graph."""
    row: dict[str, object] = {"eager_ms": milliseconds(lambda: function(*tensors))}
    if not cuda:
        return row
    try:
        recording = record(function, tensors, torch.cuda.graph_pool_handle())
        row["graph_ms"] = milliseconds(recording.graph.replay)
    except RuntimeError as error:
        row["no_graph"] = str(error).splitlines()[0][:200]
    return row


def peak(function: Callable[[], object]) -> float:
    """Returns the most memory held during a call, in MB, weights and all."""
    if not cuda:
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    function()
    synchronise()
    return round(torch.cuda.max_memory_allocated() / 1e6, 1)


# ---- parts: each yields names and measurements ----


def network(name: str, precision: str, batch: int, steps: int | None = None) -> dict[str, object]:
    """Returns times and memory of a network on `batch` pairs of SIZE that lie on the device already."""
    predictor = Predictor(_network(name), device=device.type, precision=precision)
    frames = torch.rand(2, batch, 3, *SIZE, device=device)
    first, second = (frame.to(memory_format=torch.channels_last) for frame in frames)

    def predict(first, second):
        with autocast(device, predictor.dtype):
            return predictor.model(first, second, None, steps)

    with torch.inference_mode():
        row = timed(predict, first, second)
        row["pairs_per_second"] = round(1000 * batch / row.get("graph_ms", row["eager_ms"]), 1)
        row["peak_mb"] = peak(lambda: predict(first, second))
        flow = predict(first, second).flow
        with kernels.reference():  # the kernels' share of the difference to the definitions
            row["difference_px"] = (flow - predict(first, second).flow).float().norm(dim=1).mean().item()
    return row


def graphed(name: str, height: int, width: int) -> dict[str, object]:
    """Returns whether a network was recorded, the time of a replayed call, and how far its flow is from the usual."""
    predictor = Predictor(_network(name), device=device.type, precision="fp16")
    call = Graphed(predictor.model)
    with torch.inference_mode(), autocast(device, predictor.dtype), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        far = 0.0
        for _ in range(4):
            frames = torch.rand(2, 1, 3, height, width, device=device)
            difference = call(*frames, None, None).flow - predictor.model(*frames, None, None).flow
            far = max(far, difference.abs().max().item())
        row = {"ms": milliseconds(lambda: call(*frames, None, None)), "largest_difference_px": far}
    recorded = any(isinstance(known, Recording) for known in call._known.values())
    return row | {"recorded": recorded, "warnings": [str(warning.message)[:200] for warning in said]}


def networks() -> Items:
    batches = (1, 8, 32, 64) if cuda else (1,)
    for precision in ("fp16", "bf16"):
        for batch in batches:
            yield f"fastflownet, {precision}, batch {batch}", partial(network, "fastflownet", precision, batch)
    yield "raft, 12 steps, bf16", partial(network, "raft", "bf16", 1, 12)
    yield "raft, 12 steps, fp16", partial(network, "raft", "fp16", 1, 12)
    yield "flownet2, fp16", partial(network, "flownet2", "fp16", 1)
    for name in ("liteflownet2", "lightflow", "pwcnet"):
        if name in models:
            yield f"{name}, fp16", partial(network, name, "fp16", 1)
    for name in ("fastflownet", "raft", "flownet2"):
        for height, width in (SIZE, (436, 1024)):
            yield f"{name}, Graphed, {height}x{width}", partial(graphed, name, height, width)


def train(batch: int, part: str) -> dict[str, object]:
    """Returns samples per second of pairs of 256x320 generated on the device, of training steps, or of both."""
    surfaces = default_textures().to(device)
    model = models["fastflownet"]()
    init_as_matcher(model)
    model = model.to(device, memory_format=torch.channels_last).train()
    updates = optimizers(model, 1e-4, 0.01)
    counter = iter(range(10**9))
    dtype = torch.bfloat16

    def pairs():
        return generate(batch, 256, 320, seed=0, index=next(counter), textures=surfaces)

    fixed = pairs()

    def step(sample):
        with autocast(device, dtype):
            prediction = model(sample.frame1, sample.frame2)
        multi_scale(prediction, sample).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 20.0)
        for update in updates:
            update.step()
            update.zero_grad(set_to_none=True)

    function = {"pairs": pairs, "steps": lambda: step(fixed), "both": lambda: step(pairs())}[part]
    taken = milliseconds(function, 2.0)
    return {"ms": taken, "samples_per_second": round(1000 * batch / taken, 1), "peak_mb": peak(function)}


def training() -> Items:
    for batch in (64, 128, 32) if cuda else (2,):
        for part in ("both", "pairs", "steps"):
            yield f"fastflownet, batch {batch}, {part}", partial(train, batch, part)


def operators() -> Iterator[tuple[str, str, str, tuple[torch.Tensor, ...], Callable]]:
    """Yields a name, a module and function of `ops`, its tensors, and (operator, *tensors) -> result."""

    def features(batch, channels, height, width, dtype=torch.float16):
        values = torch.randn(2, batch, channels, height, width, device=device, dtype=dtype)
        return [value.to(memory_format=torch.channels_last) for value in values]

    for batch in (1, 16) if cuda else (1,):
        for channels, height, width in ((32, 112, 256), (64, 28, 64)):
            size = f"{batch}x{channels}x{height}x{width} fp16"
            first, second = features(batch, channels, height, width)
            flow = 4 * torch.randn(batch, 2, height, width, device=device)
            yield f"warp {size}", "warp", "warp", (first, flow), lambda f, a, b: f(a, b)
            for kept, keep in (("53", KEPT), ("81", None)):
                call = lambda f, a, b, keep=keep: f(a, b, 4, keep)  # noqa: E731
                yield f"correlation, {kept} of 81, {size}", "correlation", "local_correlation", (first, second), call
    pair = features(1, 256, 56, 128)
    call = lambda f, a, b: f(a, b, 20, 2)  # noqa: E731
    yield "correlation, 441, 1x256x56x128 fp16", "dilated_correlation", "dilated_correlation", tuple(pair), call
    first, second = features(1, 256, 56, 128, torch.float32)
    positions = warp.pixel_grid(56, 128, first)[None] + 8 * torch.randn(1, 2, 56, 128, device=device)
    for kind, limit in (("stored", 2**40), ("computed", 0)):

        def read(f, a, b, positions, limit=limit):
            with torch.autocast(device.type, enabled=False):
                pyramid = all_pairs.pooled(a, b, 4) if limit == 0 else all_pairs.all_pairs(a, b, 4, limit)
            return f(pyramid, positions, 4)

        yield f"all pairs and one lookup, {kind}, 56x128", "all_pairs", "lookup", (first, second, positions), read
        if kind == "stored":
            pyramid = all_pairs.all_pairs(first, second, 4, limit)
            call = lambda f, positions, pyramid=pyramid: f(pyramid, positions, 4)  # noqa: E731
            yield "lookup alone, stored, 56x128", "all_pairs", "lookup", (positions,), call


def compare(module: str, function: str, tensors: tuple[torch.Tensor, ...], call: Callable) -> dict[str, object]:
    """Returns the times of the definition, of the fast version in torch and of the Triton kernel, and differences."""
    from importlib import import_module

    definition = {"warp": warp, "correlation": correlation, "dilated_correlation": dilated_correlation}
    definition = getattr(definition.get(module, all_pairs), function).__wrapped__
    row: dict[str, object] = {}
    exact = call(definition, *(tensor.float() for tensor in tensors)).float()
    for name in ("definition", "torch", "triton"):
        try:
            folder = {"torch": "kernels", "triton": "triton"}.get(name)
            operator = definition
            if folder:
                versions = import_module(f"fleetflow.ops.{folder}.{module}")
                operator = getattr(versions, function)
                if gradients := getattr(versions, f"{function}_gradients", None):
                    operator = kernels.differentiable(operator, gradients)
            forward = partial(call, operator)

            def both(*tensors, forward=forward):
                leaves = [tensor.detach().requires_grad_() for tensor in tensors]
                value = forward(*leaves)
                return torch.autograd.grad(value, leaves, torch.ones_like(value))

            with torch.inference_mode():
                found = forward(*tensors)
                row[name] = {"forward": timed(forward, *tensors)}
            row[name] |= {"difference": (found.float() - exact).abs().max().item()}
            row[name] |= {"forward_backward": timed(both, *tensors), "peak_mb": peak(lambda: both(*tensors))}
            if name == "triton":
                again = [both(*tensors) for _ in range(2)]
                row[name]["same_at_every_run"] = all(torch.equal(a, b) for a, b in zip(*again))
        except Exception as error:
            row.setdefault(name, {})["failed"] = f"{type(error).__name__}: {error}"[:300]
    return row


def operator_comparisons() -> Items:
    for name, module, function, tensors, call in operators():
        yield name, partial(compare, module, function, tensors, call)


def tiles() -> Items:
    """Other sizes of tiles than the kernels have; forward and with gradients."""
    from fleetflow.ops.triton import correlation as fast_correlation
    from fleetflow.ops.triton import warp as fast_warp

    def measured(module, sizes: dict[str, int], call, tensors) -> dict[str, object]:
        old = {name: getattr(module, name) for name in sizes}

        def gradients(*tensors):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            return torch.autograd.grad(call(*leaves).float().sum(), leaves)

        try:
            for name, value in sizes.items():
                setattr(module, name, value)
            with torch.inference_mode():
                row = {"forward": timed(call, *tensors)}
            return row | {"forward_backward": timed(gradients, *tensors)}
        finally:
            for name, value in old.items():
                setattr(module, name, value)

    both = torch.randn(2, 1, 32, 112, 256, device=device).half()
    first, second = (features.to(memory_format=torch.channels_last) for features in both)
    flow = 4 * torch.randn(1, 2, 112, 256, device=device)

    local = kernels.differentiable(fast_correlation.local_correlation, fast_correlation.local_correlation_gradients)
    warped = kernels.differentiable(fast_warp.warp, fast_warp.warp_gradients)

    def correlate(a, b):
        return local(a, b, 4, KEPT)

    for p, k, c in ((16, 16, 16), (8, 16, 32), (16, 16, 32), (16, 8, 32), (32, 8, 16), (32, 16, 16), (4, 64, 32)):
        sizes = {"P": p, "K": k, "C": c}
        yield f"correlation {sizes}", partial(measured, fast_correlation, sizes, correlate, (first, second))
    for p, c in ((32, 32), (16, 32), (64, 32), (128, 8), (32, 16)):
        yield f"warp P {p}, C {c}", partial(measured, fast_warp, {"P": p, "C": c}, warped, (first, flow))


def profile() -> Items:
    """The kernels that take the time: name, calls and microseconds of a prediction (training: a step)."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as observe

    def observed(name: str, steps: int | None) -> dict[str, object]:
        predictor = Predictor(_network(name), device=device.type, precision="fp16")
        first, second = torch.rand(2, 1, 3, *SIZE, device=device)
        with torch.inference_mode(), autocast(device, predictor.dtype):
            for _ in range(3):
                predictor.model(first, second, None, steps)
            synchronise()
            with observe(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
                predictor.model(first, second, None, steps)
                synchronise()
        rows = [row for row in seen.key_averages() if row.device_type != torch.autograd.DeviceType.CPU]
        rows.sort(key=lambda row: -row.self_device_time_total)
        return {
            "kernels": sum(row.count for row in rows),
            "microseconds": round(sum(row.self_device_time_total for row in rows), 1),
            "longest": [(row.key[:80], row.count, round(row.self_device_time_total, 1)) for row in rows[:15]],
        }

    for name, steps in (("fastflownet", None), ("raft", 12), ("flownet2", None), ("liteflownet2", None)):
        if name in models:
            yield name, partial(observed, name, steps)


PARTS = {
    "networks": networks,
    "training": training,
    "kernels": operator_comparisons,
    "tiles": tiles,
    "profile": profile,
}


# ---- running them ----


def _network(name: str):
    """The network, with its weights where the package has them; the time does not depend on them."""
    try:
        return load(name)
    except FleetflowError:
        return load(name, weights=False)


def hardware() -> dict[str, object]:
    """Returns what the figures belong to."""
    row: dict[str, object] = {**machine(), "device": torch.cuda.get_device_name() if cuda else "CPU only"}
    if cuda:
        from fleetflow.ops.triton import usable

        about = torch.cuda.get_device_properties(0)
        row |= {
            "memory_gb": round(about.total_memory / 1e9, 1),
            "multiprocessors": about.multi_processor_count,
            "capability": f"{about.major}.{about.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton_usable": usable(),
        }
    return row


def measure(part: str) -> None:
    """Prints a JSON line for every measurement of a part, as soon as it is made."""
    began = time.monotonic()
    items = PARTS[part]()
    while True:
        try:
            name, function = next(items)
        except StopIteration:
            return
        except Exception as error:
            print(json.dumps({"name": "the next one", "failed": f"{type(error).__name__}: {error}"[:400]}), flush=True)
            return
        row: dict[str, object] = {"name": name}
        if time.monotonic() - began > SECONDS[part] - 10:
            row["skipped"] = "no time left"
        else:
            try:
                row |= function()
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:400]
        print(json.dumps(row), flush=True)
        if cuda:
            try:
                torch.cuda.empty_cache()
            except RuntimeError:  # a kernel has broken this process; the next part has one of its own
                return


def main(folder: Path, parts: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, object] = {"hardware": hardware(), "size": SIZE}
    name = "".join(c if c.isalnum() else "_" for c in results["hardware"]["device"])
    for part in parts:
        command = [sys.executable, __file__, str(folder), "--part", part]
        began = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                output, errors = process.communicate(timeout=SECONDS[part] + 15)
            except subprocess.TimeoutExpired:
                process.kill()
                output, errors = process.communicate()
                errors += "\ntook too long"
        rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        results[part] = {"seconds": round(time.monotonic() - began, 1), "rows": rows}
        if process.returncode:
            results[part]["failed"] = errors.strip()[-600:]
        (folder / f"gpu_{name}.json").write_text(json.dumps(results, indent=1))
        print(json.dumps({part: results[part]}, indent=1), flush=True)
    print(json.dumps(results["hardware"], indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", choices=PARTS, help="only this part, and only its lines")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    parser.add_argument("--seconds", type=float, help="longest time of each part")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), default=SIZE, help="of the frames")
    given = parser.parse_args()
    SIZE, SECONDS = tuple(given.size), {part: given.seconds or most for part, most in SECONDS.items()}
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRITON_CACHE_DIR", str(given.folder / "triton"))
    measure(given.part) if given.part else main(given.folder, given.only)
