"""The command `fleetflow export`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from fleetflow.cli.console import table
from fleetflow.cli.options import Positional
from fleetflow.types import FleetflowError


def export(
    model: Positional[str],
    /,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    to: Literal["onnx", "openvino", "pt2", "executorch", "tensorrt"] = "onnx",
    size: tuple[int, int] | None = None,
    iterations: int | None = None,
    parts: bool = False,
    half: bool = False,
    bf16: bool = False,
    int8: bool = False,
    calibrate: str = "footage",
    aot: bool = False,
    weights: bool = True,
) -> None:
    """Write a network for another runtime, and prove there that it is equal; a file that is not equal is not kept.

    The file takes uint8 RGB pictures [N, H, W, 3] and returns the flow in pixels, float32 [N, H, W, 2]: colors, mean,
    sizes and the way back are inside. `fleetflow predict`, `evaluate` and `benchmark speed` take it in place of a network.

    Args:
        model: a network or NETWORK:CHECKPOINT.
        output: the file, .onnx, .xml (openvino), .pt2 or .pte (executorch); with --parts a folder.
        to: the format; tensorrt writes ONNX and the command that builds an engine of it on a machine with a GPU.
        size: height and width of all pictures; any from 128 pixels on if not given.
        iterations: refinement iterations of networks that refine; their own if not given.
        parts: write encode, step and decode, with a loop outside: early stop and warm start (RAFT, GMA, DEQ-Flow).
        half: float16 in convolutions (onnx, tensorrt), or for stored weights (openvino).
        bf16: compute in bfloat16 (openvino, pictures of one size, on a processor that has it).
        int8: convolutions in int8 (openvino).
        calibrate: pictures for --int8, a folder of consecutive frames, or "footage" (generated clips).
        aot: machine code for this kind of processor, compiled by AOTInductor (pt2); needs a C++ compiler, and minutes.
        weights: take the network with its weights; --no-weights exports random ones, to try whether it can be written.

    Examples:
        fleetflow export fastflownet -o fastflownet.onnx
        fleetflow export raft_small -o raft.xml --to openvino --iterations 12 --size 448 1024
    """
    from fleetflow.export import calibration, parity
    from fleetflow.export.graph import Sizes
    from fleetflow.export.write import export as write
    from fleetflow.export.write import license_of
    from fleetflow.models.weights import load

    if calibrate != "footage" and not int8:
        raise FleetflowError("--calibrate chooses pictures for --int8; give both")
    network = load(model, weights=weights)
    sizes = Sizes() if size is None else Sizes(*size, batch=1)
    written = write(
        network, output, network=model, license=license_of(model, network) if weights else "none", target=to, sizes=sizes,
        iterations=iterations, parts=parts, half=half, bf16=bf16, aot=aot,
        int8_pairs=calibration.pairs(calibrate, sizes) if int8 else None,
    )  # fmt: skip
    title = f"{written.files[0].name} against {model} in float32"
    table(title, parity.COLUMNS, [parity.cells(row) for row in written.rows])
    for path in written.files:
        print(path)
    if to == "tensorrt":
        print("run the script on a machine with a GPU and TensorRT; it was not tried here")
