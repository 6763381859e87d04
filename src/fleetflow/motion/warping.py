"""Backward warping of pictures: frame2 brought back onto frame1."""

import torch

from fleetflow.motion.arrays import Picture, as_tensor, check_sizes, like
from fleetflow.ops.warp import warp as warp_tensors


def warp(image: Picture, flow: Picture) -> Picture:
    """Returns the image as the flow sees it: warp(frame2, flow) looks like frame1 where nothing is hidden.

    Args:
        image: [H, W, C] or [H, W] numpy array, uint8 or float, or tensor [N, C, H, W]: frame2.
        flow: [H, W, 2] numpy array or tensor [N, 2, H, W], pixels from frame1 to frame2.

    Returns:
        image(x + flow(x)), bilinear, 0 outside the picture (where `fleetflow.motion.inside` says so), of the kind and
        type of `image`.
    """
    frame, vectors = as_tensor(image, "image"), as_tensor(flow, "flow", 2)
    check_sizes({"image": frame, "flow": vectors})
    exact = frame if frame.is_floating_point() else frame.to(torch.float32)
    warped = warp_tensors(exact, vectors.to(exact.device))
    if not frame.is_floating_point():
        limits = torch.iinfo(frame.dtype)
        warped = warped.round().clamp(limits.min, limits.max).to(frame.dtype)
    return like(warped, image)
