"""What NNCF leaves: convolutions that read a concatenation, and channel shuffles.

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


def shuffle_by_weights(model) -> None:
    """Puts channel shuffles between int8 convolutions into weights, in place; runtimes move bytes one by one.

    A convolution that reads a shuffle has its weights the other way round, one in groups reads a 1x1 convolution that
    moves the channels, in int8 again.
    """
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        quantize = node.input_value(0).get_node() if node.get_type_name() == "ShuffleChannels" else None
        if quantize is None or quantize.get_type_name() != "FakeQuantize":
            continue
        limits, count = quantize.input_values()[1:], channels_of(node.output(0))
        if any(np.prod(limit.get_shape()) > 1 for limit in limits):
            continue
        order = (
            np.arange(count).reshape(node.get_attributes()["group"], -1).T.flatten()
        )  # what comes out, by what goes in
        readers = list(node.output(0).get_target_inputs())
        others = [reader for reader in readers if not _turned(reader, quantize, order)]
        if others:
            moves = np.zeros((count, count, 1, 1), np.float32)
            moves[np.arange(count), order] = 1
            moved = ops.convolution(quantize, _quantized(moves), [1, 1], [0, 0], [0, 0], [1, 1])
            moved = ops.fake_quantize(moved, *limits, quantize.get_attributes()["levels"])
            for reader in others:
                reader.replace_source_output(moved.output(0))
    model.validate_nodes_and_infer_types()


def _turned(reader, source, order: np.ndarray) -> bool:
    """Lets a convolution read what comes before a shuffle, its weights the other way round; False where it cannot."""
    from openvino import opset13 as ops

    node = reader.get_node()
    if node.get_type_name() != "Convolution" or reader.get_index() != 0:
        return False
    link = node.input(1)
    while link.get_source_output().get_node().get_type_name() in ("FakeQuantize", "Convert", "Multiply"):
        link = link.get_source_output().get_node().input(0)
    weights = link.get_source_output().get_node()
    if weights.get_type_name() != "Constant" or weights.get_data().shape[1:2] != order.shape:
        return False
    before = np.empty_like(weights.get_data())
    before[:, order] = weights.get_data()
    link.replace_source_output(ops.constant(before).output(0))
    reader.replace_source_output(source.output(0))
    return True
