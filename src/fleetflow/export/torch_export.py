""".pt2 files: the exported program of torch. Reading them needs torch."""

import json
from pathlib import Path

import numpy as np
import torch
from torch.export import ExportedProgram

from fleetflow.export.onnx import KEY
from fleetflow.types import FleetflowError


def write_pt2(program: ExportedProgram, path: Path, about: dict) -> None:
    """Writes the program for `torch.export.load`, its metadata in the extra file "fleetflow"."""
    torch.export.save(program, path, extra_files={KEY: json.dumps(about)})


class Loaded:
    """A .pt2 file as a function of numpy arrays, as `Session` calls it."""

    def __init__(self, path: Path):
        extra = {KEY: ""}
        try:
            self.run = torch.export.load(path, extra_files=extra).module()
        except Exception as error:  # a foreign or damaged archive raises many things
            reason = (str(error) or type(error).__name__).splitlines()[0][:120]
            raise FleetflowError(f"{path} cannot be read as an exported program ({reason})") from error
        self.about = json.loads(extra[KEY] or "{}")

    def __call__(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        with torch.inference_mode():
            found = self.run(*(torch.from_numpy(array) for array in feeds.values()))
        return [part.numpy() for part in (found if isinstance(found, tuple | list) else (found,))]
