"""What NNCF leaves: convolutions that read a concatenation.

What a decoder reads side by side (a correlation, features, a flow) has no range in common. Here each part has its own:
it is divided by its range, and the weights are multiplied by it. A flow is no part of that: it stays in float, as a
convolution of its own whose result is added, because 8 bits of the longest flow are steps of a pixel.
"""

from collections.abc import Sequence

import numpy as np

FEW = 4  # channels of a flow (2), or of a flow and something else
LEVELS = 255  # of symmetric weights

Reach = dict[str, list[tuple[float, float]]]  # convolution -> smallest and largest number in each part of what it reads


def reads_parts(node) -> bool:
    """Returns whether an OpenVINO operation is a convolution that reads a concatenation of channels."""
    if node.get_type_name() != "Convolution":
        return False
    source = node.input_value(0).get_node()
    return source.get_type_name() == "Concat" and source.get_attributes()["axis"] in (1, -3)


def channels_of(value) -> int:
    return value.get_partial_shape()[1].get_length()


def reach(model, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Reach:
    """Returns the range of the parts that convolutions read: smallest and largest number of a pair, means over pairs."""
    import openvino
    from openvino import opset13 as ops

    model = model.clone()
    places, outputs = [], []
    for node in filter(reads_parts, model.get_ordered_ops()):
        for part in node.input_value(0).get_node().input_values():
            places.append(node.get_friendly_name())
            for reduce in (ops.reduce_min, ops.reduce_max):
                outputs.append(ops.result(reduce(part, ops.constant(np.arange(4)), keep_dims=False)))
    if not outputs:
        return {}
    asked = openvino.Model(outputs, model.get_parameters(), "reach")  # pyright: ignore[reportGeneralTypeIssues]
    ranges = openvino.Core().compile_model(asked, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = [list(ranges({"image1": one, "image2": two}).values()) for one, two in pairs]
    known: Reach = {}
    for place, (low, high) in zip(places, np.mean(found, 0).reshape(-1, 2)):
        known.setdefault(place, []).append((float(low), float(high)))
    return known


def quantize_parts(model, known: Reach) -> None:
    """Quantizes the convolutions of `reach` in place, but those with FEW outputs and those that read flows only."""
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        values = known.get(node.get_friendly_name(), [])
        parts = node.input_value(0).get_node().input_values() if values else []
        if not any(channels_of(part) > FEW for part in parts) or channels_of(node.output(0)) <= FEW:
            continue
        weights, at = node.input_value(1).get_node().get_data().astype(np.float32), 0
        zero = _zero([value for part, value in zip(parts, values) if channels_of(part) > FEW])
        wide, wide_weights, flows = [], [], []
        for part, value in zip(parts, values):
            own = weights[:, at : at + channels_of(part)]
            at += channels_of(part)
            if channels_of(part) <= FEW:
                flows.append((part, own))
                continue
            size = np.float32(max(value[1], -value[0] * (255 - zero) / max(zero, 1), 1e-6))
            low = np.float32(-zero / (255 - zero))
            limits = [ops.constant(limit) for limit in (low * size, size, low, np.float32(1))]
            wide.append(ops.fake_quantize(part, *limits, 256))
            wide_weights.append(own * size)
        how = {key: value for key, value in node.get_attributes().items() if key != "auto_broadcast"}
        seen = ops.concat(wide, 1) if len(wide) > 1 else wide[0]
        total = ops.convolution(seen, _quantized(np.concatenate(wide_weights, 1)), **how)
        readers = list(node.output(0).get_target_inputs())
        for part, own in flows:
            total = ops.add(total, ops.convolution(part, ops.constant(np.ascontiguousarray(own)), **how))
        for reader in readers:
            reader.replace_source_output(total.output(0))
    model.validate_nodes_and_infer_types()


def _zero(values: list[tuple[float, float]]) -> int:
    """Returns which of 256 levels is zero, one for all parts: as much below it as the most negative of them needs."""
    share = max((max(-low, 0.0) / max(high - low, 1e-9) for low, high in values), default=0.5)
    return min(round(255 * share), 127)


def _quantized(weights: np.ndarray):
    """Weights as int8 with a range for each output."""
    from openvino import opset13 as ops

    largest = np.maximum(np.abs(weights).max((1, 2, 3), keepdims=True), 1e-9).astype(np.float32)
    low, high = ops.constant(-largest), ops.constant(largest)
    return ops.fake_quantize(ops.constant(weights.astype(np.float32)), low, high, low, high, LEVELS)
