"""Prediction from an exported file: numpy and one runtime, no torch.

session = fleetflow.Session("fastflownet.onnx")
flow = session(image1, image2)      # uint8 [H, W, 3] twice -> float32 [H, W, 2] pixels
"""

import json
import os
from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fleetflow.export.telemetry import turn_off_telemetry
from fleetflow.io.arrays import as_array
from fleetflow.io.names import check_utf8
from fleetflow.types import FleetflowError

KEY = "fleetflow"  # of our entry in a file's metadata
FORMAT = 1  # of that entry and of the inputs and outputs; files of a higher one are not opened
PARTS = ("encode", "step", "decode")
MOST_THREADS = 1024  # a runtime makes as many as it is told, and the system may not have them
SUFFIXES = (".onnx", ".xml", ".pt2", ".pte")

Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


class Result(NamedTuple):
    """What a session says of a pair.

    Attributes:
        flow: float32 [N, H, W, 2] pixels.
        state: (hidden, flow), float32 [N, C, h, w] and [N, 2, h, w], with which the next pair of a video may begin;
            None for a network that is one graph.
        iterations: refinement steps that were made; None for a network that is one graph.
        residual: how far the last step has moved the state, as the length of the change over that of the state.
    """

    flow: np.ndarray
    state: tuple[np.ndarray, np.ndarray] | None = None
    iterations: int | None = None
    residual: float | None = None


class Session:
    """A network in an exported file, ready to predict.

    Attributes:
        about: what the file says of itself: network, sha256 of its weights, license, version, sizes, iterations.
    """

    def __init__(self, path: str | os.PathLike, *, threads: int = 0, precision: str | None = None):
        """Opens the file in its runtime.

        Args:
            path: NAME.onnx (ONNX Runtime), NAME.xml (OpenVINO), NAME.pt2 (torch), NAME.pte (ExecuTorch), or a folder with
                encode, step and decode, which `fleetflow export --parts` writes.
            threads: of the runtime; 0 takes what it takes by itself.
            precision: "fp32" or, with OpenVINO, a fixed size and a processor that has it, "bf16"; None takes what the file
                was exported for, and float32 where the processor has no bfloat16.

        Raises:
            FleetflowError: for a missing, damaged, foreign or newer file, a runtime that is missing or lacks an operator,
                and "bf16" on a processor without it.
        """
        if not isinstance(threads, int) or not 0 <= threads <= MOST_THREADS:
            raise FleetflowError(f"threads is {threads}; expected a number from 0 to {MOST_THREADS}")
        self.path = Path(os.path.expanduser(path))
        check_utf8(self.path, "a runtime")
        self._how = {"threads": threads, "precision": precision}
        self.parts: dict[str, Run] = {}
        if self.path.is_dir():
            files = {part: _part(self.path, part) for part in PARTS}
            opened = {part: _open(file, threads, precision) for part, file in files.items()}
            self.parts = {part: run for part, (run, _) in opened.items()}
            self.about = opened["encode"][1]
        else:
            self.run, self.about = _open(self.path, threads, precision)
            if "part" in self.about:
                raise FleetflowError(f"{path} is one of three parts of a network; give the folder that it lies in")

    def __reduce__(self) -> tuple:
        """A copy, or another process, opens the file again."""
        return partial(Session, **self._how), (self.path.absolute(),)

    def __call__(self, image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        """Returns the flow from image1 to image2, float32 [H, W, 2] pixels, or [N, H, W, 2] for a batch.

        Args:
            image1: uint8 [H, W, 3] RGB, or [N, H, W, 3].
            image2: of the same shape.
        """
        flow = self.predict(image1, image2).flow
        return flow if np.ndim(image1) == 4 else flow[0]

    def predict(
        self,
        image1: np.ndarray,
        image2: np.ndarray,
        previous: Result | None = None,
        *,
        iterations: int | None = None,
        tolerance: float = 0.0,
    ) -> Result:
        """Returns all that the network says of a pair.

        Args:
            image1: as of a call.
            image2: as of a call.
            previous: the result for the pair before this one, from which a network in parts may go on.
            iterations: most refinement steps of a network in parts; None takes those it was exported with.
            tolerance: a network in parts stops when the residual is no larger.
        """
        image1, image2 = _pictures(image1, image2, self.about, self.path)
        _check_run(previous, iterations, tolerance)
        if not self.parts:
            if iterations not in (None, self.about.get("iterations")) or previous is not None or tolerance:
                raise FleetflowError(
                    f"{self.path} makes {self.about.get('iterations') or 'no'} iterations, always; export with --parts "
                    "to choose them, and to go on from a pair before"
                )
            return Result(_guarded(self.run, {"image1": image1, "image2": image2}, self.path)[0])
        *features, hidden, flow = self._part("encode", {"image1": image1, "image2": image2})
        if previous is not None and previous.state is not None:
            hidden, flow = previous.state
        known = dict(zip(self.about["features"], features))
        residual, most, made = None, iterations or self.about["iterations"], 0
        while made < most and (residual is None or residual > tolerance):
            last, (hidden, flow) = (hidden, flow), self._part("step", {**known, "hidden": hidden, "coarse": flow})
            made += 1
            residual = _change(last, (hidden, flow))
        full = self._part("decode", {"hidden": hidden, "coarse": flow})[0]
        still = (image1 == image2).reshape(len(image1), -1).all(1)
        full = np.where(still[:, None, None, None], np.float32(0), full)
        return Result(full, (hidden, flow), made, residual)

    def _part(self, part: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return _guarded(self.parts[part], feeds, self.path / part)


def _check_run(previous: Result | None, iterations: int | None, tolerance: float) -> None:
    """Raises FleetflowError for arguments of `Session.predict` that mean nothing."""
    if not isinstance(previous, Result | None):
        raise FleetflowError(f"previous is a {type(previous).__name__}; expected what `predict` returned, or None")
    if iterations is not None and (not isinstance(iterations, Integral) or iterations < 1):
        raise FleetflowError(f"iterations is {iterations!r}; it must be a whole number, at least 1")
    if not (isinstance(tolerance, Real) and tolerance >= 0):
        raise FleetflowError(f"tolerance is {tolerance!r}; expected a residual, 0 or more")


def _change(last: tuple[np.ndarray, ...], now: tuple[np.ndarray, ...]) -> float:
    """How far a step has moved the state, relative to its length."""
    moved = sum(float(np.square(b - a, dtype=np.float64).sum()) for a, b in zip(last, now))
    length = sum(float(np.square(b, dtype=np.float64).sum()) for b in now)
    return float(np.sqrt(moved / length)) if length > 0 else 0.0


def _part(folder: Path, part: str) -> Path:
    for suffix in SUFFIXES:
        if (folder / (part + suffix)).is_file():
            return folder / (part + suffix)
    raise FleetflowError(f"{folder} has no {part}.onnx; expected a folder that fleetflow export --parts wrote")


def _open(path: Path, threads: int, precision: str | None) -> tuple[Run, dict]:
    """The file as a function of named arrays, and what it says of itself."""
    if not path.is_file():
        raise FleetflowError(f"{path} does not exist; expected a file that fleetflow export wrote")
    openers = {".onnx": _open_onnx, ".xml": _open_openvino, ".pt2": _open_torch, ".pte": _open_executorch}
    if path.suffix not in openers:
        raise FleetflowError(f"{path} is no exported file; expected one of {', '.join(openers)}")
    if precision not in (None, "fp32", "bf16") or (precision == "bf16" and path.suffix != ".xml"):
        raise FleetflowError(f'precision is "{precision}"; expected fp32, or with an .xml bf16')
    run, text = openers[path.suffix](path, threads, precision)
    return run, _described(path, text)


def _described(path: Path, text: str | dict) -> dict:
    """What a file says of itself, the JSON of its entry; raises FleetflowError for files that this version does not know."""
    try:
        about = json.loads(text) if isinstance(text, str) else dict(text)
        if not {"network", "sizes", "version"} <= about.keys() or int(about.get("format", FORMAT)) < 1:
            raise ValueError
        if not {"height", "width", "batch", "least"} <= about["sizes"].keys():
            raise ValueError
    except (ValueError, TypeError, AttributeError):
        raise FleetflowError(f"{path} was not written by fleetflow export: its metadata lacks our entry") from None
    if int(about.get("format", FORMAT)) > FORMAT:
        raise FleetflowError(
            f"{path} was written by fleetflow {about['version']}, a newer one than this: update fleetflow"
        )
    return about


def _open_onnx(path: Path, threads: int, precision: str | None) -> tuple[Run, str]:
    try:
        import onnxruntime
    except ImportError:
        raise FleetflowError("onnxruntime is not installed; run pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is raised
    if threads:
        options.intra_op_num_threads = threads
    with _opening(path, "ONNX Runtime"):
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    text = session.get_modelmeta().custom_metadata_map.get(KEY, "")
    return lambda feeds: session.run(None, feeds), text  # pyright: ignore[reportReturnType]  (tensors are arrays)


def _open_openvino(path: Path, threads: int, precision: str | None) -> tuple[Run, dict]:
    turn_off_telemetry()
    try:
        import openvino
    except ImportError:
        raise FleetflowError("openvino is not installed; run pip install openvino") from None
    if not path.with_suffix(".bin").is_file():
        raise FleetflowError(f"{path.with_suffix('.bin')} is missing; lay it beside {path.name}, or export again")
    text = path.read_bytes().rstrip()
    if not text.startswith(b"<?xml") or not text.endswith(b"</net>"):  # OpenVINO's readers print what they think of it
        raise FleetflowError(f"{path} cannot be opened by OpenVINO (it is cut off, or no .xml of a network)")
    with _opening(path, "OpenVINO"):
        core = openvino.Core()
        model = core.read_model(str(path))
        about = _described(path, model.get_rt_info([KEY]).value if model.has_rt_info([KEY]) else "")
        has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and not has_bf16:  # OpenVINO would compute in float32 and say nothing
            raise FleetflowError("this processor has no bfloat16; take fp32, or one with AVX-512 BF16 or AMX")
        precision = precision or ("bf16" if has_bf16 and about.get("precision") == "bf16" else "fp32")
        if precision == "bf16" and any(shape.is_dynamic for shape in (i.get_partial_shape() for i in model.inputs)):
            raise FleetflowError("bf16 with open sizes is wrong in OpenVINO 2026.4; export with --size, or take fp32")
        config: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else "bf16"}
        if threads:
            config["INFERENCE_NUM_THREADS"] = threads
        compiled = core.compile_model(model, "CPU", config)

    def run(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = compiled(feeds, share_outputs=True)  # copied below: the next call writes over them
        return [np.array(found[output]) for output in compiled.outputs]

    return run, about


def _open_torch(path: Path, threads: int, precision: str | None) -> tuple[Run, dict]:
    from fleetflow.export.torch_export import Loaded

    loaded = Loaded(path)
    return loaded, loaded.about


def _open_executorch(path: Path, threads: int, precision: str | None) -> tuple[Run, dict]:
    from fleetflow.export.executorch import Loaded

    loaded = Loaded(path)
    return loaded, loaded.about


class _opening:
    """Turns what a runtime raises at a damaged file, or at an operator it lacks, into one line."""

    def __init__(self, path: Path, runtime: str):
        self.path, self.runtime = path, runtime

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, _) -> None:
        if isinstance(error, Exception) and not isinstance(error, FleetflowError):
            reason = " ".join(str(error).replace(str(self.path), "it").split())[:200]
            raise FleetflowError(f"{self.path} cannot be opened by {self.runtime} ({reason})") from error


def _guarded(run: Run, feeds: dict[str, np.ndarray], path: Path) -> list[np.ndarray]:
    """What the runtime returns; what it raises as one line."""
    with _opening(path, "its runtime"):
        return run(feeds)


def _pictures(image1: np.ndarray, image2: np.ndarray, about: dict, path: Path) -> list[np.ndarray]:
    """Both pictures as uint8 [N, H, W, 3]; raises FleetflowError for what the file does not take."""
    images = []
    for name, image in (("image1", image1), ("image2", image2)):
        image = as_array(image, name, "uint8 [H, W, 3] RGB")
        if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
            raise FleetflowError(f"{name} is {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3] RGB")
        images.append(np.ascontiguousarray(image if image.ndim == 4 else image[None]))
    if images[0].shape != images[1].shape:
        sizes = " and ".join("x".join(map(str, image.shape[:3])) for image in images)
        raise FleetflowError(f"the images are {sizes}; both must have the same size: crop or resize one")
    count, height, width, _ = images[0].shape
    sizes = about["sizes"]
    if sizes["height"] is not None and (height, width) != (sizes["height"], sizes["width"]):
        raise FleetflowError(
            f"{path} takes pictures of {sizes['height']}x{sizes['width']}, these are {height}x{width}: resize them, or "
            "export with another --size"
        )
    if sizes["height"] is None and min(height, width) < sizes["least"]:
        raise FleetflowError(f"{path} takes pictures from {sizes['least']} pixels on, these are {height}x{width}")
    if count < 1:
        raise FleetflowError(f"{path} was given no pair; expected uint8 [H, W, 3] RGB, or [N, H, W, 3] from N = 1 on")
    if sizes["batch"] is not None and count != sizes["batch"]:
        raise FleetflowError(f"{path} takes {sizes['batch']} pair at once, these are {count}: give one after another")
    return images
