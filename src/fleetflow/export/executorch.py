"""ExecuTorch's files (.pte), for phones and small boards: fixed size, convolutions by XNNPACK."""

import json
from pathlib import Path

import numpy as np
from torch.export import ExportedProgram

from fleetflow.export.onnx import KEY, quiet, require
from fleetflow.types import FleetflowError


def write_executorch(program: ExportedProgram, path: Path, about: dict) -> None:
    """Writes a program of fixed shapes, and what it says of itself in NAME.pte.json beside it."""
    require("executorch", extra="executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore[reportMissingImports]
        XnnpackPartitioner,
    )
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]

    with quiet():
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    path.write_bytes(lowered.buffer)
    describing(path).write_text(json.dumps({KEY: about}))


def describing(path: Path) -> Path:
    """Returns the file beside a .pte that says what it is: the format has no room for it."""
    return path.with_name(path.name + ".json")


class Loaded:
    """A .pte file as a function of numpy arrays, as `Session` calls it."""

    def __init__(self, path: Path):
        if not describing(path).is_file():
            raise FleetflowError(f"{describing(path)} is missing; lay it beside the file, or export the network again")
        require("executorch", extra="executorch")
        from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

        self.about = json.loads(describing(path).read_text())[KEY]
        self.method = Runtime.get().load_program(path).load_method("forward")

    def __call__(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        import torch

        return [part.numpy() for part in self.method.execute([torch.from_numpy(array) for array in feeds.values()])]
