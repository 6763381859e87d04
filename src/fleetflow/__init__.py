"""fleetflow: a fleet of optical-flow networks behind one small API.

    model = fleetflow.load("fastflownet")
    flow = fleetflow.Predictor(model)(image1, image2)      # uint8 [H, W, 3] twice -> float32 [H, W, 2] pixels

The names below are imported at their first use.
"""

import importlib
import os
import sys

# OpenMP's threads wait for work by spinning, up to 14 ms by default, which starves whatever else runs on the machine.
# This must be set before torch starts them; what the user has set stays. GNU's (torch's own) and Intel's (conda's).
if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ.update(GOMP_SPINCOUNT="10000", KMP_BLOCKTIME="1")

__version__ = "0.1.0"

_HOME = {
    "Sample": "types",
    "Prediction": "types",
    "FleetflowError": "types",
    "load": "models.weights",
    "save": "models.weights",
    "Predictor": "inference.predictor",
    "reference": "ops.kernels",
    "read_image": "io.images",
    "read_video": "io.video",
    "read_flow": "io.flow",
    "write_flow": "io.flow",
    "flow_to_color": "visualise",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"fleetflow.{_HOME[name]}"), name)
    try:
        return importlib.import_module(f"fleetflow.{name}")
    except ModuleNotFoundError:
        raise AttributeError(f"module 'fleetflow' has no attribute '{name}'") from None


def __dir__() -> list[str]:
    return __all__
