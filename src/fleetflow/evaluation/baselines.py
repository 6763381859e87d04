"""What is no network of ours: OpenCV's classical methods, and the function of a Python file of the user."""

import hashlib
import inspect
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fleetflow.types import FleetflowError

DIS, FARNEBACK, DEEPFLOW = "dis", "farneback", "deepflow"
FARNEBACK_SETTINGS = (0.5, 5, 15, 3, 7, 1.5)  # scale of a level, levels, window, iterations, neighborhood, its sigma
CLASSICAL = {  # what each of OpenCV's methods is, in tables and protocols
    DIS: "OpenCV DIS (medium)",
    FARNEBACK: f"OpenCV Farneback {FARNEBACK_SETTINGS}",
    DEEPFLOW: "OpenCV DeepFlow",
}
TRIAL = (125, 187)  # height and width of the pictures that a method of the user is tried on; multiples of nothing


class Method(NamedTuple):
    """What is no network of ours; called with two images, uint8 [H, W, 3] RGB, it returns the flow [H, W, 2] pixels."""

    name: str
    predict: Callable[[np.ndarray, np.ndarray, str], Any]  # the two images, and what the pair is called
    file: Path | None = None  # of the user, whose function it is

    def __call__(self, image1: np.ndarray, image2: np.ndarray, name: str = "pair") -> np.ndarray:
        """Returns the flow, float32; name: of the pair; raises FleetflowError where the method fails, or returns anything else."""
        height, width = image1.shape[:2]
        who, size = f"predict of {self.file}" if self.file else self.name, f"{height}x{width}"
        try:
            flow = np.asarray(self.predict(image1, image2, name))
        except Exception as error:  # whatever the code of others raises
            raise FleetflowError(f"{who} failed on two pictures of {size} ({_words(error)}); fix it") from None
        if flow.shape != (height, width, 2) or not np.issubdtype(flow.dtype, np.floating):
            got = f"{flow.dtype} {list(flow.shape)}"
            raise FleetflowError(f"{who} returned {got} for pictures of {size}; expected float [{height}, {width}, 2]")
        return flow.astype(np.float32, copy=False)

    def label(self) -> dict[str, str]:
        """Returns what its results depend on, for a note beside them."""
        content = {"sha256": hashlib.sha256(self.file.read_bytes()).hexdigest()} if self.file else {}
        return {"model": self.name, **content}


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def method(name: str) -> Method | None:
    """Returns the classical method of that name, or that of a Python file NAME.py; None for any other name."""
    if name.endswith(".py"):
        return adapter(Path(os.path.expanduser(name)))
    return classical(name) if name in CLASSICAL else None


def adapter(path: Path) -> Method:
    """Returns the function predict(image1, image2) of a Python file, which is run, after one call to try it.

    If it has a parameter `name`, or a third that must be given, it gets the name of the pair: GROUP/NAME in a data set,
    the name of the file without suffix in a submission, "trial" when it is tried.

    While the file is run and tried, what lies beside it can be imported.

    Raises:
        FleetflowError: Where there is no such function, or the trial fails.
    """
    if not path.is_file():
        raise FleetflowError(f"{path} does not exist; name {', '.join(CLASSICAL)} or a Python file with predict(a, b)")
    images = np.random.default_rng(0).integers(0, 256, (2, *TRIAL, 3), dtype=np.uint8)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        function = runpy.run_path(str(path)).get("predict")
        found = Method(path.stem, _with_name(function), path) if callable(function) else None
        if found:
            found(images[0], images[1], "trial")
    except FleetflowError:
        raise
    except Exception as error:  # whatever the code of the user raises
        raise FleetflowError(f"{path} cannot be run ({_words(error)}); fix it") from None
    finally:
        sys.path.remove(str(path.resolve().parent))
    if not found:
        raise FleetflowError(f"{path} has no function predict(image1, image2); add one that returns the flow")
    return found


def _with_name(function: Callable) -> Callable[[np.ndarray, np.ndarray, str], np.ndarray]:
    """The function of the user as one of two images and a name, which it gets if its signature asks for it."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # what is written in C may have no signature
        parameters = {}
    must = [part for part in parameters.values() if part.default is part.empty and part.kind in
            (part.POSITIONAL_ONLY, part.POSITIONAL_OR_KEYWORD)]  # fmt: skip
    if len(must) == 3:
        return function
    if "name" in parameters and parameters["name"].kind != inspect.Parameter.POSITIONAL_ONLY:
        return lambda image1, image2, name: function(image1, image2, name=name)
    return lambda image1, image2, name: function(image1, image2)


def classical(name: str) -> Method:
    """Returns a method of OpenCV: "dis" (its medium preset), "farneback" or "deepflow".

    OpenCV takes as many threads as torch does now.

    Raises:
        FleetflowError: For another name, or where OpenCV or the part with DeepFlow is not installed.
    """
    if name not in CLASSICAL:
        raise FleetflowError(f'"{name}" is no classical method; known: {", ".join(CLASSICAL)}')
    cv2: Any  # the types in the package lack parts of it
    try:
        import cv2
    except ImportError:
        raise FleetflowError(f'{name} needs OpenCV; install it with pip install "fleetflow[bench]"') from None
    if name == DEEPFLOW and not hasattr(cv2, "optflow"):
        raise FleetflowError('deepflow is in opencv-contrib, not in this OpenCV; run pip install "fleetflow[bench]"')
    cv2.setNumThreads(torch.get_num_threads())
    compute = {
        DIS: lambda: cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc,
        FARNEBACK: lambda: lambda a, b, _: cv2.calcOpticalFlowFarneback(a, b, None, *FARNEBACK_SETTINGS, 0),
        DEEPFLOW: lambda: cv2.optflow.createOptFlow_DeepFlow().calc,
    }[name]()

    def predict(image1: np.ndarray, image2: np.ndarray, name: str) -> np.ndarray:
        gray = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (image1, image2)]
        return compute(*gray, None)

    return Method(CLASSICAL[name], predict)
