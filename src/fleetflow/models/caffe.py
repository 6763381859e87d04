"""The weights in a `.caffemodel`: a protobuf message `NetParameter` (BVLC/caffe, src/caffe/proto/caffe.proto).

Only the fields that lead to weights are defined, for all three generations of layers (`layer`, `layers`, and `layers`
that wrap another one). On the wire a message within a message, a list of packed numbers and a string of bytes are the
same, so all of them are defined as bytes here and taken apart one at a time: nothing is nested for the parser, the
fields of a message are counted before it makes an object of each, and the numbers never become Python objects.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fleetflow.types import FleetflowError

SIZE_LIMIT = 2**30  # bytes of a file; FlowNet2's, the largest of its kind, has 650 MB
LAYERS_LIMIT = 10_000  # fields of the whole message, most of which are layers
FIELDS_LIMIT = 1_000  # of a layer or an array
AXES_LIMIT = 32  # of an array, as in Caffe

# message: {field: (number, type, repeated)}; B bytes, I integer
MESSAGES = {
    "Net": {"wrapped": (2, "B", True), "layer": (100, "B", True)},
    "Layer": {"name": (1, "B", False), "blobs": (7, "B", True)},
    "V1Layer": {"inner": (1, "B", False), "name": (4, "B", False), "blobs": (6, "B", True)},
    "V0Layer": {"name": (1, "B", False), "blobs": (50, "B", True)},
    "Blob": {
        "num": (1, "I", False),
        "channels": (2, "I", False),
        "height": (3, "I", False),
        "width": (4, "I", False),
        "data": (5, "B", True),
        "shape": (7, "B", False),
        "double_data": (8, "B", True),
    },
    "Shape": {"dim": (1, "I", True)},
}


def read_caffemodel(path: str | Path) -> dict[str, list[np.ndarray]]:
    """Returns the arrays of each layer that has any, by the name of the layer, in float32 (float64 where so stored).

    The first array of a layer usually is its weights [outputs, inputs, height, width], the second its bias; in files
    older than 2015 every array has four axes. Memory: some twice the file.

    Raises:
        FleetflowError: For a missing, damaged or foreign file, one of more than SIZE_LIMIT bytes, arrays whose shape
            does not fit their values, two layers of one name, and where protobuf is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FleetflowError(f"there is no file {path}; give the path of a .caffemodel")
    if path.stat().st_size > SIZE_LIMIT:
        raise FleetflowError(f"{path} has {path.stat().st_size:,} bytes; expected a .caffemodel of at most 1 GiB")
    messages = _messages()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FleetflowError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    net = _parse(messages["Net"], data, path, LAYERS_LIMIT)
    del data
    found: dict[str, list[np.ndarray]] = {}
    for field, kind in (("wrapped", "V1Layer"), ("layer", "Layer")):
        for raw in getattr(net, field):
            layer = _parse(messages[kind], raw, path)
            if kind == "V1Layer" and layer.inner:
                layer = _parse(messages["V0Layer"], layer.inner, path)
            name = layer.name.decode("utf-8", errors="replace")
            arrays = [_array(messages, blob, path, name) for blob in layer.blobs]
            if arrays and name in found:
                raise FleetflowError(f"{path} holds two layers called {name!a}; expected each name once: rename one")
            if arrays:
                found[name] = arrays
    if not found:
        raise FleetflowError(f"{path} holds no layer with weights; expected a trained .caffemodel, not a .prototxt")
    return found


@cache
def _messages() -> dict[str, Any]:
    """The class of each of MESSAGES, from a pool of their own: others may have defined Caffe's messages already."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError:
        raise FleetflowError(
            '.caffemodel files need protobuf, which is missing; run: pip install "fleetflow[caffe]"'
        ) from None
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="weights.proto", package="caffe", syntax="proto2")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            entry = message.field.add(name=field, number=number)
            entry.label = types.LABEL_REPEATED if repeated else types.LABEL_OPTIONAL
            entry.type = types.TYPE_BYTES if kind == "B" else types.TYPE_INT64
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe.{name}")) for name in MESSAGES}


def _parse(kind: Any, data: bytes, path: Path, limit: int = FIELDS_LIMIT) -> Any:
    """The message of class `kind` in `data`, if it is whole and has at most `limit` fields."""
    from google.protobuf.message import DecodeError

    damaged = FleetflowError(f"{path} is no complete .caffemodel; get it again")
    at = count = 0
    while at < len(data):
        count += 1
        if count > limit:
            raise FleetflowError(f"{path} has more than {limit:,} fields in one message; expected a .caffemodel")
        tag, at = _varint(data, at)
        if tag & 7 == 2:  # a string of bytes and its length
            length, at = _varint(data, at)
            at += length
        elif tag & 7 == 0:
            _, at = _varint(data, at)
        elif tag & 7 in (1, 5):
            at += 8 if tag & 7 == 1 else 4
        else:
            raise damaged
    try:
        return kind.FromString(data)
    except DecodeError:
        raise damaged from None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number of seven bits a byte, lowest first, that starts at `at`, and where it ends."""
    value = 0
    for k, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * k
        if byte < 128:
            return value, at + k + 1
    return value, len(data) + 1  # cut off, or too long: the parser says so


def _array(messages: dict[str, Any], raw: bytes, path: Path, layer: str) -> np.ndarray:
    """The numbers of a blob in its shape, or none in the shape [0]; `layer` is for messages."""
    blob = _parse(messages["Blob"], raw, path)
    if len(blob.shape) > 12 * AXES_LIMIT:  # bytes of so many numbers, at most
        raise FleetflowError(f"{path}: an array of {layer!a} has too many axes; expected at most {AXES_LIMIT}")
    if blob.HasField("shape"):
        shape = tuple(_parse(messages["Shape"], blob.shape, path).dim)
    else:
        shape = (blob.num, blob.channels, blob.height, blob.width)
    kind = np.dtype("<f8" if blob.double_data else "<f4")
    values = b"".join(blob.double_data or blob.data)
    if len(shape) > AXES_LIMIT or min(shape, default=0) < 0 or len(values) != kind.itemsize * math.prod(shape):
        raise FleetflowError(
            f"{path}: an array of {layer!a} says {list(shape[:AXES_LIMIT])} and has {len(values) // kind.itemsize:,} "
            "values; get the file again"
        )
    numbers = np.frombuffer(values, kind).astype(kind.newbyteorder("="))
    return numbers.reshape(shape) if numbers.size else numbers
