"""Pictures and flows of either kind, numpy [H, W, C] or torch [N, C, H, W], as tensors and back."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fleetflow.io.arrays import as_array
from fleetflow.types import FleetflowError

Picture = np.ndarray | Tensor


class Masked(NamedTuple):
    """A result and where it means something: `value, valid = compose(...)`."""

    value: Picture
    valid: Picture  # bool, [H, W] numpy array or tensor [N, H, W]; of points [P] or [N, P]


def as_tensor(picture: Picture, name: str, channels: int | None = None) -> Tensor:
    """Returns [N, C, H, W] for a picture or flow that is such a tensor, or a numpy array [H, W, C] or [H, W].

    Raises:
        FleetflowError: for other shapes, and another number of channels than `channels`.
    """
    wanted = channels or "C"
    if isinstance(picture, Tensor):
        tensor = picture
    else:
        array = as_array(picture, name, f"a numpy array [H, W, {wanted}] or a tensor [N, {wanted}, H, W]")
        array = array[..., None] if array.ndim == 2 else array
        tensor = torch.from_numpy(np.array(array)).movedim(-1, 0)[None] if array.ndim == 3 else torch.empty(0)
    if tensor.ndim != 4 or channels not in (None, tensor.shape[1]) or 0 in tensor.shape[2:]:
        raise FleetflowError(
            f"{name} is {list(np.shape(picture))}; expected a numpy array [H, W, {wanted}] or a tensor [N, {wanted}, H, W]"
        )
    return tensor


def check_sizes(named: dict[str, Tensor | None]) -> None:
    """Raises FleetflowError unless all tensors [N, C, H, W] given have one number, height and width."""
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    sizes = [(len(tensor), *tensor.shape[-2:]) for tensor in given.values()]
    if len(set(sizes)) > 1:
        listed = " and ".join(f"the {name} is {list(tensor.shape[-2:])}" for name, tensor in given.items())
        raise FleetflowError(f"{listed}; all must have the same size and number: resize one")


def mask_of(valid: Picture | None, flow: Tensor, name: str = "valid") -> Tensor:
    """Returns bool [N, H, W]: the mask given, numpy [H, W] or tensor [N, H, W], and where the flow is a number."""
    known = flow.detach().isfinite().all(1)
    if valid is None:
        return known
    mask = (
        valid
        if isinstance(valid, Tensor)
        else torch.from_numpy(as_array(valid, name, "bool [H, W]").astype(bool))[None]
    )
    if mask.shape != known.shape:
        raise FleetflowError(f"{name} is {list(np.shape(valid))}; expected the height and width of the flow")
    return known & mask.to(known.device, torch.bool)


def like(tensor: Tensor, picture: Picture) -> Picture:
    """Returns the tensor [N, C, H, W] or [N, H, W] as the kind that `picture` is: numpy [H, W, C] or [H, W], or itself."""
    if isinstance(picture, Tensor):
        return tensor
    array = tensor[0].detach().cpu().numpy()
    if array.ndim == 2:
        return array
    return np.ascontiguousarray(array.transpose(1, 2, 0)) if np.ndim(picture) == 3 else array[0]
