"""caffe: .caffemodel files of three generations read back, bytes written by hand, damaged and hostile files."""

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetflow.models import caffe
from fleetflow.models.caffe import read_caffemodel
from fleetflow.types import FleetflowError

pytest.importorskip("google.protobuf", reason="reads .caffemodel files")
few = settings(max_examples=150, deadline=None, derandomize=True, database=None)

# Caffe's own message, with messages in messages and lists of numbers, where fleetflow.models.caffe has bytes.
CAFFE = {
    "NetParameter": {"name": (1, "string"), "layers": (2, "V1LayerParameter"), "layer": (100, "LayerParameter")},
    "LayerParameter": {
        "name": (1, "string"),
        "type": (2, "string"),
        "bottom": (3, "strings"),
        "blobs": (7, "BlobProto"),
    },
    "V1LayerParameter": {"layer": (1, "V0LayerParameter"), "name": (4, "string"), "blobs": (6, "BlobProto")},
    "V0LayerParameter": {"name": (1, "string"), "type": (2, "string"), "blobs": (50, "BlobProto")},
    "BlobShape": {"dim": (1, "int64s")},
    "BlobProto": {
        "num": (1, "int32"),
        "channels": (2, "int32"),
        "height": (3, "int32"),
        "width": (4, "int32"),
        "data": (5, "floats"),
        "diff": (6, "floats"),
        "shape": (7, "BlobShape"),
        "double_data": (8, "doubles"),
    },
}
SINGLE = {("V1LayerParameter", "layer"), ("BlobProto", "shape")}


def messages():
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    types = descriptor_pb2.FieldDescriptorProto
    numbers = {"float": types.TYPE_FLOAT, "double": types.TYPE_DOUBLE, "int32": types.TYPE_INT32}
    numbers |= {"int64": types.TYPE_INT64, "string": types.TYPE_STRING}
    file = descriptor_pb2.FileDescriptorProto(name="full.proto", package="full", syntax="proto2")
    for name, fields in CAFFE.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            entry = message.field.add(name=field, number=number)
            repeated = kind.endswith("s") or (kind in CAFFE and (name, field) not in SINGLE)
            entry.label = types.LABEL_REPEATED if repeated else types.LABEL_OPTIONAL
            if kind in CAFFE:
                entry.type, entry.type_name = types.TYPE_MESSAGE, f".full.{kind}"
            else:
                entry.type = numbers[kind.removesuffix("s")]
            if kind in ("floats", "doubles", "int64s"):
                entry.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"full.{name}")) for name in CAFFE}


def caffemodel(layers, generation="layer", legacy=False, double=False):
    """The bytes of a .caffemodel with the arrays of `layers`; legacy: four axes each, in fields of their own."""
    net = messages()["NetParameter"](name="a net")
    for name, arrays in layers.items():
        layer = getattr(net, "layers" if generation == "wrapped" else generation).add()
        layer = layer.layer if generation == "wrapped" else layer
        layer.name = name
        for array in arrays:
            blob = layer.blobs.add()
            if legacy:
                axes = (1,) * (4 - array.ndim) + array.shape
                blob.num, blob.channels, blob.height, blob.width = axes
            else:
                blob.shape.dim.extend(array.shape)
            (blob.double_data if double else blob.data).extend(array.ravel().tolist())
    return net.SerializeToString()


@pytest.fixture
def layers():
    generator = np.random.default_rng(0)
    return {
        "conv": [generator.normal(size=(3, 2, 5, 4)).astype(np.float32), np.array([1, -2, 0.5], np.float32)],
        "fléche/2": [generator.normal(size=(1, 4)).astype(np.float32)],
    }


def read(data, tmp_path):
    (tmp_path / "net.caffemodel").write_bytes(data)
    return read_caffemodel(tmp_path / "net.caffemodel")


def message(data, tmp_path):
    with pytest.raises(FleetflowError) as caught:
        read(data, tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("generation", ["layer", "layers", "wrapped"])
def test_three_generations(layers, tmp_path, generation, legacy, double):
    found = read(caffemodel({**layers, "relu": []}, generation, legacy, double), tmp_path)
    assert list(found) == list(layers)
    for name, arrays in layers.items():
        assert len(found[name]) == len(arrays)
        for own, array in zip(found[name], arrays):
            assert own.dtype == (np.float64 if double else np.float32) and own.flags.writeable
            assert own.shape == ((1,) * (4 - array.ndim) + array.shape if legacy else array.shape)
            assert np.array_equal(own.ravel(), array.ravel())


def test_bytes_written_by_hand(tmp_path):
    """One layer, field by field: tag = 8 * number + kind, lengths in front."""
    shape = bytes([0x3A, 4, 0x0A, 2, 2, 3])  # 7: { 1: packed 2, 3 }
    data = bytes([0x2A, 24]) + struct.pack("<6f", 1, 2, 3, 4, 5, -6.5)  # 5: packed floats
    blob = shape + data
    bias = bytes([0x08, 1, 0x10, 1, 0x18, 1, 0x20, 2, 0x2A, 8]) + struct.pack("<2f", 0.25, 7)  # num ... width, data
    layer = bytes([0x0A, 2]) + b"ip" + bytes([0x12, 12]) + b"InnerProduct" + bytes([0x1A, 1]) + b"x"
    layer += bytes([0x3A, len(blob)]) + blob + bytes([0x3A, len(bias)]) + bias + bytes([0x50, 1])  # and phase: 10
    net = bytes([0x0A, 3]) + b"net" + bytes([0xA2, 0x06, len(layer)]) + layer
    found = read(net, tmp_path)
    assert list(found) == ["ip"]
    assert found["ip"][0].tolist() == [[1, 2, 3], [4, 5, -6.5]]
    assert found["ip"][1].tolist() == [[[[0.25, 7]]]]
    split = bytes([0x2A, 8]) + data[2:10] + bytes([0x2A, 16]) + data[10:]  # a list may come in parts
    layer = bytes([0x0A, 2]) + b"ip" + bytes([0x3A, len(shape + split)]) + shape + split
    assert read(bytes([0xA2, 0x06, len(layer)]) + layer, tmp_path)["ip"][0].tolist() == [[1, 2, 3], [4, 5, -6.5]]


def test_arrays_without_axes_or_numbers(tmp_path):
    empty = bytes([0x0A, 1]) + b"a" + bytes([0x3A, 0])
    assert read(bytes([0xA2, 0x06, len(empty)]) + empty, tmp_path)["a"][0].shape == (0,)
    scalar = bytes([0x0A, 1]) + b"a" + bytes([0x3A, 8, 0x3A, 0, 0x2A, 4]) + struct.pack("<f", 3)
    assert read(bytes([0xA2, 0x06, len(scalar)]) + scalar, tmp_path)["a"][0].tolist() == 3
    net = messages()["NetParameter"]()
    net.layer.add(name="a").blobs.add().shape.dim.extend((0, 2**30, 2**30, 2**30))
    assert read(net.SerializeToString(), tmp_path)["a"][0].shape == (0,)


@pytest.mark.parametrize("axes", [(7,), (2, 4), (-1, -6), (-6,), (2**62, 2**62, 4), (2**31,) * 2, (1,) * 33, (6,) * 90])
def test_shapes_that_lie(tmp_path, axes):
    net = messages()["NetParameter"]()
    blob = net.layer.add(name="a\nb").blobs.add()
    blob.shape.dim.extend(axes)
    blob.data.extend(range(6))
    assert "a\\nb" in message(net.SerializeToString(), tmp_path)


def test_files_that_are_none(tmp_path, layers):
    assert "no file" in str(pytest.raises(FleetflowError, read_caffemodel, tmp_path / "nowhere").value)
    assert "no file" in str(pytest.raises(FleetflowError, read_caffemodel, tmp_path).value)
    assert "no layer with weights" in message(b"", tmp_path)
    assert "no layer with weights" in message(caffemodel({"relu": []}), tmp_path)
    message(b'name: "LiteFlowNet2"\nlayer { name: "conv1" }\n', tmp_path)
    message(b"PK\x03\x04" + bytes(50), tmp_path)
    assert "two layers called 'conv'" in message(2 * caffemodel(layers), tmp_path)


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(caffe, "SIZE_LIMIT", 10)
    assert "at most 1 GiB" in message(bytes(11), tmp_path)


def test_protobuf_is_asked_for_by_name(tmp_path, monkeypatch):
    caffe._messages.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "google.protobuf", None)
    assert "fleetflow[caffe]" in message(bytes(9), tmp_path)
    caffe._messages.cache_clear()


@pytest.mark.parametrize("unit", [b"\xa2\x06\x00", b"\x12\x00", b"\x40\x01", b"\x0d\0\0\0\0", b"\x09" + bytes(8)])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_many_small_fields_take_no_memory(tmp_path, unit, depth):
    """A field of two bytes would become an object of a hundred."""
    data = unit * (2**20 // len(unit))
    for tag in (b"\x3a", b"\xa2\x06")[2 - depth :]:
        data = tag + varint(len(data)) + data
    caffe._messages()
    tracemalloc.start()
    message(data, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2**20


def varint(value):
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


SMALL = caffemodel({"conv": [np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2), np.ones(2, np.float32)], "b": []})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


def survives(data, folder):
    """Either a proper result or an error of one line."""
    (folder / "net.caffemodel").write_bytes(data)
    try:
        found = read_caffemodel(folder / "net.caffemodel")
    except FleetflowError as error:
        assert "\n" not in str(error)
        return None
    assert all(isinstance(array, np.ndarray) for arrays in found.values() for array in arrays)
    return found


def test_every_truncation(folder):
    whole = survives(SMALL, folder)
    assert whole["conv"][0].shape == (2, 3, 2, 2)
    for end in range(len(SMALL)):
        found = survives(SMALL[:end], folder)
        assert found is None or np.array_equal(found["conv"][0], whole["conv"][0]), end


@few
@given(st.lists(st.tuples(st.integers(0, len(SMALL)), st.binary(max_size=4)), min_size=1, max_size=4), st.booleans())
def test_damage(folder, damages, insert):
    data = SMALL
    for place, new in damages:
        data = data[:place] + new + data[place if insert else place + len(new) :]
    survives(data, folder)


@few
@given(st.binary(max_size=200))
def test_any_bytes(folder, data):
    for start in (b"", b"\xa2\x06" + varint(len(data)), b"\x12" + varint(len(data))):
        survives(start + data, folder)
