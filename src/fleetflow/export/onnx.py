"""ONNX files, opset 18: what ONNX Runtime, OpenVINO, TensorRT, browsers and the compilers of many chips read."""

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path

import torch
from torch.export import ExportedProgram

from fleetflow.types import FleetflowError

# GridSample of opset 20 and later is read as nearest by TensorRT 10 and 11 (TensorRT#4646); Resize and Pad are complete.
OPSET = 18
KEY = "fleetflow"  # of our entry in a file's metadata


def require(*packages: str, extra: str = "export") -> None:
    """Raises FleetflowError where a package is missing that an extra of ours brings."""
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise FleetflowError(f"{' and '.join(missing)} is not installed; run pip install 'fleetflow[{extra}]'")


@contextlib.contextmanager
def quiet():
    """Keeps what exporters print and warn from the terminal; errors pass through."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def write_onnx(
    program: ExportedProgram, path: Path, about: dict, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> None:
    """Writes an exported program as one file with metadata.

    Args:
        program: of `graph.trace`.
        path: the file, which is written in place.
        about: what the file says of itself, under KEY, as JSON.
        inputs: names of the inputs, in their order.
        outputs: names of the outputs.

    Raises:
        FleetflowError: where the exporter lacks an operator.
    """
    require("onnx", "onnxscript")
    with quiet():
        try:
            written = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = next((line for line in str(error).splitlines() if "Summary" not in line and line.strip()), "")
            raise FleetflowError(f"the network cannot be written as ONNX ({reason.strip()[:200]})") from error
        assert written is not None  # with dynamo it is a program
        for node in written.model.graph.all_nodes():  # where each stands in our source: a sixth of FastFlowNet's file
            node.metadata_props.clear()
            node.doc_string = None
        written.model.metadata_props[KEY] = json.dumps(about)
        written.model.producer_name = KEY
        written.save(str(path), external_data=False)
