"""What `torch.save` wrote, read as data: of a pickle only containers, numbers and tensors are made, nothing is called.

`torch.load(weights_only=True)` refuses a checkpoint for one unknown class beside its tensors, and takes the memory that
a tensor declares before the file is looked at. Here every class and function that is not known is replaced by an object
that does nothing, and tensors are descriptions until one is asked for.
"""

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fleetflow.types import FleetflowError

MAGIC = 0x1950A86A20F9469CFC6C  # of files written before torch 1.6
DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


class Storage(NamedTuple):
    """Numbers in the file, which are read when a tensor needs them."""

    key: str
    dtype: torch.dtype
    numel: int


class Stored(NamedTuple):
    """A tensor in the file."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers, as often as they are shown."""
        return math.prod(self.shape) * self.dtype.itemsize

    def fits(self) -> bool:
        """Whether its numbers lie in its storage."""
        whole = (*self.shape, *self.stride, self.offset, self.storage.numel)
        if len(self.shape) != len(self.stride) or any(not isinstance(k, int) or k < 0 for k in whole):
            return False
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride))
        room = self.storage.numel * self.storage.dtype.itemsize
        return 0 in self.shape or (last + 1) * self.dtype.itemsize <= room


class Ignored:
    """Stands for an object of an unknown class; what a pickle does to it has no effect but that its state is kept."""

    state: Any = None
    __new__ = staticmethod(lambda cls, *_, **__: object.__new__(cls))
    __init__ = lambda self, *_, **__: None  # noqa: E731
    __call__ = lambda self, *_, **__: self  # noqa: E731

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        pass

    def append(self, _):
        pass

    def extend(self, _):
        pass

    def add(self, _):
        pass


def module_state(thing: object, prefix: str = "", depth: int = 30) -> dict[str, Stored]:
    """Returns the tensors of an nn.Module that was saved as a whole, by their names in its `state_dict()`."""
    state = thing.state if isinstance(thing, Ignored) else None
    if not isinstance(state, dict) or depth == 0:
        return {}
    own = [state.get(kind) for kind in ("_parameters", "_buffers")]
    found = {f"{prefix}{key}": value for part in own if isinstance(part, dict) for key, value in part.items()}
    found = {key: value for key, value in found.items() if isinstance(value, Stored)}
    inner = state.get("_modules")
    for key, value in inner.items() if isinstance(inner, dict) else ():
        found.update(module_state(value, f"{prefix}{key}.", depth - 1))
    return found


def _ignored() -> Any:
    return object.__new__(Ignored)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_) -> Any:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        return _ignored()
    return Stored(storage, storage.dtype, offset, shape, stride)


def _typed_tensor(storage: Any, offset: Any, shape: Any, stride: Any, _, __, dtype: Any, *___) -> Any:
    stored = _tensor(storage, offset, shape, stride)
    return stored._replace(dtype=dtype) if isinstance(stored, Stored) and isinstance(dtype, torch.dtype) else _ignored()


def _parameter(data: Any, *_) -> Any:
    return data


def _of_a_type(function: Any, _, arguments: Any, *__) -> Any:
    """A subclass of Tensor: the tensor that it is made of."""
    known = function in (_tensor, _typed_tensor, _parameter) and isinstance(arguments, tuple)
    return function(*arguments) if known else _ignored()


KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_a_type,
}


class _Reader(pickle.Unpickler):
    """A pickle of which nothing is executed."""

    def __init__(self, file: BinaryIO | IO[bytes], encoding: str = "latin1"):
        super().__init__(file, encoding=encoding)
        self.storages: list[Storage] = []

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return KNOWN.get((module, name), Ignored)

    def persistent_load(self, pid: Any) -> Any:
        """A storage: ("storage", type, key, device, numel), and in old files the part of another one that it is."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            return _ignored()
        _, dtype, key, device, numel, *view = pid
        meant = isinstance(dtype, torch.dtype) and isinstance(key, str) and isinstance(numel, int)
        if not meant or device == "meta" or view not in ([], [None]):
            return _ignored()
        self.storages.append(Storage(key, dtype, numel))
        return self.storages[-1]


class TorchFile:
    """A file of `torch.save`: its content with tensors as `Stored`, and their values on demand.

    Raises:
        FleetflowError: if it is damaged, or something else; if a tensor shows more numbers than the file can hold.
    """

    def __init__(self, path: Path):
        self.path = path
        self.length = path.stat().st_size
        self._zip: zipfile.ZipFile | None = None
        self._storages: dict[str, Tensor] = {}
        self._places: dict[str, tuple[int, int]] = {}  # in old files: where a storage begins, and its numbers
        try:
            with open(path, "rb") as file:
                zipped = file.read(4) == b"PK\3\4"
                file.seek(0)
                self.content = self._from_zip(file) if zipped else self._from_pickles(file)
        except FleetflowError:
            raise
        except OSError as error:
            raise FleetflowError(f"{path} cannot be read ({error.strerror or error}); check it") from None
        except Exception as error:  # pickle and zipfile raise nearly everything for damaged files
            raise self._damaged(error) from None
        self._shown = 0

    def tensor(self, stored: Stored) -> Tensor:
        """Returns the values of a tensor."""
        self._shown += stored.nbytes if stored.fits() else self.length + 1
        # A tensor may be there twice, under two names; all of them together cannot be many times the file.
        if not stored.fits() or stored.nbytes > self.length or self._shown > 4 * self.length:
            raise FleetflowError(
                f"{self.path} declares a tensor of {list(stored.shape)}, which its {self.length:,} bytes cannot hold; "
                "get the file again"
            )
        if not stored.nbytes:
            return torch.empty(stored.shape, dtype=stored.dtype)
        try:
            numbers = self._numbers(stored.storage)
        except Exception as error:  # a wrong checksum, a cut file
            raise self._damaged(error) from None
        return torch.as_strided(numbers.view(stored.dtype), stored.shape, stored.stride, stored.offset)

    def _damaged(self, error: Exception) -> FleetflowError:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        return FleetflowError(
            f"{self.path} cannot be read as a checkpoint ({reason}); expected a complete file of torch.save"
        )

    def _from_zip(self, file: BinaryIO) -> Any:
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED or member.file_size > self.length for member in members):
            raise ValueError("compressed")
        (name,) = (member.filename for member in members if member.filename.endswith("/data.pkl"))
        self._folder = name.removesuffix("data.pkl")
        names = archive.namelist()
        order = archive.read(f"{self._folder}byteorder") if f"{self._folder}byteorder" in names else b"little"
        if order != b"little":
            raise ValueError("written on a big-endian machine")
        self._zip = archive
        with archive.open(name) as pickled:
            return _Reader(pickled).load()

    def _from_pickles(self, file: BinaryIO) -> Any:
        """The file before torch 1.6: magic number, protocol, machine, content, names of storages, storages."""
        first = _Reader(file).load()
        if isinstance(first, Ignored):
            raise FleetflowError(
                f"{self.path} carries code, which fleetflow never runs; save its state_dict() alone with torch.save"
            )
        if first != MAGIC:
            raise ValueError("no checkpoint")
        for _ in range(2):
            _Reader(file).load()
        reader = _Reader(file)
        content = reader.load()
        sizes = {storage.key: storage.dtype.itemsize for storage in reader.storages}
        for key in _Reader(file).load():
            (numel,) = struct.unpack("<q", file.read(8))
            self._places[key] = file.tell(), numel
            if key not in sizes or not 0 <= numel * sizes[key] <= self.length - file.tell():
                raise ValueError("cut off")
            file.seek(numel * sizes[key], 1)
        return content

    def _numbers(self, storage: Storage) -> Tensor:
        """The storage as a tensor [numel]."""
        if storage.key not in self._storages:
            wanted = storage.numel * storage.dtype.itemsize
            if self._zip is not None:
                name = f"{self._folder}data/{storage.key}"
                with zipfile.ZipFile(self.path) as archive:
                    if archive.getinfo(name).file_size != wanted:
                        raise ValueError(f"the numbers of {storage.key} are cut off")
                    data = archive.read(name)  # which looks at the checksum
            else:
                start, numel = self._places[storage.key]
                if numel != storage.numel:
                    raise ValueError(f"the numbers of {storage.key} are cut off")
                with open(self.path, "rb") as file:
                    file.seek(start)
                    data = file.read(wanted)
            if len(data) != wanted:
                raise ValueError("cut off")
            self._storages[storage.key] = torch.frombuffer(bytearray(data), dtype=storage.dtype)
        return self._storages[storage.key]
