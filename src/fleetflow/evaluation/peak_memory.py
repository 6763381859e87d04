"""How much memory a prediction needs, measured in a process of its own, as the peak of a process does not go down.

`python -m fleetflow.evaluation.peak_memory CONDITIONS` is that process; it prints bytes.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

from fleetflow.evaluation.calls import call, example, load_any, tiled
from fleetflow.inference.device import Precision
from fleetflow.inference.predictor import Predictor


def peak_memory(
    network: str,
    *,
    height: int,
    width: int,
    batch: int,
    device: str,
    precision: Precision,
    iterations: int | None,
) -> float | None:
    """Returns the MB by which a prediction raises the peak of a process that has the network; None where it fails.

    It uses as many threads as torch does here. Other arguments: as in `speed.benchmark`.
    """
    conditions = {
        "network": network, "height": height, "width": width, "batch": batch, "device": device,
        "precision": precision, "iterations": iterations, "threads": torch.get_num_threads(),
    }  # fmt: skip
    command = [sys.executable, "-m", "fleetflow.evaluation.peak_memory", json.dumps(conditions)]
    run = subprocess.run(command, capture_output=True, text=True)
    return float(run.stdout) / 1e6 if run.returncode == 0 else None


def _measured(network, height, width, batch, device, precision, iterations, threads) -> int:
    torch.set_num_threads(threads)
    predictor = Predictor(load_any(network), device=device, precision=precision)
    image1, image2 = example()
    predictor.predict(tiled(image1, 64, 64), tiled(image2, 64, 64), iterations=iterations)
    peak = torch.cuda.max_memory_allocated if predictor.device.type == "cuda" else _peak
    predict = call(predictor, tiled(image1, height, width), tiled(image2, height, width), batch, iterations)
    peak()
    before = peak()
    predict()
    return peak() - before


def _peak() -> int:
    """Bytes of memory that this process has held at most: since the last call on Linux, elsewhere since its start."""
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(_measured(**json.loads(sys.argv[1])))
