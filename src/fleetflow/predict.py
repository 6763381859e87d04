"""Predict: from pictures, folders and videos to flow."""

from contextlib import nullcontext
from typing import Literal

import numpy as np
import torch

from fleetflow.models.base import FlowModel
from fleetflow.types import FleetflowError, Prediction

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def choose_device(name: str = "auto") -> torch.device:
    """Returns the device called `name`; "auto" takes a GPU where there is one. Raises FleetflowError if it is absent."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:100]
        raise FleetflowError(f'device "{name}" cannot be used ({reason}); use "auto" or "cpu"') from None
    return device


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Returns the dtype of the convolutions; "auto" takes bfloat16 where the processor or GPU has units for it."""
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            fast = device.type == "cpu" and (
                torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            )
        precision = "bf16" if fast else "fp32"
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in known:
        raise FleetflowError(f'precision is "{precision}"; expected auto, fp32, bf16 or fp16')
    return known[precision]


def autocast(device: torch.device, dtype: torch.dtype):
    """Returns the context in which convolutions run in `dtype`; for float32 it does nothing."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


class Predictor:
    """A network ready to predict on numpy pictures: device, precision and memory layout chosen once."""

    def __init__(self, model: FlowModel, *, device: str = "auto", precision: Precision = "auto"):
        self.device = choose_device(device)
        self.dtype = choose_dtype(precision, self.device)
        self.model = model.eval().to(self.device, memory_format=torch.channels_last)

    def __call__(self, image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        """Returns the flow from image1 to image2, float32 [H, W, 2] pixels.

        image1, image2: uint8 [H, W, 3] RGB (gray [H, W] and RGBA work too) of one size, from 1x1 up.
        """
        return self.predict(image1, image2).flow[0].permute(1, 2, 0).float().cpu().numpy()

    def predict(
        self, image1: np.ndarray, image2: np.ndarray, previous: Prediction | None = None, steps: int | None = None
    ) -> Prediction:
        """Returns all the network has to say about the pair, as tensors of a batch of one on the device."""
        frame1, frame2 = self._frame(image1, "image1"), self._frame(image2, "image2")
        if frame1.shape != frame2.shape:
            sizes = " and ".join(f"{frame.shape[2]}x{frame.shape[3]}" for frame in (frame1, frame2))
            raise FleetflowError(f"the images are {sizes}; both must have the same size: crop or resize one")
        with torch.inference_mode(), autocast(self.device, self.dtype):
            return self.model(frame1, frame2, previous, steps)

    def _frame(self, image: np.ndarray, name: str) -> torch.Tensor:
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            raise FleetflowError(f"{name} is {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3] RGB")
        if image.ndim == 2 or image.shape[2] == 1:
            image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
        frame = torch.from_numpy(np.ascontiguousarray(image[..., :3])).to(self.device)[None]
        return frame.permute(0, 3, 1, 2).float().div_(255)  # channels-last in memory, as the picture was
