"""TensorRT: the ONNX file that it reads right, and the command that builds an engine of it where there is a GPU."""

from pathlib import Path

from fleetflow.export.graph import LARGEST_BATCH, LARGEST_SIDE, Sizes

SCRIPT = """#!/bin/sh
# Builds {engine} from {onnx} with TensorRT on the GPU of this machine; an engine runs on that kind of GPU only.
# Not tried on the machine that wrote it: building needs a GPU.
set -e
cd "$(dirname "$0")"
trtexec --onnx={onnx} --saveEngine={engine}{half}{shapes}
"""


def build_script(onnx: Path, sizes: Sizes, *, half: bool) -> str:
    """Returns a shell script that lies beside the ONNX file and builds the engine.

    Args:
        onnx: the file that `write_onnx` made.
        sizes: of its pictures; open ones are built for 448x1024 best, and for all others.
        half: whether the engine may compute in float16.
    """
    shapes = ""
    if not sizes.fixed or sizes.batch is None:
        smallest = (1, sizes.height or sizes.least, sizes.width or sizes.least)
        best = (1, sizes.height or 448, sizes.width or 1024)
        largest = (
            sizes.batch or min(4, LARGEST_BATCH),
            sizes.height or LARGEST_SIDE // 4,
            sizes.width or LARGEST_SIDE // 4,
        )
        for name, size in (("min", smallest), ("opt", best), ("max", largest)):
            text = "x".join(map(str, (*size, 3)))
            shapes += f" \\\n  --{name}Shapes=image1:{text},image2:{text}"
    return SCRIPT.format(onnx=onnx.name, engine=f"{onnx.stem}.engine", half=" --fp16" if half else "", shapes=shapes)
