"""int8 with OpenVINO: convolutions are quantized, all that decides where something is stays in float.

A flow head writes pixels: 8 bits for a range of 100 px are steps of 0.8 px. Warps, correlations and the enlargement of
flows read or write positions, so convolutions that read or write a flow stay in float. What reads a concatenation is
quantized by us, part by part (`int8_graph`), all others by NNCF.
"""

from collections.abc import Sequence

import numpy as np

from fleetflow.export.int8_graph import FEW, channels_of, quantize_parts, reach, reads_parts, shuffle_by_weights
from fleetflow.export.onnx import require

FLOW = 2  # channels of a flow; a picture has three
MOVES = ("Reshape", "Transpose", "ShuffleChannels")  # of channels: what is moved may be int8 already


def quantized(model, pairs: Sequence[tuple[np.ndarray, np.ndarray]]):
    """Returns an OpenVINO model with int8 convolutions.

    Args:
        model: an `openvino.Model` of float32.
        pairs: pictures, uint8 [1, H, W, 3] each, of the kind that the network will see; 50 are enough.
    """
    require("nncf", extra="openvino")
    import nncf

    known = reach(model, pairs)
    kept = [node.get_friendly_name() for node in model.get_ops() if not _is_quantized(node)]
    model = nncf.quantize(
        model,
        nncf.Dataset(list(pairs), lambda pair: list(pair)),
        subset_size=len(pairs),
        ignored_scope=nncf.IgnoredScope(names=kept, validate=False),
        preset=nncf.QuantizationPreset.MIXED,  # activations behind a leaky ReLU are mostly positive
        fast_bias_correction=True,
    )
    quantize_parts(model, known)
    shuffle_by_weights(model)
    return model


def _is_quantized(node) -> bool:
    """Whether NNCF may quantize an operation: a convolution that neither reads nor writes a flow, nor reads parts."""
    if node.get_type_name() in MOVES:
        return True
    if node.get_type_name() not in ("Convolution", "GroupConvolution") or reads_parts(node):
        return False
    return channels_of(node.input_value(0)) > FLOW and channels_of(node.output(0)) > FEW
