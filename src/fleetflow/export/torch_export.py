""".pt2 files: the exported program of torch, or compiled by AOTInductor. Reading them needs torch."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.export import ExportedProgram

from fleetflow.export.onnx import KEY, quiet
from fleetflow.types import FleetflowError

COMPILED = "data/aotinductor/"  # the folder of a .pt2 file that holds machine code
ALLOW = "FLEETFLOW_MACHINE_CODE"  # environment variable: 1 lets machine code run, which files from strangers may hold
_written: set[str] = set()  # files of machine code that this process compiled itself


def write_pt2(program: ExportedProgram, path: Path, about: dict) -> None:
    """Writes the program for `torch.export.load`, its metadata in the extra file "fleetflow"."""
    torch.export.save(program, path, extra_files={KEY: json.dumps(about)})


def write_compiled(program: ExportedProgram, path: Path, about: dict) -> None:
    """Writes the program as machine code of this kind of processor, for `torch._inductor.aoti_load_package`.

    Raises:
        FleetflowError: without a C++ compiler, and where it fails.
    """
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise FleetflowError(f"--aot needs a C++ compiler, and there is no {compiler}; install one, or leave --aot out")
    try:
        with quiet():
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs={"aot_inductor.metadata": {KEY: json.dumps(about)}}
            )
    except Exception as error:  # of the compiler, or of an operator that AOTInductor lacks
        reason = " ".join(str(error).split())[:200]
        raise FleetflowError(f"the network cannot be compiled ahead of time ({reason}); leave --aot out") from error
    _written.add(os.path.realpath(path))


class Loaded:
    """A .pt2 file as a function of numpy arrays, as `Session` calls it."""

    def __init__(self, path: Path):
        extra = {KEY: ""}
        try:
            with zipfile.ZipFile(path) as archive:
                compiled = any(COMPILED in name for name in archive.namelist())
            if compiled and os.path.realpath(path) not in _written and os.environ.get(ALLOW) != "1":
                raise FleetflowError(f"{path} holds machine code, which opening it runs; if it is yours, set {ALLOW}=1")
            if compiled:
                self.run = torch._inductor.aoti_load_package(str(path))
                extra = self.run.loader.get_metadata()
            else:
                with quiet():  # it logs what it raises
                    self.run = torch.export.load(path, extra_files=extra).module()
        except FleetflowError:
            raise
        except Exception as error:  # a foreign or damaged archive raises many things
            reason = (str(error) or type(error).__name__).splitlines()[0][:120]
            raise FleetflowError(f"{path} cannot be read as an exported program ({reason})") from error
        self.about = json.loads(extra.get(KEY) or "{}")

    def __call__(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        with torch.inference_mode():
            found = self.run(*(torch.from_numpy(array) for array in feeds.values()))
        return [part.numpy() for part in (found if isinstance(found, tuple | list) else (found,))]
