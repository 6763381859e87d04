"""What an exported network loses against truth, by runtime and precision, as the tables of docs/exported.md.

    python benchmarks/export_accuracy.py fastflownet --pairs FOLDER_OF_REAL_PAIRS --keep accuracy.json
    python benchmarks/export_accuracy.py fastflownet --layers --keep layers.json
    python benchmarks/export_accuracy.py fastflownet --pairs FOLDER_OF_REAL_PAIRS --files FILE.xml:bf16 FILE.xml

The network is exported with open sizes to ONNX, OpenVINO and OpenVINO int8 (calibrated on the validation part of
footage), and measured on pairs of footage's test part and on real pairs: the mean error of each pair, then of each set.
--layers quantizes one kind of layer after the other and measures on the validation part, where choices are made.
--files measures exported files of one size instead, such as those that export_speed.py has timed, beside torch: footage
is generated in that size, real pairs are resized to it, and their flows back.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

from fleetflow.data.dataset import Files, open_files
from fleetflow.evaluation.evaluate import evaluate
from fleetflow.export import calibration, quantize
from fleetflow.export.graph import Sizes, plain, traced
from fleetflow.export.onnx import write_onnx
from fleetflow.export.openvino import write_openvino
from fleetflow.export.session import Session
from fleetflow.inference.predictor import Predictor
from fleetflow.models.weights import load

KINDS = {  # of FastFlowNet's 48 convolutions in the order of the graph: which are quantized
    "none": (),
    "pyramid": tuple(range(8)),
    "features beside the correlation": tuple(range(8, 48, 8)),
    "first of the decoders": tuple(range(9, 48, 8)),
    "grouped": tuple(k for k in range(8, 48) if k % 8 in (2, 3, 4)),
    "behind the groups": tuple(k for k in range(8, 48) if k % 8 in (5, 6)),
    "all but flow heads": tuple(k for k in range(48) if k < 8 or k % 8 != 7),
    "all": tuple(range(48)),
}


def in_memory(files: Files) -> Files:
    """Returns all samples, as a data set is read once for all models."""
    samples = [files[k] for k in range(len(files))]

    class Kept(Files):
        def __getitem__(self, k: int):
            return samples[k]

    return Kept(files.pairs, about=files.about)


def exported(network: str, folder: Path, products: bool) -> tuple[Path, dict]:
    """Returns the ONNX file of a network with open sizes, which is written where it is missing; `products` as for int8."""
    said = {"network": network, "version": "", "sizes": Sizes()._asdict(), "iterations": None}
    file = folder / f"{network}{'_products' if products else ''}.onnx"
    if not file.is_file():
        program = traced(plain(load(network)), Sizes(), None, products=products)
        write_onnx(program, file, said, ("image1", "image2"), ("flow",))
    return file, said


def quantized(onnx: Path, said: dict, name: str, pairs: list, chosen: Callable[[str], bool] | None) -> Path:
    """Returns an int8 file, in which the convolutions are quantized that `chosen` says; None: those of the library."""
    file, ours = onnx.with_name(f"{onnx.stem}_{name.replace(' ', '_')}.xml"), (quantize._is_quantized, quantize.reach)
    if chosen:
        convolutions = ("Convolution", "GroupConvolution")
        quantize._is_quantized = lambda node: (
            node.get_type_name() in convolutions and chosen(node.get_friendly_name()) and not quantize.reads_parts(node)
        )
        quantize.reach = lambda *given: {place: value for place, value in ours[1](*given).items() if chosen(place)}
    try:
        if not file.is_file():
            write_openvino(onnx, file, said, int8_pairs=pairs)
    finally:
        quantize._is_quantized, quantize.reach = ours
    return file


def fitted(predict: Callable, size: tuple[int, int]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns a function that resizes both pictures to `size` (height, width) before `predict`, and the flow back."""

    def predicted(image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        height, width = image1.shape[:2]
        if (height, width) == size:
            return predict(image1, image2)
        flow = predict(*(cv2.resize(image, size[::-1]) for image in (image1, image2)))
        return cv2.resize(flow, (width, height)) * np.float32((width / size[1], height / size[0]))

    return predicted


def of_one_size(network: str, files: list[str]) -> tuple[tuple[int, int], dict[str, Callable]]:
    """Returns the size that files take, and functions that open torch's network and the files, NAME or NAME:bf16."""
    opened = {
        name: Session(*name.split(":")[:1], threads=1, precision=name.partition(":")[2] or None) for name in files
    }
    (size,) = {(session.about["sizes"]["height"], session.about["sizes"]["width"]) for session in opened.values()}
    network_fp32 = Predictor(load(network), device="cpu", precision="fp32")
    models = {"torch, float32": network_fp32, **opened}
    return size, {name: lambda model=model: fitted(model, size) for name, model in models.items()}


def number(name: str) -> int:
    """Returns which convolution it is: node_conv2d, node_conv2d_1, ..."""
    last = name.partition("/")[0].removeprefix("node_conv2d").strip("_")
    return int(last) if last.isdigit() else 0


def measured(predict, sets: dict[str, Files]) -> dict[str, float]:
    return {name: evaluate(predict, files)["mean of sets"]["epe"] for name, files in sets.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", nargs="?", default="fastflownet")
    parser.add_argument("--pairs", type=Path, help="real pairs, as the data set pairs reads them")
    parser.add_argument("--limit", type=int, default=2, help="pairs of each class of footage; 0: real pairs only")
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--files", nargs="+", default=[], help="of one size, NAME or NAME:bf16")
    parser.add_argument("--folder", type=Path, default=Path("exported"), help="where the files are kept")
    parser.add_argument("--keep", type=Path, default=Path("accuracy.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.folder.mkdir(exist_ok=True)
    known = json.loads(given.keep.read_text()) if given.keep.is_file() else {}
    size, models = of_one_size(given.network, given.files) if given.files else (None, {})
    split = "validation" if given.layers else "test"
    sets = {}
    if given.limit:
        options = (f"split={split}", f"limit={given.limit}", *([f"size={size[0]}x{size[1]}"] if size else []))
        files = open_files("footage", None, options=options)
        sets["footage"] = in_memory(files)
    if given.pairs and not given.layers:
        sets["real pairs"] = open_files("pairs", given.pairs, without=("ambush_4_final_0004",))
    if not models:
        models = open_ones(given.network, given.folder, given.layers)
    for name, make in models.items():
        if name not in known:
            known[name] = measured(make(), sets)
            given.keep.write_text(json.dumps(known, indent=1))
            print(name, known[name], flush=True)
    first = next(iter(known.values()))
    print("| |", *(f" {name}, EPE px | change |" for name in sets))
    print("|---|", *("--:|--:|" for _ in sets))
    for name, row in known.items():
        print(f"| {name} |", *(f" {row[k]:.4f} | {row[k] - first[k]:+.4f} |" for k in sets if np.isfinite(row[k])))


def open_ones(network: str, folder: Path, layers: bool) -> dict[str, Callable]:
    """Returns functions that open the network in torch and in files with open sizes; `layers`: by what is quantized."""
    onnx, said = exported(network, folder, products=False)
    calibrating = []

    def session(name: str, chosen=None) -> Session:
        calibrating[:] = calibrating or calibration.pairs("footage", Sizes())
        graph = onnx if layers else exported(network, folder, products=True)[0]  # KINDS numbers those of the first
        return Session(quantized(graph, said, name, calibrating, chosen), threads=1)

    if layers:
        return {
            name: lambda name=name, kept=kept: session(name, lambda node: number(node) in kept)
            for name, kept in KINDS.items()
        }
    xml = onnx.with_suffix(".xml")
    if not xml.is_file():
        write_openvino(onnx, xml, said)
    return {
        "torch, float32": lambda: Predictor(load(network), device="cpu", precision="fp32"),
        "torch, bfloat16": lambda: Predictor(load(network), device="cpu", precision="bf16"),
        "ONNX Runtime": lambda: Session(onnx, threads=1),
        "OpenVINO, float32": lambda: Session(xml, threads=1),
        "OpenVINO, int8": lambda: session("int8"),
    }


if __name__ == "__main__":
    main()
