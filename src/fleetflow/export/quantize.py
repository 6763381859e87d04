"""int8 with OpenVINO: convolutions are quantized, all that decides where something is stays in float.

A flow head writes pixels: 8 bits for a range of 100 px are steps of 0.8 px. Warps, correlations and the enlargement of
flows read or write positions, so convolutions that read or write a flow stay in float. So do those on COARSE planes: what
they lose is many pixels of the picture, which finer levels do not win back, and they take little time. What reads a
concatenation is quantized by us, part by part (`int8_graph`), all others by NNCF.
"""

from collections.abc import Sequence

import numpy as np

from fleetflow.export.int8_graph import FEW, channels_of, quantize_parts, reach, reads_parts
from fleetflow.export.onnx import require

COARSE = 16  # pixels of the picture between numbers of a plane, from which on convolutions stay in float
FLOW = 2  # channels of a flow; a picture has three
CONVOLUTIONS = ("Convolution", "GroupConvolution")


def quantized(model, pairs: Sequence[tuple[np.ndarray, np.ndarray]]):
    """Returns an OpenVINO model with int8 convolutions.

    Args:
        model: an `openvino.Model` of float32.
        pairs: pictures, uint8 [1, H, W, 3] each, of the kind that the network will see; 50 are enough.
    """
    require("nncf", extra="openvino")
    import nncf

    far = coarse(model, pairs[0][0].shape)
    known = {name: parts for name, parts in reach(model, pairs).items() if name not in far}
    names = {node.get_friendly_name() for node in model.get_ops() if not _is_quantized(node)}
    kept = sorted(names | far)
    model = nncf.quantize(
        model,
        nncf.Dataset(list(pairs), lambda pair: list(pair)),
        subset_size=len(pairs),
        ignored_scope=nncf.IgnoredScope(names=kept, validate=False),
        preset=nncf.QuantizationPreset.MIXED,  # activations behind a leaky ReLU are mostly positive
        fast_bias_correction=True,
    )
    quantize_parts(model, known)
    return model


def coarse(model, shape: tuple[int, ...]) -> set[str]:
    """Returns the names of convolutions whose output has COARSE or more pixels of a picture [N, H, W, 3] to a number."""
    model = model.clone()
    model.reshape({name: list(shape) for name in ("image1", "image2")})  # a network with open sizes has planes now
    return {
        node.get_friendly_name()
        for node in model.get_ops()
        if node.get_type_name() in CONVOLUTIONS and COARSE * node.get_output_shape(0)[2] < 1.5 * shape[1]
    }


def _is_quantized(node) -> bool:
    """Whether NNCF may quantize an operation: a convolution that neither reads nor writes a flow, nor reads parts."""
    if node.get_type_name() not in CONVOLUTIONS or reads_parts(node):
        return False
    return channels_of(node.input_value(0)) > FLOW and channels_of(node.output(0)) > FEW
