"""int8 with OpenVINO: convolutions are quantized by NNCF, all that decides where something is stays in float.

A flow head writes pixels: 8 bits for a range of 100 px are steps of 0.8 px. Warps, correlations and the enlargement of
flows read or write positions. What is put side by side (a correlation, features, a flow) has no range in common: on the
validation part of footage, FastFlowNet's decoders lose 0.81 px by their first convolution in int8, and at most 0.14 px by
any other kind. So only convolutions are quantized that have more than FEW outputs and do not read a concatenation.
(Splitting these into sums of convolutions, each with a range of its own, leaves a loss of 0.57 px for the network.)
"""

from collections.abc import Sequence

import numpy as np

from fleetflow.export.onnx import require

FEW = 4  # outputs of a convolution that writes a flow (2), or a flow and something else
MOVES = ("Reshape", "Transpose")  # a channel shuffle: what it moves may be int8 already


def quantized(model, pairs: Sequence[tuple[np.ndarray, np.ndarray]]):
    """Returns an OpenVINO model with int8 convolutions.

    Args:
        model: an `openvino.Model` of float32.
        pairs: pictures, uint8 [1, H, W, 3] each, of the kind that the network will see; 50 are enough.
    """
    require("nncf", extra="openvino")
    import nncf

    kept = [node.get_friendly_name() for node in model.get_ops() if not _is_quantized(node)]
    return nncf.quantize(
        model,
        nncf.Dataset(list(pairs), lambda pair: list(pair)),
        subset_size=len(pairs),
        ignored_scope=nncf.IgnoredScope(names=kept, validate=False),
        preset=nncf.QuantizationPreset.MIXED,  # activations behind a leaky ReLU are mostly positive
        fast_bias_correction=True,
    )


def _is_quantized(node) -> bool:
    """Whether an operation is a convolution that may be int8, or may stand between two."""
    if node.get_type_name() in MOVES:
        return True
    if node.get_type_name() not in ("Convolution", "GroupConvolution"):
        return False
    source = node.input_value(0).get_node()
    side_by_side = source.get_type_name() == "Concat" and source.get_attributes()["axis"] in (1, -3)
    return not side_by_side and node.get_output_partial_shape(0)[1].get_length() > FEW
