"""The Predictor: uint8 pictures in, flow in pixels out, on any device."""

import copy
import hashlib

import numpy as np
import torch
from torch import nn

from fleetflow.inference.cuda_graphs import Graphed
from fleetflow.inference.device import Precision, autocast, choose_device, choose_dtype
from fleetflow.inference.fused import available, fuse
from fleetflow.inference.memory import keep_freed
from fleetflow.models.base import FlowModel
from fleetflow.ops.kernels import is_reference
from fleetflow.types import FleetflowError, Prediction


class Predictor:
    """A network ready to predict on numpy pictures: device, precision and memory layout chosen once.

    iterations: refinement iterations, for networks that refine; None takes the network's own.
    On the CPU the process keeps up to 1 GiB of freed memory from then on (`fleetflow.inference.memory`).
    """

    def __init__(
        self, model: FlowModel, *, device: str = "auto", precision: Precision = "auto", iterations: int | None = None
    ):
        self.iterations = model.iterations_of(iterations)
        self.device = choose_device(device)
        self.dtype = choose_dtype(precision, self.device)
        if self.device.type == "cpu":
            keep_freed()
        model = model.eval().to(self.device, memory_format=torch.channels_last)
        self._sha256 = _hash(model)  # before its convolutions are fused, after which it has no state
        self.model = _ready(model, self.device, self.dtype)
        self._run = Graphed(self.model) if self.device.type == "cuda" else self.model

    def __call__(self, image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        """Returns the flow from image1 to image2, float32 [H, W, 2] pixels.

        image1, image2: uint8 [H, W, 3] RGB (gray [H, W] and RGBA work too) of one size, from 1x1 up.
        """
        return self.predict(image1, image2).flow[0].permute(1, 2, 0).float().cpu().numpy()

    def predict(
        self, image1: np.ndarray, image2: np.ndarray, previous: Prediction | None = None, iterations: int | None = None
    ) -> Prediction:
        """Returns all the network has to say about the pair, as tensors of a batch of one on the device.

        previous: what it said about the last pair of a video, for networks that can start from there; or, without a
            memory, what another network said about this pair.
        """
        frame1, frame2 = self._frame(image1, "image1"), self._frame(image2, "image2")
        if frame1.shape != frame2.shape:
            sizes = " and ".join(f"{frame.shape[2]}x{frame.shape[3]}" for frame in (frame1, frame2))
            raise FleetflowError(f"the images are {sizes}; both must have the same size: crop or resize one")
        with torch.inference_mode(), autocast(self.device, self.dtype):
            return self._run(frame1, frame2, previous, self.iterations if iterations is None else iterations)

    def label(self) -> dict[str, str]:
        """Returns what its results depend on, for a note beside them: the network, its weights, device and precision.

        The weights are those it had when the Predictor was made.
        """
        return {
            "network": "+".join(type(part).__name__ for part in getattr(self.model, "members", (self.model,))),
            "sha256": self._sha256,
            "fit": self.model.fit,
            "iterations": str(self.iterations),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
        }

    def _frame(self, image: np.ndarray, name: str) -> torch.Tensor:
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            raise FleetflowError(f"{name} is {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3] RGB")
        if image.ndim == 2 or image.shape[2] == 1:
            image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
        frame = torch.from_numpy(np.ascontiguousarray(image[..., :3])).to(self.device)[None]
        return frame.permute(0, 3, 1, 2).float().div_(255)  # channels-last in memory, as the picture was


def _hash(model: nn.Module) -> str:
    """The SHA-256 of the names and values of the model's state, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _ready(model: FlowModel, device: torch.device, dtype: torch.dtype) -> FlowModel:
    """The model, or a copy whose convolutions hold their weights in `dtype` (and on the CPU packed and fused)."""
    fused = device.type == "cpu" and available() and not is_reference()
    if not fused and dtype == torch.float32:
        return model
    model = copy.deepcopy(model)
    if fused:
        fuse(model, dtype)
    for layer in model.modules():
        if type(layer) in (nn.Conv2d, nn.ConvTranspose2d):
            layer.to(dtype)
    return model
