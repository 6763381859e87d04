"""Correlation at every second (third, ...) displacement in Triton: the kernels of the local one, with a stride."""

from torch import Tensor

from fleetflow.ops.triton.correlation import correlation, correlation_gradients


def dilated_correlation(features1: Tensor, features2: Tensor, radius: int, stride: int) -> Tensor:
    """Returns what `ops.dilated_correlation.dilated_correlation` defines, [N, K, H, W], channels-last in memory."""
    return correlation(features1, features2, radius, stride, None)


def dilated_correlation_gradients(
    gradient: Tensor, features1: Tensor, features2: Tensor, radius: int, stride: int
) -> list[Tensor]:
    """Returns the gradients of both features for that of the result, [N, K, H, W]."""
    return correlation_gradients(gradient, features1, features2, radius, stride, None)
