"""int8 in OpenVINO: what is done to a graph beside NNCF changes rounding, nothing else."""

import numpy as np
import pytest

openvino = pytest.importorskip("openvino", reason="needs the openvino extra")
ops = pytest.importorskip("openvino.opset13")

from fleetflow.export import quantize  # noqa: E402
from fleetflow.export.int8_graph import quantize_parts, reach  # noqa: E402

ONES = ([1, 1], [1, 1], [1, 1], [1, 1])  # strides, padding before and behind, dilations


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def computed(model, *given: np.ndarray) -> np.ndarray:
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(list(given))[0]


def kinds(model) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]


def decoder():
    """Features [1, 8, 9, 11], a correlation a hundred times smaller, and a flow fifty times larger, side by side."""
    image1, image2 = (ops.parameter([1, 8, 9, 11], np.float32, name=name) for name in ("image1", "image2"))
    for image, name in ((image1, "image1"), (image2, "image2")):
        image.output(0).set_names({name})
    flow = ops.multiply(ops.strided_slice(image1, [0, 0], [1, 2], [1, 1], [1, 0], [1, 0]), ops.constant(np.float32(50)))
    seen = ops.concat([image1, ops.multiply(image2, ops.constant(np.float32(0.01))), flow], 1)
    weights = numbers(3, 16, 18, 3, 3)
    weights[:, 8:16] *= 100
    weights[:, 16:] *= 0.02
    convolution = ops.convolution(seen, ops.constant(weights), *ONES)
    return openvino.Model([ops.result(convolution)], [image1, image2], "decoder")


def test_parts_have_their_own_ranges():
    pair, model = (numbers(1, 1, 8, 9, 11), numbers(2, 1, 8, 9, 11)), decoder()
    expected = computed(model, *pair)
    known = reach(model, [pair, pair])
    (parts,) = known.values()
    read = (pair[0], pair[1] / 100, 50 * pair[0][:, :2])
    assert np.allclose(parts, [(part.min(), part.max()) for part in read])
    quantize_parts(model, known)
    assert kinds(model).count("Convolution") == 2 and kinds(model).count("FakeQuantize") == 3
    error = computed(model, *pair) - expected
    assert 0 < np.abs(error).mean() < 0.02 * np.abs(expected).mean()  # one range for all: 0.4


def test_a_flow_stays_in_float():
    pair, model = (numbers(1, 1, 8, 9, 11), numbers(2, 1, 8, 9, 11)), decoder()
    quantize_parts(model, reach(model, [pair]))
    other = pair[0].copy()
    other[:, 2:] = 0
    still = np.zeros_like(pair[1])
    far = other.copy()
    far[:, :2] *= 1000  # of features, 1000 ranges: they are clipped, the flow is not
    apart = computed(model, far, still) - computed(model, other, still)
    expected = computed(decoder(), far, still) - computed(decoder(), other, still)
    assert np.corrcoef(apart.flatten(), expected.flatten())[0, 1] > 0.5
    assert np.abs(apart).max() > 100 * np.abs(computed(model, other, still)).max()


def test_convolutions_on_coarse_planes_are_found():
    image1, image2 = (ops.parameter([-1, -1, -1, 3], np.float32, name=name) for name in ("image1", "image2"))
    for image, name in ((image1, "image1"), (image2, "image2")):
        image.output(0).set_names({name})
    picture = ops.transpose(ops.add(image1, image2), ops.constant(np.array([0, 3, 1, 2])))
    fine = ops.convolution(picture, ops.constant(numbers(1, 8, 3, 3, 3)), [8, 8], *ONES[1:])
    coarse = ops.convolution(fine, ops.constant(numbers(2, 8, 8, 3, 3)), [2, 2], *ONES[1:])
    for node, name in ((fine, "fine"), (coarse, "coarse")):
        node.set_friendly_name(name)
    model = openvino.Model([ops.result(coarse)], [image1, image2], "pyramid")
    assert quantize.coarse(model, (1, 96, 128, 3)) == {"coarse"}
    assert quantize.coarse(model, (1, 90, 122, 3)) == {"coarse"}  # planes of 12 and 6 rows, too: they are rounded up
    assert model.input("image1").get_partial_shape().is_dynamic
