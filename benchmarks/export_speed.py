"""How fast exported networks are, beside torch and OpenCV's DIS, as the table of docs/performance.md.

    python benchmarks/export_speed.py fastflownet lightflow raft_small --threads 2

Every network is exported for pictures of one size; all ways of computing it and DIS take turns in one process, so that
a noisy machine slows all alike. Compare the multiples of DIS. Run it on an otherwise quiet machine.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch

from fleetflow.evaluation.baselines import method
from fleetflow.evaluation.speed import time_in_turn
from fleetflow.export import calibration
from fleetflow.export.graph import Sizes, plain, traced
from fleetflow.export.onnx import write_onnx
from fleetflow.export.openvino import write_openvino
from fleetflow.export.session import Session
from fleetflow.inference.predictor import Predictor
from fleetflow.models.weights import load
from fleetflow.types import FleetflowError

Predict = Callable[[np.ndarray, np.ndarray], object]


def ways(network: str, sizes: Sizes, threads: int, folder: Path, compiler: bool) -> Iterator[tuple[str, Predict]]:
    """Yields the name of a way to compute a network, and the function."""
    try:
        model = load(network)
    except FleetflowError:
        model = load(network, weights=False)
    yield "torch, ours", Predictor(model, device="cpu")
    yield "torch, ours, float32", Predictor(model, device="cpu", precision="fp32")
    program = traced(plain(model), sizes, None)
    said = {"network": network, "version": "", "sizes": sizes._asdict(), "iterations": model.iterations}
    onnx, xml, int8 = (folder / f"{network}{ending}" for ending in (".onnx", ".xml", "_int8.xml"))
    write_onnx(program, onnx, said, ("image1", "image2"), ("flow",))
    yield "ONNX Runtime", Session(onnx, threads=threads)
    write_openvino(onnx, xml, said)
    yield "OpenVINO, float32", Session(xml, threads=threads)
    yield "OpenVINO, bfloat16", Session(xml, threads=threads, precision="bf16")
    write_openvino(onnx, int8, said, int8_pairs=calibration.pairs("footage", sizes))
    yield "OpenVINO, int8 and float32", Session(int8, threads=threads)
    yield "OpenVINO, int8 and bfloat16", Session(int8, threads=threads, precision="bf16")
    if compiler:
        yield "AOTInductor", ahead_of_time(program, folder / f"{network}.pt2")


def ahead_of_time(program: torch.export.ExportedProgram, file: Path) -> Predict:
    """Returns the program as torch compiles it ahead of time; needs a C++ compiler."""
    run = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=str(file)))
    return lambda image1, image2: run(*(torch.from_numpy(image)[None] for image in (image1, image2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=["fastflownet", "lightflow", "liteflownet2", "raft_small"])
    parser.add_argument("--size", nargs=2, type=int, default=(448, 1024))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40.0, help="of measuring for each network")
    parser.add_argument("--compiler", action="store_true", help="AOTInductor, too, which compiles for minutes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cv2.setNumThreads(given.threads)
    sizes = Sizes(*given.size, batch=1)
    image1, image2 = (picture[0] for picture in next(calibration.generated(tuple(given.size), 1, ("pan",)))[:2])
    dis = method("dis")
    print("| network | computed by | ms | 95 % | times DIS |\n|---|---|--:|--:|--:|")
    for network in given.networks:
        with tempfile.TemporaryDirectory() as folder:
            found = dict(ways(network, sizes, given.threads, Path(folder), given.compiler)) | {"OpenCV DIS": dis}
            functions = {name: lambda predict=predict: predict(image1, image2) for name, predict in found.items()}
            timings = time_in_turn(functions, given.seconds, frozenset())
        base = next(row.p50 for row in timings if row.name == "OpenCV DIS")
        for row in timings:
            print(f"| {network} | {row.name} | {row.p50:.1f} | {row.p95:.1f} | {row.p50 / base:.2f} |", flush=True)


if __name__ == "__main__":
    main()
