"""Two predictors at once on one machine, and one alone: milliseconds for a pair, at several lengths of spinning.

    python benchmarks/neighbors.py fastflownet

Run it on an otherwise quiet machine; each figure is the median of a process of its own.
"""

import os
import subprocess
import sys

CODE = """
import sys, time, statistics, numpy as np, fleetflow
predictor = fleetflow.Predictor(sys.argv[1], device="cpu")
image = np.random.default_rng(0).integers(0, 256, (448, 1024, 3), dtype=np.uint8)
times, end = [], time.perf_counter() + float(sys.argv[2])
predictor(image, image)
while time.perf_counter() < end:
    start = time.perf_counter()
    predictor(image, image)
    times.append(1000 * (time.perf_counter() - start))
print(statistics.median(times))
"""


def milliseconds(network: str, together: int, environment: dict[str, str], seconds: float = 10) -> list[float]:
    """Returns the median time of a pair in each of `together` processes that run at once."""
    command = [sys.executable, "-c", CODE, network, str(seconds)]
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=own | environment) for _ in range(together)
    ]
    return [float(run.communicate()[0]) for run in runs]


def main() -> None:
    network = sys.argv[1] if len(sys.argv) > 1 else "fastflownet"
    for spins in ("", "300000", "30000", "10000", "3000", "1000"):
        environment = {"GOMP_SPINCOUNT": spins} if spins else {}
        alone, both = (milliseconds(network, together, environment) for together in (1, 2))
        shown = ", ".join(f"{time:.0f}" for time in both)
        print(f"GOMP_SPINCOUNT {spins or 'ours':>7}: alone {alone[0]:.0f} ms, two at once {shown} ms")


if __name__ == "__main__":
    main()
