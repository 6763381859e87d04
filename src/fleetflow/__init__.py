"""fleetflow: a fleet of optical-flow networks behind one small API.

    model = fleetflow.load("fastflownet")
    flow = fleetflow.Predictor(model)(image1, image2)      # uint8 [H, W, 3] twice -> float32 [H, W, 2] pixels

The names below are imported at their first use.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

# OpenMP's threads wait for work by spinning, up to 14 ms by default, which starves whatever else runs on the machine.
# This must be set before torch starts them; what the user has set stays. GNU's (torch's own) and Intel's (conda's).
if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ.update(GOMP_SPINCOUNT="3000", KMP_BLOCKTIME="1")

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors and type checkers; `_HOME` says the same, to be imported at the first use
    from fleetflow.desk.page import show as show
    from fleetflow.export.session import Session as Session
    from fleetflow.inference.predictor import Predictor as Predictor
    from fleetflow.inference.stream import Stream as Stream
    from fleetflow.io.flow import read_flow as read_flow
    from fleetflow.io.flow import write_flow as write_flow
    from fleetflow.io.images import read_image as read_image
    from fleetflow.io.video import read_video as read_video
    from fleetflow.models.spec import ModelSpec as ModelSpec
    from fleetflow.models.weights import load as load
    from fleetflow.models.weights import save as save
    from fleetflow.motion.consistency import occlusion as occlusion
    from fleetflow.motion.warping import warp as warp
    from fleetflow.ops.kernels import reference as reference
    from fleetflow.types import FleetflowError as FleetflowError
    from fleetflow.types import Prediction as Prediction
    from fleetflow.types import Sample as Sample
    from fleetflow.visualise import flow_to_color as flow_to_color

_HOME = {
    "Predictor": "inference.predictor",
    "Stream": "inference.stream",
    "Session": "export.session",
    "read_flow": "io.flow",
    "write_flow": "io.flow",
    "read_image": "io.images",
    "read_video": "io.video",
    "ModelSpec": "models.spec",
    "load": "models.weights",
    "save": "models.weights",
    "show": "desk.page",
    "occlusion": "motion.consistency",
    "warp": "motion.warping",
    "reference": "ops.kernels",
    "FleetflowError": "types",
    "Prediction": "types",
    "Sample": "types",
    "flow_to_color": "visualise",
}
__all__ = [
    "FleetflowError",
    "ModelSpec",
    "Prediction",
    "Predictor",
    "Sample",
    "Session",
    "Stream",
    "__version__",
    "flow_to_color",
    "load",
    "occlusion",
    "read_flow",
    "read_image",
    "read_video",
    "reference",
    "save",
    "show",
    "warp",
    "write_flow",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"fleetflow.{_HOME[name]}"), name)
    try:
        return importlib.import_module(f"fleetflow.{name}")
    except ModuleNotFoundError:
        raise AttributeError(f"module 'fleetflow' has no attribute '{name}'") from None


def __dir__() -> list[str]:
    return __all__
