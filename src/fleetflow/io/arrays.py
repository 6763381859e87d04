"""Arrays of numbers in .npy and .npz files, as data: nothing in them is executed, sizes are checked first."""

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from fleetflow.io.limits import DEFLATE, check_size
from fleetflow.types import FleetflowError


def as_array(value: Any, name: str, expected: str) -> np.ndarray:
    """Returns a value as an array of numbers.

    Args:
        value: an array, or what numpy makes one of.
        name: what it is called in the error.
        expected: what should have been given, for the error.

    Raises:
        FleetflowError: for None, lists of different lengths, tensors that require a gradient or are not on the CPU, ...
    """
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        why = str(error).partition(". ")[0]
        raise FleetflowError(f"{name} is a {type(value).__name__} ({why}); expected {expected}") from None
    if array.dtype.kind not in "biuf":
        what = "None" if value is None else f"a {type(value).__name__} without numbers"
        raise FleetflowError(f"{name} is {what}; expected {expected}")
    return array


def read_npy(path: Path) -> np.ndarray:
    """Returns the array in a .npy file, of any shape and any type of numbers.

    Raises:
        FleetflowError: the array holds no numbers, or claims a size that is not allowed or that the file cannot hold.
        Exception: whatever numpy raises at a damaged file; read inside `io.atomic.reading`.
    """
    with open(path, "rb") as file:
        length = path.stat().st_size
        return _read(path, file, length, length, 1)


def read_npz(path: Path, *names: str, optional: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Returns arrays of a .npz archive.

    Args:
        path: the archive.
        names: the keys of those that must be there.
        optional: the keys of others, which may be missing.

    Returns:
        The arrays by their keys; those of `optional` that are there.

    Raises:
        FleetflowError: a key is missing, or as `read_npy` does.
        Exception: as `read_npy` does.
    """
    with zipfile.ZipFile(path) as archive:
        present = archive.namelist()
        for name in names:
            if f"{name}.npy" not in present:
                keys = " and ".join((*names, *optional))
                raise FleetflowError(f"{path} holds {present[:9]} but no {name}.npy; expected the keys {keys}")
        wanted = [name for name in (*names, *optional) if f"{name}.npy" in present]
        return {name: _read_member(path, archive, f"{name}.npy") for name in wanted}


def _read_member(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    member = archive.getinfo(name)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FleetflowError(f"{path} is packed in a way numpy does not write; write it with numpy.savez_compressed")
    # the lengths in the directory of the archive may lie as well as the header of the array: trust neither too far
    present = min(member.compress_size, path.stat().st_size)
    packing = DEFLATE if member.compress_type == zipfile.ZIP_DEFLATED else 1
    with archive.open(member) as file:
        return _read(path, file, member.file_size, present, packing)


def _read(path: Path, file: IO[bytes], length: int, present: int, packing: int) -> np.ndarray:
    """Returns the array in a .npy stream. length: bytes of the stream, as somebody says; others as of `check_size`."""
    if np.lib.format.read_magic(file) != (1, 0):  # later versions hold only structures and headers over 64 KiB
        raise FleetflowError(f"{path} is not a plain .npy file; write it with numpy.save")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.kind not in "biuf" or min(shape, default=0) < 0:
        raise FleetflowError(f"{path} holds {dtype} {list(shape)}; expected an array of numbers")
    needed = math.prod(shape) * dtype.itemsize
    height, width = (*shape, 1, 1)[:2]
    check_size(path, max(height, 1), max(width, 1), needed + file.tell(), length)
    check_size(path, max(height, 1), max(width, 1), needed + file.tell(), present, packing)
    data = file.read(needed)
    if file.read(1):  # at the end of a .npz member this also checks its checksum
        raise FleetflowError(f"{path} goes on after its array {list(shape)}; check the file")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")
