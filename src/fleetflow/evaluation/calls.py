"""What a benchmark calls: networks with or without weights, on the example pair at any size."""

from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fleetflow.data.dataset import to_frame
from fleetflow.evaluation.submit import predict_flow
from fleetflow.inference.cuda_graphs import Graphed
from fleetflow.inference.device import autocast
from fleetflow.inference.exported import is_exported, open_network
from fleetflow.inference.predictor import Predictor
from fleetflow.io.images import read_image
from fleetflow.models.base import FlowModel
from fleetflow.models.weights import header, shipped
from fleetflow.ops.kernels import reference
from fleetflow.types import FleetflowError


def load_any(network: str) -> FlowModel:
    """Returns the network, with its weights where the package has them (the time does not depend on them)."""
    return open_network(network, weights=has_weights(network))


def has_weights(network: str) -> bool:
    """Returns True for NETWORK:CHECKPOINT, for a file, and for a network whose weights are in the package."""
    try:
        return ":" in network or "." in network or bool(shipped(network))
    except FleetflowError:
        return False


def variant(network: str) -> str:
    """Returns the name of the network in NETWORK, NETWORK:CHECKPOINT or the path of a file of ours."""
    if "." in network and ":" not in network:
        return network if is_exported(network) else header(network)["network"]
    return network.partition(":")[0]


def example() -> list[np.ndarray]:
    """Returns the two pictures of the example in the package."""
    folder = Path(str(resources.files("fleetflow") / "example"))
    return [read_image(folder / f"frame{k}.png") for k in (1, 2)]


def tiled(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the picture, repeated and cut to a size."""
    rows, columns = -(-height // image.shape[0]), -(-width // image.shape[1])
    return np.ascontiguousarray(np.tile(image, (rows, columns, 1))[:height, :width])


def call(
    predictor: Predictor, image1: np.ndarray, image2: np.ndarray, batch: int, iterations: int | None
) -> Callable[[], object]:
    """Returns a function that predicts a pair of pictures, or so many copies of it at once, as a batch of tensors."""
    if batch == 1:
        return partial(predict_flow, predictor, image1, image2, iterations=iterations)
    frames = [to_frame(image).repeat(batch, 1, 1, 1).to(predictor.device) for image in (image1, image2)]
    frames = [frame.contiguous(memory_format=torch.channels_last) for frame in frames]
    run = Graphed(predictor.model)

    def predict() -> Tensor:
        with torch.inference_mode(), autocast(predictor.device, predictor.dtype):
            return run(*frames, None, iterations).flow.float().cpu()

    return predict


def reference_flow(model: FlowModel, frames: list[Tensor], iterations: int | None) -> Tensor:
    """Returns the flow of the reference implementation: every operator is its definition in plain torch."""
    with torch.inference_mode(), reference():
        return model(*frames, iterations=iterations).flow.cpu()
