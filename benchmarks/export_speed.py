"""How fast exported networks are, beside torch and OpenCV's DIS, as the table of docs/performance.md.

    python benchmarks/export_speed.py fastflownet lightflow raft_small --threads 2

Every network is exported for pictures of one size; all ways of computing it and DIS take turns in one process, so that
a noisy machine slows all alike. Compare the multiples of DIS. Run it on an otherwise quiet machine. Files are kept in
--folder; --prepare writes them and measures nothing, --profile says where OpenVINO's time goes.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import openvino
import torch

from fleetflow.evaluation.baselines import method
from fleetflow.evaluation.speed import time_in_turn
from fleetflow.export import calibration
from fleetflow.export.graph import Sizes, plain, traced
from fleetflow.export.onnx import write_onnx
from fleetflow.export.openvino import write_openvino
from fleetflow.export.session import Session
from fleetflow.export.torch_export import write_compiled
from fleetflow.inference.predictor import Predictor
from fleetflow.models.base import FlowModel
from fleetflow.models.weights import load
from fleetflow.types import FleetflowError

Predict = Callable[[np.ndarray, np.ndarray], object]
BFLOAT16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def written(
    network: str, model: FlowModel, sizes: Sizes, folder: Path, compiler: bool, int8: bool
) -> dict[str, Path]:  # fmt: skip
    """Returns the files of a network by their endings, as `fleetflow export` writes them; those missing are written."""
    endings = (".onnx", ".xml", "_bf16.xml", *(["_int8.xml"] if int8 else []), *([".pt2"] if compiler else []))
    files = {ending: folder / f"{network}_{sizes.height}x{sizes.width}{ending}" for ending in endings}
    said = {"network": network, "version": "", "sizes": sizes._asdict(), "iterations": model.iterations}
    missing, inputs, outputs = (
        [ending for ending in endings if not files[ending].is_file()],
        ("image1", "image2"),
        ("flow",),
    )
    if ".onnx" in missing or ".pt2" in missing:
        program = traced(plain(model), sizes, None)
        write_onnx(program, files[".onnx"], said, inputs, outputs)
        if compiler:
            write_compiled(program, files[".pt2"], said)
    for group, products in (([".xml"], False), (["_bf16.xml", "_int8.xml"], True)):
        endings = [ending for ending in group if ending in missing]
        if not endings:
            continue
        onnx = folder / f"{network}_for_openvino.onnx"
        write_onnx(traced(plain(model), sizes, None, products=products, as_bytes=True), onnx, said, inputs, outputs)
        for ending in endings:
            pairs = calibration.pairs("footage", sizes) if ending == "_int8.xml" else None
            write_openvino(onnx, files[ending], said, int8_pairs=pairs)
        onnx.unlink()
    return files


def ways(
    network: str, sizes: Sizes, threads: int, folder: Path, compiler: bool, int8: bool
) -> Iterator[tuple[str, Predict]]:  # fmt: skip
    """Yields the name of a way to compute a network, and the function."""
    try:
        model = load(network)
    except FleetflowError:
        model = load(network, weights=False)
    yield "torch, ours", Predictor(model, device="cpu")
    files = written(network, model, sizes, folder, compiler, int8)
    yield "ONNX Runtime", Session(files[".onnx"], threads=threads)
    yield "OpenVINO, float32", Session(files[".xml"], threads=threads)
    if int8:
        yield "OpenVINO, int8 and float32", Session(files["_int8.xml"], threads=threads)
    if BFLOAT16:
        yield "torch, ours, float32", Predictor(model, device="cpu", precision="fp32")
        yield "OpenVINO, bfloat16", Session(files["_bf16.xml"], threads=threads, precision="bf16")
        if int8:
            yield "OpenVINO, int8 and bfloat16", Session(files["_int8.xml"], threads=threads, precision="bf16")
    if compiler:
        yield "AOTInductor", Session(files[".pt2"], threads=threads)


def profile(file: Path, threads: int, precision: str, image1: np.ndarray, image2: np.ndarray) -> None:
    """Prints what share of an OpenVINO file's time each kind of operator takes: the least of eight runs of each."""
    core = openvino.Core()
    config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERF_COUNT": True}
    request = core.compile_model(core.read_model(str(file)), "CPU", config).create_infer_request()
    least: dict[tuple[str, str], float] = {}
    for _ in range(8):
        request.infer([image1[None], image2[None]])
        for row in request.get_profiling_info():
            key, time = (row.node_name, f"{row.node_type}, {row.exec_type}"), row.real_time.total_seconds()
            least[key] = min(time, least.get(key, time))
    kinds: dict[str, float] = {}
    for (_, kind), time in least.items():
        kinds[kind] = kinds.get(kind, 0.0) + time
    total = sum(kinds.values())
    print(f"{file.name}: {1000 * total:.0f} ms")
    for kind, time in sorted(kinds.items(), key=lambda item: -item[1])[:12]:
        print(f"| {kind} | {100 * time / total:.0f} % |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=["fastflownet", "lightflow", "liteflownet2", "raft_small"])
    parser.add_argument("--size", nargs=2, type=int, default=(448, 1024))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40.0, help="of measuring for each network")
    parser.add_argument("--compiler", action="store_true", help="AOTInductor, too, which compiles for minutes")
    parser.add_argument("--no-int8", action="store_true", help="no int8 files, which take minutes of large networks")
    parser.add_argument("--folder", type=Path, default=Path("exported"))
    parser.add_argument("--processor", action="store_true", help="processor time, for a machine that others use")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cv2.setNumThreads(given.threads)
    given.folder.mkdir(exist_ok=True)
    sizes = Sizes(*given.size, batch=1)
    image1, image2 = (picture[0] for picture in next(calibration.generated(tuple(given.size), 1, ("pan",)))[:2])
    dis = method("dis")
    print("| network | computed by | ms | 95 % | times DIS |\n|---|---|--:|--:|--:|")
    for network in given.networks:
        every = ways(network, sizes, given.threads, given.folder, given.compiler, not given.no_int8)
        found = {**dict(every), "OpenCV DIS": dis}
        if given.prepare:
            continue
        if given.profile:
            kinds = {".xml": "f32", **({} if given.no_int8 else {"_int8.xml": "f32"})}
            for ending, precision in {**kinds, **({"_bf16.xml": "bf16"} if BFLOAT16 else {})}.items():
                file = given.folder / f"{network}_{sizes.height}x{sizes.width}{ending}"
                profile(file, given.threads, precision, image1, image2)
            continue
        functions = {name: lambda predict=predict: predict(image1, image2) for name, predict in found.items()}
        clock = time.process_time if given.processor else time.perf_counter
        timings = time_in_turn(functions, given.seconds, frozenset(), clock)
        base = next(row.p50 for row in timings if row.name == "OpenCV DIS")
        for row in timings:
            print(f"| {network} | {row.name} | {row.p50:.1f} | {row.p95:.1f} | {row.p50 / base:.2f} |", flush=True)


if __name__ == "__main__":
    main()
