"""Export a network: trace, write, open in the runtime, compare; a file that is not equal is never seen."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

import fleetflow
from fleetflow.export import parity
from fleetflow.export.executorch import write_executorch
from fleetflow.export.graph import Sizes, plain, traced
from fleetflow.export.half import with_half_convolutions
from fleetflow.export.onnx import write_onnx
from fleetflow.export.openvino import write_openvino
from fleetflow.export.parts import in_parts
from fleetflow.export.session import FORMAT
from fleetflow.export.tensorrt import build_script
from fleetflow.export.torch_export import write_compiled, write_pt2
from fleetflow.io.atomic import LOCK, lock_folder, writing
from fleetflow.io.names import check_utf8
from fleetflow.models.base import FlowModel
from fleetflow.models.spec import ModelSpec
from fleetflow.models.weights import header, is_safetensors, shipped
from fleetflow.types import FleetflowError

Target = Literal["onnx", "openvino", "pt2", "executorch", "tensorrt"]
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2", "executorch": ".pte", "tensorrt": ".onnx"}
ANY = Sizes()
ONE_SIZE = ("executorch",)  # targets that take pictures of one size


class Exported(NamedTuple):
    """What an export has written: its files, what they say of themselves, and the comparison with the network."""

    files: list[Path]
    about: dict
    rows: list[parity.Row]


def export(
    model: FlowModel,
    output: Path,
    *,
    network: str,
    license: str = "unknown",
    target: Target = "onnx",
    sizes: Sizes = ANY,
    iterations: int | None = None,
    parts: bool = False,
    half: bool = False,
    bf16: bool = False,
    int8_pairs: list[tuple[np.ndarray, np.ndarray]] | None = None,
    aot: bool = False,
) -> Exported:
    """Writes a network for another runtime.

    Args:
        model: the network; it stays as it is.
        output: a file with the suffix of the target, or for `parts` a folder.
        network: its name, and `license`: of its weights, for the metadata.
        target: the format.
        sizes: of the pictures.
        iterations: of refinement; None takes the network's own.
        parts: three graphs in place of one, for a loop outside.
        half: convolutions (OpenVINO: weights) in float16.
        bf16: OpenVINO computes in bfloat16, where the processor has it; this one must, to compare.
        int8_pairs: pictures by which OpenVINO quantizes convolutions to int8.
        aot: .pt2 as machine code for this kind of processor, by AOTInductor.

    Raises:
        FleetflowError: where the target cannot hold the network, and where the file is not equal to it; then nothing is
            written.
    """
    precision = "int8" if int8_pairs is not None else "bf16" if bf16 else "half" if half else "fp32"
    _refuse(output, target, sizes, parts, precision, [half, bf16, int8_pairs is not None].count(True), aot)
    iterations = model.iterations_of(iterations)
    sha256, model = _hash(model), plain(model)
    about = {
        "format": FORMAT,
        "network": network,
        "sha256": sha256,
        "license": license,
        "version": fleetflow.__version__,
        "input": "image1, image2: uint8 [N, H, W, 3] RGB",
        "output": "flow: float32 [N, H, W, 2] pixels, right and down",
        "sizes": sizes._asdict(),
        "iterations": iterations,
        "precision": precision,
        "compiled": aot,
    }
    with _workplace(output) as place:
        file = place / (output.name or "export")
        if parts:
            rows = _write_parts(model, file, about, target, sizes, iterations)
        else:
            rows = _write(model, file, about, target, sizes, iterations, int8_pairs)
        files = _moved(place, output.parent)
    return Exported(files, about, rows)


def _refuse(output: Path, target: str, sizes: Sizes, parts: bool, precision: str, precisions: int, aot: bool) -> None:
    """Raises FleetflowError for a combination that no target takes; `precisions` is how many were asked for."""
    check_utf8(output, "a runtime")
    if not parts and output.suffix != SUFFIXES[target]:
        raise FleetflowError(f"{output} does not end in {SUFFIXES[target]}, as files for {target} do; name it so")
    if parts and (output.suffix in SUFFIXES.values() or output.is_file()):
        raise FleetflowError(f"{output} is the name of a file; --parts writes several: give a folder")
    if parts and target not in ("onnx", "openvino"):
        raise FleetflowError(f"--parts is written as onnx or openvino, not as {target}")
    if target in ONE_SIZE and not sizes.fixed:
        raise FleetflowError(f"{target} takes pictures of one size; give it with --size HEIGHT WIDTH")
    if precisions > 1:
        raise FleetflowError("--half, --bf16 and --int8 are three precisions; give one")
    if precision in ("int8", "bf16") and target != "openvino":
        raise FleetflowError(f"{precision} is written for openvino, not for {target}; add --to openvino")
    if precision == "bf16" and (parts or not sizes.fixed):
        raise FleetflowError("--bf16 is one graph for pictures of one size; give it with --size HEIGHT WIDTH")
    if precision == "int8" and parts:
        raise FleetflowError("--int8 is written as one graph; leave --parts out")
    if precision == "half" and target in ("pt2", "executorch"):
        raise FleetflowError(f"--half is for onnx, openvino and tensorrt, not for {target}")
    if aot and target != "pt2":
        raise FleetflowError(f"--aot is for pt2, not for {target}; add --to pt2")


@contextmanager
def _workplace(output: Path) -> Iterator[Path]:
    """A folder in a hidden one beside the output, which is gone at the end; what a killed run left in it goes, too."""
    hidden = output.with_name(f".{output.name}.export")
    try:
        with lock_folder(hidden, f"export to {output.name}"):
            place = hidden / "new"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            yield place
    finally:
        if not (hidden / LOCK).exists():  # else another run is at it
            shutil.rmtree(hidden, ignore_errors=True)


def _moved(place: Path, folder: Path) -> list[Path]:
    """Moves all that was written to where it belongs, the file that others are opened by last."""
    entries = sorted(place.iterdir(), key=lambda path: path.suffix in SUFFIXES.values())
    for entry in entries:
        target = folder / entry.name
        with writing(target):
            if entry.is_dir():
                target.mkdir(exist_ok=True)
                for part in sorted(entry.iterdir()):
                    os.replace(part, target / part.name)
            else:
                os.replace(entry, target)
    return [folder / entry.name for entry in reversed(entries)]


def _write(
    model: FlowModel, file: Path, about: dict, target: Target, sizes: Sizes, iterations: int | None,
    int8_pairs: list | None,
) -> list[parity.Row]:  # fmt: skip
    """Writes one graph and returns its comparison with the network."""
    half = about["precision"] == "half"
    products = about["precision"] in ("bf16", "int8")
    converted = with_half_convolutions(model) if half and target != "openvino" else model
    program = traced(converted, sizes, iterations, products=products, as_bytes=target == "openvino")
    onnx = file.with_suffix(".onnx")
    if target in ("onnx", "openvino", "tensorrt"):
        write_onnx(program, onnx, about, ("image1", "image2"), ("flow",))
    if target == "openvino":
        write_openvino(onnx, file, about, half=half, int8_pairs=int8_pairs)
        onnx.unlink()
    elif target == "pt2":
        (write_compiled if about["compiled"] else write_pt2)(program, file, about)
    elif target == "executorch":
        write_executorch(program, file, about)

    def where(pair: str) -> str | None:
        if target != "onnx":
            return None
        images = next(images for name, *images, _ in parity.pairs(sizes) if name == pair)
        return parity.first_difference(program, onnx, images)

    rows = parity.check(file, model, sizes, iterations, about["precision"], where)
    if target == "tensorrt":
        script = file.with_name(f"{file.stem}_tensorrt.sh")
        script.write_text(build_script(file, sizes, half=half))
        script.chmod(0o755)
    report = file.with_name(f"{file.stem}.parity.json")
    report.write_text(parity.as_json(rows, about, about["precision"]))
    return rows


def _write_parts(
    model: FlowModel, folder: Path, about: dict, target: Target, sizes: Sizes, iterations: int | None
) -> list[parity.Row]:
    """Writes three graphs and returns the comparison of the loop over them with the network."""
    half = about["precision"] == "half"
    sizes = sizes._replace(batch=1)
    graphs = in_parts(with_half_convolutions(model) if half and target != "openvino" else model, sizes)
    about["sizes"], about["features"] = sizes._asdict(), [name for name in graphs["step"].inputs[:-2]]
    folder.mkdir()
    for name, part in graphs.items():
        file = folder / f"{name}.onnx"
        write_onnx(part.program, file, {**about, "part": name}, part.inputs, part.outputs)
        if target == "openvino":
            write_openvino(file, file.with_suffix(".xml"), {**about, "part": name}, half=half)
            file.unlink()
    rows = parity.check(folder, model, sizes, iterations, about["precision"], lambda pair: None)
    (folder / "parity.json").write_text(parity.as_json(rows, about, about["precision"]))
    return rows


def license_of(name: str, model: FlowModel) -> str:
    """Returns the license of the weights that `fleetflow.load(name)` takes: their own where they say it."""
    spec = ModelSpec.parse(name)
    file = spec.path or shipped(spec.network)
    return header(file).get("license", "unknown") if is_safetensors(file) else model.license or "unknown"


def _hash(model: FlowModel) -> str:
    """The SHA-256 of the names and values of the model's state."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
