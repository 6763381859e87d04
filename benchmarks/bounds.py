"""What bounds each network on this CPU: measured peaks, the floor they give, and where the time goes. Markdown.

    python benchmarks/bounds.py [NETWORK ...]

All in one run at 448x1024, batch 1, as many threads as torch takes. The floor is the time that the multiply-adds of
the network's definition take at the rate of a convolution; the shares are those of the operators' own time in one
prediction. Networks without weights in the package run with random ones. The plain definition is timed twice: as torch
runs it, and in a process that keeps its freed memory (`fleetflow.inference.memory`), as fleetflow itself does.
"""

import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from fleetflow.evaluation.baselines import classical
from fleetflow.evaluation.calls import has_weights
from fleetflow.inference.predictor import Predictor
from fleetflow.models import weights
from fleetflow.models.catalog import SIZE, multiply_adds
from fleetflow.ops.kernels import reference

NETWORKS = """fastflownet lightflow lightflow_050 flownet_s flownet_c flownet_sd flownet2 pwcnet liteflownet2
    raft_small raft gma deq_flow_tiny deq_flow_b""".split()
KINDS = {
    "convolution": ("convolution",),
    "product": ("mm", "matmul", "linear"),
    "gather": ("gather", "index", "embedding", "grid_sample", "scatter"),
}


def timed(call, seconds: float = 4.0, least: int = 2) -> float:
    """Returns the median time of a call in ms, after one to warm up."""
    call()
    times, start = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def rate(dtype: torch.dtype) -> float:
    """Returns the multiply-adds a second of a 3x3 convolution of 128 channels at 56x128, in 10^9."""
    x = torch.randn(1, 128, 56, 128).to(dtype, memory_format=torch.channels_last)
    layer = torch.nn.Conv2d(128, 128, 3, padding=1).to(dtype, memory_format=torch.channels_last)
    return 128 * 128 * 9 * 56 * 128 / timed(lambda: layer(x), 1.0) / 1e6


def shares(call) -> tuple[dict[str, float], int]:
    """Returns the part of the operators' own time by kind, and the number of operators that ran."""
    with profile(activities=[ProfilerActivity.CPU]) as run:
        call()
    events = [event for event in run.key_averages() if event.self_cpu_time_total > 0]
    total = sum(event.self_cpu_time_total for event in events)
    parts = dict.fromkeys((*KINDS, "elementwise, copies"), 0.0)
    for event in events:
        kind = next((kind for kind, names in KINDS.items() if any(name in event.key for name in names)), "")
        parts[kind or "elementwise, copies"] += event.self_cpu_time_total / total
    return parts, sum(event.count for event in events)


@torch.inference_mode()
def main(names: list[str]) -> None:
    bf16, fp32 = rate(torch.bfloat16), rate(torch.float32)
    block, kept = torch.zeros(64 * 2**20), torch.zeros(64 * 2**20)
    copy = 2 * block.nbytes / timed(lambda: kept.copy_(block), 1.0) / 1e6
    few = torch.zeros(16)
    launch = 1e3 * timed(lambda: [few + few for _ in range(1000)], 0.5) / 1000
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {SIZE[0]}x{SIZE[1]}, batch 1.")
    print(f"Peaks: convolution {bf16:.0f} G multiply-adds/s in bfloat16, {fp32:.0f} in float32; ", end="")
    print(f"copying {copy:.1f} GB/s, reads and writes; an operator costs {launch:.1f} us.\n")
    print("| network | ms | x DIS | plain, ms | faster | plain, memory kept | faster | ", end="")
    print(" | ".join(("floor, ms", "of it", "operators", *KINDS, "elementwise, copies")), "|")
    print("|---" + "|--:" * 13 + "|")
    generator = np.random.default_rng(0)
    frame = torch.nn.functional.interpolate(torch.rand(1, 3, SIZE[0] // 8, SIZE[1] // 8), size=SIZE, mode="bicubic")
    frame1 = (255 * frame[0].permute(1, 2, 0).clamp(0, 1)).byte().numpy()
    frame2 = np.roll(frame1, (2, 3), (0, 1)) ^ generator.integers(0, 2, frame1.shape, np.uint8)
    for name in names:  # a process each, as memory once kept is kept
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            print(process.submit(row, name, frame1, frame2, bf16, fp32).result(), flush=True)


@torch.inference_mode()
def row(name: str, frame1: np.ndarray, frame2: np.ndarray, bf16: float, fp32: float) -> str:
    model, dis = weights.load(name, weights=has_weights(name)), classical("dis")
    tensors = [torch.from_numpy(f).permute(2, 0, 1)[None].float().div(255).contiguous() for f in (frame1, frame2)]
    with reference():
        plain = timed(lambda: model(*tensors))
    fast = Predictor(model)
    ours, base = timed(lambda: fast(frame1, frame2)), timed(lambda: dis(frame1, frame2), 2.0)
    with reference():
        kept = timed(lambda: model(*tensors))
    parts, operators = shares(lambda: fast(frame1, frame2))
    floor = multiply_adds(name) / (bf16 if fast.dtype == torch.bfloat16 else fp32) / 1e6
    cells = [name, f"{ours:.0f}", f"{ours / base:.1f}", f"{plain:.0f}", f"{plain / ours:.1f}"]
    cells += [f"{kept:.0f}", f"{kept / ours:.1f}", f"{floor:.0f}", f"{100 * floor / ours:.0f} %", str(operators)]
    cells += [f"{100 * part:.0f} %" for part in parts.values()]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(sys.argv[1:] or NETWORKS)
