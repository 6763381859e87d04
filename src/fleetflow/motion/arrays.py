"""Pictures and flows of either kind, numpy [H, W, C] or torch [N, C, H, W], as tensors and back."""

import numpy as np
import torch
from torch import Tensor

from fleetflow.types import FleetflowError

Picture = np.ndarray | Tensor


def as_tensor(picture: Picture, name: str, channels: int | None = None) -> Tensor:
    """Returns [N, C, H, W] for a picture or flow that is such a tensor, or a numpy array [H, W, C] or [H, W].

    Raises:
        FleetflowError: for other shapes, and another number of channels than `channels`.
    """
    if isinstance(picture, Tensor):
        tensor = picture
    else:
        array = np.asarray(picture)
        array = array[..., None] if array.ndim == 2 else array
        tensor = torch.from_numpy(np.array(array)).movedim(-1, 0)[None] if array.ndim == 3 else torch.empty(0)
    if tensor.ndim != 4 or channels not in (None, tensor.shape[1]):
        wanted = channels or "C"
        raise FleetflowError(
            f"{name} is {list(np.shape(picture))}; expected a numpy array [H, W, {wanted}] or a tensor [N, {wanted}, H, W]"
        )
    return tensor


def like(tensor: Tensor, picture: Picture) -> Picture:
    """Returns the tensor [N, C, H, W] or [N, H, W] as the kind that `picture` is: numpy [H, W, C] or [H, W], or itself."""
    if isinstance(picture, Tensor):
        return tensor
    array = tensor[0].detach().cpu().numpy()
    if array.ndim == 2:
        return array
    return np.ascontiguousarray(array.transpose(1, 2, 0)) if np.ndim(picture) == 3 else array[0]
