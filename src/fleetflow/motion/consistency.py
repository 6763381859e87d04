"""Forward-backward consistency: where the flow there and the flow back do not meet, something is hidden or wrong."""

import torch
from torch import Tensor

from fleetflow.motion.arrays import Picture, as_tensor, check_sizes, like
from fleetflow.ops.warp import inside, warp

# Sundaram, Brox, Keutzer, "Dense Point Trajectories by GPU-Accelerated Large Displacement Optical Flow", ECCV 2010:
SHARE = 0.01  # of the squared lengths of both flows, by which they may miss each other
SLACK = 0.5  # squared pixels by which they may in any case


def occlusion(forward: Picture, backward: Picture) -> Picture:
    """Returns which pixels of frame1 are hidden in frame2, or leave the picture.

    A pixel counts as hidden where the backward flow, at the place that the forward flow leads to, does not lead back.
    With the sum s = forward(x) + backward(x + forward(x)) that is where the square of its length is over 0.5 plus 0.01 times
    the squared lengths of both flows. Wrong flow looks alike.

    Args:
        forward: [H, W, 2] numpy array or tensor [N, 2, H, W], pixels from frame1 to frame2.
        backward: the same from frame2 to frame1: predict the pair in the other order.

    Returns:
        bool [H, W] numpy array, or tensor [N, H, W].
    """
    there, back = as_tensor(forward, "forward", 2), as_tensor(backward, "backward", 2)
    check_sizes({"forward flow": there, "backward flow": back})
    return like(_hidden(there, back.to(there)), forward)


def _hidden(forward: Tensor, backward: Tensor) -> Tensor:
    forward = forward.to(torch.promote_types(forward.dtype, torch.float32))
    returned = warp(backward.to(forward.dtype), forward)
    missed = (forward + returned).square().sum(1)
    allowed = SHARE * (forward.square().sum(1) + returned.square().sum(1)) + SLACK
    return ~(missed <= allowed) | ~inside(forward)  # neither holds for what is no number
