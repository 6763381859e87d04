"""fleetflow: a fleet of optical-flow networks behind one small API.

    model = fleetflow.load("fastflownet")
    flow = fleetflow.Predictor(model)(image1, image2)      # uint8 [H, W, 3] twice -> float32 [H, W, 2] pixels

The names below are imported at their first use.
"""

import importlib

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
