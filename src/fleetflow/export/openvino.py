"""OpenVINO's files, NAME.xml and NAME.bin beside it, made from the ONNX file."""

import json
from pathlib import Path

from fleetflow.export.onnx import KEY, quiet, require
from fleetflow.export.telemetry import turn_off_telemetry


def write_openvino(onnx: Path, path: Path, about: dict, *, half: bool = False, int8_pairs: list | None = None) -> None:
    """Writes a network for OpenVINO.

    Args:
        onnx: the file that `write_onnx` made.
        path: of the .xml; the .bin lies beside it.
        about: what the file says of itself.
        half: weights are stored in float16.
        int8_pairs: pairs of uint8 [1, H, W, 3] pictures by which convolutions are quantized to int8; None: they are not.
    """
    require("openvino", extra="openvino")
    turn_off_telemetry()
    import openvino

    with quiet():
        model = openvino.convert_model(str(onnx))
        if int8_pairs is not None:
            from fleetflow.export.quantize import quantized

            model = quantized(model, int8_pairs)
        model.set_rt_info(json.dumps(about), [KEY])
        openvino.save_model(model, str(path), compress_to_fp16=half)
